package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// TableName is the name of the backend's table in the ip and the ip6 family, where
// [Options] have no other.
const TableName = "fairlead"

// table is one IP family's table: its sets and how elements look in it.
type table struct {
	family  dataplane.Family
	nf      *nftables.Table
	addr    nftables.SetDatatype
	addrLen int
	// virtual says that connections go to virtual servers, which a Translator names.
	virtual bool
	// detached says that base chains are left out, so that no packet comes.
	detached bool
	// virtualNetworks are where virtual servers are that nobody else is to reach.
	virtualNetworks []netip.Prefix
	// affinityLimit is how many clients each of the affinity maps remembers.
	affinityLimit int

	services        *nftables.Set
	external        *nftables.Set
	timeouts        *nftables.Set
	slots           *nftables.Set
	stickyEndpoints *nftables.Set
	hairpin         *nftables.Set
	endpoints       [shards]*nftables.Set
	// lists, listSizes, sharedHairpin and sharedEndpoints are for Services with many
	// frontends, see lists.go.
	lists           *nftables.Set
	listSizes       *nftables.Set
	sharedHairpin   *nftables.Set
	sharedEndpoints [listShards]*nftables.Set
	// rowSets are the sets that rows have elements in, by the indices that edit
	// uses.
	rowSets []*nftables.Set

	// addrSets and endpointPorts have elements that frontends share.
	addrSets      [addrSets]*nftables.Set
	endpointPorts *nftables.Set
	verdicts      [verdictMaps]*nftables.Set
	nodePortAddrs *nftables.Set
	// nodePortNetworks is an interval set, which rules look into only while it has
	// elements.
	nodePortNetworks *nftables.Set

	podCIDRs     *nftables.Set
	localPods    *nftables.Set
	serviceCIDRs *nftables.Set
	ahead        *nftables.Set
}

// chain is a chain with the rules it must have.
type chain struct {
	*nftables.Chain
	rules []rule
}

type rule struct {
	comment string
	exprs   []expr.Any
}

func newTable(family dataplane.Family) *table {
	t := &table{family: family, addr: nftables.TypeIPAddr, addrLen: 4, affinityLimit: affinityLimit}
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
	// A slot is a class ID because it travels as the packet's priority.
	t.slots = mapOf("slots", with(nftables.TypeClassID), nftables.TypeClassID)
	t.stickyEndpoints = mapOf("sticky-endpoints", with(nftables.TypeInetService), addrPort)
	for i := range t.endpoints {
		t.endpoints[i] = mapOf(fmt.Sprintf("endpoints-%x", i), with(nftables.TypeClassID), addrPort)
	}
	for m := range t.verdicts {
		t.verdicts[m] = mapOf(verdictMap(m).String(), nftables.TypeClassID, nftables.TypeVerdict)
		t.verdicts[m].KeyByteOrder = binaryutil.BigEndian
	}
	t.hairpin = &nftables.Set{
		Table: t.nf, Name: "hairpin",
		KeyType: concat(append([]nftables.SetDatatype{addr, addr}, frontend...)...),
	}
	// A list ID, a slot and the priority that they travel in are 32 bits each.
	t.lists = mapOf("lists", with(), nftables.TypeClassID)
	t.listSizes = mapOf("list-sizes", concat(nftables.TypeClassID, nftables.TypeMark), nftables.TypeClassID)
	for i := range t.sharedEndpoints {
		t.sharedEndpoints[i] = mapOf(fmt.Sprintf("shared-endpoints-%x", i), concat(nftables.TypeClassID, nftables.TypeMark), addrPort)
	}
	t.sharedHairpin = &nftables.Set{Table: t.nf, Name: "shared-hairpin", KeyType: concat(addr, addr, nftables.TypeClassID)}
	t.rowSets = append([]*nftables.Set{
		inServices: t.services, inExternal: t.external, inTimeouts: t.timeouts, inLists: t.lists, inListSizes: t.listSizes,
		inSlots: t.slots, inStickyEndpoints: t.stickyEndpoints, inHairpin: t.hairpin, inSharedHairpin: t.sharedHairpin,
	}, slices.Concat(t.sharedEndpoints[:], t.endpoints[:])...)
	for s := range t.addrSets {
		t.addrSets[s] = &nftables.Set{Table: t.nf, Name: addrSet(s).String(), KeyType: addr}
	}
	// No rule adds to it. But a set of keys this short without the flag is a bitmap
	// with a list beside it, which the kernel walks for each element that comes or
	// goes (nft_set_bitmap.c): 60,000 at once took 19 s.
	t.endpointPorts = &nftables.Set{Table: t.nf, Name: "endpoint-ports", KeyType: nftables.TypeInetService, Dynamic: !otherDefinitions}
	t.nodePortAddrs = &nftables.Set{Table: t.nf, Name: "node-port-addrs", KeyType: addr}
	interval := func(name string) *nftables.Set {
		return &nftables.Set{Table: t.nf, Name: name, KeyType: addr, Interval: true}
	}
	t.nodePortNetworks = interval("node-port-networks")
	t.podCIDRs, t.localPods, t.serviceCIDRs = interval("pod-cidrs"), interval("local-pods"), interval("service-cidrs")
	t.ahead = newAhead(t.nf)
	return t
}

