package apiserver

import (
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
)

// mailbox gathers what the stores hear of until it is delivered.
type mailbox struct {
	// wake has an element when there is something to take, perhaps.
	wake chan struct{}

	mu             sync.Mutex
	services       gathered[*corev1.Service]
	endpointSlices gathered[*discoveryv1.EndpointSlice]
	nodes          gathered[*corev1.Node]
	serviceCIDRs   gathered[*networkingv1.ServiceCIDR]
	// missing has the lists that are not complete yet, and taken says that
	// there was a time without.
	missing map[kind]bool
	taken   bool
	// synced has the lists that were ever complete. nodeUnknown says that the Node
	// was not waited for.
	synced      map[kind]bool
	nodeUnknown bool
	// skipped has the lists that are not waited for, which may be read for ever.
	skipped map[kind]bool
	// listing has the lists that are being read, for the first time or again.
	listing map[kind]bool
}

func newMailbox() *mailbox {
	return &mailbox{
		wake:           make(chan struct{}, 1),
		services:       gathered[*corev1.Service]{},
		endpointSlices: gathered[*discoveryv1.EndpointSlice]{},
		nodes:          gathered[*corev1.Node]{},
		serviceCIDRs:   gathered[*networkingv1.ServiceCIDR]{},
		missing:        map[kind]bool{services: true, endpointSlices: true, nodes: true, serviceCIDRs: true},
		listing:        map[kind]bool{},
		synced:         map[kind]bool{},
		skipped:        map[kind]bool{},
	}
}

// list notes that a list of the kind is being read, until it is complete.
func (m *mailbox) list(k kind) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.skipped[k] {
		m.listing[k] = true
	}
}

// following reports whether everything has been there, and there are no lists to be
// read but changes to be heard of.
func (m *mailbox) following() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.taken && len(m.listing) == 0
}

// without notes that the list of the kind is not waited for.
func (m *mailbox) without(k kind) {
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

// completed notes that the list of the kind is complete. The caller holds the lock.
func (m *mailbox) completed(k kind) {
	delete(m.missing, k)
	delete(m.listing, k)
	delete(m.skipped, k)
	m.synced[k] = true
	m.signal()
}

// isSynced reports whether the list of the kind was ever complete.
func (m *mailbox) isSynced(k kind) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.synced[k]
}

func (m *mailbox) signal() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// late returns the lists that are not complete yet.
func (m *mailbox) late() []kind {
	m.mu.Lock()
	defer m.mu.Unlock()
	var late []kind
	for _, k := range allKinds() {
		if m.missing[k] {
			late = append(late, k)
		}
	}
	return late
}

// take removes and returns what has gathered. It reports false if there is
// nothing, or not everything yet.
func (m *mailbox) take() (kube.Delta, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.missing) > 0 {
		return kube.Delta{}, false
	}
	nodeKnown := m.nodeUnknown && m.synced[nodes]
	if m.taken && !nodeKnown && len(m.services)+len(m.endpointSlices)+len(m.nodes)+len(m.serviceCIDRs) == 0 {
		return kube.Delta{}, false
	}
	m.taken = true
	var d kube.Delta
	d.Services, d.DeletedServices = take(&m.services)
	d.EndpointSlices, d.DeletedEndpointSlices = take(&m.endpointSlices)
	node, gone := take(&m.nodes)
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
	d.ServiceCIDRs, names = take(&m.serviceCIDRs)
	for _, name := range names {
		d.DeletedServiceCIDRs = append(d.DeletedServiceCIDRs, name.Name)
	}
	return d, true
}

// gathered has the last that is known of each name.
type gathered[T any] map[types.NamespacedName]change[T]

// change is a new value, or the end, of an object.
type change[T any] struct {
	object  T
	deleted bool
	// fresh says that the name was not there when this began to gather.
	fresh bool
}

// put notes a new value. known says whether the name was there before.
func (g gathered[T]) put(name types.NamespacedName, object T, known bool) {
	before, pending := g[name]
	fresh := !known
	if pending {
		fresh = before.fresh
	}
	g[name] = change[T]{object: object, fresh: fresh}
}

// drop notes the end of what was there before.
func (g gathered[T]) drop(name types.NamespacedName) {
	if g[name].fresh {
		delete(g, name) // nobody has heard of it
		return
	}
	g[name] = change[T]{deleted: true}
}

// take empties g and returns what was in it.
func take[T any](g *gathered[T]) (objects []T, deleted []types.NamespacedName) {
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
	*g = gathered[T]{} // a map that was large stays large
	return objects, deleted
}
