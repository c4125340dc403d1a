package manifest

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
)

// model holds the objects of all files and does the work of a control plane: it allocates
// cluster IPs and node ports, and builds EndpointSlices. update returns the changes that
// result from changed files. Its cost depends on the change only: the objects of the
// changed files, the Services whose selector has a label of a changed Pod, and the Pods of
// a changed Service.
type model struct {
	nodeName  string
	addresses *addressAllocator
	nodePorts *nodePortAllocator

	files map[string]*parsedFile
	// candidates has all objects of one ID, the active one first.
	candidates map[objectID][]*object
	// retained has the objects kept from files with unidentified objects: it is not known
	// whether these files still have them.
	retained map[*object]struct{}
	// active has the active object of each ID.
	active map[objectID]*object
	// podsByLabel indexes Pods by each of their labels, servicesByLabel indexes Services by
	// the first label of their selector.
	podsByLabel, servicesByLabel map[label]map[types.NamespacedName]struct{}

	// allocatedAddrs has the addresses of each Service.
	allocatedAddrs map[types.NamespacedName][]netip.Addr
	// allocatedPorts has the node ports of each Service.
	allocatedPorts map[types.NamespacedName][]nodePortAllocation
	// generatedSlices has the names of the EndpointSlices built for each Service.
	generatedSlices map[types.NamespacedName][]types.NamespacedName
	// invalidFiles has the files with errors, and duplicates the IDs with several
	// candidates. They save the method errors a scan of all objects.
	invalidFiles map[string]struct{}
	duplicates   map[objectID]struct{}
	// failedServices has the Services whose allocation failed.
	failedServices map[types.NamespacedName]*Error

	// unloggedPorts has the node ports that were allocated but not logged yet. Only the log
	// shows them to users.
	unloggedPorts []unloggedPort

	// deliveredServices and deliveredSlices have the objects as delivered.
	deliveredServices map[types.NamespacedName]*corev1.Service
	deliveredSlices   map[types.NamespacedName]*discoveryv1.EndpointSlice
}

// label is a label of an object in a namespace.
type label struct{ namespace, key, value string }

func newModel(nodeName string, addrs *addressAllocator) *model {
	return &model{
		nodeName:          nodeName,
		addresses:         addrs,
		nodePorts:         newNodePortAllocator(),
		files:             map[string]*parsedFile{},
		invalidFiles:      map[string]struct{}{},
		duplicates:        map[objectID]struct{}{},
		candidates:        map[objectID][]*object{},
		retained:          map[*object]struct{}{},
		active:            map[objectID]*object{},
		podsByLabel:       map[label]map[types.NamespacedName]struct{}{},
		servicesByLabel:   map[label]map[types.NamespacedName]struct{}{},
		allocatedAddrs:    map[types.NamespacedName][]netip.Addr{},
		allocatedPorts:    map[types.NamespacedName][]nodePortAllocation{},
		generatedSlices:   map[types.NamespacedName][]types.NamespacedName{},
		failedServices:    map[types.NamespacedName]*Error{},
		deliveredServices: map[types.NamespacedName]*corev1.Service{},
		deliveredSlices:   map[types.NamespacedName]*discoveryv1.EndpointSlice{},
	}
}

// update replaces the contents of files, nil for a removed file, and returns the resulting
// changes.
func (m *model) update(files map[string]*parsedFile) kube.Delta {
	changed := map[objectID]struct{}{}
	for name, file := range files {
		m.replaceFile(name, file, changed)
	}
	dirty := map[types.NamespacedName]struct{}{}
	out := changes{services: map[types.NamespacedName]*corev1.Service{}, slices: map[types.NamespacedName]*discoveryv1.EndpointSlice{}}
	for i := range changed {
		m.resolveActive(i, dirty, &out)
	}
	m.updateServices(dirty, &out)
	return m.diff(&out)
}

// changes has the new state of objects, nil for deleted ones.
type changes struct {
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
}

