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
	addresses *addresses
	nodePorts *nodePorts

	files map[string]*parsed
	// places has all objects of one name, the one in force first.
	places map[id][]*object
	// retained has the objects kept of files of which it is not known whether
	// they still have them.
	retained map[*object]struct{}
	// current has the object in force.
	current map[id]*object
	// podsBy and servicesBy find Pods by each of their labels, and Services by
	// the first label of their selector.
	podsBy, servicesBy map[label]map[types.NamespacedName]struct{}

	// held has the addresses of each Service.
	held map[types.NamespacedName][]netip.Addr
	// heldPorts has the node ports of each Service.
	heldPorts map[types.NamespacedName][]heldPort
	// made has the names of the slices made for a Service.
	made map[types.NamespacedName][]types.NamespacedName
	// broken has the files with errors, and doubles the names with more than one
	// place, so that errors need no walk over everything.
	broken  map[string]struct{}
	doubles map[id]struct{}
	// failed has the Services that could not get what they need.
	failed map[types.NamespacedName]*Error

	// given has the node ports given since this was last looked at: only logs
	// tell people which they are.
	given []givenPort

	// services and slices are what was delivered.
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
}

// label is one label of the objects of a namespace.
type label struct{ namespace, key, value string }

func newModel(nodeName string, addrs *addresses) *model {
	return &model{
		nodeName:   nodeName,
		addresses:  addrs,
		nodePorts:  newNodePorts(),
		files:      map[string]*parsed{},
		broken:     map[string]struct{}{},
		doubles:    map[id]struct{}{},
		places:     map[id][]*object{},
		retained:   map[*object]struct{}{},
		current:    map[id]*object{},
		podsBy:     map[label]map[types.NamespacedName]struct{}{},
		servicesBy: map[label]map[types.NamespacedName]struct{}{},
		held:       map[types.NamespacedName][]netip.Addr{},
		heldPorts:  map[types.NamespacedName][]heldPort{},
		made:       map[types.NamespacedName][]types.NamespacedName{},
		failed:     map[types.NamespacedName]*Error{},
		services:   map[types.NamespacedName]*corev1.Service{},
		slices:     map[types.NamespacedName]*discoveryv1.EndpointSlice{},
	}
}

// update takes over what files hold now, nil for a file that is gone, and
// returns what this changes.
func (m *model) update(files map[string]*parsed) kube.Delta {
	touched := map[id]struct{}{}
	for name, file := range files {
		m.replaceFile(name, file, touched)
	}
	dirty := map[types.NamespacedName]struct{}{}
	out := changes{services: map[types.NamespacedName]*corev1.Service{}, slices: map[types.NamespacedName]*discoveryv1.EndpointSlice{}}
	for i := range touched {
		m.settle(i, dirty, &out)
	}
	m.settleServices(dirty, &out)
	return m.deliver(&out)
}

// changes are objects as they are now, nil if they are gone.
type changes struct {
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
}

// replaceFile puts the objects of a file in place of what it held. An object
// that cannot be read now stays as it was.
func (m *model) replaceFile(name string, file *parsed, touched map[id]struct{}) {
	old := m.files[name]
	if old != nil {
		for _, o := range old.objects {
			touched[o.id] = struct{}{}
			m.places[o.id] = slices.DeleteFunc(m.places[o.id], func(p *object) bool { return p == o })
			delete(m.retained, o)
		}
	}
	delete(m.broken, name)
	if file == nil {
		delete(m.files, name)
		return
	}
	if len(file.errs) > 0 {
		m.broken[name] = struct{}{}
	}
	if old != nil && (file.unknown || len(file.bad) > 0) {
		readable := map[id]bool{}
		for _, o := range file.objects {
			readable[o.id] = true
		}
		for _, o := range old.objects {
			if !readable[o.id] && (file.unknown || file.bad[o.id]) {
				file.objects = append(file.objects, o)
				if !file.bad[o.id] {
					m.retained[o] = struct{}{}
				}
			}
		}
	}
	m.files[name] = file
	for _, o := range file.objects {
		touched[o.id] = struct{}{}
		places := m.places[o.id]
		at, _ := slices.BinarySearchFunc(places, o, m.comparePlace)
		m.places[o.id] = slices.Insert(places, at, o)
	}
}

