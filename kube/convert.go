package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead/dataplane"
)

// labelServiceProxyName marks a Service that another proxy serves. The constant
// of the same name is not in k8s.io/api.
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// annotationTopologyMode is the older way of asking for trafficDistribution.
const annotationTopologyMode = corev1.AnnotationTopologyMode

// wanted is one Service port in one family as its objects ask for it, before
// collisions are settled.
type wanted struct {
	key dataplane.Key
	// port is the index in spec.ports.
	port     int
	frontend dataplane.Frontend
	// endpoints are shared with the dataplane.Service made of them, and so
	// must not be changed.
	endpoints []dataplane.Endpoint
}

// sameClaim reports whether w and o claim the same frontend for the same port.
func (w wanted) sameClaim(o wanted) bool { return w.port == o.port && w.frontend == o.frontend }

// served reports whether the Service is one for this proxy to serve.
func served(svc *corev1.Service) bool {
	if svc == nil || svc.Spec.Type == corev1.ServiceTypeExternalName {
		return false
	}
	if svc.Spec.ClusterIP == corev1.ClusterIPNone || (len(svc.Spec.ClusterIPs) > 0 && svc.Spec.ClusterIPs[0] == corev1.ClusterIPNone) {
		return false
	}
	_, other := svc.Labels[labelServiceProxyName]
	return !other
}

// serviceOf returns the name of the Service that the slice belongs to. It
// reports false for a slice that belongs to none, or to a headless one, which
// needs no proxy.
func serviceOf(slice *discoveryv1.EndpointSlice) (types.NamespacedName, bool) {
	name := slice.Labels[discoveryv1.LabelServiceName]
	_, headless := slice.Labels[corev1.IsHeadlessService]
	if name == "" || headless {
		return types.NamespacedName{}, false
	}
	return types.NamespacedName{Namespace: slice.Namespace, Name: name}, true
}

// convert returns what the Service asks for, given all slices that belong to it,
// and the problems in these objects, sorted and without doubles.
func convert(svc *corev1.Service, endpointSlices map[string]*discoveryv1.EndpointSlice, nodeName string) ([]wanted, []Problem) {
	if !served(svc) {
		return nil, nil
	}
	c := conversion{service: types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}}
	c.unsupported(svc)
	addrs := c.clusterIPs(svc)
	c.ports(svc, addrs)
	c.endpoints(svc, endpointSlices, nodeName)
	slices.SortFunc(c.problems, Problem.Compare)
	return c.wants, slices.Compact(c.problems)
}

// conversion gathers the result of convert.
type conversion struct {
	service  types.NamespacedName
	wants    []wanted
	problems []Problem
}

func (c *conversion) problem(field, format string, args ...any) {
	c.problems = append(c.problems, Problem{Service: c.service, Field: field, Message: fmt.Sprintf(format, args...)})
}

func (c *conversion) sliceProblem(slice, field, format string, args ...any) {
	c.problems = append(c.problems, Problem{
		Service: c.service, EndpointSlice: slice, Field: field, Message: fmt.Sprintf(format, args...),
	})
}

// unsupported names every field that asks for something this proxy does not do
// yet, so that nothing is left out in silence.
func (c *conversion) unsupported(svc *corev1.Service) {
	spec := &svc.Spec
	switch spec.Type {
	case corev1.ServiceTypeNodePort:
		c.problem("spec.type", "NodePort is not yet supported: the Service answers on its cluster IP only, not on node ports")
	case corev1.ServiceTypeLoadBalancer:
		c.problem("spec.type", "LoadBalancer is not yet supported: "+
			"the Service answers on its cluster IP only, not on node ports or load balancer addresses")
	case corev1.ServiceTypeClusterIP, corev1.ServiceTypeExternalName, "":
	default:
		c.problem("spec.type", "%q is not a type of Service: use ClusterIP", spec.Type)
	}
	if len(spec.ExternalIPs) > 0 {
		c.problem("spec.externalIPs", "not yet supported: the Service answers on its cluster IP only; remove the field")
	}
	if len(spec.LoadBalancerSourceRanges) > 0 {
		c.problem("spec.loadBalancerSourceRanges", "not yet supported: no client is refused; remove the field")
	}
	if a := spec.SessionAffinity; a != "" && a != corev1.ServiceAffinityNone {
		c.problem("spec.sessionAffinity", "%s is not yet supported: each connection goes to a random endpoint; use None", a)
	}
	if p := spec.InternalTrafficPolicy; p != nil && *p != corev1.ServiceInternalTrafficPolicyCluster {
		c.problem("spec.internalTrafficPolicy",
			"%s is not yet supported: connections go to the endpoints of all nodes; use Cluster", *p)
	}
	if p := spec.ExternalTrafficPolicy; p != "" && p != corev1.ServiceExternalTrafficPolicyCluster {
		c.problem("spec.externalTrafficPolicy",
			"%s is not yet supported: the Service answers on its cluster IP only; use Cluster", p)
	}
	if d := spec.TrafficDistribution; d != nil && *d != "" {
		c.problem("spec.trafficDistribution",
			"%s is not yet supported: connections go to all ready endpoints alike; remove the field", *d)
	}
	if m := svc.Annotations[annotationTopologyMode]; m != "" && !strings.EqualFold(m, "disabled") {
		c.problem("metadata.annotations["+annotationTopologyMode+"]",
			"%s is not yet supported: connections go to all ready endpoints alike; remove the annotation", m)
	}
}

