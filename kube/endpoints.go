package kube

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead.io/fairlead/dataplane"
)

// traits are the properties of an endpoint that its selection depends on. If several entries have
// the same address, the one with the smallest traits is used.
//
// Two pods can have the same address: a new pod can get the address of a terminating pod before
// the old object is deleted. An endpoint that moves from one slice to another is temporarily in
// both.
type traits uint16

const (
	// The hints are the least significant traits. They make the selection independent of the
	// order of the slices if entries differ in nothing else.
	notForZone    traits = 1 << iota // this node's zone is not in hints.forZones
	noZoneHint                       // hints.forZones is empty
	notForNode                       // this node is not in hints.forNodes
	noNodeHint                       // hints.forNodes is empty
	notOnThisNode                    // nodeName names another node or is missing
	onOtherNode                      // nodeName names another node
	notServing
	notReady
	terminating
)

func (t traits) has(bits traits) bool { return t&bits != 0 }

func (t traits) ready() bool { return !t.has(notReady) }

// serving reports whether existing UDP flows may stay with the endpoint. A ready endpoint is
// always serving, because pods of a Service with publishNotReadyAddresses can be ready without
// the condition serving.
func (t traits) serving() bool { return t.ready() || !t.has(notServing) }

// keepsAssociations reports whether existing SCTP associations may stay with the endpoint. Like
// TCP connections, they stay even if it is not ready, unless it is terminating and not serving.
func (t traits) keepsAssociations() bool { return t.serving() || !t.has(terminating) }

// candidate is an endpoint before selection.
type candidate struct {
	addr netip.AddrPort
	traits
}

// compare orders candidates by address and then by preference.
func (c candidate) compare(o candidate) int {
	if r := c.addr.Compare(o.addr); r != 0 {
		return r
	}
	return cmp.Compare(c.traits, o.traits)
}

// choice contains the endpoints selected for a port.
type choice struct {
	// cluster and local are the endpoints of the traffic policies Cluster and Local, sorted and
	// deduplicated. local is empty if no policy is Local. Every dataplane.Service of the port
	// shares these lists, so they must not be modified.
	cluster, local []dataplane.Endpoint
	// usableAnywhere is set if any endpoint of the cluster can receive connections.
	usableAnywhere bool
	// localTerminating is set if the local endpoints are terminating.
	localTerminating bool
	// zoneDependent is set if the choice may change with the zone of this node.
	zoneDependent bool
	// byCluster and byLocal have selected cluster and local.
	byCluster, byLocal selection
}

// endpoints selects the endpoints of each port.
func (c *conversion) endpoints(ports []portFamily, endpointSlices []*endpointSlice, policy policy) {
	if len(ports) == 0 {
		return
	}
	// Endpoints without a matching port are a problem of the Service. Missing endpoints are not.
	var populated, families [dataplane.IPv6 + 1]bool
	for i := range ports {
		families[ports[i].family] = true
	}
	find, read := portFinder(ports), 0 // number of candidates
	for _, slice := range endpointSlices {
		if !slice.hasFamily || !families[slice.family] {
			c.recorder.skipSlice(slice)
			continue
		}
		for _, p := range slice.problems {
			c.problems = append(c.problems, Problem{
				Service: c.name, UID: c.service.UID, EndpointSlice: slice.name, Field: p.field, Message: p.message,
			})
		}
		if len(slice.endpoints) > 0 {
			populated[slice.family] = true
		}
		for _, p := range slice.ports {
			port := find(portName{p.name, p.protocol, slice.family})
			if port == nil {
				continue
			}
			c.recorder.usePort(slice, p, port)
			port.matched = true
			if read += len(slice.endpoints); read > maxElements || port.beyondLimit {
				read -= len(port.candidates) + len(slice.endpoints)
				port.candidates, port.beyondLimit = nil, true
				continue
			}
			port.candidates = slice.appendCandidates(port.candidates, p.number, c.location)
		}
	}
	for i := range ports {
		p := &ports[i]
		p.candidates = preferredCandidates(p.candidates)
		p.chosen = chooseEndpoints(p.candidates, policy.internalLocal || policy.externalLocal)
		if populated[p.family] && !p.matched {
			c.unmatchedPorts = append(c.unmatchedPorts, c.newUnmatchedPort(p))
		}
	}
}

