package nft

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
)

// minSharedFrontends is the minimum number of frontends for which a Service shares the
// elements of endpoints, source ranges and hairpin. Services with fewer frontends have
// elements for each frontend, which saves four lookups for the first packet of a
// connection. The number does not depend on endpoints, so that adding and removing
// endpoints never changes the layout. docs/design/shared-endpoint-lists.md has the
// measurements.
const minSharedFrontends = 8

// listID identifies a shared list: the endpoints of one [dataplane.Key]. Zero means no
// list.
type listID uint32

// A packet's priority carries a list ID. The ranges of list IDs, slots and endpoint IDs are
// disjoint.
const (
	listIDBase = 0xfa18_0000
	maxListID  = 1<<18 - 1
)

// numListShards is the number of maps that the endpoints of shared lists are sharded over,
// by list ID. The kernel walks a map when a chain for a new size refers to it, and takes
// quadratic time to dump a map.
const numListShards = 8

func (n listID) shard() int { return int(n % numListShards) }

// selection returns how the slots of the list are selected. Lists of one size whose IDs are close
// together have different counters.
func (n listID) selection(kind selection) selection {
	if kind == selectInTurn {
		return turn(int(n) / numListShards)
	}
	return kind
}

// sizeClass returns the value in list-sizes for a list with this number of slots.
func (n listID) sizeClass(l endpointList, size int, kind selection) serviceClass {
	c := serviceClass(n.selection(kind))*classListSelection |
		classSharedList | serviceClass(n.shard())*classListShard | serviceClass(size) //nolint:gosec // MaxEndpoints fits
	if l == localEndpoints {
		c |= classLocalEndpoints
	}
	return c
}

// sharedList contains the elements of one list ID.
type sharedList struct {
	// sizeClasses contains the values in list-sizes, or 0 for a missing element.
	sizeClasses [numEndpointLists]serviceClass
	// slots contains the elements of shared-endpoints-…. A missing slot is the zero
	// AddrPort.
	slots [numEndpointLists][]netip.AddrPort
	// hairpins contains the sorted endpoint addresses in shared-hairpin.
	hairpins []netip.Addr
	// ranges contains the sorted source ranges. selfRanges contains the frontends' own
	// addresses that clients may have in addition.
	ranges, selfRanges []netip.Prefix
	// ports is the same as frontendElements.ports.
	ports []uint16
}

// moveToSharedList moves the elements that a Service's frontends have in common to a shared
// list.
func (r *frontendElements) moveToSharedList(s *dataplane.Service, n listID) {
	l := &sharedList{hairpins: r.hairpins, ranges: r.ranges, ports: r.ports}
	sizes := [numEndpointLists]int{clusterEndpoints: r.class.size()}
	if r.inExternal {
		sizes[localEndpoints] = r.externalClass.size()
		r.externalClass = r.externalClass.forSharedList()
	}
	r.class = r.class.forSharedList()
	for i, size := range sizes {
		l.slots[i] = r.slots[i].endpoints
		if size > 0 {
			l.sizeClasses[i] = n.sizeClass(endpointList(i), size, r.class.selection())
		}
	}
	if r.allowSelf {
		for _, f := range s.Frontends { // sorted by address
			own := frontendPrefix(f)
			if _, ok := slices.BinarySearchFunc(r.ranges, own, netip.Prefix.Compare); !ok {
				l.selfRanges = append(l.selfRanges, own)
			}
		}
		l.selfRanges = slices.Compact(l.selfRanges)
	}
	r.listID, r.sharedList = n, l
	r.slots, r.hairpins, r.ranges, r.allowSelf, r.ports = [numEndpointLists]listElements{}, nil, nil, false, nil
}