// clusterIPs returns the Service's cluster IPs, at most one a family, in the
// order of the Service.
func (c *conversion) clusterIPs(svc *corev1.Service) []netip.Addr {
	texts, field := svc.Spec.ClusterIPs, "spec.clusterIPs[%d]"
	if len(texts) == 0 {
		if svc.Spec.ClusterIP == "" {
			return nil // has not got an address yet
		}
		texts, field = []string{svc.Spec.ClusterIP}, "spec.clusterIP"
	}
	var addrs []netip.Addr
	for i, text := range texts {
		path := field
		if strings.Contains(field, "%") {
			path = fmt.Sprintf(field, i)
		}
		addr, err := parseAddr(text)
		switch {
		case text == "":
			continue
		case err != nil:
			c.problem(path, "%q %v: give the Service another cluster IP", text, err)
			continue
		case len(svc.Spec.IPFamilies) > 0 && i >= len(svc.Spec.IPFamilies):
			c.problem(path, "%s has no family in spec.ipFamilies: name one family for each cluster IP", addr)
			continue
		case len(svc.Spec.IPFamilies) > 0 && string(svc.Spec.IPFamilies[i]) != dataplane.FamilyOf(addr).String():
			c.problem(path, "%s is not of the family %s that spec.ipFamilies[%d] names: make them match",
				addr, svc.Spec.IPFamilies[i], i)
			continue
		case slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }):
			c.problem(path, "%s is a second address of one family: a Service has one cluster IP per family", addr)
			continue
		}
		addrs = append(addrs, addr)
	}
	return addrs
}

// ports makes the wants: one for each usable port and cluster IP.
func (c *conversion) ports(svc *corev1.Service, addrs []netip.Addr) {
	c.wants = make([]wanted, 0, len(svc.Spec.Ports)*len(addrs))
	for i := range svc.Spec.Ports {
		port := &svc.Spec.Ports[i]
		protocol, ok := protocolOf(port.Protocol)
		if !ok {
			c.problem(fmt.Sprintf("spec.ports[%d].protocol", i), "%q is not a protocol: use TCP, UDP or SCTP", port.Protocol)
			continue
		}
		if port.Port < 1 || port.Port > 65535 {
			c.problem(fmt.Sprintf("spec.ports[%d].port", i), "%d is not a port: use 1 to 65535", port.Port)
			continue
		}
		if slices.ContainsFunc(svc.Spec.Ports[:i], func(p corev1.ServicePort) bool { return p.Name == port.Name }) {
			c.problem(fmt.Sprintf("spec.ports[%d].name", i),
				"%q is the name of an earlier port: give each port a name of its own", port.Name)
			continue
		}
		for _, addr := range addrs {
			c.wants = append(c.wants, wanted{
				key: dataplane.Key{
					Namespace: svc.Namespace, Name: svc.Name, Port: port.Name, Family: dataplane.FamilyOf(addr),
				},
				port: i,
				frontend: dataplane.Frontend{
					Protocol: protocol,
					//nolint:gosec // the range was checked above
					Addr: netip.AddrPortFrom(addr, uint16(port.Port)),
				},
			})
		}
	}
}

// candidate is an endpoint before the choice among candidates is made.
type candidate struct {
	addr                        netip.AddrPort
	ready, serving, terminating bool
	local                       bool
}

