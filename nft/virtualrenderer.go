package nft

import (
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// virtualRenderer renders tables that send connections to the virtual servers of a
// Translator. The methods are documented at renderer.
type virtualRenderer struct{ translator Translator }

// supported returns nil: a Translator has no limits.
func (virtualRenderer) supported(*dataplane.Service) error { return nil }

// initialArrangement returns an empty arrangement, because each list has one virtual
// server at most.
func (virtualRenderer) initialArrangement(*dataplane.Service) arrangement { return arrangement{} }

func (virtualRenderer) arrange(arrangement, *dataplane.Service) arranged { return arranged{} }

func (v virtualRenderer) render(s *dataplane.Service, _ arrangement, node dataplane.Node) *row {
	if s.Key.Kind == boundAddress {
		return &row{addrs: addrSetsOf(s.Key.Kind, 0, 0, node)}
	}
	plain := *s
	plain.Affinity = 0
	r := render(&plain, arrangement{}, node)
	r.class, r.external = r.class.virtual(), r.external.virtual()
	cluster, local := v.translator.VirtualServers(s)
	switch {
	case cluster.IsValid():
		r.slots[clusterList].endpoints = []netip.AddrPort{cluster}
	case len(s.Endpoints) > 0:
		r.class |= through
	}
	if s.ExternalLocal {
		r.slots[localList].endpoints = []netip.AddrPort{local}
	}
	r.ports = portsOf(s)
	return r
}

// portsOf returns the ports of the Service's endpoints, sorted.
func portsOf(s *dataplane.Service) []uint16 {
	var ports []uint16
	for _, list := range [lists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
		for _, e := range list {
			if n := len(ports); n == 0 || ports[n-1] != e.Addr.Port() { // as a rule there is one
				ports = append(ports, e.Addr.Port())
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// binding returns all but the endpoints and the session affinity, which the Translator
// has.
func (virtualRenderer) binding(r *row) dataplane.Binding { return r.withoutEndpoints() }

func (virtualRenderer) endpointElements(s *dataplane.Service) int {
	if s.Key.Kind == boundAddress {
		return 0
	}
	return int(lists) // a virtual server each
}

// endpointPort returns false, because slots hold virtual servers. The ports are in
// row.ports instead.
func (virtualRenderer) endpointPort(netip.AddrPort) (uint16, bool) { return 0, false }

// foundPorts returns the ports in endpoint-ports as unused: the maps do not have the
// endpoints, so the Services determine which ports stay.
func (virtualRenderer) foundPorts(c *content) portCounts {
	ports := make(portCounts, len(c.portSet))
	for port := range c.portSet {
		ports[port] = 0
	}
	return ports
}

// sets leaves out the sets of session affinity.
func (virtualRenderer) sets(t *table, named []*nftables.Set) []*nftables.Set {
	return slices.DeleteFunc(slices.Clone(named), t.forAffinity)
}

func (virtualRenderer) selectionChains(*table, addressing) []chain { return nil }

func (virtualRenderer) usedPriorities() [][]expr.Any { return [][]expr.Any{isSlotOrList()} }

// extraRules returns the rules for bound addresses, and for connections that are let
// through to a virtual server.
//
//	chain route-output {
//		type route hook output priority dstnat + 9; policy accept;
func (virtualRenderer) extraRules(t *table, base baseChain) extraRules {
	routePriority := *nftables.ChainPriorityNATDest + routeOffset
	return extraRules{
		chains: []chain{
			t.undeclared(), t.bound(),
			base("route-output", nftables.ChainTypeRoute, nftables.ChainHookOutput, routePriority, t.toOwnEndpoint()),
		},
		natOutput:                []rule{t.toBoundIP()},
		filterPreroutingPostDNAT: []rule{t.toOwnClusterIP(), {exprs: append(ctStateNew(), t.toBoundIP().exprs...)}},
		filterOutputPostDNAT:     []rule{t.toOwnEndpoint()},
		natPostrouting:           []rule{t.letThrough()},
	}
}
