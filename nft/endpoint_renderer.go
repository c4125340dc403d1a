package nft

import (
	"fmt"
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// endpointRenderer renders tables that select an endpoint and translate
// connections to it. renderer documents the methods.
type endpointRenderer struct{}

func (endpointRenderer) checkSupported(s *dataplane.Service) error {
	if s.Affinity != 0 && max(len(s.Endpoints), len(s.LocalEndpoints)) > maxEndpointIDs {
		return fmt.Errorf("%w: session affinity with more than %d endpoints", dataplane.ErrUnsupported, maxEndpointIDs)
	}
	if !isSupportedScheduler(s.Scheduler) {
		return fmt.Errorf("%w: scheduler %s: nftables selects endpoints at random, in turn (%s) or by the client's address (%s)",
			dataplane.ErrUnsupported, s.Scheduler, dataplane.RoundRobin, dataplane.SourceHash)
	}
	return nil
}

func (endpointRenderer) initialAssignment(s *dataplane.Service) slotAssignment {
	return assignServiceSlots(slotAssignment{}, s)
}

func (endpointRenderer) assignSlots(current slotAssignment, s *dataplane.Service) newAssignment {
	a := assignServiceSlots(current, s)
	return newAssignment{a, !a.isInitial(s)}
}

func (endpointRenderer) render(s *dataplane.Service, a slotAssignment, node dataplane.Node) *frontendElements {
	return render(s, a, node)
}

func (endpointRenderer) binding(r *frontendElements) dataplane.Binding { return r.binding() }

func (endpointRenderer) endpointElements(s *dataplane.Service) int {
	elements := 0
	for _, list := range [numEndpointLists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
		n := len(list)
		if s.Scheduler == dataplane.SourceHash && n > 0 {
			n = hashSlots
		}
		if elements += n; s.Affinity != 0 {
			elements += len(list) // by ID
		}
	}
	return elements
}

func (endpointRenderer) endpointPort(addr netip.AddrPort) (uint16, bool) { return addr.Port(), true }

func (endpointRenderer) requiredPorts(c *tableContent) portCounts { return c.ports }

// sets removes bound-ips and adds the affinity maps.
func (endpointRenderer) sets(t *table, named []*nftables.Set) []*nftables.Set {
	var sets []*nftables.Set
	for _, s := range named {
		if s != t.addrSets[boundIPAddrs] {
			sets = append(sets, s)
		}
	}
	for shard := range numShards {
		sets = append(sets, t.affinityMap(shard))
	}
	if t.family == dataplane.IPv6 {
		sets = append(sets, t.affinityNetworkSet())
	}
	return sets
}

// selectionChains returns the chains of Services with session affinity. Other Services
// select endpoints in their class chains.
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
	chains := []chain{t.translateStickyChain(by)}
	for l := range numEndpointLists {
		chains = append(chains, t.pickChain(by, l), t.stickyChain(by, l))
	}
	return chains
}

func (endpointRenderer) extraRules(*table, newBaseChain) extraRules { return extraRules{} }
