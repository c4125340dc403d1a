package kube

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
)

// NotServed is the reason for which a Service is not served as a whole.
type NotServed string

// Reasons for which a Service is not served. Served is the zero value.
const (
	Served         NotServed = ""
	NoSuchService  NotServed = "the Service does not exist"
	IsExternalName NotServed = "spec.type is ExternalName: DNS answers with another name"
	IsHeadless     NotServed = "spec.clusterIP is None: DNS answers with the addresses of the pods"
	OfAnotherProxy NotServed = "the label " + LabelServiceProxyName + " selects another proxy"
	NoClusterIP    NotServed = "spec.clusterIPs contains no usable address, or spec.ports no usable port"
)

// Exclusion is the reason for which an endpoint receives no new connections.
type Exclusion string

// Reasons for which an endpoint receives no new connections. Selected is the zero value.
const (
	Selected         Exclusion = ""
	NotReady         Exclusion = "conditions.ready is false"
	Terminating      Exclusion = "conditions.terminating is true, and other endpoints are ready"
	NotServing       Exclusion = "conditions.terminating is true and conditions.serving is false"
	OnOtherNode      Exclusion = "nodeName is another node, and the traffic policy is Local"
	OnUnknownNode    Exclusion = "nodeName is missing, and the traffic policy is Local"
	HintForOtherNode Exclusion = "hints.forNodes does not contain this node"
	HintForOtherZone Exclusion = "hints.forZones does not contain this node's zone"
	OtherFamily      Exclusion = "addressType is of a family that spec.ipFamilies of the Service does not contain"
	NoMatchingPort   Exclusion = "no element of ports has the name and the protocol of the Service's port"
)

// Explanation says how a [Tracker] converts a Service.
type Explanation struct {
	Service   types.NamespacedName
	NotServed NotServed
	// Ports contains an element for each port, family and kind that the Service requests, in the
	// order of spec.ports.
	Ports []PortExplanation
	// Problems contains the problems of the Service and of its EndpointSlices.
	Problems []Problem
}

// PortExplanation says how a [Tracker] converts one port of a Service in one family, for the
// frontends of one kind.
type PortExplanation struct {
	Key dataplane.Key
	// Field is the path of the port: spec.ports[0].
	Field string
	Spec  dataplane.ServiceSpec
	// TrafficPolicyField is the path of the field with the traffic policy for this kind.
	// TrafficPolicyLocal is set if the policy is Local.
	TrafficPolicyField string
	TrafficPolicyLocal bool
	Frontends          []Claim
	// Endpoints contains every endpoint in the EndpointSlices of the Service, sorted by address.
	Endpoints []EndpointExplanation
}

// Claim is the claim of a Service to a frontend.
type Claim struct {
	Frontend dataplane.Frontend
	// Owner is the Service that receives the connections. OwnerKind is the kind of frontend
	// that it claims.
	Owner     types.NamespacedName
	OwnerKind dataplane.Kind
	// Owned is set if this port of the Service is the owner.
	Owned bool
}

// EndpointExplanation says why an endpoint receives connections or not.
type EndpointExplanation struct {
	// Addr is the endpoint's address. The port is 0 with NoMatchingPort and OtherFamily.
	Addr netip.AddrPort
	// EndpointSlice is the name of the EndpointSlice that contains the endpoint.
	EndpointSlice string
	// Cluster applies to clients for whom the traffic policy has no effect or is Cluster. Local
	// applies to the clients for whom it is Local, and is only set with the policy Local.
	Cluster, Local Exclusion
}

// Explain says how the Tracker converts the named Service. It runs the same functions as Apply
// and changes nothing.
func (t *Tracker) Explain(name types.NamespacedName) Explanation {
	e := Explanation{Service: name, NotServed: NoSuchService}
	s, ok := t.services[name]
	if !ok {
		return e
	}
	object := s.object.expand(new(corev1.Service))
	if e.NotServed = whyNotServed(object, t.opts.ServiceProxyName); e.NotServed != Served {
		return e
	}
	r := newRecorder()
	desired := convertAndRecord(object, s.slices, t.location, t.opts, r)
	e.Problems = s.problems
	for i := range desired.services {
		ds := &desired.services[i]
		p := PortExplanation{Key: ds.key, Field: elementPath("spec.ports", ds.port, ""), Spec: ds.spec}
		p.TrafficPolicyField, p.TrafficPolicyLocal = r.policy.trafficPolicy(ds.key.Kind)
		own := claim{service: s, port: ds.port, kind: ds.key.Kind}
		for _, f := range ds.frontends {
			owner := t.claims.owners[f]
			p.Frontends = append(p.Frontends, Claim{Frontend: f, Owner: owner.service.name, OwnerKind: owner.kind, Owned: owner == own})
		}
		for j := range r.ports {
			if port := &r.ports[j]; port.index == ds.port && port.family == ds.key.Family {
				p.Endpoints = r.endpoints(port, p.TrafficPolicyLocal)
			}
		}
		e.Ports = append(e.Ports, p)
	}
	if len(e.Ports) == 0 {
		e.NotServed = NoClusterIP
	}
	return e
}

// endpoints explains the endpoints of a port. local is set if the traffic policy is Local.
func (r *recorder) endpoints(port *portFamily, local bool) []EndpointExplanation {
	var all []EndpointExplanation
	matching := r.used[port.name()]
	for _, slice := range r.slices {
		numbers := matching[slice]
		for i := range slice.endpoints {
			e := EndpointExplanation{Addr: netip.AddrPortFrom(slice.endpoints[i].address(), 0), EndpointSlice: slice.name}
			switch {
			case r.otherFamily[slice]:
				e.Cluster, e.Local = OtherFamily, OtherFamily
			case slice.family != port.family:
				continue
			case len(numbers) == 0:
				e.Cluster, e.Local = NoMatchingPort, NoMatchingPort
			}
			if e.Cluster != Selected {
				all = append(all, e)
				continue
			}
			for _, number := range numbers {
				e.Addr = netip.AddrPortFrom(e.Addr.Addr(), number)
				j, ok := slices.BinarySearchFunc(port.candidates, e.Addr, func(c candidate, a netip.AddrPort) int { return c.addr.Compare(a) })
				if !ok { // a port with too many endpoints has no candidates
					continue
				}
				e.Cluster = port.chosen.byCluster.exclusion(port.candidates[j].traits)
				if local {
					e.Local = port.chosen.byLocal.exclusion(port.candidates[j].traits)
				}
				all = append(all, e)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b EndpointExplanation) int { return a.Addr.Compare(b.Addr) })
	return slices.CompactFunc(all, func(a, b EndpointExplanation) bool { return a.Addr == b.Addr && a.Addr.Port() != 0 })
}

// ServicesAt returns the Services that claim the cluster IP, sorted by name. It finds the Service
// of a connection to an undeclared port.
func (t *Tracker) ServicesAt(clusterIP netip.Addr) []types.NamespacedName {
	var names []types.NamespacedName
	for _, s := range t.byClusterIP[clusterIP] {
		names = append(names, s.name)
	}
	slices.SortFunc(names, compareNames)
	return names
}

// ServiceNames returns the names of all Services, sorted.
func (t *Tracker) ServiceNames() []types.NamespacedName {
	var names []types.NamespacedName
	for name, s := range t.services {
		if s.object != nil {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, compareNames)
	return names
}