// sets returns all sets of the table, in the order in which they are made. Those
// of source ranges are made when they are needed.
func (t *table) sets() []*nftables.Set {
	sets := append(slices.Clone(t.rowSets), t.addrSets[:]...)
	sets = append(append(sets, t.endpointPorts), t.verdicts[:]...)
	sets = append(sets, t.nodePortAddrs, t.nodePortNetworks, t.podCIDRs, t.localPods, t.serviceCIDRs, t.ahead)
	for shard := range shards {
		if !t.virtual {
			sets = append(sets, t.affinity(shard))
		}
	}
	if t.family == dataplane.IPv6 && !t.virtual {
		sets = append(sets, t.affinityNetworks())
	}
	return slices.DeleteFunc(sets, func(s *nftables.Set) bool {
		if t.virtual {
			return t.forAffinity(s)
		}
		return s == t.addrSets[inBoundIPs]
	})
}

// forAffinity reports whether a set is for session affinity alone.
func (t *table) forAffinity(s *nftables.Set) bool {
	return slices.Contains([]*nftables.Set{
		t.timeouts, t.slots, t.stickyEndpoints, t.verdicts[draws], t.verdicts[affinities], t.verdicts[localAffinities],
	}, s)
}

const (
	rangesPrefix       = "source-ranges-"
	sharedRangesPrefix = "shared-source-ranges-"
)

// ranges returns the set of the source ranges with prefixes of a length, each
// with its frontend. Ranges of one length do not overlap, so that it need not be
// an interval set.
func (t *table) ranges(bits int) *nftables.Set {
	return &nftables.Set{
		Table: t.nf, Name: rangesPrefix + strconv.Itoa(bits),
		KeyType: nftables.MustConcatSetType(t.addr, nftables.TypeInetProto, nftables.TypeInetService, t.addr),
	}
}

// sharedRanges returns the set of the same for list IDs.
func (t *table) sharedRanges(bits int) *nftables.Set {
	return &nftables.Set{
		Table: t.nf, Name: sharedRangesPrefix + strconv.Itoa(bits),
		KeyType: nftables.MustConcatSetType(nftables.TypeClassID, t.addr),
	}
}

// shards is the number of maps that endpoints are spread over, by the last hex
// digit of the frontend's address, or of a node port. To the packet and to an
// update it makes no difference, but the kernel takes quadratic time to list a
// map (see nlconn.MessageSize): with one map reading 100,000 Services took 47 s.
const shards = 16

func shardOf(f dataplane.Frontend) int {
	if f.Addr.Addr().IsUnspecified() {
		return int(f.Addr.Port() % shards)
	}
	b := f.Addr.Addr().AsSlice()
	return int(b[len(b)-1] % shards)
}

// addressing is how frontends are told: by their address, or, as node ports, by
// the node's. In sets a node port has the unspecified address, as in a
// dataplane.Frontend, and rules make that of the packet's (`ip daddr & 0.0.0.0`).
type addressing bool

const (
	byAddress  addressing = false
	byNodePort addressing = true

	nodePortSuffix = "node-port"
)

func addressings() []addressing { return []addressing{byAddress, byNodePort} }

func (by addressing) chainName(name string) string {
	if by == byNodePort {
		return name + "-" + nodePortSuffix
	}
	return name
}

// list is which of a Service's lists of endpoints is meant.
type list int

const (
	clusterList list = iota // dataplane.Treatment.Endpoints
	localList               // dataplane.Treatment.LocalEndpoints
	lists
)

func (l list) chainName(name string) string {
	if l == localList {
		return name + "-local"
	}
	return name
}

