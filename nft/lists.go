package nft

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
)

// shareFrom is the number of frontends from which a Service's frontends share their
// elements for endpoints, source ranges and hairpin. Fewer have elements of their
// own, which spares the first packet of a connection four lookups. The number
// of endpoints plays no part, so that no Service changes its layout as they come and
// go. docs/design/shared-endpoint-lists.md has the measurements.
const shareFrom = 8

// listID identifies a list of endpoints that frontends share: those of one
// [dataplane.Key]. Zero is no list.
type listID uint32

// A list ID travels in a packet's priority, next to the slots in the numbers of
// slotBase, so that one rule finds both.
const (
	listBase  = 0xfa18_0000
	listMask  = 0xfff8_0000
	maxListID = 1<<18 - 1
)

// listShards is the number of maps that the endpoints of lists are spread over, by
// list ID. The kernel walks a map when a chain for a new size refers to it, and takes
// quadratic time to dump one.
const listShards = 8

func (n listID) shard() int { return int(n % listShards) }

// drawClass returns the value in list-sizes for a list of this many endpoints.
func (n listID) drawClass(l list, size int) class {
	c := shared | class(n.shard())*listShard | class(size) //nolint:gosec // MaxEndpoints fits
	if l == localList {
		c |= local
	}
	return c
}

// sharedList has the elements of one list ID.
type sharedList struct {
	// draws are the values in list-sizes; 0 where there is none.
	draws [lists]class
	// slots are in shared-endpoints-…; a slot without an element is the zero
	// AddrPort.
	slots [lists][]netip.AddrPort
	// hairpins are the addresses in shared-hairpin, sorted.
	hairpins []netip.Addr
	// ranges are the source ranges, sorted, and self the frontends' own addresses
	// that clients may have besides these.
	ranges, self []netip.Prefix
	// ports are as in row.
	ports []uint16
}

// share moves what the frontends of a Service have in common from their row to a list.
func (r *row) share(s *dataplane.Service, n listID) {
	l := &sharedList{hairpins: r.hairpins, ranges: r.ranges, ports: r.ports}
	sizes := [lists]int{clusterList: r.class.size()}
	if r.inExternal {
		sizes[localList] = r.external.size()
		r.external = r.external.shared()
	}
	r.class = r.class.shared()
	for i, size := range sizes {
		l.slots[i] = r.slots[i].endpoints
		if size > 0 {
			l.draws[i] = n.drawClass(list(i), size)
		}
	}
	if r.self {
		for _, f := range s.Frontends { // sorted by address
			own := ownRange(f)
			if _, ok := slices.BinarySearchFunc(r.ranges, own, netip.Prefix.Compare); !ok {
				l.self = append(l.self, own)
			}
		}
		l.self = slices.Compact(l.self)
	}
	r.list, r.shared = n, l
	r.slots, r.hairpins, r.ranges, r.self, r.ports = [lists]slotList{}, nil, nil, false, nil
}

// allowed returns the networks that the list has elements for.
func (l *sharedList) allowed() []netip.Prefix {
	if len(l.self) == 0 {
		return l.ranges
	}
	all := slices.Concat(l.ranges, l.self)
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// rangeComment returns the comment on a network's element.
func (l *sharedList) rangeComment(p netip.Prefix) string {
	if _, ok := slices.BinarySearchFunc(l.self, p, netip.Prefix.Compare); ok {
		return selfComment
	}
	return ""
}

// sharedRow is a list with its ID; the zero one is no list.
type sharedRow struct {
	list   listID
	shared *sharedList
}

// branches returns the branches that the list needs.
func (l *sharedList) branches() []branch {
	var all []branch
	for _, c := range l.draws {
		if c != 0 {
			all = append(all, branch{listDraws, c})
		}
	}
	return all
}

// listIDs has the list IDs of one table that are in use.
type listIDs struct {
	byKey map[dataplane.Key]listID
	used  map[listID]bool
	last  listID
}

func newListIDs() listIDs {
	return listIDs{byKey: map[dataplane.Key]listID{}, used: map[listID]bool{}}
}

// allocate returns the list ID of a key, a new one if it has none, or 0 if there are
// no more. An ID that was released is used again as late as possible: packets on
// their way may have it.
func (l *listIDs) allocate(key dataplane.Key) listID {
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
			l.claim(key, l.last)
			return l.last
		}
	}
}

