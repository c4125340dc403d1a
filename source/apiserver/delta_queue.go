package apiserver

import (
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
)

// deltaQueue coalesces changes from the stores until they are delivered as a Delta.
type deltaQueue struct {
	// wake holds one element when there may be a Delta to pop.
	wake chan struct{}

	mu             sync.Mutex
	services       pendingChanges[deliveredService]
	endpointSlices pendingChanges[deliveredSlice]
	nodes          pendingChanges[*corev1.Node]
	serviceCIDRs   pendingChanges[*networkingv1.ServiceCIDR]
	// missing has the lists that are not complete yet. popped is set by the first pop, when
	// no list is missing.
	missing map[resource]bool
	popped  bool
	// synced has the resources whose list has been complete at least once. nodeUnknown is
	// set when the queue stops waiting for the Node.
	synced      map[resource]bool
	nodeUnknown bool
	// skipped has the lists that are not waited for. Their requests may never complete.
	skipped map[resource]bool
	// listing has the lists that are being read, for the first time or again.
	listing map[resource]bool
}

func newDeltaQueue() *deltaQueue {
	return &deltaQueue{
		wake:           make(chan struct{}, 1),
		services:       pendingChanges[deliveredService]{},
		endpointSlices: pendingChanges[deliveredSlice]{},
		nodes:          pendingChanges[*corev1.Node]{},
		serviceCIDRs:   pendingChanges[*networkingv1.ServiceCIDR]{},
		missing:        map[resource]bool{services: true, endpointSlices: true, nodes: true, serviceCIDRs: true},
		listing:        map[resource]bool{},
		synced:         map[resource]bool{},
		skipped:        map[resource]bool{},
	}
}

// beginList records that a list of the resource is being read, until it completes.
func (q *deltaQueue) beginList(res resource) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.skipped[res] {
		q.listing[res] = true
	}
}

// watchingOnly reports whether the first Delta has been popped and no list is being read.
func (q *deltaQueue) watchingOnly() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.popped && len(q.listing) == 0
}

// skipList stops waiting for the list of the resource.
func (q *deltaQueue) skipList(res resource) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if res == nodes && q.missing[res] {
		q.nodeUnknown = true
	}
	q.skipped[res] = true
	delete(q.missing, res)
	delete(q.listing, res)
	q.signal()
}

// completeListLocked records that the list of the resource is complete. The caller holds
// mu.
func (q *deltaQueue) completeListLocked(res resource) {
	delete(q.missing, res)
	delete(q.listing, res)
	delete(q.skipped, res)
	q.synced[res] = true
	q.signal()
}

// isSynced reports whether the list of the resource has been complete at least once.
func (q *deltaQueue) isSynced(res resource) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.synced[res]
}

func (q *deltaQueue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// missingLists returns the resources whose lists are not complete yet.
func (q *deltaQueue) missingLists() []resource {
	q.mu.Lock()
	defer q.mu.Unlock()
	var missing []resource
	for _, res := range allResources() {
		if q.missing[res] {
			missing = append(missing, res)
		}
	}
	return missing
}

// size returns the number of pending changes.
func (q *deltaQueue) size() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.sizeLocked()
}

// sizeLocked returns the number of pending changes. The caller holds mu.
func (q *deltaQueue) sizeLocked() int {
	return len(q.services) + len(q.endpointSlices) + len(q.nodes) + len(q.serviceCIDRs)
}

// pop removes and returns the coalesced changes. It reports false if nothing has changed or
// a list is missing.
func (q *deltaQueue) pop() (kube.Delta, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.missing) > 0 {
		return kube.Delta{}, false
	}
	nodeKnown := q.nodeUnknown && q.synced[nodes]
	if q.popped && !nodeKnown && q.sizeLocked() == 0 {
		return kube.Delta{}, false
	}
	q.popped = true
	var d kube.Delta
	d.Services, d.ConvertedServices, d.DeletedServices = drainDelivered(&q.services)
	d.EndpointSlices, d.ConvertedSlices, d.DeletedEndpointSlices = drainDelivered(&q.endpointSlices)
	node, deletedNodes := drain(&q.nodes)
	if len(node) > 0 {
		d.Node = node[0]
	}
	if nodeKnown {
		q.nodeUnknown = false
	}
	// After NodeUnknown, a complete list without the Node is reported as its deletion.
	d.NodeDeleted = len(node) == 0 && (len(deletedNodes) > 0 || nodeKnown)
	d.NodeUnknown = q.nodeUnknown
	var names []types.NamespacedName
	d.ServiceCIDRs, names = drain(&q.serviceCIDRs)
	for _, name := range names {
		d.DeletedServiceCIDRs = append(d.DeletedServiceCIDRs, name.Name)
	}
	return d, true
}

// delivered is an object, or its converted form; see [Options.ConvertObjects].
type delivered[O, C any] struct {
	object    *O
	converted *C
}

type (
	deliveredService = delivered[corev1.Service, kube.ConvertedService]
	deliveredSlice   = delivered[discoveryv1.EndpointSlice, kube.ConvertedSlice]
)

// whole is the convert function of objects that are delivered as they are.
func whole[O, C any](object *O) delivered[O, C] { return delivered[O, C]{object: object} }

// pendingChanges has the latest change of each name.
type pendingChanges[T any] map[types.NamespacedName]pendingChange[T]

// pendingChange is the new state of an object, or its deletion.
type pendingChange[T any] struct {
	object  T
	deleted bool
	// added means that the receiver does not have the object yet.
	added bool
}

// put records a new state. known reports whether the name existed before.
func (g pendingChanges[T]) put(name types.NamespacedName, object T, known bool) {
	before, pending := g[name]
	added := !known
	if pending {
		added = before.added
	}
	g[name] = pendingChange[T]{object: object, added: added}
}

// remove records a deletion.
func (g pendingChanges[T]) remove(name types.NamespacedName) {
	if g[name].added {
		delete(g, name) // the receiver does not have it
		return
	}
	g[name] = pendingChange[T]{deleted: true}
}

// drainDelivered empties g and returns its content.
func drainDelivered[O, C any](g *pendingChanges[delivered[O, C]]) (objects []*O, converted []*C, deleted []types.NamespacedName) {
	all, deleted := drain(g)
	for _, d := range all {
		if d.converted == nil {
			objects = append(objects, d.object)
			continue
		}
		if converted == nil {
			converted = make([]*C, 0, len(all))
		}
		converted = append(converted, d.converted)
	}
	return objects, converted, deleted
}

// drain empties g and returns its content.
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
	*g = pendingChanges[T]{} // a new map, because a map never shrinks
	return objects, deleted
}