// replaceFile replaces the objects of a file. An object that has an error now keeps its
// previous version.
func (m *model) replaceFile(name string, file *parsedFile, changed map[objectID]struct{}) {
	old := m.files[name]
	if old != nil {
		for _, o := range old.objects {
			changed[o.id] = struct{}{}
			m.candidates[o.id] = slices.DeleteFunc(m.candidates[o.id], func(p *object) bool { return p == o })
			delete(m.retained, o)
		}
	}
	delete(m.invalidFiles, name)
	if file == nil {
		delete(m.files, name)
		return
	}
	if len(file.errs) > 0 {
		m.invalidFiles[name] = struct{}{}
	}
	if old != nil && (file.unidentified || len(file.invalid) > 0) {
		readable := map[objectID]bool{}
		for _, o := range file.objects {
			readable[o.id] = true
		}
		for _, o := range old.objects {
			if !readable[o.id] && (file.unidentified || file.invalid[o.id]) {
				file.objects = append(file.objects, o)
				if !file.invalid[o.id] {
					m.retained[o] = struct{}{}
				}
			}
		}
	}
	m.files[name] = file
	for _, o := range file.objects {
		changed[o.id] = struct{}{}
		candidates := m.candidates[o.id]
		index, _ := slices.BinarySearchFunc(candidates, o, m.compareCandidates)
		m.candidates[o.id] = slices.Insert(candidates, index, o)
	}
}

// compareCandidates orders the objects of one ID, the active one first: by file and line,
// with retained objects last. A retained object may have been moved to another file, so a
// parsed object takes precedence. Among retained objects, the active one stays active.
func (m *model) compareCandidates(o, p *object) int {
	_, oRetained := m.retained[o]
	_, pRetained := m.retained[p]
	inForce := m.active[o.id]
	switch {
	case oRetained && pRetained && o == inForce:
		return -1
	case oRetained && pRetained && p == inForce:
		return 1
	case oRetained == pRetained:
		return o.comparePosition(p)
	case oRetained:
		return 1
	default:
		return -1
	}
}

// resolveActive determines the active object of an ID. If it changed, resolveActive updates
// the indexes and marks the affected Services dirty.
func (m *model) resolveActive(i objectID, dirty map[types.NamespacedName]struct{}, out *changes) {
	var current *object
	if candidates := m.candidates[i]; len(candidates) > 0 {
		current = candidates[0]
	} else {
		delete(m.candidates, i)
	}
	if len(m.candidates[i]) > 1 {
		m.duplicates[i] = struct{}{}
	} else {
		delete(m.duplicates, i)
	}
	previous := m.active[i]
	if current == nil {
		delete(m.active, i)
	} else {
		m.active[i] = current
	}
	// Allocate a failed Service again: the line of its error may have changed.
	failed := i.kind == kindService && m.failedServices[i.name] != nil
	if !failed && (previous == nil && current == nil || previous != nil && current != nil && previous.equal(current)) {
		return
	}
	switch i.kind {
	case kindService:
		dirty[i.name] = struct{}{}
		if previous != nil {
			unindex(m.servicesByLabel, i.name, selectorLabel(previous.service))
		}
		if current != nil {
			index(m.servicesByLabel, i.name, selectorLabel(current.service))
		}
	case kindPod:
		for _, o := range []*object{previous, current} {
			if o == nil {
				continue
			}
			for key, value := range o.pod.Labels {
				l := label{i.name.Namespace, key, value}
				if o == previous {
					unindex(m.podsByLabel, i.name, l)
				} else {
					index(m.podsByLabel, i.name, l)
				}
				for name := range m.servicesByLabel[l] {
					if s := m.active[objectID{kindService, name}]; s != nil && selects(s.service.Spec.Selector, o.pod.Labels) {
						dirty[name] = struct{}{}
					}
				}
			}
			// A failed Service keeps its delivered version, and this version's endpoints.
			for name := range m.failedServices {
				if svc := m.deliveredServices[name]; svc != nil && name.Namespace == i.name.Namespace && selects(svc.Spec.Selector, o.pod.Labels) {
					dirty[name] = struct{}{}
				}
			}
		}
	case kindEndpointSlice:
		out.slices[i.name] = nil
		if current != nil {
			out.slices[i.name] = current.slice
		}
	}
}

func (o *object) equal(p *object) bool {
	return reflect.DeepEqual(o.service, p.service) && reflect.DeepEqual(o.pod, p.pod) && reflect.DeepEqual(o.slice, p.slice)
}

