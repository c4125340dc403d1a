package kube

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// Options configures a [Tracker].
type Options struct {
	// NodeName is this node's name in the nodeName and the hints of endpoints. It determines
	// [dataplane.Endpoint.Local] and the endpoints that the traffic policy Local selects. If it
	// is empty, the policy selects no endpoints, and only endpoints without a nodeName may be
	// local.
	NodeName string
	// BindAddress, if valid and not unspecified, replaces the node's primary address of its
	// family. It corresponds to kube-proxy's --bind-address.
	BindAddress netip.Addr
	// MasqueradeAll masquerades every client of a cluster IP.
	MasqueradeAll bool
	// DetectLocal defines how to detect pod traffic.
	DetectLocal DetectLocal
	// NodePortAddresses selects the addresses that serve node ports.
	NodePortAddresses NodePortAddresses
	// PingServiceIPs sets [dataplane.Node.PingServiceIPs].
	PingServiceIPs bool
	// ProtectLoopback sets [dataplane.Node.ProtectLoopback]. Node ports at loopback addresses set
	// it as well.
	ProtectLoopback bool
	// ServiceProxyName selects the Services with this value of the label
	// [LabelServiceProxyName]. If it is empty, the Services without the label are served.
	// Otherwise another proxy serves these, so unassigned addresses of the ServiceCIDRs are not
	// dropped.
	ServiceProxyName string
	// Schedulers lists the supported values of [AnnotationIPVSScheduler]. It is empty if the
	// backend has no schedulers.
	Schedulers []string
	// Balancing describes the supported values of [AnnotationBalancing].
	Balancing Balancing
}

// Result contains the changes that a [Delta] causes.
type Result struct {
	// Changes contains the new value of each key that changed, nil if the key is gone.
	Changes map[dataplane.Key]*dataplane.Service
	// Problems contains the new problems, sorted. A persisting problem is not reported again.
	Problems []Problem
	// Node is the new dataplane.Node. It is nil if neither Node nor LoopbackNodePortAddrs has
	// changed. The first Result always contains it.
	Node *dataplane.Node
	// LoopbackNodePortAddrs is set together with Node. It contains the loopback addresses of this
	// node's interfaces that [Options.NodePortAddresses] selects explicitly, sorted. They are not
	// in [dataplane.Node.NodePortAddrs], because the kernel does not forward from them. If there
	// are any, of either family, Node.LocalhostNodePorts is set, and another component serves the
	// TCP node ports at the loopback addresses of these families.
	LoopbackNodePortAddrs []netip.Addr
	// Overlaps is set together with Node and contains the new overlaps of ServiceCIDRs.
	// Node.ServiceCIDRs excludes the overlapping addresses.
	Overlaps []Overlap
	// NodeHealth is the new state of the Node object, or nil if it has not changed. It is first
	// set in the Result of a Delta with Node or NodeDeleted; before, the state is unknown.
	NodeHealth *NodeHealth
	// HealthChecks contains the new and changed health-check node ports by Service, nil if a port
	// is gone.
	HealthChecks map[types.NamespacedName]*HealthCheck
	// NodePortsWithoutAddress contains at most one new report per family. A family is reported
	// again only after an address has served it.
	NodePortsWithoutAddress []NodePortsWithoutAddress

	triggers []Trigger // of the Delta's EndpointSlices
}

// Tracker keeps Services and EndpointSlices by name and incrementally computes the state that
// this node must have. Processing a [Delta] visits the Services that it changes, directly or
// through their EndpointSlices, and the Services that conflict with them. If the node has moved
// to another zone, it also visits the Services whose endpoints have hints for zones. It never
// visits all Services.
//
// A Tracker is not safe for concurrent use.
type Tracker struct {
	opts     Options
	location location
	services map[types.NamespacedName]*service
	// sliceOwners contains the Service of each EndpointSlice that belongs to one.
	sliceOwners map[types.NamespacedName]*service
	claims      claims
	// zoneDependent contains the Services whose endpoints may change with the zone of this node.
	zoneDependent map[*service]struct{}
	// byClusterIP contains the Services by cluster IP, for the case that the node gains or loses
	// that address.
	byClusterIP map[netip.Addr][]*service

	networks networks
	// node and loopback are the values of the last Result with a Node. node is nil before the
	// first one.
	node     *dataplane.Node
	loopback []netip.Addr
	overlaps []Overlap
	// health is the value of the last Result with a NodeHealth, and nil before the first one.
	health *NodeHealth

	nodePorts nodePortCheck

	// round is the number of Deltas processed.
	round uint64
	// expanded is memory for the Service that is being converted.
	expanded corev1.Service
}

