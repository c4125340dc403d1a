package nft

import (
	"encoding/binary"
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// addrSet is one of the sets of frontends' addresses. Frontends at one address
// share its element.
type addrSet int

const (
	inClusterIPs   addrSet = iota // cluster IPs: their other ports are rejected
	inBoundIPs                    // addresses that a Translator binds to the node; see BoundAddress
	inPingInternal                // the node and its pods get an answer to pings
	inPingExternal                // other clients do
	addrSets
)

func (s addrSet) String() string {
	return [...]string{"cluster-ips", "bound-ips", "ping-internal", "ping-external"}[s]
}

// inAddrSets are the sets that an address is to be in, on account of one frontend.
type inAddrSets [addrSets]bool

// addrSetsOf returns them for a frontend of a kind, with the classes that
// connections to it are in.
func addrSetsOf(kind dataplane.Kind, c, forExternal class, node dataplane.Node) inAddrSets {
	var in inAddrSets
	if kind == boundAddress {
		in[inBoundIPs] = true
		return in
	}
	in[inClusterIPs] = kind == dataplane.ClusterIP
	if !node.PingServiceIPs || kind == dataplane.NodePort || c.has(ranged) {
		return in
	}
	in[inPingInternal], in[inPingExternal] = c.size() > 0, c.size() > 0
	if c.has(external) {
		in[inPingExternal] = forExternal.size() > 0
	}
	return in
}

// addrCounts counts frontends by the address and the set that it is in.
type addrCounts [addrSets]map[netip.Addr]int

func newAddrCounts() addrCounts {
	var c addrCounts
	for s := range c {
		c[s] = map[netip.Addr]int{}
	}
	return c
}

func (c *addrCounts) add(addr netip.Addr, in inAddrSets, n int) {
	for s, is := range in {
		if is {
			if c[s] == nil {
				c[s] = map[netip.Addr]int{}
			}
			c[s][addr] += n
		}
	}
}

// size returns how many counts there are.
func (c *addrCounts) size() int {
	n := 0
	for _, m := range c {
		n += len(m)
	}
	return n
}

// commit adds the counts of a commit that the kernel has taken. A count of 0 is an
// address that is in the set without need, as a Replace finds it.
func (c *addrCounts) commit(more addrCounts) {
	for s, m := range more {
		for addr, n := range m {
			if c[s][addr] += n; c[s][addr] <= 0 {
				delete(c[s], addr)
			}
		}
	}
}

// changes returns the elements that go and come if more is added to a count; of
// those that there are, all have an entry.
func changes[K comparable](have, more map[K]int, encode func(K) []byte) (gone, come []element) {
	for k, n := range more {
		before, there := have[k]
		switch {
		case !there && n > 0:
			come = append(come, element{Key: encode(k)})
		case there && before+n <= 0:
			gone = append(gone, element{Key: encode(k)})
		}
	}
	return gone, come
}

func portElement(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

// portCounts counts the elements with an endpoint by its port, which is in the set
// endpoint-ports as long as there are any.
type portCounts map[uint16]int

func (c portCounts) commit(more portCounts) {
	for port, n := range more {
		if c[port] += n; c[port] <= 0 {
			delete(c, port)
		}
	}
}

// split returns the counts that grow, and those that shrink.
func (c portCounts) split() (more, less portCounts) {
	more, less = portCounts{}, portCounts{}
	for port, n := range c {
		switch {
		case n > 0:
			more[port] = n
		case n < 0:
			less[port] = n
		}
	}
	return more, less
}

// sharedEdit is a change of one of these sets.
type sharedEdit struct {
	set        *nftables.Set
	gone, come []element
}

// sharedEdits returns what a commit does to the sets with shared elements of the
// i-th table.
func (d *Dataplane) sharedEdits(i int, e *tableEdit) []sharedEdit {
	var edits []sharedEdit
	for s, set := range e.table.addrSets {
		gone, come := changes(d.addrs[i][s], e.addrs[s], netip.Addr.AsSlice)
		edits = append(edits, sharedEdit{set, gone, come})
	}
	gone, come := changes(d.ports[i], e.ports, portElement)
	return append(edits, sharedEdit{e.table.endpointPorts, gone, come})
}
