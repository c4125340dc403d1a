package kube

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// Options are the settings of a [Tracker].
type Options struct {
	// NodeName is the name of this node as endpoints carry it in nodeName and in
	// hints. It decides [dataplane.Endpoint.Local], and which endpoints the
	// traffic policy Local leaves. If it is empty, the policy leaves none, and
	// only endpoints without a node may be local.
	NodeName string
	// BindAddress, if it is valid and not unspecified, is taken for the node's
	// primary address of its family, whatever the Node object says. It is
	// kube-proxy's --bind-address.
	BindAddress netip.Addr
	// MasqueradeAll makes every client of a cluster IP masqueraded.
	MasqueradeAll bool
	// DetectLocal says which clients are pods.
	DetectLocal DetectLocal
	// NodePortAddresses says where node ports are served.
	NodePortAddresses NodePortAddresses
	// PingServiceIPs is [dataplane.Node.PingServiceIPs].
	PingServiceIPs bool
	// ProtectLoopback sets [dataplane.Node.ProtectLoopback]. Node ports at loopback
	// addresses set it as well.
	ProtectLoopback bool
	// Schedulers are the names that [AnnotationIPVSScheduler] may have. There are
	// none where the backend has no schedulers.
	Schedulers []string
}

// Result is what a [Delta] changes.
type Result struct {
	// Changes holds the new value of each key whose value changed, nil if the
	// key is gone. Equal values are no change.
	Changes map[dataplane.Key]*dataplane.Service
	// Problems are those that this Delta brought up, sorted. A problem that
	// persists is not named again, unless it went away in between.
	Problems []Problem
	// Node is what the dataplane must know of the node, if that or Loopback has
	// changed, and nil otherwise. The first Result has it.
	Node *dataplane.Node
	// LoopbackNodePortAddrs are, where Node is set, the loopback addresses of this node's
	// interfaces that [Options.NodePortAddresses] asks for by themselves, sorted.
	// They are none of [dataplane.Node.NodePortAddrs], as a kernel does not
	// forward from them: if there are any, of whatever family, Node has
	// LocalhostNodePorts, and something else serves the node ports of TCP at the
	// loopback addresses of the families that they are of.
	LoopbackNodePortAddrs []netip.Addr
	// Overlaps are, where Node is set, those of ServiceCIDRs that this Delta brought up:
	// Node.ServiceCIDRs has no such addresses.
	Overlaps []Overlap
	// NodeHealth is what the node's health depends on, if that has changed. The
	// first Result of a Delta with Node or NodeDeleted has it; there is none
	// before, as nothing is known of the Node object.
	NodeHealth *NodeHealth
	// HealthChecks holds the health-check node ports that are new or have
	// changed, by Service, and nil for those that are gone.
	HealthChecks map[types.NamespacedName]*HealthCheck
	// NodePortsWithoutAddress are those that this Delta brought up, at most one of a family. A
	// family is reported again only after an address has served it.
	NodePortsWithoutAddress []NodePortsWithoutAddress

	endpointSlices []*discoveryv1.EndpointSlice // the Delta's, for Triggers
}

// Tracker keeps Services and EndpointSlices by name and computes what this node
// must have, incrementally: a [Delta] costs work for the Services it touches,
// directly or through their EndpointSlices, for those that collide with them,
// and, if the node has moved to another zone, for those whose endpoints have
// hints for zones. It never walks all Services.
//
// A Tracker is not safe for concurrent use.
type Tracker struct {
	opts     Options
	location location
	services map[types.NamespacedName]*service
	// sliceOwners has the Service of each slice that belongs to one.
	sliceOwners map[types.NamespacedName]*service
	claims      claims
	// zoneDependent are the Services for which another zone of this node may make a
	// difference.
	zoneDependent map[*service]struct{}
	// byClusterIP has the Services with a cluster IP, for when the node gets or
	// loses that address.
	byClusterIP map[netip.Addr][]*service

	networks networks
	// node and loopback are what the last Result with a Node had; node is nil
	// before the first.
	node     *dataplane.Node
	loopback []netip.Addr
	overlaps []Overlap
	// health is what the last Result with a NodeHealth had, and nil before the
	// first.
	health *NodeHealth

	nodePorts nodePortCheck

	// round counts the Deltas.
	round uint64
}

