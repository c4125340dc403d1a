package nft

import (
	"encoding/binary"
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// addrSet is one of the sets of frontend addresses. Frontends with the same address share
// an element.
type addrSet int

const (
	clusterIPAddrs    addrSet = iota // cluster IPs; connections to their other ports are rejected
	boundIPAddrs                     // addresses that a Translator binds to the node; see BoundAddressService
	pingInternalAddrs                // addresses that answer pings of the node and its pods
	pingExternalAddrs                // addresses that answer pings of other clients
	numAddrSets
)

func (s addrSet) String() string {
	return [...]string{"cluster-ips", "bound-ips", "ping-internal", "ping-external"}[s]
}

// addrSetMembership says which sets must contain an address because of one frontend.
type addrSetMembership [numAddrSets]bool

// addrSetMembershipOf returns the sets that must contain the address of a frontend of this
// kind and with these classes.
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

// addrCounts counts frontends by set and address.
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

// size returns the number of counts.
func (c *addrCounts) size() int {
	n := 0
	for _, m := range c {
		n += len(m)
	}
	return n
}

// merge adds the counts of a successful commit. An address with a count of 0 is in the set
// but not needed; Replace starts with such counts for the addresses that it has read.
func (c *addrCounts) merge(more addrCounts) {
	for s, m := range more {
		for addr, n := range m {
			if c[s][addr] += n; c[s][addr] <= 0 {
				delete(c[s], addr)
			}
		}
	}
}

// diffCounts returns the elements to remove from and to add to a set if the counts more are
// added to have. have must contain an entry for each element of the set.
func diffCounts[K comparable](have, more map[K]int, encode func(K) []byte) (removed, added []element) {
	for k, n := range more {
		before, exists := have[k]
		switch {
		case !exists && n > 0:
			added = append(added, element{Key: encode(k)})
		case exists && before+n <= 0:
			removed = append(removed, element{Key: encode(k)})
		}
	}
	return removed, added
}

func encodePort(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

// portCounts counts the elements with an endpoint by the endpoint's port. The set
// endpoint-ports contains a port while its count is positive.
type portCounts map[uint16]int

func (c portCounts) merge(more portCounts) {
	for port, n := range more {
		if c[port] += n; c[port] <= 0 {
			delete(c, port)
		}
	}
}

// split returns the positive and the negative counts.
func (c portCounts) split() (positive, negative portCounts) {
	positive, negative = portCounts{}, portCounts{}
	for port, n := range c {
		switch {
		case n > 0:
			positive[port] = n
		case n < 0:
			negative[port] = n
		}
	}
	return positive, negative
}

// sharedSetDiff contains the changes of an address set or of endpoint-ports.
type sharedSetDiff struct {
	set            *nftables.Set
	removed, added []element
}

// sharedSetDiffs returns the changes that a commit makes to the sets with shared elements
// of the i-th table.
func (d *Dataplane) sharedSetDiffs(i int, e *tableDiff) []sharedSetDiff {
	var diffs []sharedSetDiff
	for s, set := range e.table.addrSets {
		removed, added := diffCounts(d.addrs[i][s], e.addrs[s], netip.Addr.AsSlice)
		diffs = append(diffs, sharedSetDiff{set, removed, added})
	}
	removed, added := diffCounts(d.ports[i], e.ports, encodePort)
	return append(diffs, sharedSetDiff{e.table.endpointPorts, removed, added})
}
