package nft

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// lookedUp records the meaning of a lookup.
func (b *branch) lookedUp(set string, key []byte, e element, found bool) {
	t := b.table
	switch {
	case set == t.services.Name && !strings.HasPrefix(b.chain, "masquerad") && b.chain != "undeclared":
		if found && !strings.HasPrefix(b.chain, "pick") {
			b.foundFrontend(key, e)
		}
	case set == t.external.Name && found && strings.HasPrefix(b.chain, "external"):
		b.walk.LocalList = true
		b.step(DecideList, "the client %s is neither this node nor one of its pods, so it gets the endpoints of this node only", b.packet.Source.Addr())
	case strings.HasPrefix(set, rangesPrefix), strings.HasPrefix(set, sharedRangesPrefix):
		if found {
			bits := set[strings.LastIndexByte(set, '-')+1:]
			b.step(DecideSource, "the source ranges contain the client's network of %s bits: %s", bits, b.packet.Source.Addr())
		}
	case strings.HasPrefix(set, affinityPrefix) && found && e.Expires > 0:
		b.walk.Affinity = e.Expires
	case strings.HasPrefix(set, stickyEndpointsPrefix) && found:
		addr, err := t.parseAddrPort(e.Val)
		if err == nil && b.walk.Affinity > 0 && strings.HasPrefix(b.chain, "translate-sticky") && !b.drewEndpoint() {
			b.walk.Remembered = addr
			b.step(DecideAffinity, "session affinity: the rules remember %s for the client for another %s", addr, b.walk.Affinity.Round(time.Second))
		}
	case (set == t.hairpin.Name || set == t.sharedHairpin.Name) && found:
		b.step(DecideHairpin, "masquerade of connections to %s: the pod connects to itself through a Service", b.destination)
	}
}

// drewEndpoint reports whether the branch has drawn an endpoint at random.
func (b *branch) drewEndpoint() bool {
	for _, n := range b.alternatives[:b.drawn] {
		if n > 1 {
			return true
		}
	}
	return false
}

func (b *branch) foundFrontend(key []byte, e element) {
	f, _, err := b.table.parseFrontend(key)
	if err != nil {
		return
	}
	class, err := b.table.parseClass(e.Val)
	if err != nil {
		return
	}
	b.walk.Frontend = f
	b.walk.Service, _, _ = parseServiceComment(e.Comment)
	if f.Addr.Addr().IsUnspecified() {
		b.step(DecideFrontend, "%s is node port %d/%s of Service %s (class %s)", b.packet.Destination, f.Addr.Port(), f.Protocol, b.walk.Service, class)
		return
	}
	b.step(DecideFrontend, "%s is a frontend of Service %s (class %s)", f, b.walk.Service, class)
}

// enterChain records the meaning of a chain that a rule sends the packet to.
func (b *branch) enterChain(chain string) {
	switch chain {
	case "masquerade":
		if n := len(b.steps); n == 0 || b.steps[n-1].Decision != DecideHairpin {
			b.step(DecideMasquerade, "masquerade: %s", b.masqueradeReason())
		}
	case "localhost":
		b.step(DecideLoopback, "%s is a loopback address, where only node ports are looked up", b.packet.Destination.Addr())
	}
}

// masqueradeReason says why the current chain masquerades.
func (b *branch) masqueradeReason() string {
	client := b.packet.Source.Addr()
	switch b.chain {
	case masqueradeChainName(dataplane.MasqueradeAlways, false):
		return "every client of this frontend is masqueraded"
	case masqueradeChainName(dataplane.MasqueradeFromNode, false):
		return fmt.Sprintf("%s is an address of this node", client)
	default:
		return fmt.Sprintf("%s is not a pod", client)
	}
}

// leaveChain records the meaning of a chain that has ended without a verdict.
func (b *branch) leaveChain(chain string) {
	client := b.packet.Source.Addr()
	switch chain {
	case masqueradeChainName(dataplane.MasqueradeFromNode, false):
		b.step(DecideMasquerade, "no masquerade: the client's address %s is kept, because it is not an address of this node", client)
	case masqueradeChainName(dataplane.MasqueradeOffCluster, false):
		b.step(DecideMasquerade, "no masquerade: %s counts as a pod, so its address is kept", client)
	case "external", byNodePort.chainName("external"):
		b.step(DecideList, "the client %s is this node or one of its pods, so it gets the endpoints of all nodes", client)
	}
}

// count records a counter. Counters of refused packets name the reason.
func (b *branch) count(c counter) {
	var text string
	switch c {
	case rejectedNoEndpoints:
		text = "rejected: the endpoint list of this frontend is empty"
	case droppedNoEndpoints, droppedNoLocalEndpoints:
		text = "dropped: no endpoint is on this node, but other nodes have endpoints"
	case droppedSourceRanges:
		text = fmt.Sprintf("dropped: no source range contains the client %s", b.packet.Source.Addr())
	case rejectedUndeclaredPort:
		text = fmt.Sprintf("rejected: %s is a cluster IP, but its Service does not declare port %d/%s",
			b.packet.Destination.Addr(), b.packet.Destination.Port(), b.packet.Protocol)
	case droppedNoService:
		text = fmt.Sprintf("dropped: %s is in a ServiceCIDR, but no Service has it", b.packet.Destination.Addr())
	case droppedLoopback:
		text = "dropped: only processes of this node may connect to its loopback addresses"
	case affinityFull:
		b.step(DecideAffinity, "session affinity: the map is full, so this client is not remembered")
		return
	case affinityNetworkLimit:
		b.step(DecideAffinity, "session affinity: the client's network has reached its limit, so this client is not remembered")
		return
	default:
		if strings.HasPrefix(string(c), "rejected-localhost-") {
			text = fmt.Sprintf("rejected: node port %d/%s is not served at the loopback address %s",
				b.packet.Destination.Port(), b.packet.Protocol, b.packet.Destination.Addr())
			break
		}
		return
	}
	b.outcome.Counter = string(c)
	b.step(DecideRefused, "%s", text)
}

// dropped records a drop without a counter.
func (b *branch) dropped() {
	if b.outcome.Counter != "" {
		return
	}
	for _, p := range b.table.virtualNetworks {
		if p.Contains(b.packet.Destination.Addr()) {
			b.step(DecideVirtual, "dropped: %s is an internal address of virtual servers, which clients reach through frontends only", b.packet.Destination.Addr())
			return
		}
	}
	b.step(DecideRefused, "dropped")
}

// intervalsContain reports whether an address is in one of the sorted, disjoint networks of an interval
// set.
func intervalsContain(elements []element, key []byte) bool {
	addr, ok := netip.AddrFromSlice(key)
	if !ok {
		return false
	}
	inside := false
	var last netip.Addr
	for _, e := range elements {
		start, ok := netip.AddrFromSlice(e.Key)
		if ok && !addr.Less(start) && (!last.IsValid() || !start.Less(last)) {
			if start != last || !e.IntervalEnd { // adjacent intervals: the start decides
				inside = !e.IntervalEnd
			}
			last = start
		}
	}
	return inside
}
