package nft

import (
	"fmt"
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// endpointRenderer renders tables that select an endpoint at random and translate
// connections to it. The methods are documented at renderer.
type endpointRenderer struct{}

func (endpointRenderer) supported(s *dataplane.Service) error {
	if s.Affinity != 0 && max(len(s.Endpoints), len(s.LocalEndpoints)) > maxIDs {
		return fmt.Errorf("%w: session affinity with more than %d endpoints", dataplane.ErrUnsupported, maxIDs)
	}
	if s.Scheduler != "" {
		return fmt.Errorf("%w: IPVS scheduler %s, as endpoints are chosen at random", dataplane.ErrUnsupported, s.Scheduler)
	}
	return nil
}

func (endpointRenderer) initialArrangement(s *dataplane.Service) arrangement {
	return arrangeService(arrangement{}, s)
}

func (endpointRenderer) arrange(current arrangement, s *dataplane.Service) arranged {
	a := arrangeService(current, s)
	return arranged{a, !a.natural(s)}
}

func (endpointRenderer) render(s *dataplane.Service, a arrangement, node dataplane.Node) *row {
	return render(s, a, node)
}

func (endpointRenderer) binding(r *row) dataplane.Binding { return r.binding() }

func (endpointRenderer) endpointElements(s *dataplane.Service) int {
	endpoints := len(s.Endpoints) + len(s.LocalEndpoints)
	if s.Affinity != 0 {
		endpoints *= 2 // by slot and by ID
	}
	return endpoints
}

func (endpointRenderer) endpointPort(addr netip.AddrPort) (uint16, bool) { return addr.Port(), true }

func (endpointRenderer) foundPorts(c *content) portCounts { return c.ports }

// sets leaves out bound-ips and adds the maps of session affinity.
func (endpointRenderer) sets(t *table, named []*nftables.Set) []*nftables.Set {
	var sets []*nftables.Set
	for _, s := range named {
		if s != t.addrSets[inBoundIPs] {
			sets = append(sets, s)
		}
	}
	for shard := range shards {
		sets = append(sets, t.affinity(shard))
	}
	if t.family == dataplane.IPv6 {
		sets = append(sets, t.affinityNetworks())
	}
	return sets
}

// selectionChains returns the chains of Services with session affinity. Those of other
// Services are in their class chains.
//
//	chain translate-sticky {
//	…
//	chain pick {
//	…
//	chain sticky {
//	…
//	chain pick-local {
//	…
//	chain sticky-local {
//	…
func (endpointRenderer) selectionChains(t *table, by addressing) []chain {
	chains := []chain{t.translateSticky(by)}
	for l := range lists {
		chains = append(chains, t.pick(by, l), t.sticky(by, l))
	}
	return chains
}

func (endpointRenderer) usedPriorities() [][]expr.Any { return [][]expr.Any{isSlotOrList(), isID()} }

func (endpointRenderer) extraRules(*table, baseChain) extraRules { return extraRules{} }