// allowedRanges returns the networks that the source range sets contain for the list.
func (l *sharedList) allowedRanges() []netip.Prefix {
	if len(l.selfRanges) == 0 {
		return l.ranges
	}
	all := slices.Concat(l.ranges, l.selfRanges)
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// rangeComment returns the comment on a network's element.
func (l *sharedList) rangeComment(p netip.Prefix) string {
	if _, ok := slices.BinarySearchFunc(l.selfRanges, p, netip.Prefix.Compare); ok {
		return selfComment
	}
	return ""
}

// sharedListWithID is a shared list with its ID. The zero value means no list.
type sharedListWithID struct {
	id         listID
	sharedList *sharedList
}

// verdictElements returns the verdict elements that the list needs.
func (l *sharedList) verdictElements() []verdictElement {
	var all []verdictElement
	for _, c := range l.sizeClasses {
		if c != 0 {
			all = append(all, verdictElement{vmapListDraws, c})
		}
	}
	return all
}

// listIDAllocator allocates the list IDs of one table.
type listIDAllocator struct {
	byKey map[dataplane.Key]listID
	used  map[listID]bool
	last  listID
}

func newListIDAllocator() listIDAllocator {
	return listIDAllocator{byKey: map[dataplane.Key]listID{}, used: map[listID]bool{}}
}

// allocate returns the list ID of a key. It allocates a new ID if the key has none, and
// returns 0 if all IDs are in use. It reuses a released ID as late as possible, because
// packets may still carry it.
func (l *listIDAllocator) allocate(key dataplane.Key) listID {
	if n, ok := l.byKey[key]; ok {
		return n
	}
	if len(l.used) == maxListID {
		return 0
	}
	for {
		if l.last++; l.last > maxListID {
			l.last = 1
		}
		if !l.used[l.last] {
			l.assign(key, l.last)
			return l.last
		}
	}
}

// reserve marks an ID that exists in the kernel as used.
func (l *listIDAllocator) reserve(n listID) {
	l.used[n] = true
	l.last = max(l.last, n)
}

func (l *listIDAllocator) assign(key dataplane.Key, n listID) {
	l.byKey[key], l.used[n] = n, true
}

func (l *listIDAllocator) release(key dataplane.Key) {
	if n, ok := l.byKey[key]; ok {
		delete(l.byKey, key)
		delete(l.used, n)
	}
}

// usesSharedList reports whether the Service's frontends share a list. Node ports never do,
// because a Service port has at most one.
func (d *Dataplane) usesSharedList(s *dataplane.Service) bool {
	return len(s.Frontends) >= d.minSharedFrontends && s.Affinity == 0 &&
		(s.Key.Kind == dataplane.ExternalIP || s.Key.Kind == dataplane.LoadBalancer)
}

// allocateListID returns the list ID for a Service, or 0 if its frontends do not share a
// list.
func (d *Dataplane) allocateListID(s *dataplane.Service) listID {
	if !d.usesSharedList(s) {
		return 0
	}
	return d.listIDs[familyIndex(s.Key.Family)].allocate(s.Key)
}

// diffSharedList adds the difference between two states of a list and counts its verdict
// elements. Either may be nil.
func (e *tableDiff) diffSharedList(n listID, have, want *sharedList) {
	if have != nil {
		for _, b := range have.verdictElements() {
			e.countVerdictElement(b, -1)
		}
	}
	e.diffSharedListFromKernel(n, have, want)
}

// diffSharedListFromKernel is diffSharedList for a list that was read from the kernel and
// whose verdict elements are not counted yet.
func (e *tableDiff) diffSharedListFromKernel(n listID, have, want *sharedList) {
	if want != nil {
		for _, b := range want.verdictElements() {
			e.countVerdictElement(b, 1)
		}
	} else {
		want = &sharedList{}
	}
	if have == nil {
		have = &sharedList{}
	}
	for l := range numEndpointLists {
		e.diffSharedListSlots(n, l, have.slots[l], want.slots[l])
		if h, w := have.sizeClasses[l], want.sizeClasses[l]; h != w {
			key := e.table.encodeListSlotKey(n, l, 0)
			if h != 0 {
				e.delete(listSizesSet, element{Key: key})
			}
			if w != 0 {
				e.insert(listSizesSet, element{Key: key, Val: e.table.encodeClass(w)})
			}
		}
	}
	mergeSorted(have.hairpins, want.hairpins, netip.Addr.Compare, func(a netip.Addr, inHave, inWant bool) {
		switch {
		case !inWant:
			e.delete(sharedHairpinSet, element{Key: e.table.encodeSharedHairpinKey(a, n)})
		case !inHave:
			e.insert(sharedHairpinSet, element{Key: e.table.encodeSharedHairpinKey(a, n)})
		}
	})
	e.diffSharedSourceRanges(n, have, want)
	e.diffPorts(have.ports, want.ports)
}

func (e *tableDiff) diffSharedListSlots(n listID, l endpointList, have, want []netip.AddrPort) {
	set := sharedEndpointsSet + n.shard()
	for i := range max(len(have), len(want)) {
		var h, w netip.AddrPort
		if i < len(have) {
			h = have[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if h == w {
			continue
		}
		key := e.table.encodeListSlotKey(n, l, uint32(i)) //nolint:gosec // a slot
		if h.IsValid() {
			e.delete(set, element{Key: key})
			e.countEndpointPort(h, -1)
		}
		if w.IsValid() {
			e.insert(set, element{Key: key, Val: e.table.encodeAddrPort(w)})
			e.countEndpointPort(w, 1)
		}
	}
}

func (e *tableDiff) diffSharedSourceRanges(n listID, have, want *sharedList) {
	mergeSorted(have.allowedRanges(), want.allowedRanges(), netip.Prefix.Compare, func(p netip.Prefix, inHave, inWant bool) {
		if inHave && inWant && have.rangeComment(p) == want.rangeComment(p) {
			return
		}
		set, key := rangeSetKey{p.Bits(), true}, e.table.encodeSharedSourceRangeKey(n, p)
		if inHave {
			e.deleteRange(set, element{Key: key})
		}
		if inWant {
			e.insertRange(set, element{Key: key, Comment: want.rangeComment(p)})
		}
	})
}

// sharedListChains returns the chains for connections to frontends that share a list. A
// packet carries only one number from one lookup to the next, in its priority, so the rules
// look up the list ID again after the size.
//
//	chain list {
//		meta priority set ip daddr . meta l4proto . th dport map @lists
//	}
//	chain shared {
//		jump list
//		meta priority set meta priority . numgen random mod 1 offset 4196204544 map @list-sizes meta priority vmap @list-draws
//		drop comment "it has just changed: the client will try again"
//	}
func (t *table) sharedListChains(rangeBits []int) []chain {
	priority := &expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)}
	chains := []chain{
		// A single chain, because the kernel walks a map for each new chain that refers
		// to it; see translateChains.
		t.newChain("list", rule{exprs: slices.Concat(
			t.frontendKey(byAddress, 0), []expr.Any{mapLookup(t.lists, reg(0)), setPriority(reg(0))},
		)}),
		t.sharedSourceRangesChain(rangeBits),
	}
	for l := range numEndpointLists {
		chains = append(chains, t.newChain(l.chainName("shared"),
			rule{exprs: []expr.Any{jumpChain("list")}},
			rule{exprs: slices.Concat(
				[]expr.Any{priority, firstSlot(l, reg(1)), mapLookup(t.listSizes, reg(0)), setPriority(reg(0))},
				t.priorityVmap(vmapListDraws),
			)},
			rule{comment: "it has just changed: the client will try again", exprs: []expr.Any{drop()}},
		))
	}
	return chains
}

// listClassRules returns the rules that select an endpoint of a list with the size of a
// class.
//
//	chain list-2-shared-1 {
//		jump list
//		meta priority set none dnat ip to meta priority . numgen random mod 2 offset 4196204544 map @shared-endpoints-1
//		meta priority set none dnat ip to meta priority . numgen random mod 1 offset 4196204544 map @shared-endpoints-1 comment "the slot went while the packet was on its way"
//		drop comment "and so did the last one: the client will try again"
//	}
func (t *table) listClassRules(c serviceClass) []rule {
	translate := func(slot ...expr.Any) []expr.Any {
		return slices.Concat(
			[]expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)}}, slot,
			t.dnatFromMap(t.sharedEndpoints[c.shard()]),
		)
	}
	return []rule{
		{exprs: []expr.Any{jumpChain("list")}},
		{exprs: translate(t.selectSlot(c.listSelection(), c.size(), c.endpointList(), 1)...)},
		{comment: "the slot went while the packet was on its way", exprs: translate(firstSlot(c.endpointList(), reg(1)))},
		{comment: "and so did the last one: the client will try again", exprs: []expr.Any{drop()}},
	}
}