// service is the Tracker's state for the name of a Service: the object, its slices, or both.
type service struct {
	name   types.NamespacedName
	object *ConvertedService
	// slices is sorted by name.
	slices []*endpointSlice

	// createdUnix is the creation time used for the claims, in seconds, the precision of the API.
	// A Service without a creation time counts as the oldest.
	createdUnix int64
	// portClaims are the Service's claims, and clusterIPs its cluster IPs.
	portClaims []portClaims
	clusterIPs []netip.Addr
	// problems contains the problems of the objects and of conflicts, sorted and deduplicated.
	problems []Problem
	// programmed is the result of the last resolve, in the order of portClaims. An element is
	// nil if every frontend belongs to other Services.
	programmed []*dataplane.Service
	// healthCheck is the health-check node port; its Port is 0 without one.
	healthCheck HealthCheck

	// dirtyRound is the last round in which the Service was resolved. claimsChangedRound is the
	// last round in which its claims, or the owner of a frontend that it claims, changed.
	dirtyRound, claimsChangedRound uint64
	// portsChangedRound is the last round in which fields changed that the slices' ports depend
	// on. slicesRound is the last round that delivered a slice of the Service.
	portsChangedRound, slicesRound uint64
	// unmatchedPorts lists the ports that were reported as missing in all slices.
	unmatchedPorts []portName
	// hasConflict is set if another Service owns a frontend that this Service claims.
	hasConflict bool
}

// portClaims contains the frontends of one kind that a port claims.
type portClaims struct {
	port      int
	kind      dataplane.Kind
	frontends []dataplane.Frontend
}

func (c portClaims) equal(o portClaims) bool {
	return c.port == o.port && c.kind == o.kind && slices.Equal(c.frontends, o.frontends)
}

// NewTracker returns a Tracker without any objects.
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

// Apply stores the objects of d and returns the resulting changes. Deletions are processed first:
// an object that is both deleted and delivered exists afterwards. It is valid to deliver an
// unchanged object again and to delete an unknown one.
//
// When the Node object is deleted, NodeHealth reports it. Its zone, addresses and pod networks
// remain in use, because the node still exists and has connections.
func (t *Tracker) Apply(d Delta) Result {
	return t.process(func(result *Result, markDirty func(*service)) {
		t.applyNode(d, result, markDirty)
		t.applyObjects(d, result, markDirty)
	})
}

// process runs change, which marks Services as dirty, then resolves these Services and returns
// the Result.
func (t *Tracker) process(change func(result *Result, markDirty func(*service))) Result {
	t.round++
	var result Result
	var dirty []*service
	change(&result, func(s *service) {
		if s.dirtyRound != t.round {
			s.dirtyRound = t.round
			dirty = append(dirty, s)
		}
	})
	t.resolveAll(dirty, &result)
	t.nodePorts.updateServices(result.Changes)
	result.NodePortsWithoutAddress = t.nodePorts.newlyWithoutAddress()
	return result
}

// Configure replaces the options and returns the resulting changes. The node name, the
// schedulers, the balancing and the name of the proxy cannot change: Configure ignores those of opts.
func (t *Tracker) Configure(opts Options) Result {
	opts.NodeName, opts.ServiceProxyName = t.opts.NodeName, t.opts.ServiceProxyName
	opts.Schedulers, opts.Balancing = t.opts.Schedulers, t.opts.Balancing
	t.opts = opts
	return t.process(t.updateNode)
}

