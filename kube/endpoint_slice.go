package kube

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// endpointSlice is what a Tracker keeps of an EndpointSlice. A node has those of all
// endpoints of the cluster in memory, as long as they exist: the objects would
// take four times as much of it, and most of what the garbage collector looks at.
type endpointSlice struct {
	name string
	// family is that of the endpoints. Where there is none, as the slice has
	// names and not addresses, it is of no use, and the rest is empty.
	family    dataplane.Family
	hasFamily bool
	ports     []endpointPort
	endpoints []endpoint
	// hints are those that endpoints refer to.
	hints []*discoveryv1.EndpointHints
	// problems are those of ports and endpoints that are left out.
	problems []sliceProblem
}

// endpointPort is a port that can be used.
type endpointPort struct {
	name     string
	protocol dataplane.Protocol
	number   uint16
}

// endpoint is an endpoint that can be used. It has no pointers, which spares the
// garbage collector to look at it.
type endpoint struct {
	// addr is as of netip.Addr.As16.
	addr [16]byte
	// hints is the number of its hints in the slice, counted from 1; 0 says that
	// it has none.
	hints int32
	// traits are those that don't depend on hints.
	traits traits
}

// sliceProblem is what is wrong with a field.
type sliceProblem struct{ field, message string }

// owningService returns the name of the Service that the slice belongs to. It
// reports false for a slice that belongs to none, or to a headless one, which
// needs no proxy.
func owningService(object *discoveryv1.EndpointSlice) (types.NamespacedName, bool) {
	name := object.Labels[discoveryv1.LabelServiceName]
	_, headless := object.Labels[corev1.IsHeadlessService]
	if name == "" || headless {
		return types.NamespacedName{}, false
	}
	return types.NamespacedName{Namespace: object.Namespace, Name: name}, true
}

// newEndpointSlice reads an EndpointSlice, on a node of this name.
func newEndpointSlice(object *discoveryv1.EndpointSlice, node string) *endpointSlice {
	s := &endpointSlice{name: object.Name}
	if s.family, s.hasFamily = addressTypeFamily(object.AddressType); !s.hasFamily {
		return s
	}
	s.ports = make([]endpointPort, 0, len(object.Ports))
	for i := range object.Ports {
		s.addPort(i, &object.Ports[i])
	}
	s.endpoints = make([]endpoint, 0, len(object.Endpoints))
	for i := range object.Endpoints {
		s.addEndpoint(i, &object.Endpoints[i], node)
	}
	return s
}

func (s *endpointSlice) addProblem(field, format string, args ...any) {
	s.problems = append(s.problems, sliceProblem{field, fmt.Sprintf(format, args...)})
}

func (s *endpointSlice) addPort(i int, p *discoveryv1.EndpointPort) {
	if p.Name == nil {
		s.addProblem(elementPath("ports", i, ".name"), `missing: use the Service port's name, or "" for an unnamed port`)
		return
	}
	var text corev1.Protocol
	if p.Protocol != nil {
		text = *p.Protocol
	}
	protocol, ok := protocolOf(text)
	if !ok {
		s.addProblem(elementPath("ports", i, ".protocol"), "%q is not a protocol: use TCP, UDP or SCTP", text)
		return
	}
	if p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
		s.addProblem(elementPath("ports", i, ".port"), "missing or not a port: use 1 to 65535")
		return
	}
	s.ports = append(s.ports, endpointPort{*p.Name, protocol, uint16(*p.Port)}) //nolint:gosec // the range was checked above
}

func (s *endpointSlice) addEndpoint(i int, ep *discoveryv1.Endpoint, node string) {
	if len(ep.Addresses) == 0 {
		s.addProblem(elementPath("endpoints", i, ".addresses"), "empty: name the endpoint's address")
		return
	}
	// All addresses of an endpoint are the same pod; consumers use the first, as
	// the API says.
	addr, err := parseAddr(ep.Addresses[0])
	if err == nil {
		err = validateEndpointAddr(addr, s.family)
	}
	if err != nil {
		s.addProblem(elementPath("endpoints", i, ".addresses[0]"), "%q %v: use the address of a pod", ep.Addresses[0], err)
		return
	}
	s.endpoints = append(s.endpoints, endpoint{addr: addr.As16(), hints: s.hintIndex(ep.Hints), traits: conditionTraits(ep, node)})
}

// hintIndex returns the number of an endpoint's hints. Sources share equal ones.
func (s *endpointSlice) hintIndex(h *discoveryv1.EndpointHints) int32 {
	if h == nil {
		return 0
	}
	i := len(s.hints) - 1
	if i < 0 || s.hints[i] != h {
		if i = slices.Index(s.hints[:min(len(s.hints), linearSearchMax)], h); i < 0 {
			i = len(s.hints)
			s.hints = append(s.hints, h)
		}
	}
	return int32(i) + 1 //nolint:gosec // there are no more than endpoints, which fit into memory
}

// address returns the endpoint's address.
func (e *endpoint) address() netip.Addr { return netip.AddrFrom16(e.addr).Unmap() }

// appendCandidates appends the endpoints as seen from a place, at a port.
func (s *endpointSlice) appendCandidates(to []candidate, port uint16, here location) []candidate {
	to = slices.Grow(to, len(s.endpoints))
	for i := range s.endpoints {
		e := &s.endpoints[i]
		var hints *discoveryv1.EndpointHints
		if e.hints > 0 {
			hints = s.hints[e.hints-1]
		}
		to = append(to, candidate{addr: netip.AddrPortFrom(e.address(), port), traits: e.traits | here.hintTraits(hints)})
	}
	return to
}
