package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// endpointSlice is the part of an EndpointSlice that a Tracker keeps. A node holds all endpoints
// of the cluster in memory. Keeping the objects would take four times the memory and would be
// most of the garbage collector's work.
type endpointSlice struct {
	name string
	// family is the family of the endpoints. If the slice contains names instead of addresses,
	// hasFamily is false and the remaining fields are empty.
	family    dataplane.Family
	hasFamily bool
	ports     []endpointPort
	endpoints []endpoint
	// hints contains the hints that endpoints refer to.
	hints []*discoveryv1.EndpointHints
	// problems contains the problems of ports and endpoints that are skipped.
	problems []sliceProblem
}

// ConvertedSlice is an EndpointSlice in the form that a [Tracker] keeps. It takes about a sixth of
// the memory of the object, so a source of many objects converts each of them as it arrives.
type ConvertedSlice struct {
	namespace string
	// service is the Service's name. It is empty if the slice belongs to no Service, or to a
	// headless one, which needs no proxy.
	service string
	// trigger is the time of the slice's [Trigger], or zero.
	trigger time.Time
	slice   *endpointSlice
}

// ConvertSlice converts an EndpointSlice. node is the NodeName of the Tracker's [Options]. The
// result keeps strings and hints of the object, but not the object.
func ConvertSlice(object *discoveryv1.EndpointSlice, node string) *ConvertedSlice {
	c := &ConvertedSlice{namespace: object.Namespace, slice: &endpointSlice{name: object.Name}}
	owner, ok := owningService(object)
	if !ok {
		return c
	}
	c.service = owner.Name
	if text := object.Annotations[corev1.EndpointsLastChangeTriggerTime]; text != "" {
		if at, err := time.Parse(time.RFC3339Nano, text); err == nil {
			c.trigger = at
		}
	}
	c.slice.convert(object, node)
	return c
}

// Name returns the name of the EndpointSlice.
func (c *ConvertedSlice) Name() types.NamespacedName {
	return types.NamespacedName{Namespace: c.namespace, Name: c.slice.name}
}

// endpointPort is a valid port.
type endpointPort struct {
	name     string
	protocol dataplane.Protocol
	number   uint16
}

// endpoint is a valid endpoint. It contains no pointers, so that the garbage collector does not
// scan it.
type endpoint struct {
	// addr has the form of netip.Addr.As16.
	addr [16]byte
	// hints is the 1-based index of the endpoint's hints in endpointSlice.hints; 0 means no
	// hints.
	hints int32
	// traits does not include the traits of hints.
	traits traits
}

// sliceProblem is a problem with a field.
type sliceProblem struct{ field, message string }

// owningService returns the name of the Service that the slice belongs to. It returns false if
// the slice belongs to no Service, or to a headless one, which needs no proxy.
func owningService(object *discoveryv1.EndpointSlice) (types.NamespacedName, bool) {
	name := object.Labels[discoveryv1.LabelServiceName]
	_, headless := object.Labels[corev1.IsHeadlessService]
	if name == "" || headless {
		return types.NamespacedName{}, false
	}
	return types.NamespacedName{Namespace: object.Namespace, Name: name}, true
}

// convert sets the fields except name from an EndpointSlice on the named node.
func (s *endpointSlice) convert(object *discoveryv1.EndpointSlice, node string) {
	if s.family, s.hasFamily = addressTypeFamily(object.AddressType); !s.hasFamily {
		return
	}
	s.ports = make([]endpointPort, 0, len(object.Ports))
	for i := range object.Ports {
		s.addPort(i, &object.Ports[i])
	}
	s.endpoints = make([]endpoint, 0, len(object.Endpoints))
	for i := range object.Endpoints {
		s.addEndpoint(i, &object.Endpoints[i], node)
	}
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
		s.addProblem(elementPath("endpoints", i, ".addresses"), "empty: set the endpoint's address")
		return
	}
	// All addresses of an endpoint belong to the same pod. The API tells consumers to use the
	// first.
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

// hintIndex returns the 1-based index of h in s.hints and adds h if necessary. Sources share
// equal hints, so comparing pointers is sufficient.
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
	return int32(i) + 1 //nolint:gosec // at most the number of endpoints, which fit into memory
}

// address returns the endpoint's address.
func (e *endpoint) address() netip.Addr { return netip.AddrFrom16(e.addr).Unmap() }

// appendCandidates appends the endpoints with the given port, as seen from a location.
func (s *endpointSlice) appendCandidates(to []candidate, port uint16, loc location) []candidate {
	to = slices.Grow(to, len(s.endpoints))
	for i := range s.endpoints {
		e := &s.endpoints[i]
		var hints *discoveryv1.EndpointHints
		if e.hints > 0 {
			hints = s.hints[e.hints-1]
		}
		to = append(to, candidate{addr: netip.AddrPortFrom(e.address(), port), traits: e.traits | loc.hintTraits(hints)})
	}
	return to
}