// sharedSourceRangesChain returns the chain that drops packets of clients outside the
// source ranges of the shared list, and returns for other clients.
//
//	chain source-ranges-shared {
//		jump list
//		meta priority . ip saddr & 255.255.255.0 @shared-source-ranges-24 return
//		…
//		counter name "dropped-source-ranges" drop
//	}
func (t *table) sharedSourceRangesChain(bits []int) chain {
	rules := []rule{{exprs: []expr.Any{jumpChain("list")}}}
	for _, n := range bits {
		mask, none := make([]byte, t.addrLen), make([]byte, t.addrLen)
		setLeadingBits(mask, n)
		rules = append(rules, rule{exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)},
			t.saddr(1),
			&expr.Bitwise{SourceRegister: reg(1), DestRegister: reg(1), Len: uint32(t.addrLen), Mask: mask, Xor: none},
			lookup(t.sharedSourceRangeSet(n)),
			&expr.Verdict{Kind: expr.VerdictReturn},
		}})
	}
	return t.newChain("source-ranges-shared", append(rules, rule{exprs: []expr.Any{counterRef(droppedSourceRanges), drop()}})...)
}

// sharedMasqueradeChain returns the chain that decides whether to masquerade connections to
// frontends that share a list. MasqueradeAlways needs no such chain.
//
//	chain masquerade-node-shared {
//		meta priority set ct original ip daddr . meta l4proto . ct original proto-dst map @lists
//		ip saddr . ip daddr . meta priority @shared-hairpin goto masquerade comment "pods that reach themselves through a Service"
//		goto masquerade-node
//	}
func (t *table) sharedMasqueradeChain(m dataplane.Masquerade) chain {
	return t.newChain(masqueradeChainName(m, true),
		rule{exprs: slices.Concat(
			t.originalFrontendKey(byAddress, 0), []expr.Any{mapLookup(t.lists, reg(0)), setPriority(reg(0))},
		)},
		rule{
			comment: "pods that reach themselves through a Service",
			exprs: []expr.Any{
				t.saddr(0), t.daddr(t.addrLen / 4), &expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(2 * t.addrLen / 4)},
				lookup(t.sharedHairpin), gotoChain("masquerade"),
			},
		},
		rule{exprs: []expr.Any{gotoChain(masqueradeChainName(m, false))}},
	)
}