// networksOf returns the networks of the table's family, without those that lie
// within another, in order.
func (t *table) networksOf(lists ...[]netip.Prefix) []netip.Prefix {
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

// nodeSets returns what the sets that follow the node hold.
func (t *table) nodeSets(node dataplane.Node) map[*nftables.Set][]element {
	sets := map[*nftables.Set][]element{
		t.podCIDRs:      intervals(t.networksOf(node.PodCIDRs)),
		t.localPods:     intervals(t.networksOf(node.PodCIDRs, node.LocalPodCIDRs)),
		t.serviceCIDRs:  intervals(t.networksOf(node.ServiceCIDRs)),
		t.nodePortAddrs: nil,
		t.ahead:         t.aheadElements(node),

		t.nodePortNetworks: intervals(t.networksForNodePorts(node)),
	}
	for _, a := range slices.Compact(slices.SortedFunc(slices.Values(node.NodePortAddrs), netip.Addr.Compare)) {
		if dataplane.FamilyOf(a) == t.family && !a.IsLoopback() {
			sets[t.nodePortAddrs] = append(sets[t.nodePortAddrs], element{Key: a.AsSlice()})
		}
	}
	return sets
}

// networksForNodePorts returns dataplane.Node.NodePortNetworks without loopback
// addresses and without the networks of virtual servers, in order.
func (t *table) networksForNodePorts(node dataplane.Node) []netip.Prefix {
	loopback := netip.MustParsePrefix("127.0.0.0/8")
	if t.family == dataplane.IPv6 {
		loopback = netip.PrefixFrom(netip.IPv6Unspecified().Next(), 128)
	}
	networks := t.networksOf(node.NodePortNetworks)
	for _, excluded := range append([]netip.Prefix{loopback}, t.virtualNetworks...) {
		var kept []netip.Prefix
		for _, p := range networks {
			kept = append(kept, subtract(p, excluded)...)
		}
		networks = kept
	}
	return t.networksOf(networks)
}

// subtract returns the networks that make up p without the addresses of excluded.
func subtract(p, excluded netip.Prefix) []netip.Prefix {
	switch {
	case !p.Overlaps(excluded):
		return []netip.Prefix{p}
	case excluded.Bits() <= p.Bits():
		return nil
	}
	lower := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	upper := netip.PrefixFrom(lastAddr(lower).Next(), p.Bits()+1)
	return append(subtract(lower, excluded), subtract(upper, excluded)...)
}

// counter is a named counter: a reason not to serve a connection.
type counter string

const (
	rejectedNoEndpoints    counter = "rejected-no-endpoints"
	droppedNoEndpoints     counter = "dropped-no-endpoints"
	droppedNoLocalEndpoint counter = "dropped-no-local-endpoints"
	droppedSourceRanges    counter = "dropped-source-ranges"
	rejectedUndeclaredPort counter = "rejected-undeclared-port"
	droppedNoService       counter = "dropped-no-service"
	droppedInvalid         counter = "dropped-invalid"
	droppedLoopback        counter = "dropped-loopback"
)

// Counters of connections whose clients are not remembered, although their Service has
// session affinity.
const (
	affinityFull         counter = "affinity-full"
	affinityNetworkLimit counter = "affinity-network-limit"
)

// rejectedLocalhost counts connections to a node port at a loopback address.
func rejectedLocalhost(p dataplane.Protocol) counter {
	return counter("rejected-localhost-" + strings.ToLower(p.String()))
}

// protocols returns those that frontends have.
func protocols() []dataplane.Protocol {
	return []dataplane.Protocol{dataplane.TCP, dataplane.UDP, dataplane.SCTP}
}

// counters returns all counters, unservedCounters those of what is not served.
func counters() []counter {
	return append(unservedCounters(), affinityFull, affinityNetworkLimit)
}

func unservedCounters() []counter {
	all := []counter{
		rejectedNoEndpoints, droppedNoEndpoints, droppedNoLocalEndpoint, droppedSourceRanges,
		rejectedUndeclaredPort, droppedNoService, droppedInvalid, droppedLoopback,
	}
	for _, p := range protocols() {
		all = append(all, rejectedLocalhost(p))
	}
	return all
}

func (t *table) object(c counter) *nftables.NamedObj {
	return &nftables.NamedObj{Table: t.nf, Name: string(c), Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}}
}