// compare orders candidates by address, and those with the same address with
// the one to keep first. Two pods can have one address: that of a terminating
// pod can be given to a new one before the old object is gone. And an endpoint
// that moves from one slice to another is in both for a while.
func (a candidate) compare(b candidate) int {
	return cmp.Or(
		a.addr.Compare(b.addr),
		falseFirst(a.terminating, b.terminating),
		falseFirst(b.ready, a.ready),
		falseFirst(b.serving, a.serving),
		falseFirst(b.local, a.local),
	)
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// endpoints gives each want its endpoints.
func (c *conversion) endpoints(svc *corev1.Service, endpointSlices map[string]*discoveryv1.EndpointSlice, nodeName string) {
	if len(c.wants) == 0 {
		return
	}
	candidates := make([][]candidate, len(c.wants))
	// A Service whose pods are missing is no problem of its objects; one whose
	// endpoints are there under another port name is.
	populated := map[dataplane.Family]bool{}
	matched := make([]bool, len(c.wants))
	for _, slice := range endpointSlices {
		family, ok := familyOf(slice.AddressType)
		if !ok || !slices.ContainsFunc(c.wants, func(w wanted) bool { return w.key.Family == family }) {
			continue
		}
		parsed := c.parseEndpoints(slice, family, nodeName)
		if len(parsed) > 0 {
			populated[family] = true
		}
		for i := range slice.Ports {
			name, protocol, port, ok := c.slicePort(slice, i)
			if !ok {
				continue
			}
			for w := range c.wants {
				want := &c.wants[w]
				if want.key.Port != name || want.frontend.Protocol != protocol || want.key.Family != family {
					continue
				}
				matched[w] = true
				candidates[w] = slices.Grow(candidates[w], len(parsed))
				for _, p := range parsed {
					p.addr = netip.AddrPortFrom(p.addr.Addr(), port)
					candidates[w] = append(candidates[w], p)
				}
			}
		}
	}
	for w := range c.wants {
		want := &c.wants[w]
		want.endpoints = choose(candidates[w])
		if populated[want.key.Family] && !matched[w] {
			c.unmatched(svc, want)
		}
	}
}

// unmatched reports a port that no slice knows although there are slices with
// endpoints.
func (c *conversion) unmatched(svc *corev1.Service, want *wanted) {
	target := svc.Spec.Ports[want.port].TargetPort.StrVal
	if target != "" {
		c.problem(fmt.Sprintf("spec.ports[%d].targetPort", want.port),
			"no endpoint of family %s has a %s port %q, so connections are refused: give a container port of the pods this name",
			want.key.Family, want.frontend.Protocol, target)
		return
	}
	c.problem(fmt.Sprintf("spec.ports[%d].name", want.port),
		"no EndpointSlice of family %s has a %s port with the name %q, so connections are refused: use the same name in both",
		want.key.Family, want.frontend.Protocol, want.key.Port)
}

// parseEndpoints returns the usable endpoints of a slice, with port 0.
func (c *conversion) parseEndpoints(slice *discoveryv1.EndpointSlice, family dataplane.Family, nodeName string) []candidate {
	parsed := make([]candidate, 0, len(slice.Endpoints))
	for i := range slice.Endpoints {
		ep := &slice.Endpoints[i]
		if len(ep.Addresses) == 0 {
			c.sliceProblem(slice.Name, fmt.Sprintf("endpoints[%d].addresses", i), "empty: name the endpoint's address")
			continue
		}
		// All addresses of an endpoint are the same pod; consumers use the
		// first, as the API says.
		addr, err := parseAddr(ep.Addresses[0])
		if err == nil {
			err = endpointAddr(addr, family)
		}
		if err != nil {
			c.sliceProblem(slice.Name, fmt.Sprintf("endpoints[%d].addresses[0]", i),
				"%q %v: use the address of a pod", ep.Addresses[0], err)
			continue
		}
		parsed = append(parsed, candidate{
			addr:        netip.AddrPortFrom(addr, 0),
			ready:       isTrue(ep.Conditions.Ready, true),
			serving:     isTrue(ep.Conditions.Serving, true),
			terminating: isTrue(ep.Conditions.Terminating, false),
			local:       ep.NodeName == nil || *ep.NodeName == "" || *ep.NodeName == nodeName,
		})
	}
	return parsed
}

// slicePort returns the i-th port of a slice and whether it can be used.
func (c *conversion) slicePort(slice *discoveryv1.EndpointSlice, i int) (name string, protocol dataplane.Protocol, port uint16, ok bool) {
	p := &slice.Ports[i]
	if p.Name == nil {
		c.sliceProblem(slice.Name, fmt.Sprintf("ports[%d].name", i), `missing: use the Service port's name, or "" for an unnamed port`)
		return "", 0, 0, false
	}
	var text corev1.Protocol
	if p.Protocol != nil {
		text = *p.Protocol
	}
	protocol, ok = protocolOf(text)
	if !ok {
		c.sliceProblem(slice.Name, fmt.Sprintf("ports[%d].protocol", i), "%q is not a protocol: use TCP, UDP or SCTP", text)
		return "", 0, 0, false
	}
	if p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
		c.sliceProblem(slice.Name, fmt.Sprintf("ports[%d].port", i), "missing or not a port: use 1 to 65535")
		return "", 0, 0, false
	}
	return *p.Name, protocol, uint16(*p.Port), true //nolint:gosec // the range was checked above
}

