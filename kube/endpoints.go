package kube

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead.io/fairlead/dataplane"
)

// traits are what counts about an endpoint when it is chosen. Of two entries
// with one address the one with the smaller traits is believed.
//
// Two pods can have one address: that of a terminating pod can be given to a new
// one before the old object is gone. And an endpoint that moves from one slice
// to another is in both for a while.
type traits uint16

const (
	// The hints come last. Where entries differ in nothing else they only make
	// the choice independent of the order of the slices.
	notForZone    traits = 1 << iota // this node's zone is not in hints.forZones
	noZoneHint                       // hints.forZones is empty
	notForNode                       // this node is not in hints.forNodes
	noNodeHint                       // hints.forNodes is empty
	notOnThisNode                    // nodeName is another node's, or missing
	onOtherNode                      // nodeName is another node's
	notServing
	notReady
	terminating
)

func (t traits) has(bits traits) bool { return t&bits != 0 }

func (t traits) ready() bool { return !t.has(notReady) }

// servingTerminating says that the endpoint takes connections if no ready one does.
func (t traits) servingTerminating() bool {
	return t.has(notReady) && t.has(terminating) && !t.has(notServing)
}

// serving says that the endpoint does not need to be left by those who talk to
// it. A ready one counts whatever its condition serving says: pods of a Service
// with publishNotReadyAddresses can be ready without serving.
func (t traits) serving() bool { return t.ready() || !t.has(notServing) }

// keepsAssociations says that those who have an association of SCTP with the
// endpoint need not leave it. They may even if it is not ready, as connections of
// TCP do, unless it is about to end.
func (t traits) keepsAssociations() bool { return t.serving() || !t.has(terminating) }

// candidate is an endpoint before the choice among candidates is made.
type candidate struct {
	addr netip.AddrPort
	traits
}

// compare orders candidates by address, and those with the same address with
// the one to believe first.
func (c candidate) compare(o candidate) int {
	if r := c.addr.Compare(o.addr); r != 0 {
		return r
	}
	return cmp.Compare(c.traits, o.traits)
}

// choice is what connections to a port go to.
type choice struct {
	// cluster and local are the endpoints of the traffic policies of the same
	// names, sorted and unique. local is empty where no policy is Local. They
	// are shared with every dataplane.Service made of them, and so must not be
	// changed.
	cluster, local []dataplane.Endpoint
	// usableAnywhere says that an endpoint of the cluster can take connections.
	usableAnywhere bool
	// localTerminating says that the local ones are terminating.
	localTerminating bool
	// zoneDependent says that another zone of this node may give another choice.
	zoneDependent bool
}

// endpoints gives each port its endpoints.
func (c *conversion) endpoints(ports []portFamily, endpointSlices []*endpointSlice, policy policy) {
	if len(ports) == 0 {
		return
	}
	// A Service whose pods are missing is no problem of its objects; one whose
	// endpoints are there under another port name is.
	var populated, families [dataplane.IPv6 + 1]bool
	for i := range ports {
		families[ports[i].family] = true
	}
	find, read := portFinder(ports), 0 // candidates
	for _, slice := range endpointSlices {
		if !slice.hasFamily || !families[slice.family] {
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

// portName is what a Service's port is found by in slices.
type portName struct {
	name     string
	protocol dataplane.Protocol
	family   dataplane.Family
}

// portFinder returns a function that finds a port, or nil.
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

// unmatchedPort is a port that no slice knows although there are slices with
// endpoints. It is a problem if the slices are not just late.
type unmatchedPort struct {
	port    portName
	problem Problem
}

func (c *conversion) newUnmatchedPort(p *portFamily) unmatchedPort {
	if target := p.port.TargetPort.StrVal; target != "" {
		return unmatchedPort{p.name(), c.newProblem(elementPath("spec.ports", p.index, ".targetPort"),
			"no endpoint of family %s has a %s port %q, so connections are refused: give a container port of the pods this name",
			p.family, p.protocol, target)}
	}
	return unmatchedPort{p.name(), c.newProblem(elementPath("spec.ports", p.index, ".name"),
		"no EndpointSlice of family %s has a %s port with the name %q, so connections are refused: use the same name in both",
		p.family, p.protocol, p.port.Name)}
}

// samePorts reports whether slices that were written for one Service are right
// for the other, as far as ports go.
func samePorts(a, b *corev1.Service) bool {
	return a != nil && b != nil && a.UID == b.UID && slices.EqualFunc(a.Spec.Ports, b.Spec.Ports, func(p, q corev1.ServicePort) bool {
		return p.Name == q.Name && p.Protocol == q.Protocol && p.TargetPort == q.TargetPort
	})
}

// conditionTraits returns what counts about an endpoint as seen from a node, but for its
// hints.
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
		t |= notOnThisNode // but it may be
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

// preferredCandidates returns the candidate to believe of each address, sorted by address.
// It reuses the list.
func preferredCandidates(candidates []candidate) []candidate {
	slices.SortFunc(candidates, candidate.compare)
	candidates = slices.CompactFunc(candidates, func(a, b candidate) bool { return a.addr == b.addr })
	propagateLocal(candidates)
	return candidates
}

// chooseEndpoints returns what connections go to: with the policy Cluster the ready
// endpoints that the hints leave, or else those that are terminating and still
// serve; with the policy Local the ready ones of this node, or else those of
// this node that are terminating and still serve. The candidates are those
// believed.
func chooseEndpoints(candidates []candidate, local bool) choice {
	var c choice
	hints := topologyOf(candidates)
	c.zoneDependent = hints.zoneDependent
	c.cluster = filterEndpoints(candidates, func(t traits) bool { return t.ready() && !t.has(hints.excluded) })
	if len(c.cluster) == 0 {
		c.cluster = filterEndpoints(candidates, traits.servingTerminating)
	}
	c.usableAnywhere = len(c.cluster) > 0
	if !local {
		return c
	}
	c.local = filterEndpoints(candidates, func(t traits) bool { return t.ready() && !t.has(notOnThisNode) })
	if len(c.local) == 0 {
		c.local = filterEndpoints(candidates, func(t traits) bool { return t.servingTerminating() && !t.has(notOnThisNode) })
		c.localTerminating = true
	}
	if slices.Equal(c.cluster, c.local) {
		c.local = c.cluster
	}
	return c
}

// servingExcluded returns the addresses of the candidates that serve although the
// treatment names them nowhere: those that terminate, and those that a policy or
// hints leave out. All lists are sorted.
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

// skipTo drops the endpoints before addr and reports whether addr is the next.
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

// propagateLocal makes all candidates of an address local if one of them is: it is
// the pod that is. Those of one address stand together.
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

// filterEndpoints returns the endpoints of the candidates with these traits.
func filterEndpoints(candidates []candidate, wanted func(traits) bool) []dataplane.Endpoint {
	n := 0
	for _, c := range candidates {
		if wanted(c.traits) {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	endpoints := make([]dataplane.Endpoint, 0, n)
	for _, c := range candidates {
		if wanted(c.traits) {
			endpoints = append(endpoints, dataplane.Endpoint{Addr: c.addr, Local: !c.has(onOtherNode)})
		}
	}
	return endpoints
}