// reserve keeps an ID that the kernel has from being allocated.
func (l *listIDs) reserve(n listID) {
	l.used[n] = true
	l.last = max(l.last, n)
}

func (l *listIDs) claim(key dataplane.Key, n listID) {
	l.byKey[key], l.used[n] = n, true
}

func (l *listIDs) release(key dataplane.Key) {
	if n, ok := l.byKey[key]; ok {
		delete(l.byKey, key)
		delete(l.used, n)
	}
}

// shares reports whether the Service's frontends share a list. Several node ports of
// one Service port do not occur.
func (d *Dataplane) shares(s *dataplane.Service) bool {
	return len(s.Frontends) >= d.shareFrom && s.Affinity == 0 &&
		(s.Key.Kind == dataplane.ExternalIP || s.Key.Kind == dataplane.LoadBalancer)
}

// listOf returns the list ID that a Service gets, or 0 if it shares nothing.
func (d *Dataplane) listOf(s *dataplane.Service) listID {
	if !d.shares(s) {
		return 0
	}
	return d.lists[index(s.Key.Family)].allocate(s.Key)
}

// changeList adds what turns the elements of a list into others, and counts the
// branches. Either may be nil.
func (e *tableEdit) changeList(n listID, have, want *sharedList) {
	if have != nil {
		for _, b := range have.branches() {
			e.countBranch(b, -1)
		}
	}
	e.foundList(n, have, want)
}

// foundList is changeList for a list that was found in the kernel, whose branches
// have not been counted.
func (e *tableEdit) foundList(n listID, have, want *sharedList) {
	if want != nil {
		for _, b := range want.branches() {
			e.countBranch(b, 1)
		}
	} else {
		want = &sharedList{}
	}
	if have == nil {
		have = &sharedList{}
	}
	for l := range lists {
		e.changeListSlots(n, l, have.slots[l], want.slots[l])
		if h, w := have.draws[l], want.draws[l]; h != w {
			key := e.table.listSlotElement(n, l, 0)
			if h != 0 {
				e.delete(inListSizes, element{Key: key})
			}
			if w != 0 {
				e.insert(inListSizes, element{Key: key, Val: e.table.classElement(w)})
			}
		}
	}
	merge(have.hairpins, want.hairpins, netip.Addr.Compare, func(a netip.Addr, inHave, inWant bool) {
		switch {
		case !inWant:
			e.delete(inSharedHairpin, element{Key: e.table.sharedHairpinElement(a, n)})
		case !inHave:
			e.insert(inSharedHairpin, element{Key: e.table.sharedHairpinElement(a, n)})
		}
	})
	e.changeSharedRanges(n, have, want)
	e.changePorts(have.ports, want.ports)
}

func (e *tableEdit) changeListSlots(n listID, l list, have, want []netip.AddrPort) {
	set := inSharedEndpoints + n.shard()
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
		key := e.table.listSlotElement(n, l, uint32(i)) //nolint:gosec // a slot
		if h.IsValid() {
			e.delete(set, element{Key: key})
			e.countPort(h, -1)
		}
		if w.IsValid() {
			e.insert(set, element{Key: key, Val: e.table.addrPortElement(w)})
			e.countPort(w, 1)
		}
	}
}

func (e *tableEdit) changeSharedRanges(n listID, have, want *sharedList) {
	merge(have.allowed(), want.allowed(), netip.Prefix.Compare, func(p netip.Prefix, inHave, inWant bool) {
		if inHave && inWant && have.rangeComment(p) == want.rangeComment(p) {
			return
		}
		set, key := rangeSet{p.Bits(), true}, e.table.sharedRangeElement(n, p)
		if inHave {
			e.deleteRange(set, element{Key: key})
		}
		if inWant {
			e.insertRange(set, element{Key: key, Comment: want.rangeComment(p)})
		}
	})
}

