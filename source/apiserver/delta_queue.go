package apiserver

import (
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
)

// deltaQueue gathers what the stores hear of until it is delivered.
type deltaQueue struct {
	// wake has an element when there is something to take, perhaps.
	wake chan struct{}

	mu             sync.Mutex
	services       pendingChanges[*corev1.Service]
	endpointSlices pendingChanges[*discoveryv1.EndpointSlice]
	nodes          pendingChanges[*corev1.Node]
	serviceCIDRs   pendingChanges[*networkingv1.ServiceCIDR]
	// missing has the lists that are not complete yet, and taken says that
	// there was a time without.
	missing map[resource]bool
	popped  bool
	// synced has the lists that were ever complete. nodeUnknown says that the Node
	// was not waited for.
	synced      map[resource]bool
	nodeUnknown bool
	// skipped has the lists that are not waited for, which may be read for ever.
	skipped map[resource]bool
	// listing has the lists that are being read, for the first time or again.
	listing map[resource]bool
}

func newDeltaQueue() *deltaQueue {
	return &deltaQueue{
		wake:           make(chan struct{}, 1),
		services:       pendingChanges[*corev1.Service]{},
		endpointSlices: pendingChanges[*discoveryv1.EndpointSlice]{},
		nodes:          pendingChanges[*corev1.Node]{},
		serviceCIDRs:   pendingChanges[*networkingv1.ServiceCIDR]{},
		missing:        map[resource]bool{services: true, endpointSlices: true, nodes: true, serviceCIDRs: true},
		listing:        map[resource]bool{},
		synced:         map[resource]bool{},
		skipped:        map[resource]bool{},
	}
}

// beginList notes that a list of the kind is being read, until it is complete.
func (m *deltaQueue) beginList(k resource) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.skipped[k] {
		m.listing[k] = true
	}
}

// watchingOnly reports whether everything has been there, and there are no lists to be
// read but changes to be heard of.
func (m *deltaQueue) watchingOnly() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.popped && len(m.listing) == 0
}

// skipList notes that the list of the kind is not waited for.
func (m *deltaQueue) skipList(k resource) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if k == nodes && m.missing[k] {
		m.nodeUnknown = true
	}
	m.skipped[k] = true
	delete(m.missing, k)
	delete(m.listing, k)
	m.signal()
}

// completeListLocked notes that the list of the kind is complete. The caller holds the lock.
func (m *deltaQueue) completeListLocked(k resource) {
	delete(m.missing, k)
	delete(m.listing, k)
	delete(m.skipped, k)
	m.synced[k] = true
	m.signal()
}

// isSynced reports whether the list of the kind was ever complete.
func (m *deltaQueue) isSynced(k resource) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.synced[k]
}

func (m *deltaQueue) signal() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// missingLists returns the lists that are not complete yet.
func (m *deltaQueue) missingLists() []resource {
	m.mu.Lock()
	defer m.mu.Unlock()
	var late []resource
	for _, k := range allResources() {
		if m.missing[k] {
			late = append(late, k)
		}
	}
	return late
}

// pop removes and returns what has gathered. It reports false if there is
// nothing, or not everything yet.
func (m *deltaQueue) pop() (kube.Delta, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.missing) > 0 {
		return kube.Delta{}, false
	}
	nodeKnown := m.nodeUnknown && m.synced[nodes]
	if m.popped && !nodeKnown && len(m.services)+len(m.endpointSlices)+len(m.nodes)+len(m.serviceCIDRs) == 0 {
		return kube.Delta{}, false
	}
	m.popped = true
	var d kube.Delta
	d.Services, d.DeletedServices = drain(&m.services)
	d.EndpointSlices, d.DeletedEndpointSlices = drain(&m.endpointSlices)
	node, gone := drain(&m.nodes)
	if len(node) > 0 {
		d.Node = node[0]
	}
	if nodeKnown {
		m.nodeUnknown = false
	}
	// If it was unknown, that there is none has to be said.
	d.NodeDeleted = len(node) == 0 && (len(gone) > 0 || nodeKnown)
	d.NodeUnknown = m.nodeUnknown
	var names []types.NamespacedName
	d.ServiceCIDRs, names = drain(&m.serviceCIDRs)
	for _, name := range names {
		d.DeletedServiceCIDRs = append(d.DeletedServiceCIDRs, name.Name)
	}
	return d, true
}

// pendingChanges has the last that is known of each name.
type pendingChanges[T any] map[types.NamespacedName]pendingChange[T]

// pendingChange is a new value, or the end, of an object.
type pendingChange[T any] struct {
	object  T
	deleted bool
	// added says that the name was not there when this began to gather.
	added bool
}

// put notes a new value. known says whether the name was there before.
func (g pendingChanges[T]) put(name types.NamespacedName, object T, known bool) {
	before, pending := g[name]
	fresh := !known
	if pending {
		fresh = before.added
	}
	g[name] = pendingChange[T]{object: object, added: fresh}
}

// remove notes the end of what was there before.
func (g pendingChanges[T]) remove(name types.NamespacedName) {
	if g[name].added {
		delete(g, name) // nobody has heard of it
		return
	}
	g[name] = pendingChange[T]{deleted: true}
}

// drain empties g and returns what was in it.
func drain[T any](g *pendingChanges[T]) (objects []T, deleted []types.NamespacedName) {
	if len(*g) == 0 {
		return nil, nil
	}
	objects = make([]T, 0, len(*g))
	for name, c := range *g {
		if c.deleted {
			deleted = append(deleted, name)
		} else {
			objects = append(objects, c.object)
		}
	}
	*g = pendingChanges[T]{} // a map that was large stays large
	return objects, deleted
}
