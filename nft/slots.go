package nft

import (
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// endpointList is which of a Service's lists of endpoints is meant.
type endpointList int

const (
	clusterEndpoints endpointList = iota // dataplane.ServiceSpec.Endpoints
	localEndpoints                       // dataplane.ServiceSpec.LocalEndpoints
	numEndpointLists
)

func (l endpointList) chainName(name string) string {
	if l == localEndpoints {
		return name + "-local"
	}
	return name
}

// clusterSlotBase is what slots count from: a tc class ID whose major nobody else
// uses, so that a priority that is left on a packet can be told for ours. Each
// list has a major of its own.
const (
	clusterSlotBase = 0xfa1d_0000
	localSlotBase   = 0xfa1c_0000
	slotMask        = 0xfffe_0000 // of both
	slotMajor       = clusterSlotBase & slotMask
)

func (l endpointList) slotBase() uint32 {
	if l == localEndpoints {
		return localSlotBase
	}
	return clusterSlotBase
}

// slotAssignment is where the endpoints of a Service are: in which slot of its
// list, and with affinity under which ID.
type slotAssignment [numEndpointLists]listAssignment

type listAssignment struct {
	slots []netip.AddrPort
	ids   []endpointID // by slot; nil without affinity
}

// newAssignment is the arrangement of a Service, and whether it needs to be kept, as it
// is not what assignServiceSlots makes from nothing.
type newAssignment struct {
	slotAssignment
	mustStore bool
}

// slotAssignmentFor returns the arrangement of a Service that is programmed.
func (d *Dataplane) slotAssignmentFor(s *dataplane.Service) slotAssignment {
	if a, ok := d.slotAssignments[s.Key]; ok {
		return a
	}
	return d.renderer.initialAssignment(s)
}

// assignServiceSlots arranges the endpoints of a Service so that as little as
// possible differs from the current arrangement.
func assignServiceSlots(current slotAssignment, s *dataplane.Service) slotAssignment {
	var a slotAssignment
	for l, want := range [numEndpointLists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
		a[l].slots = assignSlots(current[l].slots, want)
		if s.Affinity != 0 {
			a[l].ids = assignEndpointIDs(endpointList(l), current[l], a[l].slots)
		}
	}
	return a
}

// isInitial reports whether the arrangement is what assignServiceSlots makes from
// nothing.
func (a slotAssignment) isInitial(s *dataplane.Service) bool {
	if !isInitialOrder(a[clusterEndpoints].slots, s.Endpoints) || !isInitialOrder(a[localEndpoints].slots, s.LocalEndpoints) {
		return false
	}
	if s.Affinity == 0 {
		return true
	}
	for l := range numEndpointLists {
		if !slices.Equal(a[l].ids, assignEndpointIDs(l, listAssignment{}, a[l].slots)) {
			return false
		}
	}
	return true
}

// slotAssignment returns the one that a row which was read shows.
func (r *frontendElements) slotAssignment() slotAssignment {
	var a slotAssignment
	for l := range numEndpointLists {
		a[l].slots = r.slots[l].endpoints
		if r.class.has(classSharedList) && r.sharedList != nil {
			a[l].slots = r.sharedList.slots[l]
			continue
		}
		if !r.class.has(classSessionAffinity) {
			continue
		}
		a[l].slots = nil
		for _, n := range r.slots[l].ids {
			a[l].slots = append(a[l].slots, r.byID[endpointID(n)]) //nolint:gosec // or no endpoint
			a[l].ids = append(a[l].ids, endpointID(n))             //nolint:gosec // or no endpoint
		}
	}
	return a
}

// assignSlots gives each of the wanted endpoints a slot, the slots being 0 to N-1,
// so that as few as possible differ from the current ones. An endpoint that
// is somewhere below N stays there.
func assignSlots(current []netip.AddrPort, want []dataplane.Endpoint) []netip.AddrPort {
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
			if j, ok = findEndpoint(want, addr); !ok {
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

func findEndpoint(sorted []dataplane.Endpoint, addr netip.AddrPort) (int, bool) {
	return slices.BinarySearchFunc(sorted, addr, func(e dataplane.Endpoint, a netip.AddrPort) int {
		return e.Addr.Compare(a)
	})
}

// isInitialOrder reports whether the slots are what arrange makes from nothing.
func isInitialOrder(slots []netip.AddrPort, want []dataplane.Endpoint) bool {
	return slices.EqualFunc(slots, want, func(a netip.AddrPort, e dataplane.Endpoint) bool { return a == e.Addr })
}

// endpointID is what an endpoint of a Service with affinity is remembered by: an even
// number in the list of Endpoints, an odd one in that of LocalEndpoints. As a
// packet's priority it is followed by two bytes that tell it from a class or
// a slot.
type endpointID uint16

const endpointIDMark = 0xfa

func (i endpointID) endpointList() endpointList { return endpointList(i & 1) }

// maxEndpointIDs is how many IDs a list has.
const maxEndpointIDs = 1 << 15

// assignEndpointIDs gives IDs to the endpoints in the slots of a list. One that has an ID
// keeps it. Others get one that nobody had just now: what clients remember is
// an ID, and they should not be sent to another pod by it. Which one is
// decided by the endpoint's address, so that one that comes back has the ID
// that it had, as a rule.
func assignEndpointIDs(l endpointList, current listAssignment, in []netip.AddrPort) []endpointID {
	known, used := map[netip.AddrPort]endpointID{}, map[endpointID]bool{}
	for i, n := range current.ids {
		if addr := current.slots[i]; addr.IsValid() && n.endpointList() == l && !used[n] {
			known[addr], used[n] = n, true
		}
	}
	if len(used)+len(in) > maxEndpointIDs { // no room for those who leave
		stay := map[netip.AddrPort]endpointID{}
		clear(used)
		for _, addr := range in {
			if n, ok := known[addr]; ok {
				stay[addr], used[n] = n, true
			}
		}
		known = stay
	}
	ids := make([]endpointID, len(in))
	for i, addr := range in {
		n, ok := known[addr]
		if !ok {
			for n = preferredEndpointID(l, addr); used[n]; {
				n += endpointID(numEndpointLists)
			}
			used[n] = true
		}
		ids[i] = n
	}
	return ids
}

func preferredEndpointID(l endpointList, addr netip.AddrPort) endpointID {
	h := fnv.New32a()
	b := addr.Addr().As16()
	_, _ = h.Write(binary.BigEndian.AppendUint16(b[:], addr.Port()))
	sum := h.Sum32()
	return endpointID(sum^sum>>16)&^1 | endpointID(l) //nolint:gosec // the low bits
}
