package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// TableName is the default name of the tables in the ip and ip6 families. See
// [Options].Table.
const TableName = "fairlead"

// table describes the table of one IP family: its sets and the encoding of their elements.
type table struct {
	family  dataplane.Family
	nf      *nftables.Table
	addr    nftables.SetDatatype
	addrLen int
	// renderer is the Dataplane's renderer.
	renderer renderer
	// detached means that the table has no base chains, so that no packets reach it.
	detached bool
	// virtualNetworks are the networks of virtual servers that clients must not reach
	// directly.
	virtualNetworks []netip.Prefix
	// affinityMapSize is the maximum number of clients in each affinity map.
	affinityMapSize int

	services        *nftables.Set
	external        *nftables.Set
	timeouts        *nftables.Set
	hairpin         *nftables.Set
	endpoints       [numShards]*nftables.Set
	slots           [numShards]*nftables.Set
	stickyEndpoints [numShards]*nftables.Set
	// lists, listSizes, sharedHairpin and sharedEndpoints are for shared lists; see
	// shared_lists.go.
	lists           *nftables.Set
	listSizes       *nftables.Set
	sharedHairpin   *nftables.Set
	sharedEndpoints [numListShards]*nftables.Set
	// frontendSets are the sets with elements of frontends and shared lists, by the indices
	// that elementDiff uses.
	frontendSets []*nftables.Set

	// addrSets and endpointPorts contain elements that frontends share.
	addrSets      [numAddrSets]*nftables.Set
	endpointPorts *nftables.Set
	verdicts      [numVerdictMaps]*nftables.Set
	nodePortAddrs *nftables.Set
	// nodePortNetworks is an interval set. Rules look it up only if it has elements.
	nodePortNetworks *nftables.Set

	podCIDRs     *nftables.Set
	localPods    *nftables.Set
	serviceCIDRs *nftables.Set
	ahead        *nftables.Set
}