// shared returns the chains that connections to frontends which share a list go
// through. A packet keeps one number from one lookup to the next, its
// priority, so the list ID is looked up again once the size is known.
//
//	chain list {
//		meta priority set ip daddr . meta l4proto . th dport map @lists
//	}
//	chain shared {
//		jump list
//		meta priority set meta priority . numgen random mod 1 offset 4196204544 map @list-sizes meta priority vmap @list-draws
//		drop comment "it has just changed: the client will try again"
//	}
func (t *table) shared(rangeBits []int) []chain {
	priority := &expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)}
	chains := []chain{
		// In one chain, because the kernel walks a map for each new chain that refers
		// to it; see translate.
		t.chain("list", rule{exprs: slices.Concat(
			t.frontendKey(byAddress, 0), []expr.Any{mapLookup(t.lists, reg(0)), setPriority(reg(0))},
		)}),
		t.sharedSourceRanges(rangeBits),
	}
	for l := range lists {
		chains = append(chains, t.chain(l.chainName("shared"),
			rule{exprs: []expr.Any{jumpTo("list")}},
			rule{exprs: slices.Concat(
				[]expr.Any{priority, firstSlot(l, reg(1)), mapLookup(t.listSizes, reg(0)), setPriority(reg(0))},
				t.branchOff(listDraws),
			)},
			rule{comment: "it has just changed: the client will try again", exprs: []expr.Any{drop()}},
		))
	}
	return chains
}

// listRules draw an endpoint of a list of one size.
//
//	chain list-2-shared-1 {
//		jump list
//		dnat ip to meta priority . numgen random mod 2 offset 4196204544 map @shared-endpoints-1
//		dnat ip to meta priority . numgen random mod 1 offset 4196204544 map @shared-endpoints-1 comment "the slot went while the packet was on its way"
//		drop comment "and so did the last one: the client will try again"
//	}
func (t *table) listRules(c class) []rule {
	translate := func(slot expr.Any) []expr.Any {
		return slices.Concat(
			[]expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)}, slot},
			t.dnat(t.sharedEndpoints[c.shard()]),
		)
	}
	return []rule{
		{exprs: []expr.Any{jumpTo("list")}},
		{exprs: translate(randomSlot(c.size(), c.list(), reg(1)))},
		{comment: "the slot went while the packet was on its way", exprs: translate(firstSlot(c.list(), reg(1)))},
		{comment: "and so did the last one: the client will try again", exprs: []expr.Any{drop()}},
	}
}

// sharedSourceRanges returns from frontends whose list has a source range that the
// client is in.
//
//	chain source-ranges-shared {
//		jump list
//		meta priority . ip saddr & 255.255.255.0 @shared-source-ranges-24 return
//		…
//		counter name "dropped-source-ranges" drop
//	}
func (t *table) sharedSourceRanges(bits []int) chain {
	rules := []rule{{exprs: []expr.Any{jumpTo("list")}}}
	for _, n := range bits {
		mask, none := make([]byte, t.addrLen), make([]byte, t.addrLen)
		setBits(mask, n)
		rules = append(rules, rule{exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)},
			t.saddr(1),
			&expr.Bitwise{SourceRegister: reg(1), DestRegister: reg(1), Len: uint32(t.addrLen), Mask: mask, Xor: none},
			lookup(t.sharedRanges(n)),
			&expr.Verdict{Kind: expr.VerdictReturn},
		}})
	}
	return t.chain("source-ranges-shared", append(rules, rule{exprs: []expr.Any{count(droppedSourceRanges), drop()}})...)
}

// sharedMasquerade decides on connections to frontends that share a list. With
// MasqueradeAlways there is nothing to decide.
//
//	chain masquerade-node-shared {
//		meta priority set ct original ip daddr . meta l4proto . ct original proto-dst map @lists
//		ip saddr . ip daddr . meta priority @shared-hairpin goto masquerade comment "pods that reach themselves through a Service"
//		goto masquerade-node
//	}
func (t *table) sharedMasquerade(m dataplane.Masquerade) chain {
	return t.chain(masqueradeChain(m, true),
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
		rule{exprs: []expr.Any{gotoChain(masqueradeChain(m, false))}},
	)
}

// masqueradeChain returns the name of the chain for connections with a masquerade to
// frontends that share a list, or do not.
func masqueradeChain(m dataplane.Masquerade, shared bool) string {
	name := "masquerade-" + m.String()
	if shared && m != dataplane.MasqueradeAlways {
		return name + "-shared"
	}
	return name
}

// listElement is a list ID as it travels in the packet's priority.
func (*table) listElement(n listID) []byte {
	return binary.NativeEndian.AppendUint32(nil, listBase|uint32(n))
}

// listSlotElement is the key of a slot in shared-endpoints-…, and for slot 0 that of
// the list in list-sizes.
func (t *table) listSlotElement(n listID, l list, slot uint32) []byte {
	return binary.NativeEndian.AppendUint32(t.listElement(n), l.slotBase()|slot)
}

