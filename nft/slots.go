package nft

import (
	"encoding/binary"
	"hash/fnv"
	"math/bits"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// endpointList identifies one of the two endpoint lists of a Service.
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

// Slots start at a tc class ID whose major number no other program uses, so that rules can
// recognize a slot that is left in a packet's priority. Each list has its own major number.
const (
	clusterSlotBase = 0xfa1d_0000
	localSlotBase   = 0xfa1c_0000
	slotMask        = 0xfffe_0000 // of both lists
	slotMajor       = clusterSlotBase & slotMask
)

func (l endpointList) slotBase() uint32 {
	if l == localEndpoints {
		return localSlotBase
	}
	return clusterSlotBase
}

// slotAssignment assigns the endpoints of a Service to the slots of each list, and with
// session affinity to endpoint IDs.
type slotAssignment [numEndpointLists]listAssignment

// listAssignment assigns the endpoints of one list.
type listAssignment struct {
	slots []netip.AddrPort
	ids   []endpointID // by slot; nil without affinity
	// selection says how a slot is selected.
	selection selection
}

// newAssignment is a new slot assignment. mustStore is set if it differs from the
// assignment that assignServiceSlots computes without a current one.
type newAssignment struct {
	slotAssignment
	mustStore bool
}

// slotAssignmentFor returns the slot assignment of a programmed Service.
func (d *Dataplane) slotAssignmentFor(s *dataplane.Service) slotAssignment {
	if a, ok := d.slotAssignments[s.Key]; ok {
		return a
	}
	return d.renderer.initialAssignment(s)
}

// assignServiceSlots assigns slots to the endpoints of a Service, with as few changes to
// the current assignment as possible.
func assignServiceSlots(current slotAssignment, s *dataplane.Service) slotAssignment {
	var a slotAssignment
	for l, want := range [numEndpointLists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
		if a[l].selection = selectionOf(s.Scheduler); a[l].selection == selectByHash {
			a[l].slots = assignHashSlots(want)
		} else {
			a[l].slots = assignSlots(current[l].slots, want)
		}
		if s.Affinity != 0 {
			a[l].ids = assignEndpointIDs(endpointList(l), current[l], a[l].slots)
		}
	}
	return a
}

// isInitial reports whether assignServiceSlots computes the same assignment without a
// current one.
func (a slotAssignment) isInitial(s *dataplane.Service) bool {
	hashed := s.Scheduler == dataplane.SourceHash // such slots depend on the endpoints only
	if !hashed && (!isInitialOrder(a[clusterEndpoints].slots, s.Endpoints) || !isInitialOrder(a[localEndpoints].slots, s.LocalEndpoints)) {
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

// slotAssignment returns the slot assignment of a frontend that was read from the kernel.
func (r *frontendElements) slotAssignment() slotAssignment {
	var a slotAssignment
	a[clusterEndpoints].selection, a[localEndpoints].selection = r.class.selection(), r.externalClass.selection()
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
			a[l].slots = append(a[l].slots, r.byID[endpointID(n)]) //nolint:gosec // noEndpointID has no endpoint
			a[l].ids = append(a[l].ids, endpointID(n))             //nolint:gosec // noEndpointID has no endpoint
		}
	}
	return a
}

// assignSlots assigns a slot from 0 to N-1 to each of the N desired endpoints, with as few
// changes to the current slots as possible. An endpoint in a slot below N keeps its slot.
func assignSlots(current []netip.AddrPort, want []dataplane.Endpoint) []netip.AddrPort {
	slots := make([]netip.AddrPort, len(want))
	if len(current) == 0 {
		for i, e := range want {
			slots[i] = e.Addr
		}
		return slots
	}
	assigned := make([]bool, len(want))
	next := 0 // if slots are mostly in order, this is the next endpoint
	for i, addr := range current[:min(len(current), len(slots))] {
		j := next
		if j >= len(want) || want[j].Addr != addr {
			var ok bool
			if j, ok = findEndpoint(want, addr); !ok {
				continue
			}
		}
		if next = j + 1; !assigned[j] {
			slots[i], assigned[j] = addr, true
		}
	}
	free := 0
	for j, e := range want {
		if assigned[j] {
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

// isInitialOrder reports whether assignSlots computes the same slots without current ones.
func isInitialOrder(slots []netip.AddrPort, want []dataplane.Endpoint) bool {
	return slices.EqualFunc(slots, want, func(a netip.AddrPort, e dataplane.Endpoint) bool { return a == e.Addr })
}

// endpointID identifies an endpoint in the affinity maps. IDs of the cluster list are even,
// IDs of the local list are odd.
type endpointID uint16

// The major number of a packet priority that is an endpoint ID.
const (
	endpointIDMajor = 0xfafa_0000
	endpointIDMask  = 0xffff_0000
)

// priority returns the packet priority for the ID. Its minor number is the ID with swapped
// bytes, so an upgrade finds the elements of earlier builds unchanged.
func (i endpointID) priority() uint32 {
	return endpointIDMajor | uint32(bits.ReverseBytes16(uint16(i)))
}

func (i endpointID) endpointList() endpointList { return endpointList(i & 1) }

// maxEndpointIDs is the number of IDs of a list.
const maxEndpointIDs = 1 << 15

// assignEndpointIDs assigns IDs to the endpoints in the slots of a list. An endpoint keeps
// its ID. A new endpoint gets an ID that no endpoint of the current assignment has, because
// clients that store a reused ID would be sent to another pod. The ID depends on the
// endpoint's address, so that an endpoint that returns usually gets its previous ID.
func assignEndpointIDs(l endpointList, current listAssignment, in []netip.AddrPort) []endpointID {
	idByAddr, used := map[netip.AddrPort]endpointID{}, map[endpointID]bool{}
	for i, n := range current.ids {
		if addr := current.slots[i]; addr.IsValid() && n.endpointList() == l && !used[n] {
			idByAddr[addr], used[n] = n, true
		}
	}
	if len(used)+len(in) > maxEndpointIDs { // too few IDs to keep those of removed endpoints
		kept := map[netip.AddrPort]endpointID{}
		clear(used)
		for _, addr := range in {
			if n, ok := idByAddr[addr]; ok {
				kept[addr], used[n] = n, true
			}
		}
		idByAddr = kept
	}
	ids := make([]endpointID, len(in))
	for i, addr := range in {
		n, ok := idByAddr[addr]
		if !ok {
			for n = preferredEndpointID(l, addr); used[n]; {
				n += endpointID(numEndpointLists)
			}
			idByAddr[addr], used[n] = n, true // an endpoint can have several slots
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