// masqueradeChainName returns the name of the chain that decides whether to masquerade a
// connection. shared says whether its frontend shares a list. The tables of a running node
// contain these names, so they must not change with Masquerade.String.
func masqueradeChainName(m dataplane.Masquerade, shared bool) string {
	name := "masquerade-foreign"
	switch m {
	case dataplane.MasqueradeAlways:
		return "masquerade-always"
	case dataplane.MasqueradeFromNode:
		name = "masquerade-node"
	case dataplane.MasqueradeOffCluster:
	}
	if shared {
		return name + "-shared"
	}
	return name
}

// encodeListID encodes a list ID as a packet priority.
func (*table) encodeListID(n listID) []byte {
	return binary.NativeEndian.AppendUint32(nil, listIDBase|uint32(n))
}

// encodeListSlotKey returns the key of a slot in shared-endpoints-…. For slot 0, it is also
// the key of the list in list-sizes.
func (t *table) encodeListSlotKey(n listID, l endpointList, slot uint32) []byte {
	return binary.NativeEndian.AppendUint32(t.encodeListID(n), l.slotBase()|slot)
}

func (t *table) encodeSharedHairpinKey(a netip.Addr, n listID) []byte {
	b := make([]byte, 0, 2*t.addrLen+4)
	b = append(b, a.AsSlice()...)
	b = append(b, a.AsSlice()...)
	return append(b, t.encodeListID(n)...)
}

func (t *table) encodeSharedSourceRangeKey(n listID, p netip.Prefix) []byte {
	return append(t.encodeListID(n), p.Addr().AsSlice()...)
}

