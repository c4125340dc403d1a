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
	clusterIPAddrs    addrSet = iota // cluster IPs: their other ports are rejected
	boundIPAddrs                     // addresses that a Translator binds to the node; see BoundAddressService
	pingInternalAddrs                // the node and its pods get an answer to pings
	pingExternalAddrs                // other clients do
	numAddrSets
)

func (s addrSet) String() string {
	return [...]string{"cluster-ips", "bound-ips", "ping-internal", "ping-external"}[s]
}

// addrSetMembership are the sets that an address is to be in, on account of one frontend.
type addrSetMembership [numAddrSets]bool

// addrSetMembershipOf returns them for a frontend of a kind, with the classes that
// connections to it are in.
func addrSetMembershipOf(kind dataplane.Kind, c, forExternal serviceClass, node dataplane.Node) addrSetMembership {
	var in addrSetMembership
	if kind == boundAddressKind {
		in[boundIPAddrs] = true
		return in
	}
	in[clusterIPAddrs] = kind == dataplane.ClusterIP
	if !node.PingServiceIPs || kind == dataplane.NodePort || c.has(classSourceRanges) {
		return in
	}
	in[pingInternalAddrs], in[pingExternalAddrs] = c.size() > 0, c.size() > 0
	if c.has(classTrafficPolicyLocal) {
		in[pingExternalAddrs] = forExternal.size() > 0
	}
	return in
}

// addrCounts counts frontends by the address and the set that it is in.
type addrCounts [numAddrSets]map[netip.Addr]int

func newAddrCounts() addrCounts {
	var c addrCounts
	for s := range c {
		c[s] = map[netip.Addr]int{}
	}
	return c
}

func (c *addrCounts) add(addr netip.Addr, in addrSetMembership, n int) {
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

// merge adds the counts of a commit that the kernel has taken. A count of 0 is an
// address that is in the set without need, as a Replace finds it.
func (c *addrCounts) merge(more addrCounts) {
	for s, m := range more {
		for addr, n := range m {
			if c[s][addr] += n; c[s][addr] <= 0 {
				delete(c[s], addr)
			}
		}
	}
}

// diffCounts returns the elements that go and come if more is added to a count; of
// those that there are, all have an entry.
func diffCounts[K comparable](have, more map[K]int, encode func(K) []byte) (gone, come []element) {
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

func encodePort(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

// portCounts counts the elements with an endpoint by its port, which is in the set
// endpoint-ports as long as there are any.
type portCounts map[uint16]int

func (c portCounts) merge(more portCounts) {
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

// sharedSetDiff is a change of one of these sets.
type sharedSetDiff struct {
	set        *nftables.Set
	gone, come []element
}

// sharedSetDiffs returns what a commit does to the sets with shared elements of the
// i-th table.
func (d *Dataplane) sharedSetDiffs(i int, e *tableDiff) []sharedSetDiff {
	var edits []sharedSetDiff
	for s, set := range e.table.addrSets {
		gone, come := diffCounts(d.addrs[i][s], e.addrs[s], netip.Addr.AsSlice)
		edits = append(edits, sharedSetDiff{set, gone, come})
	}
	gone, come := diffCounts(d.ports[i], e.ports, encodePort)
	return append(edits, sharedSetDiff{e.table.endpointPorts, gone, come})
}