// service is what the Tracker knows under the name of a Service: the Service,
// its slices, or both.
type service struct {
	name   types.NamespacedName
	object *corev1.Service
	// slices are sorted by name.
	slices []*endpointSlice

	// createdUnix is the creation time that its claims were made with, in seconds,
	// which is the precision of the API. A Service without one counts as the
	// oldest.
	createdUnix int64
	// portClaims are its claims, and clusterIPs its cluster IPs.
	portClaims []portClaims
	clusterIPs []netip.Addr
	// problems of the objects and of collisions, sorted and without doubles.
	problems []Problem
	// programmed is what the last Result left in place, in the order of
	// claimed: nil for what lost its frontends.
	programmed []*dataplane.Service
	// healthCheck is the health-check node port, or has port 0.
	healthCheck HealthCheck

	// dirtyRound is the round in which the Service was last found to be touched,
	// and disputed that in which its claims, or the owner of one, last changed.
	dirtyRound, claimsChangedRound uint64
	// portsChangedRound is the round in which what slices know of its ports last
	// changed, and slicesRound that in which a slice of it was last delivered.
	portsChangedRound, slicesRound uint64
	// unmatchedPorts are the ports that were reported to be known to no slice.
	unmatchedPorts []portName
	// hasConflict says that another owns something that it claims.
	hasConflict bool
}

// portClaims are the frontends of one kind that a port claims.
type portClaims struct {
	port      int
	kind      dataplane.Kind
	frontends []dataplane.Frontend
}

func (c portClaims) equal(o portClaims) bool {
	return c.port == o.port && c.kind == o.kind && slices.Equal(c.frontends, o.frontends)
}

// NewTracker returns a Tracker that knows no objects.
func NewTracker(opts Options) *Tracker {
	return &Tracker{
		opts:          opts,
		location:      location{node: opts.NodeName},
		services:      map[types.NamespacedName]*service{},
		sliceOwners:   map[types.NamespacedName]*service{},
		claims:        newClaims(),
		zoneDependent: map[*service]struct{}{},

		byClusterIP: map[netip.Addr][]*service{},
		networks:    networks{serviceCIDRs: map[string][]netip.Prefix{}},
	}
}

// Apply takes over the objects of d and returns what they change. Within one
// Delta deletions come first: an object that is deleted and delivered is there.
// Objects may be delivered again without having changed, and objects may be
// deleted that were never there.
//
// A Node that is deleted is reported as such, but its zone, its addresses and
// its pod networks are taken to be as they were: the node is still there, and
// has connections.
func (t *Tracker) Apply(d Delta) Result {
	return t.process(func(result *Result, touch func(*service)) {
		result.endpointSlices = d.EndpointSlices
		t.applyNode(d, result, touch)
		t.applyObjects(d, touch)
	})
}

// process returns the Result of a change, which names the Services to work out
// again.
func (t *Tracker) process(change func(result *Result, touch func(*service))) Result {
	t.round++
	var result Result
	var work []*service
	change(&result, func(s *service) {
		if s.dirtyRound != t.round {
			s.dirtyRound = t.round
			work = append(work, s)
		}
	})
	t.resolveAll(work, &result)
	t.nodePorts.updateServices(result.Changes)
	result.NodePortsWithoutAddress = t.nodePorts.newlyWithoutAddress()
	return result
}

// Configure replaces the options and returns what that changes. The name of the
// node and the schedulers can't change: those of opts are ignored.
func (t *Tracker) Configure(opts Options) Result {
	opts.NodeName, opts.Schedulers = t.opts.NodeName, t.opts.Schedulers
	t.opts = opts
	return t.process(t.updateNode)
}

