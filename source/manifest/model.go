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

// model holds the objects of all files and does what a control plane would:
// addresses, node ports and endpoints. It answers each change of files with what that
// changes, at a cost that follows the change: the objects of the changed files,
// the Services whose selector shares a label with a changed Pod, and the Pods of
// a changed Service.
type model struct {
	nodeName  string
	addresses *addressAllocator
	nodePorts *nodePortAllocator

	files map[string]*parsedFile
	// candidates has all objects of one name, the one in force first.
	candidates map[objectID][]*object
	// retained has the objects kept of files of which it is not known whether
	// they still have them.
	retained map[*object]struct{}
	// active has the object in force.
	active map[objectID]*object
	// podsByLabel and servicesByLabel find Pods by each of their labels, and Services by
	// the first label of their selector.
	podsByLabel, servicesByLabel map[label]map[types.NamespacedName]struct{}

	// allocatedAddrs has the addresses of each Service.
	allocatedAddrs map[types.NamespacedName][]netip.Addr
	// allocatedPorts has the node ports of each Service.
	allocatedPorts map[types.NamespacedName][]nodePortAllocation
	// generatedSlices has the names of the slices made for a Service.
	generatedSlices map[types.NamespacedName][]types.NamespacedName
	// invalidFiles has the files with errors, and doubles the names with more than one
	// place, so that errors need no walk over everything.
	invalidFiles map[string]struct{}
	duplicates   map[objectID]struct{}
	// failedServices has the Services that could not get what they need.
	failedServices map[types.NamespacedName]*Error

	// unloggedPorts has the node ports given since this was last looked at: only logs
	// tell people which they are.
	unloggedPorts []unloggedPort

	// deliveredServices and slices are what was delivered.
	deliveredServices map[types.NamespacedName]*corev1.Service
	deliveredSlices   map[types.NamespacedName]*discoveryv1.EndpointSlice
}

// label is one label of the objects of a namespace.
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

// update takes over what files hold now, nil for a file that is gone, and
// returns what this changes.
func (m *model) update(files map[string]*parsedFile) kube.Delta {
	touched := map[objectID]struct{}{}
	for name, file := range files {
		m.replaceFile(name, file, touched)
	}
	dirty := map[types.NamespacedName]struct{}{}
	out := changes{services: map[types.NamespacedName]*corev1.Service{}, slices: map[types.NamespacedName]*discoveryv1.EndpointSlice{}}
	for i := range touched {
		m.resolveActive(i, dirty, &out)
	}
	m.updateServices(dirty, &out)
	return m.diff(&out)
}

// changes are objects as they are now, nil if they are gone.
type changes struct {
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
}

