package nft

import (
	"cmp"
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// elementDiff contains the elements to delete from and to add to one table. A commit runs
// all deletions first, so an element whose value changes is in both.
type elementDiff struct {
	table    *table
	del, add [numFrontendSets][]element
	// delRanges and addRanges are the elements of source range sets, by set.
	delRanges, addRanges map[rangeSetKey][]element
	// ports counts the change in the number of elements with an endpoint of each port.
	ports    portCounts
	elements int
}

// rangeSetKey identifies the source range set of a prefix length, with frontends or with
// list IDs as keys.
type rangeSetKey struct {
	bits   int
	shared bool
}

func (t *table) rangeSetByKey(s rangeSetKey) *nftables.Set {
	if s.shared {
		return t.sharedSourceRangeSet(s.bits)
	}
	return t.sourceRangeSet(s.bits)
}

// The sets that contain elements of frontends and shared lists, as indices into the fields
// of elementDiff. The last indices are the first of the shards of a map. The sets
// before numClassSets contain the classes of a frontend. The rules look up the other sets
// only for frontends in these sets, or for lists in listSizesSet.
const (
	servicesSet = iota
	externalSet
	timeoutsSet
	listsSet
	listSizesSet
	hairpinSet
	sharedHairpinSet
	sharedEndpointsSet
	endpointsSet       = sharedEndpointsSet + numListShards
	slotsSet           = endpointsSet + numShards
	stickyEndpointsSet = slotsSet + numShards
	numFrontendSets    = stickyEndpointsSet + numShards

	numClassSets = listSizesSet
)

// diffFrontendElements adds the difference between two states of a frontend. Either may be
// nil.
func (e *elementDiff) diffFrontendElements(f dataplane.Frontend, have, want *frontendElements) {
	if have == want {
		return
	}
	if have == nil {
		have = &frontendElements{}
	}
	if want == nil {
		want = &frontendElements{}
	}
	t := e.table
	e.diffClass(servicesSet, f, have.inServices, have.class, have.comment, want.inServices, want.class, want.comment)
	e.diffClass(externalSet, f, have.inExternal, have.externalClass, "", want.inExternal, want.externalClass, "")
	e.diffClass(timeoutsSet, f, have.timeoutClass != 0, have.timeoutClass, "", want.timeoutClass != 0, want.timeoutClass, "")
	e.diffListID(f, have.listID, want.listID)
	for l := range numEndpointLists {
		e.diffSlots(f, l, have.slots[l], want.slots[l])
	}
	e.diffEndpointIDs(f, have.byID, want.byID)
	mergeSorted(have.hairpins, want.hairpins, netip.Addr.Compare, func(a netip.Addr, inHave, inWant bool) {
		switch {
		case !inWant:
			e.delete(hairpinSet, element{Key: t.encodeHairpinKey(a, f)})
		case !inHave:
			e.insert(hairpinSet, element{Key: t.encodeHairpinKey(a, f)})
		}
	})
	if len(have.ranges)+len(want.ranges) > 0 {
		e.diffSourceRanges(f, have, want)
	}
	e.diffPorts(have.ports, want.ports)
}

func (e *elementDiff) diffPorts(have, want []uint16) {
	mergeSorted(have, want, cmp.Compare[uint16], func(port uint16, inHave, inWant bool) {
		switch {
		case !inWant:
			e.addPort(port, -1)
		case !inHave:
			e.addPort(port, 1)
		}
	})
}

func (e *elementDiff) diffListID(f dataplane.Frontend, have, want listID) {
	if have == want {
		return
	}
	key := e.table.encodeFrontend(f)
	if have != 0 {
		e.delete(listsSet, element{Key: key})
	}
	if want != 0 {
		e.insert(listsSet, element{Key: key, Val: e.table.encodeListID(want)})
	}
}

func (e *elementDiff) diffClass(
	set int, f dataplane.Frontend, inHave bool, have serviceClass, haveComment string, inWant bool, want serviceClass, wantComment string,
) {
	if inHave == inWant && (!inHave || have == want && haveComment == wantComment) {
		return
	}
	key := e.table.encodeFrontend(f)
	if inHave {
		e.delete(set, element{Key: key})
	}
	if inWant {
		e.insert(set, element{Key: key, Val: e.table.encodeClass(want), Comment: wantComment})
	}
}

func (e *elementDiff) diffSlots(f dataplane.Frontend, l endpointList, have, want listElements) {
	t, shard, idShard := e.table, endpointsSet+shardOf(f), slotsSet+shardOf(f)
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
		key := t.encodeSlotKey(f, l, uint32(i)) //nolint:gosec // a slot
		if h.IsValid() {
			e.delete(shard, element{Key: key})
			e.countEndpointPort(h, -1)
		}
		if w.IsValid() {
			e.insert(shard, element{Key: key, Val: t.encodeAddrPort(w)})
			e.countEndpointPort(w, 1)
		}
	}
	for i := range max(len(have.ids), len(want.ids)) {
		h, w := noEndpointID, noEndpointID
		if i < len(have.ids) {
			h = have.ids[i]
		}
		if i < len(want.ids) {
			w = want.ids[i]
		}
		if h == w {
			continue
		}
		key := t.encodeSlotKey(f, l, uint32(i)) //nolint:gosec // a slot
		if h != noEndpointID {
			e.delete(idShard, element{Key: key})
		}
		if w != noEndpointID {
			e.insert(idShard, element{Key: key, Val: t.encodeEndpointID(endpointID(w))}) //nolint:gosec // an ID
		}
	}
}

