package kube

import (
	discoveryv1 "k8s.io/api/discovery/v1"
)

// hintTraits returns what an endpoint's hints say to this place.
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

// topology is how hints narrow the ready endpoints of a port.
type topology struct {
	// excluded are the traits of those that are left out.
	excluded traits
	// zoneDependent says that the zone of this node takes part in the decision.
	zoneDependent bool
}

// topologyOf decides which hints are followed. If every ready candidate has a
// hint for nodes and one of them is for this node, only those for this node are
// used; or else, if every one has a hint for zones and one of them is for this
// zone, only those for this zone; or else all.
func topologyOf(candidates []candidate) topology {
	ready := false
	var some traits // that at least one ready candidate has
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