func newTable(family dataplane.Family) *table {
	t := &table{family: family, renderer: endpointRenderer{}, addr: nftables.TypeIPAddr, addrLen: 4, affinityMapSize: affinityMapSize}
	t.nf = &nftables.Table{Name: TableName, Family: nftables.TableFamilyIPv4}
	if family == dataplane.IPv6 {
		t.addr, t.addrLen = nftables.TypeIP6Addr, 16
		t.nf.Family = nftables.TableFamilyIPv6
	}
	addr := t.addr
	frontend := []nftables.SetDatatype{addr, nftables.TypeInetProto, nftables.TypeInetService}
	concat := nftables.MustConcatSetType
	with := func(more ...nftables.SetDatatype) nftables.SetDatatype {
		return concat(append(slices.Clone(frontend), more...)...)
	}
	mapOf := func(name string, key, data nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t.nf, Name: name, IsMap: true, KeyType: key, DataType: data}
	}
	addrPort := concat(addr, nftables.TypeInetService)
	t.services = mapOf("services", with(), nftables.TypeClassID)
	t.external = mapOf("external", with(), nftables.TypeClassID)
	t.timeouts = mapOf("timeouts", with(), nftables.TypeClassID)
	for i := range numShards {
		// A slot is a class ID because the packet's priority carries it.
		t.endpoints[i] = mapOf(fmt.Sprintf("endpoints-%x", i), with(nftables.TypeClassID), addrPort)
		t.slots[i] = mapOf(fmt.Sprintf("slots-%x", i), with(nftables.TypeClassID), nftables.TypeClassID)
		t.stickyEndpoints[i] = mapOf(fmt.Sprintf(stickyEndpointsPrefix+"%x", i), with(nftables.TypeInetService), addrPort)
	}
	for m := range t.verdicts {
		t.verdicts[m] = mapOf(verdictMap(m).String(), nftables.TypeClassID, nftables.TypeVerdict)
		t.verdicts[m].KeyByteOrder = binaryutil.BigEndian
	}
	t.hairpin = &nftables.Set{
		Table: t.nf, Name: "hairpin",
		KeyType: concat(append([]nftables.SetDatatype{addr, addr}, frontend...)...),
	}
	// A list ID, a slot and the priority that carries them are 32 bits each.
	t.lists = mapOf("lists", with(), nftables.TypeClassID)
	t.listSizes = mapOf("list-sizes", concat(nftables.TypeClassID, nftables.TypeMark), nftables.TypeClassID)
	for i := range t.sharedEndpoints {
		t.sharedEndpoints[i] = mapOf(fmt.Sprintf("shared-endpoints-%x", i), concat(nftables.TypeClassID, nftables.TypeMark), addrPort)
	}
	t.sharedHairpin = &nftables.Set{Table: t.nf, Name: "shared-hairpin", KeyType: concat(addr, addr, nftables.TypeClassID)}
	t.frontendSets = append([]*nftables.Set{
		servicesSet: t.services, externalSet: t.external, timeoutsSet: t.timeouts, listsSet: t.lists, listSizesSet: t.listSizes,
		hairpinSet: t.hairpin, sharedHairpinSet: t.sharedHairpin,
	}, slices.Concat(t.sharedEndpoints[:], t.endpoints[:], t.slots[:], t.stickyEndpoints[:])...)
	for s := range t.addrSets {
		t.addrSets[s] = &nftables.Set{Table: t.nf, Name: addrSet(s).String(), KeyType: addr}
	}
	// No rule adds elements to this set. But without the flag dynamic, the kernel stores a
	// set of such short keys as a bitmap with a list. It walks the list for each added or
	// removed element (nft_set_bitmap.c): 60,000 elements at once took 19 s.
	t.endpointPorts = &nftables.Set{Table: t.nf, Name: "endpoint-ports", KeyType: nftables.TypeInetService, Dynamic: !alteredDefinitions}
	t.nodePortAddrs = &nftables.Set{Table: t.nf, Name: "node-port-addrs", KeyType: addr}
	interval := func(name string) *nftables.Set {
		return &nftables.Set{Table: t.nf, Name: name, KeyType: addr, Interval: true}
	}
	t.nodePortNetworks = interval("node-port-networks")
	t.podCIDRs, t.localPods, t.serviceCIDRs = interval("pod-cidrs"), interval("local-pods"), interval("service-cidrs")
	t.ahead = newAheadSet(t.nf)
	return t
}

// sets returns the sets of the table in the order in which they are created, without the
// source range sets, which are created on demand.
func (t *table) sets() []*nftables.Set {
	sets := append(slices.Clone(t.frontendSets), t.addrSets[:]...)
	sets = append(append(sets, t.endpointPorts), t.verdicts[:]...)
	sets = append(sets, t.nodePortAddrs, t.nodePortNetworks, t.podCIDRs, t.localPods, t.serviceCIDRs, t.ahead)
	return t.renderer.sets(t, sets)
}

// isAffinitySet reports whether only session affinity needs a set.
func (t *table) isAffinitySet(s *nftables.Set) bool {
	return slices.Contains(t.slots[:], s) || slices.Contains(t.stickyEndpoints[:], s) || slices.Contains([]*nftables.Set{
		t.timeouts, t.verdicts[vmapDraws], t.verdicts[vmapAffinities], t.verdicts[vmapLocalAffinities],
	}, s)
}

const (
	stickyEndpointsPrefix = "sticky-endpoints-"

	rangesPrefix       = "source-ranges-"
	sharedRangesPrefix = "shared-source-ranges-"
)

// sourceRangeSet returns the set of source ranges with this prefix length. Its keys are
// frontend and network. Ranges of one length do not overlap, so the set need not be an
// interval set.
func (t *table) sourceRangeSet(bits int) *nftables.Set {
	return &nftables.Set{
		Table: t.nf, Name: rangesPrefix + strconv.Itoa(bits),
		KeyType: nftables.MustConcatSetType(t.addr, nftables.TypeInetProto, nftables.TypeInetService, t.addr),
	}
}

