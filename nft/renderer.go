package nft

import (
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// renderer determines how the tables send connections to endpoints. With an
// endpointRenderer, the tables select an endpoint. With a virtualRenderer, a Translator
// does. [Open] selects the renderer. A renderer has no state, so the tables and the
// Dataplane share it.
type renderer interface {
	// checkSupported returns an error that wraps [dataplane.ErrUnsupported] if the tables
	// cannot implement the Service.
	checkSupported(s *dataplane.Service) error
	// initialAssignment returns the slot assignment of a programmed Service that is not in
	// Dataplane.slotAssignments.
	initialAssignment(s *dataplane.Service) slotAssignment
	// assignSlots returns the slot assignment that follows the current one when the Service
	// changes to s.
	assignSlots(current slotAssignment, s *dataplane.Service) newAssignment
	// render returns the elements of each frontend of the Service on this node.
	render(s *dataplane.Service, a slotAssignment, node dataplane.Node) *frontendElements
	// binding returns the binding that Read reports for a frontend.
	binding(r *frontendElements) dataplane.Binding

	// endpointElements estimates how many elements one frontend of the Service has for
	// its endpoints.
	endpointElements(s *dataplane.Service) int
	// endpointPort returns the port that an address in a slot, or with an endpoint ID, adds
	// to the set endpoint-ports. It returns false if the address is not an endpoint.
	endpointPort(addr netip.AddrPort) (uint16, bool)
	// requiredPorts returns the ports that the set endpoint-ports must contain according to
	// the elements read, with the number of elements that need each port.
	requiredPorts(c *tableContent) portCounts

	// sets returns the sets of a table in the order in which they are created. named
	// contains the sets that are fields of table.
	sets(t *table, named []*nftables.Set) []*nftables.Set
	// selectionChains returns the chains that select endpoints for frontends with this
	// addressing, and store them for session affinity.
	selectionChains(t *table, by addressing) []chain
	// extraRules returns the chains and rules that only this renderer needs.
	extraRules(t *table, base newBaseChain) extraRules
}

// extraRules contains chains that a renderer adds to a table, and rules that it appends to
// base chains.
type extraRules struct {
	chains []chain
	// natOutput is for nat-output and nat-output-ahead. Each other field is for the base
	// chain with its name.
	natOutput                []rule
	filterPreroutingPostDNAT []rule
	filterOutputPostDNAT     []rule
	natPostrouting           []rule
}

// renderer returns the renderer for the options.
func (o Options) renderer() renderer {
	if o.Translator != nil {
		return virtualRenderer{translator: o.Translator}
	}
	return endpointRenderer{}
}