// selectorLabel returns the label of its selector by which a Service is indexed.
func selectorLabel(svc *corev1.Service) label {
	keys := sortedKeys(svc.Spec.Selector)
	if len(keys) == 0 {
		return label{}
	}
	return label{svc.Namespace, keys[0], svc.Spec.Selector[keys[0]]}
}

func index(in map[label]map[types.NamespacedName]struct{}, name types.NamespacedName, l label) {
	if l == (label{}) {
		return
	}
	if in[l] == nil {
		in[l] = map[types.NamespacedName]struct{}{}
	}
	in[l][name] = struct{}{}
}

func unindex(in map[label]map[types.NamespacedName]struct{}, name types.NamespacedName, l label) {
	delete(in[l], name)
	if len(in[l]) == 0 {
		delete(in, l)
	}
}

// updateServices allocates addresses and node ports for the dirty Services and builds their
// EndpointSlices.
func (m *model) updateServices(dirty map[types.NamespacedName]struct{}, out *changes) {
	if len(dirty) == 0 {
		return
	}
	// A failed Service may succeed after changes of other Services.
	for name := range m.failedServices {
		dirty[name] = struct{}{}
	}
	names := make([]types.NamespacedName, 0, len(dirty))
	for name := range dirty {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b types.NamespacedName) int { return strings.Compare(a.String(), b.String()) })
	maps.Copy(out.services, m.allocate(names))
	for _, name := range names {
		svc, ok := out.services[name]
		if !ok {
			svc = m.deliveredServices[name] // failed: the delivered version stays
		}
		m.generateSlices(name, svc, out)
	}
}

// serviceAllocation is the allocation of addresses and node ports for one Service.
type serviceAllocation struct {
	name         types.NamespacedName
	object       *object // nil if the Service was removed
	addrRequests []addressRequest
	policy       corev1.IPFamilyPolicy
	// oldAddrs has the previous addresses, newAddrs the new ones.
	oldAddrs, newAddrs []netip.Addr
	// portRequests, oldPorts and newPorts are the same for node ports.
	portRequests       []nodePortRequest
	oldPorts, newPorts []nodePortAllocation
	// failed means that the requests cannot be met for now; err has the reason.
	failed bool
	err    *Error
}

// allocate allocates addresses and node ports to the Services in three steps, each in the
// order of the Services' names: it allocates what the files request, so that no other
// Service gets it; then it reuses existing allocations; then it allocates free ones. A
// Service whose requests cannot be met keeps its previous allocations, which other Services
// then cannot get. allocate returns the Services with their addresses, nil for removed
// ones, and omits failed ones.
func (m *model) allocate(names []types.NamespacedName) map[types.NamespacedName]*corev1.Service {
	requests := make(map[types.NamespacedName]*serviceAllocation, len(names))
	order := make([]*serviceAllocation, 0, len(names))
	for _, name := range names {
		delete(m.failedServices, name)
		r := &serviceAllocation{name: name, object: m.active[objectID{kindService, name}], oldAddrs: m.allocatedAddrs[name], oldPorts: m.allocatedPorts[name]}
		if r.object != nil && r.object.service.Spec.Type != corev1.ServiceTypeExternalName {
			r.addrRequests, r.policy, r.err = m.addresses.requests(r.object)
			r.portRequests = nodePortRequests(r.object.service)
		}
		requests[name] = r
		if r.err != nil {
			r.failed = true // permanently, until its file changes
			m.failedServices[name] = r.err
			continue
		}
		order = append(order, r)
		// Another Service can get the released addresses in the same update.
		m.releaseUnneeded(r)
	}
	for _, r := range order {
		if r.err = m.allocateRequested(r); r.err != nil {
			m.rollBack(r, requests)
		}
	}
	for _, r := range order {
		if r.failed {
			continue
		}
		if r.err = m.allocateRemaining(r); r.err != nil {
			m.rollBack(r, requests)
		}
	}
	m.retryFailed(order)

	done := make(map[types.NamespacedName]*corev1.Service, len(order))
	for _, r := range order {
		if r.failed {
			m.failedServices[r.name] = r.err
		} else {
			done[r.name] = m.buildService(r)
		}
	}
	return done
}