// sharedSourceRangeSet returns the set of source ranges with this prefix length whose keys
// are list ID and network.
func (t *table) sharedSourceRangeSet(bits int) *nftables.Set {
	return &nftables.Set{
		Table: t.nf, Name: sharedRangesPrefix + strconv.Itoa(bits),
		KeyType: nftables.MustConcatSetType(nftables.TypeClassID, t.addr),
	}
}

// numShards is the number of maps that endpoints, and slots and endpoints with session affinity, are
// sharded over, by the last hex digit of the frontend's address, or of the node port. Sharding
// costs packets a few comparisons and does not affect updates. But the kernel takes quadratic time
// to dump a map (see nlconn.MessageSize): with a single map, reading 100,000 Services took 47 s.
const numShards = 16

func shardOf(f dataplane.Frontend) int {
	if f.Addr.Addr().IsUnspecified() {
		return int(f.Addr.Port() % numShards)
	}
	b := f.Addr.Addr().AsSlice()
	return int(b[len(b)-1] % numShards)
}

// nodeSetElements returns the elements of the sets that depend on the node.
func (t *table) nodeSetElements(node dataplane.Node) map[*nftables.Set][]element {
	sets := map[*nftables.Set][]element{
		t.podCIDRs:      intervalElements(t.mergeNetworks(node.PodCIDRs)),
		t.localPods:     intervalElements(t.mergeNetworks(node.PodCIDRs, node.LocalPodCIDRs)),
		t.serviceCIDRs:  intervalElements(t.mergeNetworks(node.ServiceCIDRs)),
		t.nodePortAddrs: nil,
		t.ahead:         t.aheadElements(node),

		t.nodePortNetworks: intervalElements(t.mergeNodePortNetworks(node)),
	}
	for _, a := range slices.Compact(slices.SortedFunc(slices.Values(node.NodePortAddrs), netip.Addr.Compare)) {
		if dataplane.FamilyOf(a) == t.family && !a.IsLoopback() {
			sets[t.nodePortAddrs] = append(sets[t.nodePortAddrs], element{Key: a.AsSlice()})
		}
	}
	return sets
}

// mergeNetworks returns the sorted networks of the table's family, without networks that
// another one contains.
func (t *table) mergeNetworks(lists ...[]netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, p := range slices.Concat(lists...) {
		if dataplane.FamilyOf(p.Addr()) == t.family {
			all = append(all, p.Masked())
		}
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int { return a.Compare(b) })
	var merged []netip.Prefix
	for _, p := range all {
		if n := len(merged); n > 0 && merged[n-1].Contains(p.Addr()) {
			continue
		}
		merged = append(merged, p)
	}
	return merged
}

// mergeNodePortNetworks returns the sorted dataplane.Node.NodePortNetworks without loopback
// addresses and without the networks of virtual servers.
func (t *table) mergeNodePortNetworks(node dataplane.Node) []netip.Prefix {
	loopback := netip.MustParsePrefix("127.0.0.0/8")
	if t.family == dataplane.IPv6 {
		loopback = netip.PrefixFrom(netip.IPv6Unspecified().Next(), 128)
	}
	networks := t.mergeNetworks(node.NodePortNetworks)
	for _, excluded := range append([]netip.Prefix{loopback}, t.virtualNetworks...) {
		var kept []netip.Prefix
		for _, p := range networks {
			kept = append(kept, subtractPrefix(p, excluded)...)
		}
		networks = kept
	}
	return t.mergeNetworks(networks)
}

// subtractPrefix returns the networks that cover p without the addresses of excluded.
func subtractPrefix(p, excluded netip.Prefix) []netip.Prefix {
	switch {
	case !p.Overlaps(excluded):
		return []netip.Prefix{p}
	case excluded.Bits() <= p.Bits():
		return nil
	}
	lower := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	upper := netip.PrefixFrom(lastAddr(lower).Next(), p.Bits()+1)
	return append(subtractPrefix(lower, excluded), subtractPrefix(upper, excluded)...)
}

func (t *table) counterObject(c counter) *nftables.NamedObj {
	return &nftables.NamedObj{Table: t.nf, Name: string(c), Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}}
}