// chains returns the chains that do not depend on Services, callees first, but
// for the lengths of source ranges.
func (t *table) chains(node dataplane.Node, rangeBits []int) []chain {
	accept := nftables.ChainPolicyAccept
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority, rules ...rule) chain {
		return chain{rules: rules, Chain: &nftables.Chain{
			Name: name, Table: t.nf, Type: typ, Hooknum: hook, Priority: &prio, Policy: &accept,
		}}
	}
	chains := []chain{t.reject()}
	for _, by := range addressings() {
		chains = append(chains, t.sourceRanges(by, rangeBits), t.translate(by))
		if !t.virtual {
			chains = append(chains, t.translateSticky(by))
			for l := range lists {
				chains = append(chains, t.pick(by, l), t.sticky(by, l))
			}
		}
		chains = append(chains, t.externalClients(by, node))
	}
	chains = append(chains, t.shared(rangeBits)...)
	chains = append(chains, t.masquerade(node)...)
	chains = append(chains, t.masquerading(node), t.localhost(node), t.invalid(node))
	dispatch, postDNAT := append(t.toVirtualNetworks(), t.dispatch(node)...), t.unmark()
	if node.PingServiceIPs {
		chains = append(chains, t.ping(node)...)
		dispatch = append(dispatch, t.pings())
		postDNAT = append(postDNAT, t.answeredPings())
	}
	output := append([]rule{t.toLocalhost()}, dispatch...)
	unserved := append(t.unserved(), t.invalidOfEndpoints())
	outgoing := append(slices.Clone(unserved), t.answersToInvalid())
	dstnat, filter := *nftables.ChainPriorityNATDest, *nftables.ChainPriorityFilter
	incoming, sent := slices.Concat(postDNAT, t.loopbackFromNetwork(node)), postDNAT
	if t.protectsLoopback(node) {
		chains = append(chains, t.dropLoopback())
	}
	if t.virtual {
		chains = append(chains, t.undeclared(), t.bound(),
			base("route-output", nftables.ChainTypeRoute, nftables.ChainHookOutput, dstnat+routeOffset, t.toOwnEndpoint()))
		output = append(output, t.toBoundIP())
		incoming = append(incoming, t.toOwnClusterIP(), rule{exprs: append(ctStateNew(), t.toBoundIP().exprs...)})
		sent = append(slices.Clone(postDNAT), t.toOwnEndpoint())
	}
	if t.tellsPods(node) {
		chains = append(chains,
			base("filter-input", nftables.ChainTypeFilter, nftables.ChainHookInput, filter, t.invalidOfEndpoints()))
	}
	chains = append(chains, t.places(base, dispatch, output)...)
	return append(chains,
		base("filter-prerouting-post-dnat", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, dstnat+10, incoming...),
		base("filter-output-post-dnat", nftables.ChainTypeFilter, nftables.ChainHookOutput, dstnat+10, sent...),
		base("filter-forward", nftables.ChainTypeFilter, nftables.ChainHookForward, filter, unserved...),
		base("filter-output", nftables.ChainTypeFilter, nftables.ChainHookOutput, filter, outgoing...),
		base("nat-postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource, t.postrouting()...),
	)
}

func (t *table) chain(name string, rules ...rule) chain {
	return chain{Chain: &nftables.Chain{Name: name, Table: t.nf}, rules: rules}
}

// reject rejects with a TCP reset or an ICMP port unreachable. Chains go here
// from prerouting, rather than from input and forward, so that clients are told
// even where the node has no route to the address. (Kernel 5.9, netfilter:
// nf_tables: add "reject" to prerouting.)
func (t *table) reject() chain {
	icmp := &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3} // port unreachable (RFC 792)
	if t.family == dataplane.IPv6 {
		icmp.Code = 4 // port unreachable (RFC 4443)
	}
	return t.chain("reject",
		rule{exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{byte(dataplane.TCP)}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
		}},
		rule{exprs: []expr.Any{icmp}},
	)
}

// dispatch are the rules that a connection starts with: one for frontends with
// an address of their own, which go first, and one or two for node ports.
func (t *table) dispatch(node dataplane.Node) []rule {
	var rules []rule
	for _, to := range t.destinations(node) {
		rules = append(rules, rule{exprs: slices.Concat(
			to.match(t.daddr(0)),
			t.frontendKey(to.by, 0),
			[]expr.Any{mapLookup(t.services, reg(0)), setPriority(reg(0))},
			t.branchOff(classes),
		)})
	}
	return rules
}

// destination is a set of addresses that frontends of an addressing answer at, and
// nil if all do.
type destination struct {
	by    addressing
	addrs *nftables.Set
}

// destinations returns the destinations that rules look for, in this order.
func (t *table) destinations(node dataplane.Node) []destination {
	all := []destination{{by: byAddress}, {byNodePort, t.nodePortAddrs}}
	if len(t.networksForNodePorts(node)) > 0 {
		all = append(all, destination{byNodePort, t.nodePortNetworks})
	}
	return all
}