// replaceFile puts the objects of a file in place of what it held. An object
// that cannot be read now stays as it was.
func (m *model) replaceFile(name string, file *parsedFile, touched map[objectID]struct{}) {
	old := m.files[name]
	if old != nil {
		for _, o := range old.objects {
			touched[o.id] = struct{}{}
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
		touched[o.id] = struct{}{}
		places := m.candidates[o.id]
		at, _ := slices.BinarySearchFunc(places, o, m.compareCandidates)
		m.candidates[o.id] = slices.Insert(places, at, o)
	}
}

// compareCandidates orders objects of one name, the one in force first: by file and
// line, but after all others what is retained. It may have been moved, so it
// must not stand in the way of what is known to be there. Of what is retained,
// the one in force stays in force.
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

// resolveActive decides which object of a name is in force and, if it changed, updates
// the indexes and marks the Services that this touches.
func (m *model) resolveActive(i objectID, dirty map[types.NamespacedName]struct{}, out *changes) {
	var now *object
	if places := m.candidates[i]; len(places) > 0 {
		now = places[0]
	} else {
		delete(m.candidates, i)
	}
	if len(m.candidates[i]) > 1 {
		m.duplicates[i] = struct{}{}
	} else {
		delete(m.duplicates, i)
	}
	was := m.active[i]
	if now == nil {
		delete(m.active, i)
	} else {
		m.active[i] = now
	}
	// A failed Service is looked at again: its error may be in another line now.
	failed := i.kind == kindService && m.failedServices[i.name] != nil
	if !failed && (was == nil && now == nil || was != nil && now != nil && was.equal(now)) {
		return
	}
	switch i.kind {
	case kindService:
		dirty[i.name] = struct{}{}
		if was != nil {
			unindex(m.servicesByLabel, i.name, selectorLabel(was.service))
		}
		if now != nil {
			index(m.servicesByLabel, i.name, selectorLabel(now.service))
		}
	case kindPod:
		for _, o := range []*object{was, now} {
			if o == nil {
				continue
			}
			for key, value := range o.pod.Labels {
				l := label{i.name.Namespace, key, value}
				if o == was {
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
			// A failed Service goes on as it was delivered, and so do its endpoints.
			for name := range m.failedServices {
				if svc := m.deliveredServices[name]; svc != nil && name.Namespace == i.name.Namespace && selects(svc.Spec.Selector, o.pod.Labels) {
					dirty[name] = struct{}{}
				}
			}
		}
	case kindEndpointSlice:
		out.slices[i.name] = nil
		if now != nil {
			out.slices[i.name] = now.slice
		}
	}
}

func (o *object) equal(p *object) bool {
	return reflect.DeepEqual(o.service, p.service) && reflect.DeepEqual(o.pod, p.pod) && reflect.DeepEqual(o.slice, p.slice)
}

// selectorLabel returns the label of its selector by which a Service is found.
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

// updateServices gives the dirty Services their addresses, node ports and
// endpoints.
func (m *model) updateServices(dirty map[types.NamespacedName]struct{}, out *changes) {
	if len(dirty) == 0 {
		return
	}
	// A Service that failed may succeed now that others have changed.
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
			svc = m.deliveredServices[name] // failed: as it was
		}
		m.generateSlices(name, svc, out)
	}
}

// serviceAllocation is what one Service needs.
type serviceAllocation struct {
	name         types.NamespacedName
	object       *object // nil if the Service is gone
	addrRequests []addressRequest
	policy       corev1.IPFamilyPolicy
	// oldAddrs has the addresses before, and addrs those that it gets.
	oldAddrs, newAddrs []netip.Addr
	// portWishes, oldPorts and ports are the same for node ports.
	portRequests       []nodePortRequest
	oldPorts, newPorts []nodePortAllocation
	// failed says that it does not get its wishes for now, err why not.
	failed bool
	err    *Error
}

// allocate gives addresses and node ports to the Services, in the order of the
// names: first
// those that files say, so that these are not handed out, then those that each
// Service has already, then new ones. A Service that does not get all it needs
// keeps what it has, and others have to do without that. assign returns the
// Services with their addresses, nil for those that are gone, and leaves out
// those that failed.
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
			r.failed = true // and nothing can help it
			m.failedServices[name] = r.err
			continue
		}
		order = append(order, r)
		// What a Service gives up can be another's in the same update.
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

// retryFailed gives those that failed what has become free since, because others
// failed after them. It takes nothing from anyone, so it ends; after that, the
// errors say what is in force.
func (m *model) retryFailed(order []*serviceAllocation) {
	for again := true; again; {
		again = false
		for _, r := range order {
			if !r.failed {
				continue
			}
			m.releaseUnneeded(r)
			if r.err = m.allocateRequested(r); r.err == nil {
				r.err = m.allocateRemaining(r)
			}
			if r.err != nil {
				m.rollBack(r, nil) // nobody can have taken what it gave up
				continue
			}
			r.failed = false
			again = true
		}
	}
}

// releaseUnneeded releases what a Service has and does not need any more.
func (m *model) releaseUnneeded(r *serviceAllocation) {
	for _, addr := range r.oldAddrs {
		if !slices.ContainsFunc(r.addrRequests, func(w addressRequest) bool { return r.reusesAddr(w, addr) }) {
			m.addresses.release(addr, r.name)
		}
	}
	for _, h := range r.oldPorts {
		if !slices.ContainsFunc(r.portRequests, func(w nodePortRequest) bool { return r.reusesPort(w, h) }) {
			m.nodePorts.release(h.port, r.name)
		}
	}
}

