package nft

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"

	"fairlead/dataplane"
)

// row is everything that the maps and sets hold for one frontend. All elements
// belong to exactly one frontend, so the difference of two states is the
// difference of their rows. Rows read from the kernel can be of any shape;
// those that render makes are consistent.
type row struct {
	// service is the comment on the frontend's element.
	service string
	// class is the value in services; 0 if the frontend is not there.
	class class
	// rejected says that the frontend is in no-endpoints.
	rejected bool
	// slots are the endpoints by slot. A slot that is not there is the zero
	// AddrPort.
	slots []netip.AddrPort
	// hairpins are the addresses that are in hairpin with this frontend,
	// sorted.
	hairpins []netip.Addr
}

// render returns what the maps hold for each frontend of the Service when its
// endpoints are in these slots.
func render(s *dataplane.Service, slots []netip.AddrPort) *row {
	r := &row{service: comment(s.Key), class: class(len(slots)), rejected: len(slots) == 0, slots: slots}
	for _, e := range s.Endpoints { // sorted, so the hairpins are
		if !e.Local {
			continue
		}
		if n := len(r.hairpins); n == 0 || r.hairpins[n-1] != e.Addr.Addr() {
			r.hairpins = append(r.hairpins, e.Addr.Addr())
		}
	}
	return r
}

// supported returns an error that wraps [dataplane.ErrUnsupported] if this
// backend can't program the Service.
func supported(s *dataplane.Service) error {
	var what string
	switch {
	case s.Key.Kind == dataplane.NodePort:
		what = "node ports"
	case s.ExternalLocal:
		what = "externalTrafficPolicy: Local"
	case s.Masquerade != dataplane.MasqueradeForeign:
		what = "masquerade " + s.Masquerade.String()
	case s.NoEndpoints != dataplane.Reject:
		what = "to " + s.NoEndpoints.String() + " without endpoints"
	case s.Affinity != 0:
		what = "session affinity"
	case len(s.SourceRanges) > 0:
		what = "source ranges"
	default:
		return nil
	}
	return fmt.Errorf("%w: %s", dataplane.ErrUnsupported, what)
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

// edit collects the elements to delete and to add in one table. In a commit all
// deletions come first, so an element whose value changes is in both.
type edit struct {
	table    *table
	del, add [inEndpoints + shards][]element
	elements int
}

// The sets that rows have elements in, as indices into edit's fields. The last
// is the first of the shards of endpoints.
const (
	inServices = iota
	inNoEndpoints
	inHairpin
	inEndpoints
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
	if have.class != want.class || (have.class != 0 && have.service != want.service) {
		if have.class != 0 {
			e.delete(inServices, element{Key: t.frontendElement(f)})
		}
		if want.class != 0 {
			e.insert(inServices, element{
				Key: t.frontendElement(f), Val: t.classElement(want.class), Comment: want.service,
			})
		}
	}
	if have.rejected != want.rejected || (have.rejected && have.service != want.service) {
		if have.rejected {
			e.delete(inNoEndpoints, element{Key: t.frontendElement(f)})
		}
		if want.rejected {
			e.insert(inNoEndpoints, element{Key: t.frontendElement(f), Comment: want.service})
		}
	}
	shard := inEndpoints + shardOf(f)
	for i := range max(len(have.slots), len(want.slots)) {
		var h, w netip.AddrPort
		if i < len(have.slots) {
			h = have.slots[i]
		}
		if i < len(want.slots) {
			w = want.slots[i]
		}
		if h == w {
			continue
		}
		key := t.slotElement(f, uint32(i))
		if h.IsValid() {
			e.delete(shard, element{Key: key})
		}
		if w.IsValid() {
			e.insert(shard, element{Key: key, Val: t.addrPortElement(w)})
		}
	}
	merge(have.hairpins, want.hairpins, func(a netip.Addr, inHave, inWant bool) {
		switch {
		case !inWant:
			e.delete(inHairpin, element{Key: t.hairpinElement(a, f)})
		case !inHave:
			e.insert(inHairpin, element{Key: t.hairpinElement(a, f)})
		}
	})
}

func (e *edit) delete(set int, el element) {
	e.del[set] = append(e.del[set], el)
	e.elements++
}

func (e *edit) insert(set int, el element) {
	e.add[set] = append(e.add[set], el)
	e.elements++
}

// merge walks two sorted lists without duplicates in step.
func merge(a, b []netip.Addr, visit func(addr netip.Addr, inA, inB bool)) {
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && a[0].Less(b[0]):
			visit(a[0], true, false)
			a = a[1:]
		case len(a) == 0 || b[0].Less(a[0]):
			visit(b[0], false, true)
			b = b[1:]
		default:
			visit(a[0], true, true)
			a, b = a[1:], b[1:]
		}
	}
}