// applyNode stores the node's part of d.
func (t *Tracker) applyNode(d Delta, result *Result, markDirty func(*service)) {
	changed := t.node == nil
	info := t.networks.node
	if d.NodeDeleted {
		info.health = NodeHealth{}
	}
	if d.Node != nil {
		info = newNodeInfo(d.Node)
		changed = changed || !info.equalNetwork(t.networks.node)
	}
	if (d.Node != nil || d.NodeDeleted) && (t.health == nil || *t.health != info.health) {
		health := info.health
		t.health = &health
		result.NodeHealth = &health
	}
	t.networks.node = info
	if t.location.zone != info.zone {
		t.location.zone = info.zone
		for s := range t.zoneDependent {
			markDirty(s)
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
		t.updateNode(result, markDirty)
	}
}

// updateNode computes the dataplane.Node and marks Services as dirty whose cluster IP has become,
// or is no longer, an address of the node.
func (t *Tracker) updateNode(result *Result, markDirty func(*service)) {
	own := t.networks.ownAddrs(t.opts.BindAddress)
	for addr := range symmetricDifference(t.location.ownAddrs, own) {
		for _, s := range t.byClusterIP[addr] {
			markDirty(s)
		}
	}
	t.location.ownAddrs = own
	node := newDataplaneNode(t.opts, t.networks)
	var overlaps []Overlap
	node.ServiceCIDRs, overlaps = subtractOverlaps(node.ServiceCIDRs, slices.Concat(node.PodCIDRs, node.LocalPodCIDRs), own)
	if t.opts.ServiceProxyName != "" {
		node.ServiceCIDRs, overlaps = nil, nil
	}
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

// applyObjects stores the Services and slices of d.
func (t *Tracker) applyObjects(d Delta, result *Result, markDirty func(*service)) {
	if len(t.services) == 0 { // the first list
		n := len(d.Services) + len(d.ConvertedServices)
		t.services = make(map[types.NamespacedName]*service, n)
		t.sliceOwners = make(map[types.NamespacedName]*service, len(d.EndpointSlices)+len(d.ConvertedSlices))
		t.byClusterIP = make(map[netip.Addr][]*service, n)
		t.claims.owners = make(map[dataplane.Frontend]claim, n)
	}
	for _, name := range d.DeletedServices {
		if s, ok := t.services[name]; ok {
			s.object = nil
			markDirty(s)
		}
	}
	for _, name := range d.DeletedEndpointSlices {
		t.removeSlice(name, markDirty)
	}
	for _, object := range d.Services {
		t.applyService(newConvertedService(object), markDirty)
	}
	for _, object := range d.ConvertedServices {
		t.applyService(object, markDirty)
	}
	for _, object := range d.EndpointSlices {
		t.applySlice(ConvertSlice(object, t.opts.NodeName), result, markDirty)
	}
	for _, slice := range d.ConvertedSlices {
		t.applySlice(slice, result, markDirty)
	}
}

// applyService stores a new or changed Service.
func (t *Tracker) applyService(object *ConvertedService, markDirty func(*service)) {
	s := t.ensureService(object.name)
	if !samePorts(s.object, object) {
		s.portsChangedRound = t.round
	}
	s.object = object
	markDirty(s)
}

// applySlice stores a new or changed slice.
func (t *Tracker) applySlice(c *ConvertedSlice, result *Result, markDirty func(*service)) {
	name, owner := c.Name(), types.NamespacedName{Namespace: c.namespace, Name: c.service}
	if old, exists := t.sliceOwners[name]; exists && (c.service == "" || old.name != owner) {
		t.removeSlice(name, markDirty)
	}
	if c.service == "" {
		return
	}
	if !c.trigger.IsZero() {
		result.triggers = append(result.triggers, Trigger{Service: owner, At: c.trigger})
	}
	s := t.ensureService(owner)
	slice := c.slice
	if i, ok := s.findSlice(slice.name); ok {
		s.slices[i] = slice
	} else {
		s.slices = slices.Insert(s.slices, i, slice)
		t.sliceOwners[name] = s
	}
	s.slicesRound = t.round
	markDirty(s)
}

func (t *Tracker) ensureService(name types.NamespacedName) *service {
	s, ok := t.services[name]
	if !ok {
		s = &service{name: name}
		t.services[name] = s
	}
	return s
}

// findSlice returns the index at which the named slice is or would be inserted.
func (s *service) findSlice(name string) (int, bool) {
	return slices.BinarySearchFunc(s.slices, name, func(slice *endpointSlice, name string) int {
		return strings.Compare(slice.name, name)
	})
}

func (t *Tracker) removeSlice(name types.NamespacedName, markDirty func(*service)) {
	s, ok := t.sliceOwners[name]
	if !ok {
		return
	}
	delete(t.sliceOwners, name)
	if i, ok := s.findSlice(name.Name); ok {
		s.slices = slices.Delete(s.slices, i, i+1)
	}
	markDirty(s)
}