func (*table) parseListID(b []byte) (listID, []byte, error) {
	if len(b) < 4 {
		return 0, nil, errUnexpectedElement
	}
	n := binary.NativeEndian.Uint32(b)
	if n&^maxListID != listIDBase || n == listIDBase {
		return 0, nil, errUnexpectedElement
	}
	return listID(n & maxListID), b[4:], nil
}

func (t *table) parseListSlot(b []byte) (listID, endpointList, int, error) {
	n, rest, err := t.parseListID(b)
	if err != nil || len(rest) != 4 {
		return 0, 0, 0, errUnexpectedElement
	}
	slot := binary.NativeEndian.Uint32(rest)
	for l := range numEndpointLists {
		if slot&^uint32(classSizeMask) == l.slotBase() {
			return n, l, int(slot & uint32(classSizeMask)), nil
		}
	}
	return 0, 0, 0, errUnexpectedElement
}

func (c *tableContent) sharedList(n listID) *sharedList {
	l, ok := c.sharedLists[n]
	if !ok {
		l = &sharedList{}
		c.sharedLists[n] = l
	}
	return l
}

func (c *tableContent) parseListID(t *table, e element) error {
	f, rest, err := t.parseFrontend(e.Key)
	if err != nil || len(rest) > 0 {
		return errUnexpectedElement
	}
	n, rest, err := t.parseListID(e.Val)
	if err != nil || len(rest) > 0 {
		return errUnexpectedElement
	}
	c.frontend(f).listID = n
	return nil
}

func (c *tableContent) parseListSize(t *table, e element) error {
	n, l, slot, err := t.parseListSlot(e.Key)
	if err != nil || slot != 0 {
		return errUnexpectedElement
	}
	class, err := t.parseClass(e.Val)
	if err != nil || class.size() == 0 || class != n.sizeClass(l, class.size(), class.listSelection().kind()) {
		return errUnexpectedElement
	}
	c.sharedList(n).sizeClasses[l] = class
	return nil
}

func (c *tableContent) parseSharedEndpoint(t *table, shard int, e element) error {
	n, l, slot, err := t.parseListSlot(e.Key)
	if err != nil || n.shard() != shard {
		return errUnexpectedElement
	}
	addr, err := t.parseAddrPort(e.Val)
	if err != nil {
		return err
	}
	slots := &c.sharedList(n).slots[l]
	for len(*slots) <= slot {
		*slots = append(*slots, netip.AddrPort{})
	}
	(*slots)[slot] = addr
	c.countEndpointPort(t, addr)
	return nil
}

func (c *tableContent) parseSharedHairpin(t *table, e element) error {
	n := t.addrLen
	if len(e.Key) != 2*n+4 || !slices.Equal(e.Key[:n], e.Key[n:2*n]) {
		return errUnexpectedElement
	}
	addr, _ := netip.AddrFromSlice(e.Key[:n])
	id, _, err := t.parseListID(e.Key[2*n:])
	if err != nil {
		return err
	}
	l := c.sharedList(id)
	l.hairpins = append(l.hairpins, addr)
	return nil
}

func (c *tableContent) parseSharedSourceRange(t *table, bits int, e element) error {
	n, rest, err := t.parseListID(e.Key)
	if err != nil || len(rest) != t.addrLen {
		return errUnexpectedElement
	}
	addr, _ := netip.AddrFromSlice(rest)
	p := netip.PrefixFrom(addr, bits)
	if p != p.Masked() {
		return errUnexpectedElement
	}
	l := c.sharedList(n)
	switch {
	case e.Comment == "":
		l.ranges = append(l.ranges, p)
	case e.Comment == selfComment && p.IsSingleIP():
		l.selfRanges = append(l.selfRanges, p)
	default:
		return errUnexpectedElement
	}
	return nil
}

// linkSharedLists sets the shared list of all frontends that were read.
func (c *tableContent) linkSharedLists() {
	for _, l := range c.sharedLists {
		slices.SortFunc(l.hairpins, netip.Addr.Compare)
		slices.SortFunc(l.ranges, netip.Prefix.Compare)
		slices.SortFunc(l.selfRanges, netip.Prefix.Compare)
	}
	for _, r := range c.frontends {
		if r.listID != 0 {
			r.sharedList = cmp.Or(c.sharedLists[r.listID], &sharedList{})
		}
	}
}