func (t *table) sharedHairpinElement(a netip.Addr, n listID) []byte {
	b := make([]byte, 0, 2*t.addrLen+4)
	b = append(b, a.AsSlice()...)
	b = append(b, a.AsSlice()...)
	return append(b, t.listElement(n)...)
}

func (t *table) sharedRangeElement(n listID, p netip.Prefix) []byte {
	return append(t.listElement(n), p.Addr().AsSlice()...)
}

func (*table) parseList(b []byte) (listID, []byte, error) {
	if len(b) < 4 {
		return 0, nil, errForeign
	}
	n := binary.NativeEndian.Uint32(b)
	if n&^maxListID != listBase || n == listBase {
		return 0, nil, errForeign
	}
	return listID(n & maxListID), b[4:], nil
}

func (t *table) parseListSlot(b []byte) (listID, list, int, error) {
	n, rest, err := t.parseList(b)
	if err != nil || len(rest) != 4 {
		return 0, 0, 0, errForeign
	}
	slot := binary.NativeEndian.Uint32(rest)
	for l := range lists {
		if slot&^uint32(sizeMask) == l.slotBase() {
			return n, l, int(slot & uint32(sizeMask)), nil
		}
	}
	return 0, 0, 0, errForeign
}

func (c *content) list(n listID) *sharedList {
	l, ok := c.lists[n]
	if !ok {
		l = &sharedList{}
		c.lists[n] = l
	}
	return l
}

func (c *content) parseListOf(t *table, e element) error {
	f, rest, err := t.parseFrontend(e.Key)
	if err != nil || len(rest) > 0 {
		return errForeign
	}
	n, rest, err := t.parseList(e.Val)
	if err != nil || len(rest) > 0 {
		return errForeign
	}
	c.row(f).list = n
	return nil
}

func (c *content) parseListSize(t *table, e element) error {
	n, l, slot, err := t.parseListSlot(e.Key)
	if err != nil || slot != 0 {
		return errForeign
	}
	draw, err := t.parseClass(e.Val)
	if err != nil || draw.size() == 0 || draw != n.drawClass(l, draw.size()) {
		return errForeign
	}
	c.list(n).draws[l] = draw
	return nil
}

func (c *content) parseSharedEndpoint(t *table, shard int, e element) error {
	n, l, slot, err := t.parseListSlot(e.Key)
	if err != nil || n.shard() != shard {
		return errForeign
	}
	addr, err := t.parseAddrPort(e.Val)
	if err != nil {
		return err
	}
	slots := &c.list(n).slots[l]
	for len(*slots) <= slot {
		*slots = append(*slots, netip.AddrPort{})
	}
	(*slots)[slot] = addr
	c.countPort(t, addr)
	return nil
}

func (c *content) parseSharedHairpin(t *table, e element) error {
	n := t.addrLen
	if len(e.Key) != 2*n+4 || !slices.Equal(e.Key[:n], e.Key[n:2*n]) {
		return errForeign
	}
	addr, _ := netip.AddrFromSlice(e.Key[:n])
	id, _, err := t.parseList(e.Key[2*n:])
	if err != nil {
		return err
	}
	l := c.list(id)
	l.hairpins = append(l.hairpins, addr)
	return nil
}

func (c *content) parseSharedRange(t *table, bits int, e element) error {
	n, rest, err := t.parseList(e.Key)
	if err != nil || len(rest) != t.addrLen {
		return errForeign
	}
	addr, _ := netip.AddrFromSlice(rest)
	p := netip.PrefixFrom(addr, bits)
	if p != p.Masked() {
		return errForeign
	}
	l := c.list(n)
	switch {
	case e.Comment == "":
		l.ranges = append(l.ranges, p)
	case e.Comment == selfComment && p.IsSingleIP():
		l.self = append(l.self, p)
	default:
		return errForeign
	}
	return nil
}

// resolveLists gives each row that was read the list that it shares.
func (c *content) resolveLists() {
	for _, l := range c.lists {
		slices.SortFunc(l.hairpins, netip.Addr.Compare)
		slices.SortFunc(l.ranges, netip.Prefix.Compare)
		slices.SortFunc(l.self, netip.Prefix.Compare)
	}
	for _, r := range c.rows {
		if r.list != 0 {
			r.shared = cmp.Or(c.lists[r.list], &sharedList{})
		}
	}
}
