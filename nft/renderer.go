package nft

import (
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// renderer determines how the tables send connections to endpoints: with an
// endpointRenderer they select an endpoint themselves, with a virtualRenderer they
// leave that to a Translator. [Open] chooses one. A renderer has no state, so the
// tables and the Dataplane share it.
type renderer interface {
	// checkSupported returns an error that wraps [dataplane.ErrUnsupported] if the tables
	// cannot serve the Service.
	checkSupported(s *dataplane.Service) error
	// initialAssignment returns the arrangement of a Service that is programmed and
	// has none in Dataplane.slotAssignments.
	initialAssignment(s *dataplane.Service) slotAssignment
	// assignSlots returns the arrangement that follows the current one when the Service
	// changes to s.
	assignSlots(current slotAssignment, s *dataplane.Service) newAssignment
	// render returns what the maps hold for each frontend of the Service on this node.
	render(s *dataplane.Service, a slotAssignment, node dataplane.Node) *frontendElements
	// binding returns what Read reports of a row.
	binding(r *frontendElements) dataplane.Binding

	// endpointElements estimates how many elements one frontend of the Service has for
	// its endpoints.
	endpointElements(s *dataplane.Service) int
	// endpointPort returns the port that an address in a slot, or with an ID, adds to
	// the set endpoint-ports. It returns false if the address is not an endpoint's.
	endpointPort(addr netip.AddrPort) (uint16, bool)
	// requiredPorts returns the ports that belong in the set endpoint-ports according to
	// the elements read, with the number of elements that need each.
	requiredPorts(c *tableContent) portCounts

	// sets returns the sets of a table in the order in which they are made. named has
	// the sets that are fields of table.
	sets(t *table, named []*nftables.Set) []*nftables.Set
	// selectionChains returns the chains that select and remember endpoints of frontends
	// with an addressing.
	selectionChains(t *table, by addressing) []chain
	// priorityMatches returns one match for each kind of priority that NAT chains leave on
	// a packet.
	priorityMatches() [][]expr.Any
	// extraRules returns the chains and rules that no other renderer has.
	extraRules(t *table, base newBaseChain) extraRules
}

// extraRules has chains that a renderer adds to a table, and rules that it adds to the
// end of base chains.
type extraRules struct {
	chains []chain
	// natOutput is for nat-output and nat-output-ahead, the others are for the base
	// chain of their name.
	natOutput                []rule
	filterPreroutingPostDNAT []rule
	filterOutputPostDNAT     []rule
	natPostrouting           []rule
}

// renderer returns the renderer that the options ask for.
func (o Options) renderer() renderer {
	if o.Translator != nil {
		return virtualRenderer{translator: o.Translator}
	}
	return endpointRenderer{}
}