// match matches packets to the destination, given what loads their address.
func (d destination) match(address expr.Any) []expr.Any {
	if d.addrs == nil {
		return nil
	}
	return []expr.Any{address, lookup(d.addrs)}
}

// branchOff is `meta priority vmap @…`.
func (t *table) branchOff(m verdictMap) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)}, verdictLookup(t.verdicts[m])}
}

// sourceRanges returns from frontends whose source ranges the client is in.
func (t *table) sourceRanges(by addressing, bits []int) chain {
	var rules []rule
	for _, n := range bits {
		client := t.addrLen/4 + 2
		mask, none := make([]byte, t.addrLen), make([]byte, t.addrLen)
		setBits(mask, n)
		rules = append(rules, rule{exprs: slices.Concat(
			t.frontendKey(by, 0),
			[]expr.Any{
				t.saddr(client),
				&expr.Bitwise{SourceRegister: reg(client), DestRegister: reg(client), Len: uint32(t.addrLen), Mask: mask, Xor: none},
				lookup(t.ranges(n)),
				&expr.Verdict{Kind: expr.VerdictReturn},
			})})
	}
	return t.chain(by.chainName("source-ranges"), append(rules, rule{exprs: []expr.Any{count(droppedSourceRanges), drop()}})...)
}

// externalClients sends clients that are not this node nor its pods to the class
// of the local endpoints.
func (t *table) externalClients(by addressing, node dataplane.Node) chain {
	return t.chain(by.chainName("external"), rule{
		comment: outsiders,
		exprs: slices.Concat(t.outsiders(node),
			t.frontendKey(by, 0),
			[]expr.Any{mapLookup(t.external, reg(0)), setPriority(reg(0))},
			t.branchOff(localClasses),
		),
	})
}

const outsiders = "not this node nor its pods"

// outsiders matches clients that are not this node nor its pods.
func (t *table) outsiders(node dataplane.Node) []expr.Any {
	var others []expr.Any
	if len(t.networksOf(node.PodCIDRs, node.LocalPodCIDRs)) > 0 {
		others = append(others, t.saddr(0), notIn(t.localPods))
	}
	return slices.Concat(others, notFrom(node), sourceType(expr.CmpOpNeq))
}

// translate returns the chain that sends a connection to the endpoint in the
// slot that is the packet's priority, if there is one. It is one chain for all
// classes because the kernel walks a map of any kind for each new chain in
// which a rule refers to it (nf_tables_api.c, nf_tables_bind_set): 0.5 s for a
// new class at 100,000 Services, if each class had rules of its own.
func (t *table) translate(by addressing) chain {
	slot := t.addrLen/4 + 2
	var rules []rule
	for i := range shards {
		rules = append(rules, rule{exprs: slices.Concat(t.inShard(by, i),
			t.frontendKey(by, 0), []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(slot)}},
			t.dnat(t.endpoints[i]))})
	}
	return t.chain(by.chainName("translate"), rules...)
}

// inShard matches frontends of a shard: `ip daddr & 0.0.0.15 == 0.0.0.3`.
func (t *table) inShard(by addressing, shard int) []expr.Any {
	n, field := t.addrLen, t.daddr(0)
	if by == byNodePort {
		n, field = 2, dport(0)
	}
	mask, value, none := make([]byte, n), make([]byte, n), make([]byte, n)
	mask[n-1], value[n-1] = shards-1, byte(shard)
	return []expr.Any{
		field,
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(n), Mask: mask, Xor: none},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: value},
	}
}

// translateSticky sends a connection to the endpoint whose ID is the packet's
// priority, if it is there.
func (t *table) translateSticky(by addressing) chain {
	return t.chain(by.chainName("translate-sticky"), rule{exprs: slices.Concat(
		t.frontendKey(by, 0), []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(t.addrLen/4 + 2)}},
		t.dnat(t.stickyEndpoints),
	)})
}

func (t *table) dnat(endpoints *nftables.Set) []expr.Any {
	return []expr.Any{
		mapLookup(endpoints, reg(0)),
		&expr.NAT{
			Type: expr.NATTypeDestNAT, Family: uint32(t.nf.Family),
			// The maxima are what the kernel makes of leaving them out.
			RegAddrMin: reg(0), RegAddrMax: reg(0),
			RegProtoMin: reg(t.addrLen / 4), RegProtoMax: reg(t.addrLen / 4), Specified: true,
		},
	}
}

