package nft

import (
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

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

// arrangement is where the endpoints of a Service are: in which slot of its
// list, and with affinity under which ID.
type arrangement [lists]placement

type placement struct {
	slots []netip.AddrPort
	ids   []id // by slot; nil without affinity
}

// arranged is the arrangement of a Service, and whether it needs to be kept, as it
// is not what arrangeService makes from nothing.
type arranged struct {
	arrangement
	keep bool
}

// arrangementOf returns the arrangement of a Service that is programmed.
func (d *Dataplane) arrangementOf(s *dataplane.Service) arrangement {
	if a, ok := d.arrangements[s.Key]; ok {
		return a
	}
	return d.renderer.initialArrangement(s)
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

// id is what an endpoint of a Service with affinity is remembered by: an even
// number in the list of Endpoints, an odd one in that of LocalEndpoints. As a
// packet's priority it is followed by two bytes that tell it from a class or
// a slot.
type id uint16

const idMark = 0xfa

func (i id) list() list { return list(i & 1) }

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