// applyNode takes over what d says of the node.
func (t *Tracker) applyNode(d Delta, result *Result, touch func(*service)) {
	changed := t.node == nil
	facts := t.networks.node
	if d.NodeDeleted {
		facts.health = NodeHealth{}
	}
	if d.Node != nil {
		facts = newNodeInfo(d.Node)
		changed = changed || !facts.equalNetwork(t.networks.node)
	}
	if (d.Node != nil || d.NodeDeleted) && (t.health == nil || *t.health != facts.health) {
		health := facts.health
		t.health = &health
		result.NodeHealth = &health
	}
	t.networks.node = facts
	if t.location.zone != facts.zone {
		t.location.zone = facts.zone
		for s := range t.zoneDependent {
			touch(s)
		}
	}
	for _, name := range d.DeletedServiceCIDRs {
		if _, ok := t.networks.serviceCIDRs[name]; ok {
			delete(t.networks.serviceCIDRs, name)
			changed = true
		}
	}
	for _, object := range d.ServiceCIDRs {
		t.networks.serviceCIDRs[object.Name] = parseNetworks(object.Spec.CIDRs)
		changed = true
	}
	if d.LocalAddrs != nil {
		t.networks.localAddrs, t.networks.localAddrsKnown = d.LocalAddrs, true
		t.networks.virtualAddrs, t.networks.localRoutes = d.VirtualAddrs, d.LocalRoutes
		changed = true
	}
	if changed {
		t.updateNode(result, touch)
	}
}

// updateNode computes what the dataplane must know of the node, and touches the
// Services whose cluster IPs have become the node's own, or no longer are.
func (t *Tracker) updateNode(result *Result, touch func(*service)) {
	own := t.networks.ownAddrs(t.opts.BindAddress)
	for addr := range symmetricDifference(t.location.ownAddrs, own) {
		for _, s := range t.byClusterIP[addr] {
			touch(s)
		}
	}
	t.location.ownAddrs = own
	node := newDataplaneNode(t.opts, t.networks)
	var overlaps []Overlap
	node.ServiceCIDRs, overlaps = subtractOverlaps(node.ServiceCIDRs, slices.Concat(node.PodCIDRs, node.LocalPodCIDRs), own)
	loopback := loopbackAddrs(t.opts.NodePortAddresses, t.networks)
	if t.node != nil && t.node.Equal(node) && slices.Equal(t.loopback, loopback) {
		return
	}
	for _, o := range overlaps {
		if !slices.Contains(t.overlaps, o) {
			result.Overlaps = append(result.Overlaps, o)
		}
	}
	t.node, t.loopback, t.overlaps = &node, loopback, overlaps
	result.Node, result.LoopbackNodePortAddrs = &node, loopback
	t.nodePorts.setNode(node, loopback)
}

// applyObjects takes over the Services and slices of d.
func (t *Tracker) applyObjects(d Delta, touch func(*service)) {
	for _, name := range d.DeletedServices {
		if s, ok := t.services[name]; ok {
			s.object = nil
			touch(s)
		}
	}
	for _, name := range d.DeletedEndpointSlices {
		t.removeSlice(name, touch)
	}
	for _, object := range d.Services {
		s := t.ensureService(types.NamespacedName{Namespace: object.Namespace, Name: object.Name})
		if !samePorts(s.object, object) {
			s.portsChangedRound = t.round
		}
		s.object = object
		touch(s)
	}
	for _, object := range d.EndpointSlices {
		name := types.NamespacedName{Namespace: object.Namespace, Name: object.Name}
		owner, ok := owningService(object)
		if was, had := t.sliceOwners[name]; had && (!ok || was.name != owner) {
			t.removeSlice(name, touch)
		}
		if !ok {
			continue
		}
		s := t.ensureService(owner)
		slice := newEndpointSlice(object, t.opts.NodeName)
		if i, ok := s.findSlice(slice.name); ok {
			s.slices[i] = slice
		} else {
			s.slices = slices.Insert(s.slices, i, slice)
			t.sliceOwners[name] = s
		}
		s.slicesRound = t.round
		touch(s)
	}
}

func (t *Tracker) ensureService(name types.NamespacedName) *service {
	s, ok := t.services[name]
	if !ok {
		s = &service{name: name}
		t.services[name] = s
	}
	return s
}

// findSlice returns the index of the slice with the name, or where it belongs.
func (s *service) findSlice(name string) (int, bool) {
	return slices.BinarySearchFunc(s.slices, name, func(slice *endpointSlice, name string) int {
		return strings.Compare(slice.name, name)
	})
}

func (t *Tracker) removeSlice(name types.NamespacedName, touch func(*service)) {
	s, ok := t.sliceOwners[name]
	if !ok {
		return
	}
	delete(t.sliceOwners, name)
	if i, ok := s.findSlice(name.Name); ok {
		s.slices = slices.Delete(s.slices, i, i+1)
	}
	touch(s)
}