// retryFailed retries failed Services with the addresses and ports that became free because
// other Services failed later. It takes nothing from other Services, so it terminates;
// afterwards the errors describe the final state.
func (m *model) retryFailed(order []*serviceAllocation) {
	for retried := true; retried; {
		retried = false
		for _, r := range order {
			if !r.failed {
				continue
			}
			m.releaseUnneeded(r)
			if r.err = m.allocateRequested(r); r.err == nil {
				r.err = m.allocateRemaining(r)
			}
			if r.err != nil {
				m.rollBack(r, nil) // no other Service has got its released addresses
				continue
			}
			r.failed = false
			retried = true
		}
	}
}

// releaseUnneeded releases the previous allocations that the Service no longer needs.
func (m *model) releaseUnneeded(r *serviceAllocation) {
	for _, addr := range r.oldAddrs {
		if !slices.ContainsFunc(r.addrRequests, func(req addressRequest) bool { return r.reusesAddr(req, addr) }) {
			m.addresses.release(addr, r.name)
		}
	}
	for _, alloc := range r.oldPorts {
		if !slices.ContainsFunc(r.portRequests, func(req nodePortRequest) bool { return r.reusesPort(req, alloc) }) {
			m.nodePorts.release(alloc.port, r.name)
		}
	}
}

// reusesAddr reports whether an address that the Service has satisfies a request.
func (r *serviceAllocation) reusesAddr(req addressRequest, addr netip.Addr) bool {
	if isHeadless(r.object.service) {
		return false
	}
	if req.requested.IsValid() {
		return req.requested == addr
	}
	return req.family == familyOf(addr)
}

// reusesPort reports whether a node port that the Service has satisfies a request.
func (r *serviceAllocation) reusesPort(req nodePortRequest, alloc nodePortAllocation) bool {
	if req.key != alloc.key {
		return false
	}
	if req.requested != 0 {
		return req.requestedPort() == alloc.port
	}
	// The file may request it for another port now.
	return !slices.ContainsFunc(r.portRequests, func(req nodePortRequest) bool { return req.requestedPort() == alloc.port })
}

// allocateRequested allocates the addresses and node ports that the file requests.
func (m *model) allocateRequested(r *serviceAllocation) *Error {
	for i, req := range r.addrRequests {
		if !req.requested.IsValid() {
			continue
		}
		if owner, ok := m.addresses.allocate(req.requested, r.name); !ok {
			field := "spec.clusterIP"
			if i > 0 {
				field = "spec.clusterIPs[1]"
			}
			return r.object.errorf(field, "%s is already the address of Service %s: change one of them", req.requested, owner)
		}
	}
	for _, req := range r.portRequests {
		if req.requested == 0 {
			continue
		}
		if owner, ok := m.nodePorts.allocate(req.requestedPort(), r.name); !ok {
			return r.object.errorf(req.field, "%s is already a node port of Service %s: change one of them, or remove the field to allocate one",
				req.requestedPort(), owner)
		}
	}
	return nil
}

// allocateRemaining completes the addresses and node ports of a Service after
// allocateRequested.
func (m *model) allocateRemaining(r *serviceAllocation) *Error {
	if err := m.allocateAddresses(r); err != nil {
		return err
	}
	return m.allocatePorts(r)
}

func (m *model) allocatePorts(r *serviceAllocation) *Error {
	r.newPorts = nil
	// Existing ports first, so that allocateSharedPort does not take their numbers.
	for _, req := range r.portRequests {
		index := slices.IndexFunc(r.oldPorts, func(alloc nodePortAllocation) bool { return r.reusesPort(req, alloc) })
		switch {
		case req.requested != 0:
			r.newPorts = append(r.newPorts, nodePortAllocation{req.key, req.requestedPort()})
		case index >= 0:
			r.newPorts = append(r.newPorts, r.oldPorts[index])
		}
	}
	for _, req := range r.portRequests {
		if slices.ContainsFunc(r.newPorts, func(alloc nodePortAllocation) bool { return alloc.key == req.key }) {
			continue
		}
		port, ok := m.allocateSharedPort(r, req)
		if !ok {
			port, ok = m.nodePorts.allocateNext(r.name, req.key)
		}
		if !ok {
			return r.object.errorf(req.field, "no free node port: all %d ports from %d on are in use: "+
				"write another number here, or change other Services to type ClusterIP", nodePortCount, firstNodePort)
		}
		r.newPorts = append(r.newPorts, nodePortAllocation{req.key, port})
	}
	return nil
}

