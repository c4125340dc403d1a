package nft

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// endpoint returns the nth test endpoint.
func endpoint(n int) dataplane.Endpoint {
	return dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), 8080)}
}

func endpoints(ns ...int) []dataplane.Endpoint {
	var list []dataplane.Endpoint
	for _, n := range ns {
		list = append(list, endpoint(n))
	}
	return list
}

func frontend(n int) dataplane.Frontend {
	return dataplane.Frontend{
		Protocol: dataplane.TCP,
		Addr:     netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, byte(n >> 8), byte(n)}), 80),
	}
}

func service(t testing.TB, name string, frontends []dataplane.Frontend, endpoints []dataplane.Endpoint) *dataplane.Service {
	t.Helper()
	key := dataplane.Key{Namespace: "default", Name: name, Family: dataplane.FamilyOf(frontends[0].Addr.Addr())}
	s, err := dataplane.NewService(key, frontends, dataplane.ServiceSpec{Endpoints: endpoints})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// endpointAddrs returns the addresses of test endpoints; -1 is an empty slot.
func endpointAddrs(ns ...int) []netip.AddrPort {
	var list []netip.AddrPort
	for _, n := range ns {
		var a netip.AddrPort
		if n >= 0 {
			a = endpoint(n).Addr
		}
		list = append(list, a)
	}
	return list
}

func TestAssignSlots(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name          string
		current, want []int
		slots         []int
	}{
		{"initial assignment in order", nil, []int{1, 2, 3}, []int{1, 2, 3}},
		{"no change", []int{3, 1, 2}, []int{1, 2, 3}, []int{3, 1, 2}},
		{"new endpoint appended", []int{3, 1, 2}, []int{0, 1, 2, 3}, []int{3, 1, 2, 0}},
		{"last endpoint fills the slot of a removed one", []int{1, 2, 3, 4}, []int{1, 3, 4}, []int{1, 4, 3}},
		{"last endpoint removed", []int{1, 2, 3}, []int{1, 2}, []int{1, 2}},
		{"new endpoint takes the slot of a removed one", []int{1, 2, 3}, []int{1, 3, 9}, []int{1, 9, 3}},
		{"all endpoints removed", []int{1, 2}, nil, nil},
		{"empty slot filled", []int{1, -1, 3}, []int{1, 2, 3}, []int{1, 2, 3}},
		{"duplicate removed", []int{1, 1, 2}, []int{1, 2}, []int{1, 2}},
		{"too many slots", []int{1, 2, 3, 4, 5}, []int{5}, []int{5}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got := assignSlots(endpointAddrs(test.current...), endpoints(test.want...))
			if !slices.Equal(got, endpointAddrs(test.slots...)) {
				t.Errorf("got %v, want %v", got, endpointAddrs(test.slots...))
			}
		})
	}
}

// TestAssignSlotsMovesFew checks with random slots that the slots hold exactly the endpoints,
// and that no endpoint moves unnecessarily.
func TestAssignSlotsMovesFew(t *testing.T) {
	t.Parallel()
	for seed := range uint64(500) {
		random := rand.New(rand.NewPCG(seed, 0))
		current := endpointAddrs(random.Perm(1 + random.IntN(40))...)
		var want []dataplane.Endpoint
		for n := range 50 {
			if random.IntN(2) == 0 {
				want = append(want, endpoint(n))
			}
		}
		got := assignSlots(current, want)
		sorted := slices.SortedFunc(slices.Values(got), netip.AddrPort.Compare)
		if !isInitialOrder(sorted, want) {
			t.Fatalf("seed %d: slots hold %v, want exactly %v", seed, sorted, want)
		}
		for i, addr := range current {
			if _, wanted := findEndpoint(want, addr); wanted && i < len(want) && got[i] != addr {
				t.Fatalf("seed %d: %v moved from slot %d", seed, addr, i)
			}
		}
	}
}

// TestAssignEndpointIDs checks with random assignments that IDs are unique and that remaining
// endpoints keep their IDs. New endpoints must get no ID that was just in use.
func TestAssignEndpointIDs(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 3))
		l := endpointList(seed % 2)
		var current listAssignment
		taken := map[endpointID]bool{}
		for _, n := range random.Perm(30)[:random.IntN(30)] {
			current.slots = append(current.slots, endpoint(n).Addr)
			ours := endpointID(2*random.IntN(40)) | endpointID(l) // few values, so that they collide
			if random.IntN(4) > 0 {
				ours = preferredEndpointID(l, endpoint(random.IntN(60)).Addr)
			}
			for taken[ours] {
				ours += 2
			}
			taken[ours] = true
			current.ids = append(current.ids, ours)
		}
		in := endpointAddrs(random.Perm(60)[:random.IntN(60)]...)
		ids := assignEndpointIDs(l, current, in)
		seen := map[endpointID]bool{}
		for i, addr := range in {
			if seen[ids[i]] || ids[i].endpointList() != l {
				t.Fatalf("seed %d: ID %d is in list %d, or duplicate in %v", seed, ids[i], ids[i].endpointList(), ids)
			}
			seen[ids[i]] = true
			if j := slices.Index(current.slots, addr); j >= 0 && current.ids[j] != ids[i] {
				t.Fatalf("seed %d: ID of %v changed from %d to %d", seed, addr, current.ids[j], ids[i])
			} else if j < 0 && taken[ids[i]] {
				t.Fatalf("seed %d: new endpoint %v got ID %d of another endpoint", seed, addr, ids[i])
			}
		}
	}
}

// TestAssignAllEndpointIDs fills a list with the maximum number of endpoints and then
// replaces half of them.
func TestAssignAllEndpointIDs(t *testing.T) {
	t.Parallel()
	var all []int
	for n := range maxEndpointIDs {
		all = append(all, n)
	}
	first := listAssignment{slots: endpointAddrs(all...)}
	first.ids = assignEndpointIDs(localEndpoints, listAssignment{}, first.slots)
	for n := range maxEndpointIDs / 2 {
		all[n] = maxEndpointIDs + n
	}
	second := endpointAddrs(all...)
	ids := assignEndpointIDs(localEndpoints, first, second)
	if !slices.Equal(ids[maxEndpointIDs/2:], first.ids[maxEndpointIDs/2:]) {
		t.Error("IDs of remaining endpoints changed")
	}
	slices.Sort(ids)
	if n := len(slices.Compact(ids)); n != maxEndpointIDs {
		t.Errorf("%d distinct IDs for %d endpoints", n, maxEndpointIDs)
	}
}
