package nft

import (
	"cmp"
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// edit collects the elements to delete and to add in one table. In a commit all
// deletions come first, so an element whose value changes is in both.
type edit struct {
	table    *table
	del, add [inEndpoints + shards][]element
	// delRanges and addRanges are those of source ranges, by set.
	delRanges, addRanges map[rangeSet][]element
	// ports is by how much the number of elements with an endpoint of each port
	// changes.
	ports    portCounts
	elements int
}

// rangeSet is the set of the source ranges of a prefix length, of frontends or of
// list IDs.
type rangeSet struct {
	bits   int
	shared bool
}

func (t *table) rangeSet(s rangeSet) *nftables.Set {
	if s.shared {
		return t.sharedRanges(s.bits)
	}
	return t.ranges(s.bits)
}

// The sets that rows and lists have elements in, as indices into edit's fields. The
// last ones are the first of the shards of endpoints. Those before classSets have the
// classes of a frontend: the others are looked into on account of these only, and of
// what a list has in inListSizes.
const (
	inServices = iota
	inExternal
	inTimeouts
	inLists
	inListSizes
	inSlots
	inStickyEndpoints
	inHairpin
	inSharedHairpin
	inSharedEndpoints
	inEndpoints = inSharedEndpoints + listShards

	classSets = inListSizes
)

// change adds to the edit what turns one row of a frontend into another.
// Either may be nil.
func (e *edit) change(f dataplane.Frontend, have, want *row) {
	if have == want {
		return
	}
	if have == nil {
		have = &row{}
	}
	if want == nil {
		want = &row{}
	}
	t := e.table
	e.changeClass(inServices, f, have.inServices, have.class, have.service, want.inServices, want.class, want.service)
	e.changeClass(inExternal, f, have.inExternal, have.external, "", want.inExternal, want.external, "")
	e.changeClass(inTimeouts, f, have.timeout != 0, have.timeout, "", want.timeout != 0, want.timeout, "")
	e.changeListOf(f, have.list, want.list)
	for l := range lists {
		e.changeSlots(f, l, have.slots[l], want.slots[l])
	}
	e.changeIDs(f, have.byID, want.byID)
	merge(have.hairpins, want.hairpins, netip.Addr.Compare, func(a netip.Addr, inHave, inWant bool) {
		switch {
		case !inWant:
			e.delete(inHairpin, element{Key: t.hairpinElement(a, f)})
		case !inHave:
			e.insert(inHairpin, element{Key: t.hairpinElement(a, f)})
		}
	})
	if len(have.ranges)+len(want.ranges) > 0 {
		e.changeRanges(f, have, want)
	}
	e.changePorts(have.ports, want.ports)
}

func (e *edit) changePorts(have, want []uint16) {
	merge(have, want, cmp.Compare[uint16], func(port uint16, inHave, inWant bool) {
		switch {
		case !inWant:
			e.addPort(port, -1)
		case !inHave:
			e.addPort(port, 1)
		}
	})
}

func (e *edit) changeListOf(f dataplane.Frontend, have, want listID) {
	if have == want {
		return
	}
	key := e.table.frontendElement(f)
	if have != 0 {
		e.delete(inLists, element{Key: key})
	}
	if want != 0 {
		e.insert(inLists, element{Key: key, Val: e.table.listElement(want)})
	}
}

func (e *edit) changeClass(
	set int, f dataplane.Frontend, inHave bool, have class, haveComment string, inWant bool, want class, wantComment string,
) {
	if inHave == inWant && (!inHave || have == want && haveComment == wantComment) {
		return
	}
	key := e.table.frontendElement(f)
	if inHave {
		e.delete(set, element{Key: key})
	}
	if inWant {
		e.insert(set, element{Key: key, Val: e.table.classElement(want), Comment: wantComment})
	}
}

func (e *edit) changeSlots(f dataplane.Frontend, l list, have, want slotList) {
	t, shard := e.table, inEndpoints+shardOf(f)
	for i := range max(len(have.endpoints), len(want.endpoints)) {
		var h, w netip.AddrPort
		if i < len(have.endpoints) {
			h = have.endpoints[i]
		}
		if i < len(want.endpoints) {
			w = want.endpoints[i]
		}
		if h == w {
			continue
		}
		key := t.slotElement(f, l, uint32(i)) //nolint:gosec // a slot
		if h.IsValid() {
			e.delete(shard, element{Key: key})
			e.countPort(h, -1)
		}
		if w.IsValid() {
			e.insert(shard, element{Key: key, Val: t.addrPortElement(w)})
			e.countPort(w, 1)
		}
	}
	for i := range max(len(have.ids), len(want.ids)) {
		h, w := noID, noID
		if i < len(have.ids) {
			h = have.ids[i]
		}
		if i < len(want.ids) {
			w = want.ids[i]
		}
		if h == w {
			continue
		}
		key := t.slotElement(f, l, uint32(i)) //nolint:gosec // a slot
		if h != noID {
			e.delete(inSlots, element{Key: key})
		}
		if w != noID {
			e.insert(inSlots, element{Key: key, Val: t.idElement(id(w))}) //nolint:gosec // an ID
		}
	}
}

func (e *edit) changeIDs(f dataplane.Frontend, have, want map[id]netip.AddrPort) {
	t := e.table
	for n, addr := range have {
		if want[n] != addr {
			e.delete(inStickyEndpoints, element{Key: t.stickyElement(f, n)})
			e.countPort(addr, -1)
		}
	}
	for n, addr := range want {
		if have[n] != addr {
			e.insert(inStickyEndpoints, element{Key: t.stickyElement(f, n), Val: t.addrPortElement(addr)})
			e.countPort(addr, 1)
		}
	}
}

func (e *edit) changeRanges(f dataplane.Frontend, have, want *row) {
	t := e.table
	merge(have.allowed(f), want.allowed(f), netip.Prefix.Compare, func(p netip.Prefix, inHave, inWant bool) {
		if inHave && inWant && have.rangeComment(f, p) == want.rangeComment(f, p) {
			return
		}
		set, key := rangeSet{bits: p.Bits()}, t.rangeElement(f, p)
		if inHave {
			e.deleteRange(set, element{Key: key})
		}
		if inWant {
			e.insertRange(set, element{Key: key, Comment: want.rangeComment(f, p)})
		}
	})
}

// countPort counts the port of what is in a slot, unless that is a virtual server.
func (e *edit) countPort(endpoint netip.AddrPort, n int) {
	if port, ok := e.table.renderer.endpointPort(endpoint); ok {
		e.addPort(port, n)
	}
}

func (e *edit) addPort(port uint16, n int) {
	if e.ports == nil {
		e.ports = portCounts{}
	}
	e.ports[port] += n
}

func (e *edit) delete(set int, el element) {
	e.del[set] = append(e.del[set], el)
	e.elements++
}

func (e *edit) insert(set int, el element) {
	e.add[set] = append(e.add[set], el)
	e.elements++
}

func (e *edit) deleteRange(set rangeSet, el element) {
	if e.delRanges == nil {
		e.delRanges = map[rangeSet][]element{}
	}
	e.delRanges[set] = append(e.delRanges[set], el)
	e.elements++
}

func (e *edit) insertRange(set rangeSet, el element) {
	if e.addRanges == nil {
		e.addRanges = map[rangeSet][]element{}
	}
	e.addRanges[set] = append(e.addRanges[set], el)
	e.elements++
}

// merge walks two sorted lists without duplicates in step.
func merge[E any](a, b []E, compare func(E, E) int, visit func(e E, inA, inB bool)) {
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && compare(a[0], b[0]) < 0:
			visit(a[0], true, false)
			a = a[1:]
		case len(a) == 0 || compare(b[0], a[0]) < 0:
			visit(b[0], false, true)
			b = b[1:]
		default:
			visit(a[0], true, true)
			a, b = a[1:], b[1:]
		}
	}
}