func (e *elementDiff) diffEndpointIDs(f dataplane.Frontend, have, want map[endpointID]netip.AddrPort) {
	t, shard := e.table, stickyEndpointsSet+shardOf(f)
	for n, addr := range have {
		if want[n] != addr {
			e.delete(shard, element{Key: t.encodeStickyKey(f, n)})
			e.countEndpointPort(addr, -1)
		}
	}
	for n, addr := range want {
		if have[n] != addr {
			e.insert(shard, element{Key: t.encodeStickyKey(f, n), Val: t.encodeAddrPort(addr)})
			e.countEndpointPort(addr, 1)
		}
	}
}

func (e *elementDiff) diffSourceRanges(f dataplane.Frontend, have, want *frontendElements) {
	t := e.table
	mergeSorted(have.allowedRanges(f), want.allowedRanges(f), netip.Prefix.Compare, func(p netip.Prefix, inHave, inWant bool) {
		if inHave && inWant && have.rangeComment(f, p) == want.rangeComment(f, p) {
			return
		}
		set, key := rangeSetKey{bits: p.Bits()}, t.encodeSourceRangeKey(f, p)
		if inHave {
			e.deleteRange(set, element{Key: key})
		}
		if inWant {
			e.insertRange(set, element{Key: key, Comment: want.rangeComment(f, p)})
		}
	})
}

// countEndpointPort counts the port of an address in a slot, unless the address is a
// virtual server.
func (e *elementDiff) countEndpointPort(endpoint netip.AddrPort, n int) {
	if port, ok := e.table.renderer.endpointPort(endpoint); ok {
		e.addPort(port, n)
	}
}

func (e *elementDiff) addPort(port uint16, n int) {
	if e.ports == nil {
		e.ports = portCounts{}
	}
	e.ports[port] += n
}

func (e *elementDiff) delete(set int, el element) {
	e.del[set] = append(e.del[set], el)
	e.elements++
}

func (e *elementDiff) insert(set int, el element) {
	e.add[set] = append(e.add[set], el)
	e.elements++
}

func (e *elementDiff) deleteRange(set rangeSetKey, el element) {
	if e.delRanges == nil {
		e.delRanges = map[rangeSetKey][]element{}
	}
	e.delRanges[set] = append(e.delRanges[set], el)
	e.elements++
}

func (e *elementDiff) insertRange(set rangeSetKey, el element) {
	if e.addRanges == nil {
		e.addRanges = map[rangeSetKey][]element{}
	}
	e.addRanges[set] = append(e.addRanges[set], el)
	e.elements++
}

// mergeSorted visits the elements of two sorted lists without duplicates in order.
func mergeSorted[E any](a, b []E, compare func(E, E) int, visit func(e E, inA, inB bool)) {
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
