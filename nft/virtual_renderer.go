package nft

import (
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// virtualRenderer renders tables that send connections to the virtual servers of a
// Translator. renderer documents the methods.
type virtualRenderer struct{ translator Translator }

// checkSupported returns nil: a Translator supports every Service.
func (virtualRenderer) checkSupported(*dataplane.Service) error { return nil }

// initialAssignment returns an empty slot assignment, because each list has at most one
// virtual server.
func (virtualRenderer) initialAssignment(*dataplane.Service) slotAssignment { return slotAssignment{} }

func (virtualRenderer) assignSlots(slotAssignment, *dataplane.Service) newAssignment {
	return newAssignment{}
}

func (v virtualRenderer) render(s *dataplane.Service, _ slotAssignment, node dataplane.Node) *frontendElements {
	if s.Key.Kind == boundAddressKind {
		return &frontendElements{addrs: addrSetMembershipOf(s.Key.Kind, 0, 0, node)}
	}
	plain := *s
	plain.Affinity = 0
	r := render(&plain, slotAssignment{}, node)
	r.class, r.externalClass = r.class.forVirtualServer(), r.externalClass.forVirtualServer()
	cluster, local := v.translator.VirtualServers(s)
	switch {
	case cluster.IsValid():
		r.slots[clusterEndpoints].endpoints = []netip.AddrPort{cluster}
	case len(s.Endpoints) > 0:
		r.class |= classPassThrough
	}
	if s.ExternalTrafficPolicyLocal {
		r.slots[localEndpoints].endpoints = []netip.AddrPort{local}
	}
	r.ports = endpointPortsOf(s)
	return r
}

// endpointPortsOf returns the sorted ports of the Service's endpoints.
func endpointPortsOf(s *dataplane.Service) []uint16 {
	var ports []uint16
	for _, list := range [numEndpointLists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
		for _, e := range list {
			if n := len(ports); n == 0 || ports[n-1] != e.Addr.Port() { // usually, all have the same port
				ports = append(ports, e.Addr.Port())
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// binding returns the binding without endpoints and session affinity, which only the
// Translator has.
func (virtualRenderer) binding(r *frontendElements) dataplane.Binding {
	return r.bindingExceptEndpoints()
}

func (virtualRenderer) endpointElements(s *dataplane.Service) int {
	if s.Key.Kind == boundAddressKind {
		return 0
	}
	return int(numEndpointLists) // one virtual server per list
}

// endpointPort returns false, because slots contain virtual servers. frontendElements.ports
// contains the ports.
func (virtualRenderer) endpointPort(netip.AddrPort) (uint16, bool) { return 0, false }

// requiredPorts returns the ports in endpoint-ports with a count of 0: the maps do not
// contain the endpoints, so the Services determine which ports stay.
func (virtualRenderer) requiredPorts(c *tableContent) portCounts {
	ports := make(portCounts, len(c.portSet))
	for port := range c.portSet {
		ports[port] = 0
	}
	return ports
}

// sets removes the sets of session affinity.
func (virtualRenderer) sets(t *table, named []*nftables.Set) []*nftables.Set {
	return slices.DeleteFunc(slices.Clone(named), t.isAffinitySet)
}

func (virtualRenderer) selectionChains(*table, addressing) []chain { return nil }

// extraRules returns the rules for bound addresses and for pass-through connections.
//
//	chain route-output {
//		type route hook output priority dstnat + 9; policy accept;
func (virtualRenderer) extraRules(t *table, base newBaseChain) extraRules {
	routePriority := *nftables.ChainPriorityNATDest + routeOffset
	return extraRules{
		chains: []chain{
			t.undeclaredChain(), t.boundChain(),
			base("route-output", nftables.ChainTypeRoute, nftables.ChainHookOutput, routePriority, t.rerouteRule()),
		},
		natOutput:                []rule{t.boundIPRule()},
		filterPreroutingPostDNAT: []rule{t.ownClusterIPRule(), {exprs: append(matchCtStateNew(), t.boundIPRule().exprs...)}},
		filterOutputPostDNAT:     []rule{t.rerouteRule()},
		natPostrouting:           []rule{t.passedThroughRule()},
	}
}