// portName identifies a Service's port in slices.
type portName struct {
	name     string
	protocol dataplane.Protocol
	family   dataplane.Family
}

// portFinder returns a function that finds a port, or returns nil.
func portFinder(ports []portFamily) func(portName) *portFamily {
	if len(ports) <= linearSearchMax {
		return func(name portName) *portFamily {
			for i := range ports {
				if ports[i].name() == name {
					return &ports[i]
				}
			}
			return nil
		}
	}
	byName := make(map[portName]*portFamily, len(ports))
	for i := range ports {
		byName[ports[i].name()] = &ports[i]
	}
	return func(name portName) *portFamily { return byName[name] }
}

func (p *portFamily) name() portName { return portName{p.port.Name, p.protocol, p.family} }

// unmatchedPort is a port that is missing in all slices, although there are slices with
// endpoints. It is a problem unless the slices are merely late.
type unmatchedPort struct {
	port    portName
	problem Problem
}

func (c *conversion) newUnmatchedPort(p *portFamily) unmatchedPort {
	if target := p.port.TargetPort.StrVal; target != "" {
		return unmatchedPort{p.name(), c.newProblem(elementPath("spec.ports", p.index, ".targetPort"),
			"no endpoint of family %s has a %s port %q, so connections are rejected: give a container port of the pods this name",
			p.family, p.protocol, target)}
	}
	return unmatchedPort{p.name(), c.newProblem(elementPath("spec.ports", p.index, ".name"),
		"no EndpointSlice of family %s has a %s port with the name %q, so connections are rejected: use the same name in both",
		p.family, p.protocol, p.port.Name)}
}

// samePorts reports whether the ports of slices written for one Service are also valid for the
// other.
func samePorts(a, b *ConvertedService) bool {
	return a != nil && b != nil && a.uid == b.uid && slices.EqualFunc(a.rest.Spec.Ports, b.rest.Spec.Ports, func(p, q corev1.ServicePort) bool {
		return p.Name == q.Name && p.Protocol == q.Protocol && p.TargetPort == q.TargetPort
	})
}

// conditionTraits returns the traits of an endpoint as seen from a node, without its hints.
func conditionTraits(ep *discoveryv1.Endpoint, node string) traits {
	var t traits
	if !isTrue(ep.Conditions.Ready, true) {
		t |= notReady
	}
	if !isTrue(ep.Conditions.Serving, true) {
		t |= notServing
	}
	if isTrue(ep.Conditions.Terminating, false) {
		t |= terminating
	}
	switch {
	case ep.NodeName == nil || *ep.NodeName == "":
		t |= notOnThisNode // it may be on this node, but this is unknown
	case *ep.NodeName != node:
		t |= notOnThisNode | onOtherNode
	}
	return t
}

func isTrue(condition *bool, ifNil bool) bool {
	if condition == nil {
		return ifNil
	}
	return *condition
}

// preferredCandidates returns the preferred candidate of each address, sorted by address. It
// reuses the slice.
func preferredCandidates(candidates []candidate) []candidate {
	slices.SortFunc(candidates, candidate.compare)
	candidates = slices.CompactFunc(candidates, func(a, b candidate) bool { return a.addr == b.addr })
	propagateLocal(candidates)
	return candidates
}

// chooseEndpoints selects the endpoints of both traffic policies from preferred candidates.
// Cluster selects the ready endpoints that hints allow, or else serving terminating ones. Local
// selects the ready endpoints on this node, or else serving terminating ones on this node.
func chooseEndpoints(candidates []candidate, local bool) choice {
	var c choice
	hints := topologyOf(candidates)
	c.zoneDependent = hints.zoneDependent
	c.cluster, c.byCluster = selectEndpoints(candidates, selection{hints: hints.excluded})
	c.usableAnywhere = len(c.cluster) > 0
	if !local {
		return c
	}
	c.local, c.byLocal = selectEndpoints(candidates, selection{local: true})
	c.localTerminating = c.byLocal.terminating
	if slices.Equal(c.cluster, c.local) {
		c.local = c.cluster
	}
	return c
}