// allocateSharedPort allocates the number that the same port of the Service has in another
// protocol, as is usual for DNS, if it is free.
func (m *model) allocateSharedPort(r *serviceAllocation, req nodePortRequest) (nodePort, bool) {
	for _, alloc := range r.newPorts {
		port := nodePort{req.key.protocol, alloc.port.number}
		if _, taken := m.nodePorts.owners[port]; alloc.key.port == req.key.port && !taken {
			m.nodePorts.allocate(port, r.name)
			return port, true
		}
	}
	return nodePort{}, false
}

func (m *model) allocateAddresses(r *serviceAllocation) *Error {
	r.newAddrs = nil
	if r.object == nil || isHeadless(r.object.service) {
		return nil
	}
	for _, req := range r.addrRequests {
		addr := req.requested
		if i := slices.IndexFunc(r.oldAddrs, func(a netip.Addr) bool { return r.reusesAddr(req, a) }); !addr.IsValid() && i >= 0 {
			addr = r.oldAddrs[i]
		}
		if !addr.IsValid() {
			var ok bool
			if addr, ok = m.addresses.allocateNext(r.name, req.family); !ok {
				p := m.addresses.pools[req.family]
				return r.object.errorf("spec.clusterIP", "no free address: all %d of %s are in use: "+
					"set --service-cidr to a larger network", p.size, p.prefix)
			}
		}
		r.newAddrs = append(r.newAddrs, addr)
	}
	return nil
}

// rollBack restores the previous allocations of a failed Service, so that its last valid
// version stays in place. Other Services that got one of these allocations in this update
// fail in turn.
func (m *model) rollBack(r *serviceAllocation, requests map[types.NamespacedName]*serviceAllocation) {
	failing := []*serviceAllocation{r}
	for len(failing) > 0 {
		r, failing = failing[len(failing)-1], failing[:len(failing)-1]
		r.failed = true
		for _, addr := range r.newAddrs {
			if !slices.Contains(r.oldAddrs, addr) {
				m.addresses.release(addr, r.name)
			}
		}
		r.newAddrs = nil
		for _, req := range r.addrRequests {
			if req.requested.IsValid() && !slices.Contains(r.oldAddrs, req.requested) {
				m.addresses.release(req.requested, r.name)
			}
		}
		for _, addr := range r.oldAddrs {
			if owner, ok := m.addresses.allocate(addr, r.name); !ok {
				// The owner got the address in this update: no two Services had the same before.
				m.addresses.release(addr, owner)
				m.addresses.allocate(addr, r.name)
				failing = append(failing, requests[owner])
			}
		}
		failing = append(failing, m.rollBackPorts(r, requests)...)
	}
}

// rollBackPorts is rollBack for node ports. It returns the allocations that fail in turn.
func (m *model) rollBackPorts(r *serviceAllocation, requests map[types.NamespacedName]*serviceAllocation) []*serviceAllocation {
	release := func(port nodePort) {
		if !slices.ContainsFunc(r.oldPorts, func(alloc nodePortAllocation) bool { return alloc.port == port }) {
			m.nodePorts.release(port, r.name)
		}
	}
	for _, alloc := range r.newPorts {
		release(alloc.port)
	}
	r.newPorts = nil
	for _, req := range r.portRequests {
		release(req.requestedPort())
	}
	var failing []*serviceAllocation
	for _, alloc := range r.oldPorts {
		if owner, ok := m.nodePorts.allocate(alloc.port, r.name); !ok {
			m.nodePorts.release(alloc.port, owner)
			m.nodePorts.allocate(alloc.port, r.name)
			failing = append(failing, requests[owner])
		}
	}
	return failing
}

