package nft

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
)

// selection says how the rules select a slot of an endpoint list. A service class contains it.
// The values from selectInTurn select the slots in turn. Each has its own chain, and so its own
// counter.
type selection uint8

const (
	selectRandom selection = iota
	selectByHash
	selectInTurn

	// maxSelections is the number of selections in the five bits of a class.
	maxSelections = 1 << 5
	// numTurns is the number of counters of the Services with one size and the same
	// properties. See docs/design/0017-balancing.md.
	numTurns = maxSelections - int(selectInTurn)
)

// turn returns the selection with the n-th counter.
func turn(n int) selection { return selectInTurn + selection(n%numTurns) } //nolint:gosec // fits

// selectionOf returns the selection of a scheduler, with the first counter.
func selectionOf(scheduler string) selection {
	switch scheduler {
	case dataplane.SourceHash:
		return selectByHash
	case dataplane.RoundRobin:
		return selectInTurn
	default:
		return selectRandom
	}
}

// kind returns the selection with the first counter: selectRandom, selectByHash or selectInTurn.
func (s selection) kind() selection { return min(s, selectInTurn) }

// scheduler returns dataplane.ServiceSpec.Scheduler.
func (s selection) scheduler() string {
	switch s.kind() {
	case selectByHash:
		return dataplane.SourceHash
	case selectInTurn:
		return dataplane.RoundRobin
	default:
		return ""
	}
}

// suffix returns the end of the names of chains with the selection.
func (s selection) suffix() string {
	switch s.kind() {
	case selectByHash:
		return "-hash"
	case selectInTurn:
		return fmt.Sprintf("-turn-%x", int(s-selectInTurn))
	default:
		return ""
	}
}

// isSupportedScheduler reports whether the tables can select endpoints in this way.
func isSupportedScheduler(scheduler string) bool {
	return scheduler == selectionOf(scheduler).scheduler()
}

// selectSlot loads a slot of a list into a register.
//
//	meta priority set numgen random mod 2 offset 4196204544
//	meta priority set numgen inc mod 2 offset 4196204544 jump translate
//	meta priority set jhash ip saddr mod 1024 seed 0xfa1d offset 4196204544 jump translate
func (t *table) selectSlot(s selection, size int, l endpointList, word int) []expr.Any {
	switch s.kind() {
	case selectByHash:
		return []expr.Any{t.saddr(word), &expr.Hash{
			SourceRegister: reg(word), DestRegister: reg(word), Length: uint32(t.addrLen), //nolint:gosec // 4 or 16
			Modulus: uint32(size), Seed: hashSeed, Offset: l.slotBase(), Type: expr.HashTypeJenkins, //nolint:gosec // a size
		}}
	case selectInTurn:
		return []expr.Any{slotInTurn(size, l, reg(word))}
	default:
		return []expr.Any{randomSlot(size, l, reg(word))}
	}
}

// hashSeed is the seed of the hash of a client's address. It is the same on all nodes, so a
// client reaches the same endpoint through each of them.
const hashSeed = 0xfa1d

// hashSlots is the number of slots of a list whose slots are selected by hash. It does not
// depend on the endpoints, so the slot of a client never changes.
const hashSlots = dataplane.SourceHashSlots

// assignHashSlots assigns the slots that are selected by hash to endpoints. In each slot, every
// endpoint has a weight that depends on the slot and the endpoint only, and the endpoint with the
// highest weight gets the slot (rendezvous hashing; D. Thaler and C. Ravishankar, "Using
// Name-Based Mappings to Increase Hit Rates", 1998). So the slots of a removed endpoint are the
// only ones that change, and all nodes assign the same slots.
func assignHashSlots(endpoints []dataplane.Endpoint) []netip.AddrPort {
	if len(endpoints) == 0 {
		return nil
	}
	hashes := make([]uint64, len(endpoints))
	for i, e := range endpoints {
		h := fnv.New64a()
		b := e.Addr.Addr().As16()
		_, _ = h.Write(binary.BigEndian.AppendUint16(b[:], e.Addr.Port()))
		hashes[i] = h.Sum64()
	}
	slots := make([]netip.AddrPort, hashSlots)
	for slot := range slots {
		salt := mix(uint64(slot)) //nolint:gosec // a slot
		best, highest := 0, uint64(0)
		for i, h := range hashes {
			if weight := mix(h ^ salt); weight > highest {
				best, highest = i, weight
			}
		}
		slots[slot] = endpoints[best].Addr
	}
	return slots
}

// mix returns a number whose bits all depend on all bits of n (the finalizer of SplitMix64, G.
// Steele, D. Lea and C. Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
func mix(n uint64) uint64 {
	n += 0x9e3779b97f4a7c15
	n = (n ^ n>>30) * 0xbf58476d1ce4e5b9
	n = (n ^ n>>27) * 0x94d049bb133111eb
	return n ^ n>>31
}

// turnUsers counts, by table, the users of verdict elements with counters that a call has read or
// planned. Dataplane.verdictElements counts the programmed ones.
type turnUsers [2]map[verdictElement]int

func newTurnUsers() turnUsers { return turnUsers{{}, {}} }

// add counts the frontend's verdict elements with counters.
func (u turnUsers) add(i int, r *frontendElements) {
	for _, v := range r.verdictElements() {
		if v.vmap != vmapListDraws && v.selection().kind() == selectInTurn {
			u[i][v]++
		}
	}
}

// assignTurns assigns a counter to each list of a Service whose endpoints are selected in turn, so
// that no other Service uses it. If all are in use, it assigns one with the fewest users. A list
// keeps its counter while its size stays the same. For shared lists, the list ID determines the
// counter; see listID.selection.
func (d *Dataplane) assignTurns(s *dataplane.Service, before slotAssignment, a newAssignment, users turnUsers) newAssignment {
	if s.Scheduler != dataplane.RoundRobin || d.usesSharedList(s) {
		return a
	}
	i := familyIndex(s.Key.Family)
	cluster, local := classOf(s)
	for l, class := range [numEndpointLists]serviceClass{cluster, local} {
		list := &a.slotAssignment[l]
		if class.size() < 2 || list.selection != selectInTurn { // a single endpoint needs no counter
			continue
		}
		vmap := vmapClasses
		if endpointList(l) == localEndpoints {
			vmap = vmapLocalClasses
		}
		count := func(n selection) int {
			v := verdictElement{vmap, class.withSelection(n)}
			return d.verdictElements[i][v] + users[i][v]
		}
		had := before[l].selection.kind() == selectInTurn
		if had {
			list.selection = before[l].selection
		}
		if !had || len(before[l].slots) != len(list.slots) {
			for n := range numTurns {
				if count(turn(n)) < count(list.selection) {
					list.selection = turn(n)
				}
			}
		}
		a.mustStore = a.mustStore || list.selection != selectInTurn
		users[i][verdictElement{vmap, class.withSelection(list.selection)}]++
	}
	return a
}