// sticky branches off to the affinity of a frontend.
func (t *table) sticky(by addressing, l list) chain {
	m := affinities
	if l == localList {
		m = localAffinities
	}
	return t.chain(by.chainName(l.chainName("sticky")),
		rule{exprs: slices.Concat(
			t.frontendKey(by, 0),
			[]expr.Any{mapLookup(t.timeouts, reg(0)), setPriority(reg(0))},
			t.branchOff(m),
		)},
		rule{comment: "it has just changed: the client will try again", exprs: []expr.Any{drop()}},
	)
}

// pick draws an endpoint: a slot, and then the ID of the endpoint in it.
func (t *table) pick(by addressing, l list) chain {
	sizes := t.services
	if l == localList {
		sizes = t.external
	}
	slot := t.addrLen/4 + 2
	in := func(slotIs ...expr.Any) []expr.Any {
		return slices.Concat(t.frontendKey(by, 0), slotIs, []expr.Any{mapLookup(t.slots, reg(0)), setPriority(reg(0))})
	}
	return t.chain(by.chainName(l.chainName("pick")),
		rule{exprs: slices.Concat(
			t.frontendKey(by, 0),
			[]expr.Any{mapLookup(sizes, reg(0)), setPriority(reg(0))},
			t.branchOff(draws),
		)},
		rule{exprs: in(&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(slot)})},
		rule{
			comment: "the slot went while the packet was on its way",
			exprs:   slices.Concat(isSlot(), in(firstSlot(l, reg(slot)))),
		},
	)
}

// unmark puts back the priority of a packet in which a slot, or the ID of a list or
// an endpoint, has done its work.
func (t *table) unmark() []rule {
	rules := []rule{{exprs: slices.Concat(isSlotOrList(), resetPriority())}}
	if !t.virtual {
		rules = append(rules, rule{exprs: slices.Concat(isID(), resetPriority())})
	}
	return rules
}

// unserved are rules for connections to the networks of cluster IPs that are for
// no Service. They are in forward and output, not before, so that an address
// that is the node's own, as that of a DNS cache may be, or that somebody else
// translates, is left alone.
func (t *table) unserved() []rule {
	return []rule{
		{exprs: slices.Concat(ctStateNew(), []expr.Any{
			t.daddr(0), lookup(t.addrSets[inClusterIPs]), count(rejectedUndeclaredPort), gotoChain("reject"),
		})},
		{exprs: slices.Concat(ctStateNew(), []expr.Any{
			t.daddr(0), lookup(t.serviceCIDRs), count(droppedNoService), drop(),
		})},
	}
}

func (t *table) postrouting() []rule {
	rules := []rule{{exprs: append(ctStatusDNAT(), gotoChain("masquerading"))}}
	if t.virtual {
		rules = append(rules, t.letThrough())
	}
	return rules
}

// masquerading decides on connections that were translated, by us or by others,
// which is why it looks their frontend up.
func (t *table) masquerading(node dataplane.Node) chain {
	var rules []rule
	for _, to := range t.destinations(node) {
		match := to.match(t.originalDaddr(0))
		rules = append(rules,
			rule{
				comment: "pods that reach themselves through a Service",
				exprs: slices.Concat(match,
					[]expr.Any{t.saddr(0), t.daddr(t.addrLen / 4)},
					t.originalFrontendKey(to.by, 2*t.addrLen/4),
					[]expr.Any{lookup(t.hairpin), gotoChain("masquerade")}),
			},
			rule{exprs: slices.Concat(match,
				t.originalFrontendKey(to.by, 0),
				[]expr.Any{mapLookup(t.services, reg(0)), setPriority(reg(0))},
				t.branchOff(masquerades))},
		)
	}
	return t.chain("masquerading", rules...)
}

// masquerade returns the chains that connections of Services may end in after
// that. They put the priority back, which has the class.
func (t *table) masquerade(node dataplane.Node) []chain {
	name := func(m dataplane.Masquerade) string { return masqueradeChain(m, false) }
	none := rule{exprs: resetPriority()}
	masquerade := gotoChain("masquerade")
	foreign := []rule{none}
	if conditions, some := t.foreign(node); some {
		foreign = []rule{
			{comment: "clients that are no pods", exprs: append(conditions, masquerade)},
			none,
		}
	}
	chains := []chain{
		t.chain("masquerade", rule{exprs: append(resetPriority(), &expr.Masq{FullyRandom: true})}),
		t.chain(name(dataplane.MasqueradeAlways), rule{exprs: []expr.Any{masquerade}}),
		t.chain(name(dataplane.MasqueradeNode),
			rule{comment: "this node's own connections", exprs: append(sourceType(expr.CmpOpEq), masquerade)},
			none,
		),
		t.chain(name(dataplane.MasqueradeForeign), foreign...),
	}
	for _, m := range []dataplane.Masquerade{dataplane.MasqueradeNode, dataplane.MasqueradeForeign} {
		chains = append(chains, t.sharedMasquerade(m))
	}
	return chains
}

