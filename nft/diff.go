package nft

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// row is everything that the maps and sets hold for one frontend. All elements
// but those that shared.go counts belong to exactly one frontend, so the
// difference of two states is the difference of their rows. Rows read from the kernel can be
// of any shape; those that render makes are consistent.
type row struct {
	// service is the comment on the frontend's element in services.
	service string
	// class is the value in services, external the one in external, where
	// the frontend is there.
	class, external        class
	inServices, inExternal bool
	// timeout is the affinity class in timeouts; 0 if the frontend is not there.
	timeout class
	// slots are what is in the slots of each list.
	slots [lists]slotList
	// byID is in sticky-endpoints.
	byID map[id]netip.AddrPort
	// hairpins are the addresses that are in hairpin with this frontend,
	// sorted.
	hairpins []netip.Addr
	// ranges are the source ranges, sorted. self says that a client may have
	// the frontend's own address.
	ranges []netip.Prefix
	self   bool

	// list is the value in lists, and shared the elements of that list; 0 and nil
	// where the frontend shares none.
	list   listID
	shared *sharedList

	// addrs are the sets that the frontend's address is to be in. They are not
	// known of a row that was read.
	addrs inAddrSets
	// ports are those of the endpoints where there is a Translator, sorted, and
	// otherwise told by slots and byID. They are not known of a row that was read.
	ports []uint16
}

// slotList is what is in the slots of a list: endpoints, or with affinity their IDs.
type slotList struct {
	// endpoints are in endpoints-…; a slot that is not there is the zero
	// AddrPort.
	endpoints []netip.AddrPort
	// ids are in slots; a slot that is not there is noID.
	ids []int
}

const noID = -1

// render returns what the maps hold for each frontend of the Service when its
// endpoints are arranged like this, on this node.
func render(s *dataplane.Service, a arrangement, node dataplane.Node) *row {
	r := &row{
		service: comment(s.Key), inServices: true, inExternal: s.ExternalLocal, timeout: affinityOf(s),
		ranges: s.SourceRanges,
	}
	r.class, r.external = classOf(s)
	r.addrs = addrSetsOf(s.Key.Kind, r.class, r.external, node)
	for l := range lists {
		if s.Affinity == 0 {
			r.slots[l].endpoints = a[l].slots
			continue
		}
		if r.byID == nil {
			r.byID = map[id]netip.AddrPort{}
		}
		for i, n := range a[l].ids {
			r.slots[l].ids = append(r.slots[l].ids, int(n))
			r.byID[n] = a[l].slots[i]
		}
	}
	for _, list := range [lists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
		for _, e := range list { // sorted, so the hairpins are
			if n := len(r.hairpins); e.Local && (n == 0 || r.hairpins[n-1] != e.Addr.Addr()) {
				r.hairpins = append(r.hairpins, e.Addr.Addr())
			}
		}
	}
	if len(s.LocalEndpoints) > 0 {
		slices.SortFunc(r.hairpins, netip.Addr.Compare)
		r.hairpins = slices.Compact(r.hairpins)
	}
	r.self = slices.ContainsFunc(s.SourceRanges, func(p netip.Prefix) bool {
		return slices.ContainsFunc(node.Addrs, p.Contains)
	})
	return r
}

// branches returns the branches that the row needs.
func (r *row) branches() []branch {
	var all []branch
	add := func(m verdictMap, c class) {
		all = append(all, branch{m, c})
		if c.has(sticky) && c.size() > 0 {
			all = append(all, branch{draws, c})
		}
	}
	if r.inServices {
		add(classes, r.class)
		all = append(all, branch{masquerades, r.class})
	}
	if r.inExternal {
		add(localClasses, r.external)
	}
	if r.timeout != 0 {
		all = append(all, branch{affinities, r.timeout})
		if r.inExternal {
			all = append(all, branch{localAffinities, r.timeout})
		}
	}
	return all
}

// sameBranches reports whether the rows need the same branches, and their address
// in the same sets.
func (r *row) sameBranches(o *row) bool {
	return r.class == o.class && r.external == o.external && r.inServices == o.inServices && r.inExternal == o.inExternal &&
		r.timeout == o.timeout && r.addrs == o.addrs
}