// reusesAddr reports whether an address that the Service has fulfils a wish.
func (r *serviceAllocation) reusesAddr(w addressRequest, addr netip.Addr) bool {
	if isHeadless(r.object.service) {
		return false
	}
	if w.requested.IsValid() {
		return w.requested == addr
	}
	return w.family == familyOf(addr)
}

// reusesPort reports whether a node port that the Service has fulfils a wish.
func (r *serviceAllocation) reusesPort(w nodePortRequest, h nodePortAllocation) bool {
	if w.key != h.key {
		return false
	}
	if w.requested != 0 {
		return w.requestedPort() == h.port
	}
	// The file may say it for something else now.
	return !slices.ContainsFunc(r.portRequests, func(w nodePortRequest) bool { return w.requestedPort() == h.port })
}

// allocateRequested claims the addresses and node ports that the file says.
func (m *model) allocateRequested(r *serviceAllocation) *Error {
	for i, w := range r.addrRequests {
		if !w.requested.IsValid() {
			continue
		}
		if holder, ok := m.addresses.allocate(w.requested, r.name); !ok {
			field := "spec.clusterIP"
			if i > 0 {
				field = "spec.clusterIPs[1]"
			}
			return r.object.errorf(field, "%s is already the address of Service %s: give one of them another address", w.requested, holder)
		}
	}
	for _, w := range r.portRequests {
		if w.requested == 0 {
			continue
		}
		if holder, ok := m.nodePorts.allocate(w.requestedPort(), r.name); !ok {
			return r.object.errorf(w.field, "%s is already a node port of Service %s: give one of them another number, or remove the field to get one",
				w.requestedPort(), holder)
		}
	}
	return nil
}

// allocateRemaining completes the addresses and node ports of a Service whose said
// ones are claimed.
func (m *model) allocateRemaining(r *serviceAllocation) *Error {
	if err := m.allocateAddresses(r); err != nil {
		return err
	}
	return m.allocatePorts(r)
}

func (m *model) allocatePorts(r *serviceAllocation) *Error {
	r.newPorts = nil
	// What it has goes first, so that it is not shared away.
	for _, w := range r.portRequests {
		at := slices.IndexFunc(r.oldPorts, func(h nodePortAllocation) bool { return r.reusesPort(w, h) })
		switch {
		case w.requested != 0:
			r.newPorts = append(r.newPorts, nodePortAllocation{w.key, w.requestedPort()})
		case at >= 0:
			r.newPorts = append(r.newPorts, r.oldPorts[at])
		}
	}
	for _, w := range r.portRequests {
		if slices.ContainsFunc(r.newPorts, func(h nodePortAllocation) bool { return h.key == w.key }) {
			continue
		}
		port, ok := m.allocateSharedPort(r, w)
		if !ok {
			port, ok = m.nodePorts.allocateNext(r.name, w.key)
		}
		if !ok {
			return r.object.errorf(w.field, "no node port is left for the Service, because all %d from %d on are in use: "+
				"write another number here, or make other Services ClusterIP", nodePortCount, firstNodePort)
		}
		r.newPorts = append(r.newPorts, nodePortAllocation{w.key, port})
	}
	return nil
}

