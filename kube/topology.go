package kube

import (
	discoveryv1 "k8s.io/api/discovery/v1"
)

// hintTraits returns the traits of an endpoint's hints at this location.
func (l location) hintTraits(hints *discoveryv1.EndpointHints) traits {
	t := noZoneHint | notForZone | noNodeHint | notForNode
	if hints == nil {
		return t
	}
	for i := range hints.ForZones {
		t &^= noZoneHint
		if l.zone != "" && hints.ForZones[i].Name == l.zone {
			t &^= notForZone
		}
	}
	for i := range hints.ForNodes {
		t &^= noNodeHint
		if l.node != "" && hints.ForNodes[i].Name == l.node {
			t &^= notForNode
		}
	}
	return t
}

// topology is the effect of hints on the ready endpoints of a port.
type topology struct {
	// excluded contains the traits of the endpoints that hints exclude.
	excluded traits
	// zoneDependent is set if the result depends on the zone of this node.
	zoneDependent bool
}

// topologyOf evaluates the hints of the ready candidates. If every one has a hint for nodes and
// at least one hint names this node, only those with a hint for this node are used. Otherwise, if
// every one has a hint for zones and at least one hint names this node's zone, only those with a
// hint for the zone are used. Otherwise all are used.
func topologyOf(candidates []candidate) topology {
	ready := false
	var some traits // traits of at least one ready candidate
	all := notForNode | notForZone
	for _, c := range candidates {
		if c.ready() {
			ready = true
			some |= c.traits
			all &= c.traits
		}
	}
	switch {
	case !ready:
		return topology{}
	case !some.has(noNodeHint) && !all.has(notForNode):
		return topology{excluded: notForNode}
	case some.has(noZoneHint):
		return topology{}
	case all.has(notForZone):
		return topology{zoneDependent: true}
	default:
		return topology{excluded: notForZone, zoneDependent: true}
	}
}