// allowed returns the ranges that a frontend with this row has elements for.
func (r *row) allowed(f dataplane.Frontend) []netip.Prefix {
	own := ownRange(f)
	if !r.self || slices.Contains(r.ranges, own) {
		return r.ranges
	}
	all := append(slices.Clone(r.ranges), own)
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// rangeComment is the comment on a range's element: the frontend's own address
// has one if it is there on account of self.
func (r *row) rangeComment(f dataplane.Frontend, p netip.Prefix) string {
	if r.self && p == ownRange(f) && !slices.Contains(r.ranges, p) {
		return selfComment
	}
	return ""
}

const selfComment = "this node"

func ownRange(f dataplane.Frontend) netip.Prefix {
	return netip.PrefixFrom(f.Addr.Addr(), f.Addr.Addr().BitLen())
}

// supported returns an error that wraps [dataplane.ErrUnsupported] if this
// backend can't program the Service.
func supported(s *dataplane.Service) error {
	if s.Affinity != 0 && max(len(s.Endpoints), len(s.LocalEndpoints)) > maxIDs {
		return fmt.Errorf("%w: session affinity with more than %d endpoints", dataplane.ErrUnsupported, maxIDs)
	}
	if s.Scheduler != "" {
		return fmt.Errorf("%w: IPVS scheduler %s, as endpoints are chosen at random", dataplane.ErrUnsupported, s.Scheduler)
	}
	return nil
}

// maxComment is the longest comment that `nft` prints, less the final zero
// (libnftnl, NFTNL_UDATA_COMMENT_MAXLEN).
const maxComment = 127

// comment names the Service for people. Longer names are shortened and end in
// part of their SHA-256, so that they stay different.
func comment(k dataplane.Key) string {
	s := k.Service()
	if len(s) <= maxComment {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	suffix := "~" + hex.EncodeToString(sum[:4])
	return s[:maxComment-len(suffix)] + suffix
}

// arrange gives each of the wanted endpoints a slot, the slots being 0 to N-1,
// so that as few as possible differ from the current ones. An endpoint that
// is somewhere below N stays there.
func arrange(current []netip.AddrPort, want []dataplane.Endpoint) []netip.AddrPort {
	slots := make([]netip.AddrPort, len(want))
	if len(current) == 0 {
		for i, e := range want {
			slots[i] = e.Addr
		}
		return slots
	}
	placed := make([]bool, len(want))
	next := 0 // in slots that are mostly in order, the next one is found here
	for i, addr := range current[:min(len(current), len(slots))] {
		j := next
		if j >= len(want) || want[j].Addr != addr {
			var ok bool
			if j, ok = find(want, addr); !ok {
				continue
			}
		}
		if next = j + 1; !placed[j] {
			slots[i], placed[j] = addr, true
		}
	}
	free := 0
	for j, e := range want {
		if placed[j] {
			continue
		}
		for slots[free].IsValid() {
			free++
		}
		slots[free] = e.Addr
	}
	return slots
}

func find(sorted []dataplane.Endpoint, addr netip.AddrPort) (int, bool) {
	return slices.BinarySearchFunc(sorted, addr, func(e dataplane.Endpoint, a netip.AddrPort) int {
		return e.Addr.Compare(a)
	})
}

// inOrder reports whether the slots are what arrange makes from nothing.
func inOrder(slots []netip.AddrPort, want []dataplane.Endpoint) bool {
	return slices.EqualFunc(slots, want, func(a netip.AddrPort, e dataplane.Endpoint) bool { return a == e.Addr })
}

// arrangement is where the endpoints of a Service are: in which slot of its
// list, and with affinity under which ID.
type arrangement [lists]placement

type placement struct {
	slots []netip.AddrPort
	ids   []id // by slot; nil without affinity
}

// arrangeService arranges the endpoints of a Service so that as little as
// possible differs from the current arrangement.
func arrangeService(current arrangement, s *dataplane.Service) arrangement {
	var a arrangement
	for l, want := range [lists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
		a[l].slots = arrange(current[l].slots, want)
		if s.Affinity != 0 {
			a[l].ids = identify(list(l), current[l], a[l].slots)
		}
	}
	return a
}

// natural reports whether the arrangement is what arrangeService makes from
// nothing.
func (a arrangement) natural(s *dataplane.Service) bool {
	if !inOrder(a[clusterList].slots, s.Endpoints) || !inOrder(a[localList].slots, s.LocalEndpoints) {
		return false
	}
	if s.Affinity == 0 {
		return true
	}
	for l := range lists {
		if !slices.Equal(a[l].ids, identify(l, placement{}, a[l].slots)) {
			return false
		}
	}
	return true
}

// arrangement returns the one that a row which was read shows.
func (r *row) arrangement() arrangement {
	var a arrangement
	for l := range lists {
		a[l].slots = r.slots[l].endpoints
		if r.class.has(shared) && r.shared != nil {
			a[l].slots = r.shared.slots[l]
			continue
		}
		if !r.class.has(sticky) {
			continue
		}
		a[l].slots = nil
		for _, n := range r.slots[l].ids {
			a[l].slots = append(a[l].slots, r.byID[id(n)]) //nolint:gosec // or no endpoint
			a[l].ids = append(a[l].ids, id(n))             //nolint:gosec // or no endpoint
		}
	}
	return a
}

// maxIDs is how many IDs a list has.
const maxIDs = 1 << 15

// identify gives IDs to the endpoints in the slots of a list. One that has an ID
// keeps it. Others get one that nobody had just now: what clients remember is
// an ID, and they should not be sent to another pod by it. Which one is
// decided by the endpoint's address, so that one that comes back has the ID
// that it had, as a rule.
func identify(l list, current placement, in []netip.AddrPort) []id {
	known, used := map[netip.AddrPort]id{}, map[id]bool{}
	for i, n := range current.ids {
		if addr := current.slots[i]; addr.IsValid() && n.list() == l && !used[n] {
			known[addr], used[n] = n, true
		}
	}
	if len(used)+len(in) > maxIDs { // no room for those who leave
		stay := map[netip.AddrPort]id{}
		clear(used)
		for _, addr := range in {
			if n, ok := known[addr]; ok {
				stay[addr], used[n] = n, true
			}
		}
		known = stay
	}
	ids := make([]id, len(in))
	for i, addr := range in {
		n, ok := known[addr]
		if !ok {
			for n = firstID(l, addr); used[n]; {
				n += id(lists)
			}
			used[n] = true
		}
		ids[i] = n
	}
	return ids
}

func firstID(l list, addr netip.AddrPort) id {
	h := fnv.New32a()
	b := addr.Addr().As16()
	_, _ = h.Write(binary.BigEndian.AppendUint16(b[:], addr.Port()))
	sum := h.Sum32()
	return id(sum^sum>>16)&^1 | id(l) //nolint:gosec // the low bits
}

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
	if !e.table.virtual {
		e.addPort(endpoint.Port(), n)
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