// foreign matches clients that dataplane.MasqueradeForeign is about, if there are
// any.
func (t *table) foreign(node dataplane.Node) (conditions []expr.Any, some bool) {
	switch {
	case node.MasqueradeAll:
		return nil, true
	case node.PodInterface != "" || node.PodInterfacePrefix != "":
		return notFrom(node), true
	case len(t.networksOf(node.PodCIDRs)) > 0:
		return []expr.Any{t.saddr(0), notIn(t.podCIDRs)}, true
	default:
		return nil, false
	}
}

// notFrom matches packets that did not come in through a pod's interface; those
// of the node itself are among them.
func notFrom(node dataplane.Node) []expr.Any {
	if name := podInterface(node); name != nil {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg(0)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: name},
		}
	}
	return nil
}

// podInterface returns what the names of pods' interfaces are compared with, or
// nil if these do not tell pods.
func podInterface(node dataplane.Node) []byte {
	switch {
	case node.PodInterface != "":
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, node.PodInterface)
		return name
	case node.PodInterfacePrefix != "":
		return []byte(node.PodInterfacePrefix)
	default:
		return nil
	}
}

// sourceType compares whether the packet is from an address of the node: `fib
// saddr type local`.
func sourceType(op expr.CmpOp) []expr.Any {
	return addressType(&expr.Fib{FlagSADDR: true}, op)
}

func addressType(of *expr.Fib, op expr.CmpOp) []expr.Any {
	of.Register, of.ResultADDRTYPE = reg(0), true
	return []expr.Any{
		of, &expr.Cmp{Op: op, Register: reg(0), Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// slotBase is what slots count from: a tc class ID whose major nobody else
// uses, so that a priority that is left on a packet can be told for ours. Each
// list has a major of its own.
const (
	slotBase      = 0xfa1d_0000
	localSlotBase = 0xfa1c_0000
	slotMask      = 0xfffe_0000 // of both
	slotMajor     = slotBase & slotMask
)

func (l list) slotBase() uint32 {
	if l == localList {
		return localSlotBase
	}
	return slotBase
}

// randomSlot is `numgen random mod n offset slotBase`.
func randomSlot(n int, l list, register uint32) expr.Any {
	return &expr.Numgen{Register: register, Modulus: uint32(n), Type: unix.NFT_NG_RANDOM, Offset: l.slotBase()} //nolint:gosec // a size
}

// firstSlot is a draw of one: nft can't print a constant in a concatenation.
func firstSlot(l list, register uint32) expr.Any { return randomSlot(1, l, register) }

// id is what an endpoint of a Service with affinity is remembered by: an even
// number in the list of Endpoints, an odd one in that of LocalEndpoints. As a
// packet's priority it is followed by two bytes that tell it from a class or
// a slot.
type id uint16

const idMark = 0xfa

func (i id) list() list { return list(i & 1) }

// isSlot matches priorities that are slots, isID those that are IDs.
func isSlot() []expr.Any {
	return priorityIs(binaryutil.NativeEndian.PutUint32(slotMask), binaryutil.NativeEndian.PutUint32(slotMajor))
}

// isSlotOrList matches list IDs as well.
func isSlotOrList() []expr.Any {
	return priorityIs(binaryutil.NativeEndian.PutUint32(listMask), binaryutil.NativeEndian.PutUint32(listBase))
}

func isID() []expr.Any {
	return priorityIs([]byte{0, 0, 0xff, 0xff}, []byte{0, 0, idMark, idMark})
}

func isIDOf(l list) []expr.Any {
	return priorityIs([]byte{0, 1, 0xff, 0xff}, []byte{0, byte(l), idMark, idMark})
}

func priorityIs(mask, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)},
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: value},
	}
}

// reg returns the register at a 32-bit offset, by the name that the kernel
// gives it when it lists rules: the old 128-bit name where there is one
// (nf_tables_api.c, nft_dump_register).
func reg(word int) uint32 {
	if word%4 == 0 {
		return unix.NFT_REG_1 + uint32(word/4)
	}
	return unix.NFT_REG32_00 + uint32(word)
}

func (t *table) saddr(word int) expr.Any {
	if t.family == dataplane.IPv6 {
		return networkHeader(word, 8, 16)
	}
	return networkHeader(word, 12, 4)
}