// choose returns the endpoints that connections go to: the ready ones, or, if
// there are none, those that are terminating and still serving.
func choose(candidates []candidate) []dataplane.Endpoint {
	slices.SortFunc(candidates, candidate.compare)
	candidates = slices.CompactFunc(candidates, func(a, b candidate) bool { return a.addr == b.addr })
	chosen := make([]dataplane.Endpoint, 0, len(candidates))
	for _, c := range candidates {
		if c.ready {
			chosen = append(chosen, dataplane.Endpoint{Addr: c.addr, Local: c.local})
		}
	}
	if len(chosen) > 0 {
		return chosen
	}
	for _, c := range candidates {
		if c.serving && c.terminating {
			chosen = append(chosen, dataplane.Endpoint{Addr: c.addr, Local: c.local})
		}
	}
	return chosen
}

func isTrue(condition *bool, ifNil bool) bool {
	if condition == nil {
		return ifNil
	}
	return *condition
}

func protocolOf(p corev1.Protocol) (dataplane.Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return dataplane.TCP, true
	case corev1.ProtocolUDP:
		return dataplane.UDP, true
	case corev1.ProtocolSCTP:
		return dataplane.SCTP, true
	default:
		return 0, false
	}
}

// familyOf reports false for address types that are not a family: FQDN, and
// whatever is added later.
func familyOf(t discoveryv1.AddressType) (dataplane.Family, bool) {
	switch t {
	case discoveryv1.AddressTypeIPv4:
		return dataplane.IPv4, true
	case discoveryv1.AddressTypeIPv6:
		return dataplane.IPv6, true
	default:
		return 0, false
	}
}

// parseAddr reads an IP address as old API servers accepted it: leading zeros
// in IPv4 octets are decimal. The error completes a sentence that begins with
// the text.
func parseAddr(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil {
		addr, err = netip.ParseAddr(withoutLeadingZeros(text))
	}
	switch {
	case err != nil:
		return netip.Addr{}, errNotIP
	case addr.Is4In6():
		return netip.Addr{}, errMapped
	case addr.Zone() != "":
		return netip.Addr{}, errZone
	case addr.IsUnspecified():
		return netip.Addr{}, errUnspecified
	}
	return addr, nil
}

func withoutLeadingZeros(text string) string {
	octets := strings.Split(text, ".")
	if len(octets) != 4 {
		return text
	}
	for i, octet := range octets {
		if trimmed := strings.TrimLeft(octet, "0"); trimmed != "" {
			octets[i] = trimmed
		} else if octet != "" {
			octets[i] = "0"
		}
	}
	return strings.Join(octets, ".")
}

// endpointAddr refuses what the API server refuses in an EndpointSlice: an
// endpoint on a loopback or link-local address would let a Service reach into
// the node.
func endpointAddr(addr netip.Addr, family dataplane.Family) error {
	switch {
	case dataplane.FamilyOf(addr) != family:
		return fmt.Errorf("is not of the slice's addressType %s", family)
	case addr.IsLoopback():
		return errLoopback
	case addr.IsLinkLocalUnicast():
		return errLinkLocal
	case addr.IsMulticast():
		return errMulticast
	}
	return nil
}

// addrError says what is wrong with an address; it completes a sentence that
// begins with the address.
type addrError string

func (e addrError) Error() string { return string(e) }

const (
	errNotIP       addrError = "is not an IP address"
	errMapped      addrError = "is an IPv4-mapped IPv6 address"
	errZone        addrError = "has a zone"
	errUnspecified addrError = "is the unspecified address"
	errLoopback    addrError = "is a loopback address"
	errLinkLocal   addrError = "is a link-local address"
	errMulticast   addrError = "is a multicast address"
)