// comparePlace orders objects of one name, the one in force first: by file and
// line, but after all others what is retained. It may have been moved, so it
// must not stand in the way of what is known to be there. Of what is retained,
// the one in force stays in force.
func (m *model) comparePlace(o, p *object) int {
	_, oRetained := m.retained[o]
	_, pRetained := m.retained[p]
	inForce := m.current[o.id]
	switch {
	case oRetained && pRetained && o == inForce:
		return -1
	case oRetained && pRetained && p == inForce:
		return 1
	case oRetained == pRetained:
		return o.comparePlace(p)
	case oRetained:
		return 1
	default:
		return -1
	}
}

// settle decides which object of a name is in force and, if it changed, updates
// the indexes and marks the Services that this touches.
func (m *model) settle(i id, dirty map[types.NamespacedName]struct{}, out *changes) {
	var now *object
	if places := m.places[i]; len(places) > 0 {
		now = places[0]
	} else {
		delete(m.places, i)
	}
	if len(m.places[i]) > 1 {
		m.doubles[i] = struct{}{}
	} else {
		delete(m.doubles, i)
	}
	was := m.current[i]
	if now == nil {
		delete(m.current, i)
	} else {
		m.current[i] = now
	}
	// A failed Service is looked at again: its error may be in another line now.
	failed := i.kind == kindService && m.failed[i.name] != nil
	if !failed && (was == nil && now == nil || was != nil && now != nil && was.equal(now)) {
		return
	}
	switch i.kind {
	case kindService:
		dirty[i.name] = struct{}{}
		if was != nil {
			unindex(m.servicesBy, i.name, selectorLabel(was.service))
		}
		if now != nil {
			index(m.servicesBy, i.name, selectorLabel(now.service))
		}
	case kindPod:
		for _, o := range []*object{was, now} {
			if o == nil {
				continue
			}
			for key, value := range o.pod.Labels {
				l := label{i.name.Namespace, key, value}
				if o == was {
					unindex(m.podsBy, i.name, l)
				} else {
					index(m.podsBy, i.name, l)
				}
				for name := range m.servicesBy[l] {
					if s := m.current[id{kindService, name}]; s != nil && selects(s.service.Spec.Selector, o.pod.Labels) {
						dirty[name] = struct{}{}
					}
				}
			}
			// A failed Service goes on as it was delivered, and so do its endpoints.
			for name := range m.failed {
				if svc := m.services[name]; svc != nil && name.Namespace == i.name.Namespace && selects(svc.Spec.Selector, o.pod.Labels) {
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

// settleServices gives the dirty Services their addresses, node ports and
// endpoints.
func (m *model) settleServices(dirty map[types.NamespacedName]struct{}, out *changes) {
	if len(dirty) == 0 {
		return
	}
	// A Service that failed may succeed now that others have changed.
	for name := range m.failed {
		dirty[name] = struct{}{}
	}
	names := make([]types.NamespacedName, 0, len(dirty))
	for name := range dirty {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b types.NamespacedName) int { return strings.Compare(a.String(), b.String()) })
	maps.Copy(out.services, m.assign(names))
	for _, name := range names {
		svc, ok := out.services[name]
		if !ok {
			svc = m.services[name] // failed: as it was
		}
		m.makeSlices(name, svc, out)
	}
}

// request is what one Service needs.
type request struct {
	name   types.NamespacedName
	object *object // nil if the Service is gone
	wishes []wish
	policy corev1.IPFamilyPolicy
	// had has the addresses before, and addrs those that it gets.
	had, addrs []netip.Addr
	// portWishes, hadPorts and ports are the same for node ports.
	portWishes      []portWish
	hadPorts, ports []heldPort
	// failed says that it does not get its wishes for now, err why not.
	failed bool
	err    *Error
}

// assign gives addresses and node ports to the Services, in the order of the
// names: first
// those that files say, so that these are not handed out, then those that each
// Service has already, then new ones. A Service that does not get all it needs
// keeps what it has, and others have to do without that. assign returns the
// Services with their addresses, nil for those that are gone, and leaves out
// those that failed.
func (m *model) assign(names []types.NamespacedName) map[types.NamespacedName]*corev1.Service {
	requests := make(map[types.NamespacedName]*request, len(names))
	order := make([]*request, 0, len(names))
	for _, name := range names {
		delete(m.failed, name)
		r := &request{name: name, object: m.current[id{kindService, name}], had: m.held[name], hadPorts: m.heldPorts[name]}
		if r.object != nil && r.object.service.Spec.Type != corev1.ServiceTypeExternalName {
			r.wishes, r.policy, r.err = m.addresses.wishes(r.object)
			r.portWishes = portWishes(r.object.service)
		}
		requests[name] = r
		if r.err != nil {
			r.failed = true // and nothing can help it
			m.failed[name] = r.err
			continue
		}
		order = append(order, r)
		// What a Service gives up can be another's in the same update.
		m.giveUp(r)
	}
	for _, r := range order {
		if r.err = m.claimSaid(r); r.err != nil {
			m.fail(r, requests)
		}
	}
	for _, r := range order {
		if r.failed {
			continue
		}
		if r.err = m.claimOthers(r); r.err != nil {
			m.fail(r, requests)
		}
	}
	m.retry(order)

	done := make(map[types.NamespacedName]*corev1.Service, len(order))
	for _, r := range order {
		if r.failed {
			m.failed[r.name] = r.err
		} else {
			done[r.name] = m.finish(r)
		}
	}
	return done
}

// retry gives those that failed what has become free since, because others
// failed after them. It takes nothing from anyone, so it ends; after that, the
// errors say what is in force.
func (m *model) retry(order []*request) {
	for again := true; again; {
		again = false
		for _, r := range order {
			if !r.failed {
				continue
			}
			m.giveUp(r)
			if r.err = m.claimSaid(r); r.err == nil {
				r.err = m.claimOthers(r)
			}
			if r.err != nil {
				m.fail(r, nil) // nobody can have taken what it gave up
				continue
			}
			r.failed = false
			again = true
		}
	}
}

// giveUp releases what a Service has and does not need any more.
func (m *model) giveUp(r *request) {
	for _, addr := range r.had {
		if !slices.ContainsFunc(r.wishes, func(w wish) bool { return r.keeps(w, addr) }) {
			m.addresses.release(addr, r.name)
		}
	}
	for _, h := range r.hadPorts {
		if !slices.ContainsFunc(r.portWishes, func(w portWish) bool { return r.keepsPort(w, h) }) {
			m.nodePorts.release(h.port, r.name)
		}
	}
}

// keeps reports whether an address that the Service has fulfils a wish.
func (r *request) keeps(w wish, addr netip.Addr) bool {
	if isHeadless(r.object.service) {
		return false
	}
	if w.explicit.IsValid() {
		return w.explicit == addr
	}
	return w.family == familyOf(addr)
}

// keepsPort reports whether a node port that the Service has fulfils a wish.
func (r *request) keepsPort(w portWish, h heldPort) bool {
	if w.use != h.use {
		return false
	}
	if w.explicit != 0 {
		return w.said() == h.port
	}
	// The file may say it for something else now.
	return !slices.ContainsFunc(r.portWishes, func(w portWish) bool { return w.said() == h.port })
}

// claimSaid claims the addresses and node ports that the file says.
func (m *model) claimSaid(r *request) *Error {
	for i, w := range r.wishes {
		if !w.explicit.IsValid() {
			continue
		}
		if holder, ok := m.addresses.claim(w.explicit, r.name); !ok {
			field := "spec.clusterIP"
			if i > 0 {
				field = "spec.clusterIPs[1]"
			}
			return r.object.errorf(field, "%s is already the address of Service %s: give one of them another address", w.explicit, holder)
		}
	}
	for _, w := range r.portWishes {
		if w.explicit == 0 {
			continue
		}
		if holder, ok := m.nodePorts.claim(w.said(), r.name); !ok {
			return r.object.errorf(w.field, "%s is already a node port of Service %s: give one of them another number, or remove the field to get one",
				w.said(), holder)
		}
	}
	return nil
}

// claimOthers completes the addresses and node ports of a Service whose said
// ones are claimed.
func (m *model) claimOthers(r *request) *Error {
	if err := m.claimOtherAddresses(r); err != nil {
		return err
	}
	return m.claimOtherPorts(r)
}

func (m *model) claimOtherPorts(r *request) *Error {
	r.ports = nil
	// What it has goes first, so that it is not shared away.
	for _, w := range r.portWishes {
		at := slices.IndexFunc(r.hadPorts, func(h heldPort) bool { return r.keepsPort(w, h) })
		switch {
		case w.explicit != 0:
			r.ports = append(r.ports, heldPort{w.use, w.said()})
		case at >= 0:
			r.ports = append(r.ports, r.hadPorts[at])
		}
	}
	for _, w := range r.portWishes {
		if slices.ContainsFunc(r.ports, func(h heldPort) bool { return h.use == w.use }) {
			continue
		}
		port, ok := m.sharePort(r, w)
		if !ok {
			port, ok = m.nodePorts.give(r.name, w.use)
		}
		if !ok {
			return r.object.errorf(w.field, "no node port is left for the Service, because all %d from %d on are in use: "+
				"write another number here, or make other Services ClusterIP", nodePortCount, firstNodePort)
		}
		r.ports = append(r.ports, heldPort{w.use, port})
	}
	return nil
}

// sharePort claims the number that the same port of the Service has in another
// protocol, as DNS servers have it, if it is free.
func (m *model) sharePort(r *request, w portWish) (nodePort, bool) {
	for _, h := range r.ports {
		port := nodePort{w.use.protocol, h.port.number}
		if _, taken := m.nodePorts.holders[port]; h.use.port == w.use.port && !taken {
			m.nodePorts.claim(port, r.name)
			return port, true
		}
	}
	return nodePort{}, false
}

func (m *model) claimOtherAddresses(r *request) *Error {
	r.addrs = nil
	if r.object == nil || isHeadless(r.object.service) {
		return nil
	}
	for _, w := range r.wishes {
		addr := w.explicit
		if i := slices.IndexFunc(r.had, func(a netip.Addr) bool { return r.keeps(w, a) }); !addr.IsValid() && i >= 0 {
			addr = r.had[i]
		}
		if !addr.IsValid() {
			var ok bool
			if addr, ok = m.addresses.give(r.name, w.family); !ok {
				p := m.addresses.pools[w.family]
				return r.object.errorf("spec.clusterIP", "no address is left for the Service, because all %d of %s are in use: "+
					"give a larger network with --service-cidr", p.size, p.prefix)
			}
		}
		r.addrs = append(r.addrs, addr)
	}
	return nil
}

// fail puts a Service back to what it had, so that its last good version goes
// on. Those of the requests that have got any of that fail in turn.
func (m *model) fail(r *request, requests map[types.NamespacedName]*request) {
	failing := []*request{r}
	for len(failing) > 0 {
		r, failing = failing[len(failing)-1], failing[:len(failing)-1]
		r.failed = true
		for _, addr := range r.addrs {
			if !slices.Contains(r.had, addr) {
				m.addresses.release(addr, r.name)
			}
		}
		r.addrs = nil
		for _, w := range r.wishes {
			if w.explicit.IsValid() && !slices.Contains(r.had, w.explicit) {
				m.addresses.release(w.explicit, r.name)
			}
		}
		for _, addr := range r.had {
			if holder, ok := m.addresses.claim(addr, r.name); !ok {
				// It had something else before: no two had the same.
				m.addresses.release(addr, holder)
				m.addresses.claim(addr, r.name)
				failing = append(failing, requests[holder])
			}
		}
		failing = append(failing, m.failPorts(r, requests)...)
	}
}

// failPorts is fail for node ports. It returns the requests that fail in turn.
func (m *model) failPorts(r *request, requests map[types.NamespacedName]*request) []*request {
	release := func(port nodePort) {
		if !slices.ContainsFunc(r.hadPorts, func(h heldPort) bool { return h.port == port }) {
			m.nodePorts.release(port, r.name)
		}
	}
	for _, h := range r.ports {
		release(h.port)
	}
	r.ports = nil
	for _, w := range r.portWishes {
		release(w.said())
	}
	var failing []*request
	for _, h := range r.hadPorts {
		if holder, ok := m.nodePorts.claim(h.port, r.name); !ok {
			m.nodePorts.release(h.port, holder)
			m.nodePorts.claim(h.port, r.name)
			failing = append(failing, requests[holder])
		}
	}
	return failing
}

// finish returns the Service of a request that has its addresses and node
// ports, nil if it is gone.
func (m *model) finish(r *request) *corev1.Service {
	delete(m.held, r.name)
	delete(m.heldPorts, r.name)
	if r.object == nil {
		return nil
	}
	svc := r.object.service.DeepCopy()
	if len(r.addrs) > 0 {
		m.held[r.name] = r.addrs
		svc.Spec.ClusterIPs = nil
		for _, addr := range r.addrs {
			svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, addr.String())
		}
		svc.Spec.ClusterIP = svc.Spec.ClusterIPs[0]
	}
	if len(r.ports) > 0 {
		m.heldPorts[r.name] = r.ports
		for _, h := range r.ports {
			said := slices.ContainsFunc(r.portWishes, func(w portWish) bool { return w.use == h.use && w.explicit != 0 })
			if !said && !slices.Contains(r.hadPorts, h) {
				m.given = append(m.given, givenPort{r.name, h})
			}
		}
		setNodePorts(svc, r.ports)
	}
	svc.Spec.IPFamilies = nil
	for _, w := range r.wishes {
		svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, w.family)
	}
	svc.Spec.IPFamilyPolicy = nil
	if r.policy != "" {
		svc.Spec.IPFamilyPolicy = new(r.policy)
	}
	return svc
}

// makeSlices makes the EndpointSlices of a Service, nil if it is gone.
func (m *model) makeSlices(name types.NamespacedName, svc *corev1.Service, out *changes) {
	for _, slice := range m.made[name] {
		out.slices[slice] = nil
	}
	delete(m.made, name)
	if svc == nil || len(svc.Spec.Selector) == 0 || svc.Spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	for _, slice := range endpointSlices(svc, m.podsOf(svc), m.nodeName) {
		sliceName := types.NamespacedName{Namespace: slice.Namespace, Name: slice.Name}
		out.slices[sliceName] = slice
		m.made[name] = append(m.made[name], sliceName)
	}
}

// podsOf returns the pods that the Service selects. It looks at those that have
// the rarest of the selector's labels.
func (m *model) podsOf(svc *corev1.Service) []*corev1.Pod {
	var fewest map[types.NamespacedName]struct{}
	first := true
	for key, value := range svc.Spec.Selector {
		set := m.podsBy[label{svc.Namespace, key, value}]
		if first || len(set) < len(fewest) {
			fewest, first = set, false
		}
	}
	var pods []*corev1.Pod
	for name := range fewest {
		if pod := m.current[id{kindPod, name}].pod; selects(svc.Spec.Selector, pod.Labels) {
			pods = append(pods, pod)
		}
	}
	return pods
}

// deliver returns the changes that are different from what was delivered.
func (m *model) deliver(out *changes) kube.Delta {
	var d kube.Delta
	for _, name := range sortedNames(out.services) {
		switch svc, was := out.services[name], m.services[name]; {
		case svc == nil && was != nil:
			delete(m.services, name)
			d.DeletedServices = append(d.DeletedServices, name)
		case svc != nil && !reflect.DeepEqual(svc, was):
			m.services[name] = svc
			d.Services = append(d.Services, svc)
		}
	}
	for _, name := range sortedNames(out.slices) {
		switch slice, was := out.slices[name], m.slices[name]; {
		case slice == nil && was != nil:
			delete(m.slices, name)
			d.DeletedEndpointSlices = append(d.DeletedEndpointSlices, name)
		case slice != nil && !reflect.DeepEqual(slice, was):
			m.slices[name] = slice
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
	for name := range m.broken {
		errs = append(errs, m.files[name].errs...)
	}
	for _, err := range m.failed {
		errs = append(errs, err)
	}
	for i := range m.doubles {
		used := m.places[i][0]
		for _, o := range m.places[i][1:] {
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