// allocateSharedPort claims the number that the same port of the Service has in another
// protocol, as DNS servers have it, if it is free.
func (m *model) allocateSharedPort(r *serviceAllocation, w nodePortRequest) (nodePort, bool) {
	for _, h := range r.newPorts {
		port := nodePort{w.key.protocol, h.port.number}
		if _, taken := m.nodePorts.owners[port]; h.key.port == w.key.port && !taken {
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
	for _, w := range r.addrRequests {
		addr := w.requested
		if i := slices.IndexFunc(r.oldAddrs, func(a netip.Addr) bool { return r.reusesAddr(w, a) }); !addr.IsValid() && i >= 0 {
			addr = r.oldAddrs[i]
		}
		if !addr.IsValid() {
			var ok bool
			if addr, ok = m.addresses.allocateNext(r.name, w.family); !ok {
				p := m.addresses.pools[w.family]
				return r.object.errorf("spec.clusterIP", "no address is left for the Service, because all %d of %s are in use: "+
					"give a larger network with --service-cidr", p.size, p.prefix)
			}
		}
		r.newAddrs = append(r.newAddrs, addr)
	}
	return nil
}

// rollBack puts a Service back to what it had, so that its last good version goes
// on. Those of the requests that have got any of that fail in turn.
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
		for _, w := range r.addrRequests {
			if w.requested.IsValid() && !slices.Contains(r.oldAddrs, w.requested) {
				m.addresses.release(w.requested, r.name)
			}
		}
		for _, addr := range r.oldAddrs {
			if holder, ok := m.addresses.allocate(addr, r.name); !ok {
				// It had something else before: no two had the same.
				m.addresses.release(addr, holder)
				m.addresses.allocate(addr, r.name)
				failing = append(failing, requests[holder])
			}
		}
		failing = append(failing, m.rollBackPorts(r, requests)...)
	}
}

// rollBackPorts is fail for node ports. It returns the requests that fail in turn.
func (m *model) rollBackPorts(r *serviceAllocation, requests map[types.NamespacedName]*serviceAllocation) []*serviceAllocation {
	release := func(port nodePort) {
		if !slices.ContainsFunc(r.oldPorts, func(h nodePortAllocation) bool { return h.port == port }) {
			m.nodePorts.release(port, r.name)
		}
	}
	for _, h := range r.newPorts {
		release(h.port)
	}
	r.newPorts = nil
	for _, w := range r.portRequests {
		release(w.requestedPort())
	}
	var failing []*serviceAllocation
	for _, h := range r.oldPorts {
		if holder, ok := m.nodePorts.allocate(h.port, r.name); !ok {
			m.nodePorts.release(h.port, holder)
			m.nodePorts.allocate(h.port, r.name)
			failing = append(failing, requests[holder])
		}
	}
	return failing
}

// buildService returns the Service of a request that has its addresses and node
// ports, nil if it is gone.
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
		for _, h := range r.newPorts {
			said := slices.ContainsFunc(r.portRequests, func(w nodePortRequest) bool { return w.key == h.key && w.requested != 0 })
			if !said && !slices.Contains(r.oldPorts, h) {
				m.unloggedPorts = append(m.unloggedPorts, unloggedPort{r.name, h})
			}
		}
		setNodePorts(svc, r.newPorts)
	}
	svc.Spec.IPFamilies = nil
	for _, w := range r.addrRequests {
		svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, w.family)
	}
	svc.Spec.IPFamilyPolicy = nil
	if r.policy != "" {
		svc.Spec.IPFamilyPolicy = new(r.policy)
	}
	return svc
}

// generateSlices makes the EndpointSlices of a Service, nil if it is gone.
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

// selectPods returns the pods that the Service selects. It looks at those that have
// the rarest of the selector's labels.
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

// diff returns the changes that are different from what was delivered.
func (m *model) diff(out *changes) kube.Delta {
	var d kube.Delta
	for _, name := range sortedNames(out.services) {
		switch svc, was := out.services[name], m.deliveredServices[name]; {
		case svc == nil && was != nil:
			delete(m.deliveredServices, name)
			d.DeletedServices = append(d.DeletedServices, name)
		case svc != nil && !reflect.DeepEqual(svc, was):
			m.deliveredServices[name] = svc
			d.Services = append(d.Services, svc)
		}
	}
	for _, name := range sortedNames(out.slices) {
		switch slice, was := out.slices[name], m.deliveredSlices[name]; {
		case slice == nil && was != nil:
			delete(m.deliveredSlices, name)
			d.DeletedEndpointSlices = append(d.DeletedEndpointSlices, name)
		case slice != nil && !reflect.DeepEqual(slice, was):
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

// errors returns everything that is wrong now, sorted by file and line.
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
				break // and so are the others; none may be there any more
			}
			errs = append(errs, o.errorf("metadata.name", "%s is also in %s, line %d, and that one is used: remove or rename one of them",
				i, used.file, used.root.line))
		}
	}
	slices.SortFunc(errs, (*Error).compare)
	return errs
}