// buildService returns the Service with its addresses and node ports, nil if it was
// removed.
func (m *model) buildService(r *serviceAllocation) *corev1.Service {
	delete(m.allocatedAddrs, r.name)
	delete(m.allocatedPorts, r.name)
	if r.object == nil {
		return nil
	}
	svc := r.object.service.DeepCopy()
	if len(r.newAddrs) > 0 {
		m.allocatedAddrs[r.name] = r.newAddrs
		svc.Spec.ClusterIPs = nil
		for _, addr := range r.newAddrs {
			svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, addr.String())
		}
		svc.Spec.ClusterIP = svc.Spec.ClusterIPs[0]
	}
	if len(r.newPorts) > 0 {
		m.allocatedPorts[r.name] = r.newPorts
		for _, alloc := range r.newPorts {
			requested := slices.ContainsFunc(r.portRequests, func(req nodePortRequest) bool { return req.key == alloc.key && req.requested != 0 })
			if !requested && !slices.Contains(r.oldPorts, alloc) {
				m.unloggedPorts = append(m.unloggedPorts, unloggedPort{r.name, alloc})
			}
		}
		setNodePorts(svc, r.newPorts)
	}
	svc.Spec.IPFamilies = nil
	for _, req := range r.addrRequests {
		svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, req.family)
	}
	svc.Spec.IPFamilyPolicy = nil
	if r.policy != "" {
		svc.Spec.IPFamilyPolicy = new(r.policy)
	}
	return svc
}

// generateSlices builds the EndpointSlices of a Service and marks its previous ones
// deleted. svc is nil if the Service was removed.
func (m *model) generateSlices(name types.NamespacedName, svc *corev1.Service, out *changes) {
	for _, slice := range m.generatedSlices[name] {
		out.slices[slice] = nil
	}
	delete(m.generatedSlices, name)
	if svc == nil || len(svc.Spec.Selector) == 0 || svc.Spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	for _, slice := range buildEndpointSlices(svc, m.selectPods(svc), m.nodeName) {
		sliceName := types.NamespacedName{Namespace: slice.Namespace, Name: slice.Name}
		out.slices[sliceName] = slice
		m.generatedSlices[name] = append(m.generatedSlices[name], sliceName)
	}
}

// selectPods returns the pods that the Service's selector matches. It scans the pods with
// the rarest label of the selector.
func (m *model) selectPods(svc *corev1.Service) []*corev1.Pod {
	var fewest map[types.NamespacedName]struct{}
	first := true
	for key, value := range svc.Spec.Selector {
		set := m.podsByLabel[label{svc.Namespace, key, value}]
		if first || len(set) < len(fewest) {
			fewest, first = set, false
		}
	}
	var pods []*corev1.Pod
	for name := range fewest {
		if pod := m.active[objectID{kindPod, name}].pod; selects(svc.Spec.Selector, pod.Labels) {
			pods = append(pods, pod)
		}
	}
	return pods
}

// diff returns the changes since the last delivery and records them as delivered.
func (m *model) diff(out *changes) kube.Delta {
	var d kube.Delta
	for _, name := range sortedNames(out.services) {
		switch svc, previous := out.services[name], m.deliveredServices[name]; {
		case svc == nil && previous != nil:
			delete(m.deliveredServices, name)
			d.DeletedServices = append(d.DeletedServices, name)
		case svc != nil && !reflect.DeepEqual(svc, previous):
			m.deliveredServices[name] = svc
			d.Services = append(d.Services, svc)
		}
	}
	for _, name := range sortedNames(out.slices) {
		switch slice, previous := out.slices[name], m.deliveredSlices[name]; {
		case slice == nil && previous != nil:
			delete(m.deliveredSlices, name)
			d.DeletedEndpointSlices = append(d.DeletedEndpointSlices, name)
		case slice != nil && !reflect.DeepEqual(slice, previous):
			m.deliveredSlices[name] = slice
			d.EndpointSlices = append(d.EndpointSlices, slice)
		}
	}
	return d
}

func sortedNames[V any](m map[types.NamespacedName]V) []types.NamespacedName {
	names := make([]types.NamespacedName, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b types.NamespacedName) int { return strings.Compare(a.String(), b.String()) })
	return names
}

// errors returns all current errors, sorted by file and line.
func (m *model) errors() Errors {
	var errs Errors
	for name := range m.invalidFiles {
		errs = append(errs, m.files[name].errs...)
	}
	for _, err := range m.failedServices {
		errs = append(errs, err)
	}
	for i := range m.duplicates {
		used := m.candidates[i][0]
		for _, o := range m.candidates[i][1:] {
			if _, ok := m.retained[o]; ok {
				break // the others are retained too; their files may no longer have them
			}
			errs = append(errs, o.errorf("metadata.name", "%s is also in %s, line %d, which is used: remove or rename one of them",
				i, used.file, used.root.line))
		}
	}
	slices.SortFunc(errs, (*Error).compare)
	return errs
}