// selectEndpoints returns the endpoints that s selects. If it selects none, selectEndpoints
// selects serving terminating endpoints, and returns the selection that it has used.
func selectEndpoints(candidates []candidate, s selection) ([]dataplane.Endpoint, selection) {
	endpoints := filterEndpoints(candidates, s)
	if len(endpoints) == 0 {
		s.terminating, s.hints = true, 0
		endpoints = filterEndpoints(candidates, s)
	}
	return endpoints, s
}

// selection defines which candidates receive connections.
type selection struct {
	// local selects only candidates on this node.
	local bool
	// terminating selects the serving terminating candidates, because no candidate is ready.
	terminating bool
	// hints contains the traits of candidates that hints exclude.
	hints traits
}

// exclusion returns why s does not select a candidate with these traits, or Selected.
func (s selection) exclusion(t traits) Exclusion {
	switch {
	case s.local && t.has(onOtherNode):
		return OnOtherNode
	case s.local && t.has(notOnThisNode):
		return OnUnknownNode
	case !t.ready() && !t.has(terminating):
		return NotReady
	case !t.ready() && t.has(notServing):
		return NotServing
	case !t.ready() && !s.terminating:
		return Terminating
	case t.has(s.hints & notForNode):
		return HintForOtherNode
	case t.has(s.hints & notForZone):
		return HintForOtherZone
	default:
		return Selected
	}
}

// servingExcluded returns the addresses of candidates that serve but are in neither list of the
// ServiceSpec: terminating endpoints, and endpoints excluded by a policy or by hints. All lists
// are sorted.
func servingExcluded(candidates []candidate, t *dataplane.ServiceSpec, serves func(traits) bool) []netip.AddrPort {
	var besides []netip.AddrPort
	endpoints, local := t.Endpoints, t.LocalEndpoints
	for _, c := range candidates {
		inEndpoints := skipTo(&endpoints, c.addr)
		inLocal := skipTo(&local, c.addr)
		if serves(c.traits) && !inEndpoints && !inLocal {
			besides = append(besides, c.addr)
		}
	}
	return slices.Clip(besides)
}

// skipTo drops the endpoints before addr and reports whether addr is next.
func skipTo(list *[]dataplane.Endpoint, addr netip.AddrPort) bool {
	for len(*list) > 0 {
		switch (*list)[0].Addr.Compare(addr) {
		case -1:
			*list = (*list)[1:]
		case 0:
			return true
		default:
			return false
		}
	}
	return false
}

// propagateLocal marks all candidates of an address as local if any is, because being local is
// a property of the pod. Candidates with the same address are adjacent.
func propagateLocal(candidates []candidate) {
	for i, c := range candidates {
		if c.has(onOtherNode) {
			continue
		}
		same := c.addr.Addr()
		for j := i - 1; j >= 0 && candidates[j].addr.Addr() == same && candidates[j].has(onOtherNode); j-- {
			candidates[j].traits &^= onOtherNode
		}
		for j := i + 1; j < len(candidates) && candidates[j].addr.Addr() == same && candidates[j].has(onOtherNode); j++ {
			candidates[j].traits &^= onOtherNode
		}
	}
}

// filterEndpoints returns the endpoints of the candidates that s selects.
func filterEndpoints(candidates []candidate, s selection) []dataplane.Endpoint {
	n := 0
	for _, c := range candidates {
		if s.exclusion(c.traits) == Selected {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	endpoints := make([]dataplane.Endpoint, 0, n)
	for _, c := range candidates {
		if s.exclusion(c.traits) == Selected {
			endpoints = append(endpoints, dataplane.Endpoint{Addr: c.addr, Local: !c.has(onOtherNode)})
		}
	}
	return endpoints
}