func (t *table) daddr(word int) expr.Any {
	if t.family == dataplane.IPv6 {
		return networkHeader(word, 24, 16)
	}
	return networkHeader(word, 16, 4)
}

func networkHeader(word int, offset, length uint32) expr.Any {
	return &expr.Payload{
		DestRegister: reg(word), Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length,
	}
}

// dport loads the destination port: TCP, UDP and SCTP all have it in bytes 2
// and 3.
func dport(word int) expr.Any {
	return &expr.Payload{DestRegister: reg(word), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
}

// frontendKey loads `ip daddr . meta l4proto . th dport`.
func (t *table) frontendKey(by addressing, word int) []expr.Any {
	n := t.addrLen / 4
	return slices.Concat(
		t.address(by, t.daddr(word), word),
		[]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(word + n)}, dport(word + n + 1)},
	)
}

// address makes the address in a key that of the frontend.
func (t *table) address(by addressing, load expr.Any, word int) []expr.Any {
	if by == byAddress {
		return []expr.Any{load}
	}
	return []expr.Any{load, &expr.Bitwise{
		SourceRegister: reg(word), DestRegister: reg(word), Len: uint32(t.addrLen),
		Mask: make([]byte, t.addrLen), Xor: make([]byte, t.addrLen),
	}}
}

// clientKey loads the client's address and the frontend.
func (t *table) clientKey(by addressing) []expr.Any {
	return append([]expr.Any{t.saddr(0)}, t.frontendKey(by, t.addrLen/4)...)
}

// originalFrontendKey loads what the client asked for before it was
// translated, in the same form.
func (t *table) originalFrontendKey(by addressing, word int) []expr.Any {
	n := t.addrLen / 4
	return slices.Concat(
		t.address(by, t.originalDaddr(word), word),
		[]expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(word + n)},
			original(expr.CtKeyPROTODST, word+n+1),
		},
	)
}

func (t *table) originalDaddr(word int) expr.Any {
	if t.family == dataplane.IPv6 {
		return original(expr.CtKeyDSTIP6, word)
	}
	return original(expr.CtKeyDSTIP, word)
}

func original(k expr.CtKey, word int) expr.Any {
	return &expr.Ct{Key: k, Register: reg(word), Direction: expr.CtDirOriginal, OptDirection: true}
}

func lookup(s *nftables.Set) *expr.Lookup {
	return &expr.Lookup{SourceRegister: reg(0), SetName: s.Name}
}

func mapLookup(s *nftables.Set, dest uint32) expr.Any {
	return &expr.Lookup{SourceRegister: reg(0), DestRegister: dest, IsDestRegSet: true, SetName: s.Name}
}

func verdictLookup(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: reg(0), DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: s.Name}
}

func setPriority(source uint32) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: source}
}

// resetPriority is `meta priority set none`.
func resetPriority() []expr.Any {
	return []expr.Any{&expr.Immediate{Register: reg(0), Data: []byte{0, 0, 0, 0}}, setPriority(reg(0))}
}

func gotoChain(name string) expr.Any {
	return &expr.Verdict{Kind: expr.VerdictGoto, Chain: name}
}

func jumpTo(name string) expr.Any {
	return &expr.Verdict{Kind: expr.VerdictJump, Chain: name}
}

func drop() expr.Any { return &expr.Verdict{Kind: expr.VerdictDrop} }

func count(c counter) expr.Any {
	return &expr.Objref{Type: int(nftables.ObjTypeCounter), Name: string(c)}
}

func notIn(s *nftables.Set) expr.Any {
	l := lookup(s)
	l.Invert = true
	return l
}

func ctStateNew() []expr.Any { return ctBits(expr.CtKeySTATE, expr.CtStateBitNEW) }

func ctStateInvalid() []expr.Any { return ctBits(expr.CtKeySTATE, expr.CtStateBitINVALID) }

func ctStatusDNAT() []expr.Any {
	const dstNAT = 1 << 5 // IPS_DST_NAT, linux/netfilter/nf_conntrack_common.h
	return ctBits(expr.CtKeySTATUS, dstNAT)
}

func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: reg(0)},
		&expr.Bitwise{
			SourceRegister: reg(0), DestRegister: reg(0), Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: []byte{0, 0, 0, 0},
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: []byte{0, 0, 0, 0}},
	}
}

func (r rule) userData() []byte {
	if r.comment == "" {
		return nil
	}
	return userdata.AppendString(nil, userdata.TypeComment, r.comment)
}
