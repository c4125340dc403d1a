package nft

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/go-cmp/cmp"
)

// endpoint returns the n-th of a row of endpoints.
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
	s, err := dataplane.NewService(key, frontends, dataplane.Treatment{Endpoints: endpoints})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// slots is short for the addresses of endpoints; -1 is a hole.
func slots(ns ...int) []netip.AddrPort {
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

func TestArrange(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name          string
		current, want []int
		slots         []int
	}{
		{"from nothing, in order", nil, []int{1, 2, 3}, []int{1, 2, 3}},
		{"nothing changes", []int{3, 1, 2}, []int{1, 2, 3}, []int{3, 1, 2}},
		{"a new one goes to the end", []int{3, 1, 2}, []int{0, 1, 2, 3}, []int{3, 1, 2, 0}},
		{"the last one fills the place of one that leaves", []int{1, 2, 3, 4}, []int{1, 3, 4}, []int{1, 4, 3}},
		{"the last one leaves", []int{1, 2, 3}, []int{1, 2}, []int{1, 2}},
		{"one takes the place of another", []int{1, 2, 3}, []int{1, 3, 9}, []int{1, 9, 3}},
		{"all leave", []int{1, 2}, nil, nil},
		{"a hole is filled", []int{1, -1, 3}, []int{1, 2, 3}, []int{1, 2, 3}},
		{"a double is removed", []int{1, 1, 2}, []int{1, 2}, []int{1, 2}},
		{"too many slots", []int{1, 2, 3, 4, 5}, []int{5}, []int{5}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got := arrange(slots(test.current...), endpoints(test.want...))
			if !slices.Equal(got, slots(test.slots...)) {
				t.Errorf("got %v, want %v", got, slots(test.slots...))
			}
		})
	}
}

// TestArrangeMovesFew checks, from random slots, that the slots are filled with
// exactly the endpoints, and that none moves that could stay.
func TestArrangeMovesFew(t *testing.T) {
	t.Parallel()
	for seed := range uint64(500) {
		random := rand.New(rand.NewPCG(seed, 0))
		current := slots(random.Perm(1 + random.IntN(40))...)
		var want []dataplane.Endpoint
		for n := range 50 {
			if random.IntN(2) == 0 {
				want = append(want, endpoint(n))
			}
		}
		got := arrange(current, want)
		sorted := slices.SortedFunc(slices.Values(got), netip.AddrPort.Compare)
		if !inOrder(sorted, want) {
			t.Fatalf("seed %d: slots hold %v, want exactly %v", seed, sorted, want)
		}
		for i, addr := range current {
			if _, wanted := find(want, addr); wanted && i < len(want) && got[i] != addr {
				t.Fatalf("seed %d: %v moved from slot %d", seed, addr, i)
			}
		}
	}
}

// TestIdentify checks, from random placements, that those that stay keep their IDs,
// that newcomers get none that anybody had just now, and that no two are the same.
func TestIdentify(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 3))
		l := list(seed % 2)
		var current placement
		taken := map[id]bool{}
		for _, n := range random.Perm(30)[:random.IntN(30)] {
			current.slots = append(current.slots, endpoint(n).Addr)
			ours := id(2*random.IntN(40)) | id(l) // few, so that they collide
			if random.IntN(4) > 0 {
				ours = firstID(l, endpoint(random.IntN(60)).Addr)
			}
			for taken[ours] {
				ours += 2
			}
			taken[ours] = true
			current.ids = append(current.ids, ours)
		}
		in := slots(random.Perm(60)[:random.IntN(60)]...)
		ids := identify(l, current, in)
		seen := map[id]bool{}
		for i, addr := range in {
			if seen[ids[i]] || ids[i].list() != l {
				t.Fatalf("seed %d: ID %d is of list %d, or twice in %v", seed, ids[i], ids[i].list(), ids)
			}
			seen[ids[i]] = true
			if j := slices.Index(current.slots, addr); j >= 0 && current.ids[j] != ids[i] {
				t.Fatalf("seed %d: %v had ID %d and has %d", seed, addr, current.ids[j], ids[i])
			} else if j < 0 && taken[ids[i]] {
				t.Fatalf("seed %d: %v is new and got %d, which another had", seed, addr, ids[i])
			}
		}
	}
}

// TestIdentifyAsManyAsThereCanBe fills a list, half of which is then replaced.
func TestIdentifyAsManyAsThereCanBe(t *testing.T) {
	t.Parallel()
	var all []int
	for n := range maxIDs {
		all = append(all, n)
	}
	first := placement{slots: slots(all...)}
	first.ids = identify(localList, placement{}, first.slots)
	for n := range maxIDs / 2 {
		all[n] = maxIDs + n
	}
	second := slots(all...)
	ids := identify(localList, first, second)
	if !slices.Equal(ids[maxIDs/2:], first.ids[maxIDs/2:]) {
		t.Error("endpoints that stay have other IDs")
	}
	slices.Sort(ids)
	if n := len(slices.Compact(ids)); n != maxIDs {
		t.Errorf("%d different IDs of %d endpoints", n, maxIDs)
	}
}

// TestChangeWritesFew counts elements: the cost of a change must not depend on
// how many endpoints the Service has.
func TestChangeWritesFew(t *testing.T) {
	t.Parallel()
	list := make([]dataplane.Endpoint, 1000)
	for n := range list {
		list[n] = endpoint(n)
	}
	full := service(t, "full", []dataplane.Frontend{frontend(1)}, slices.Clone(list))
	replaced := slices.Clone(list)
	replaced[17] = endpoint(5000)
	for _, test := range []struct {
		name     string
		old, new *dataplane.Service
		del, add int
	}{
		{"nothing changes", full, full, 0, 0},
		{"one endpoint replaced", full, service(t, "full", full.Frontends, replaced), 1, 1},
		// The class, the slot of the one that leaves, and the last slot.
		{"one endpoint removed", full, service(t, "full", full.Frontends, slices.Delete(slices.Clone(list), 17, 18)), 3, 2},
		{"one endpoint added", full, service(t, "full", full.Frontends, append(slices.Clone(list), endpoint(5000))), 1, 2},
		{"a new name on the same frontend", full, service(t, "renamed", full.Frontends, slices.Clone(list)), 1, 1},
		{"a pod of this node added", full, service(t, "full", full.Frontends, append(slices.Clone(list),
			dataplane.Endpoint{Addr: endpoint(5000).Addr, Local: true})), 1, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := &Dataplane{tables: [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}}
			d.forget()
			changes := []dataplane.Change{{Old: test.old, New: test.new}}
			if test.old.Key != test.new.Key {
				changes = []dataplane.Change{{Old: test.old}, {New: test.new}}
			}
			p, b := d.plan(changes, map[dataplane.Key]error{}), d.newBatch()
			for _, c := range changes {
				p.add(b, c)
			}
			var del, add int
			for set := range b.tables[0].del {
				del += len(b.tables[0].del[set])
				add += len(b.tables[0].add[set])
			}
			if del != test.del || add != test.add {
				t.Errorf("%d elements deleted and %d added, want %d and %d", del, add, test.del, test.add)
			}
		})
	}
}

func TestComment(t *testing.T) {
	t.Parallel()
	key := func(namespace, name, port string) dataplane.Key {
		return dataplane.Key{Namespace: namespace, Name: name, Port: port, Family: dataplane.IPv4}
	}
	if got, want := comment(key("shop", "cart", "http")), "shop/cart:http"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	long := strings.Repeat("n", 63)
	a, b := comment(key(long, long, "port-a")), comment(key(long, long, "port-b"))
	if len(a) != maxComment || len(b) != maxComment {
		t.Errorf("long names have %d and %d bytes, want %d", len(a), len(b), maxComment)
	}
	if a == b {
		t.Errorf("two names are shortened to the same %q", a)
	}
	if fits := comment(key(long, long[1:], "")); strings.Contains(fits, "~") {
		t.Errorf("a name that fits was shortened to %q", fits)
	}
}

func TestNetworks(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		cidrs []string
		want  string // the elements of the IPv4 table
	}{
		{"none", nil, ""},
		{"one", []string{"10.1.0.0/16"}, "10.1.0.0 10.2.0.0)"},
		{"only of the family", []string{"10.1.0.0/16", "fd00::/64"}, "10.1.0.0 10.2.0.0)"},
		{"one within another", []string{"10.1.2.0/24", "10.0.0.0/8", "10.1.0.0/16"}, "10.0.0.0 11.0.0.0)"},
		{"neighbours", []string{"10.1.0.0/24", "10.1.1.0/24"}, "10.1.0.0 10.1.1.0) 10.1.1.0 10.1.2.0)"},
		{"up to the last address", []string{"240.0.0.0/4"}, "240.0.0.0"},
		{"everything", []string{"0.0.0.0/0"}, "0.0.0.0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var node dataplane.Node
			for _, c := range test.cidrs {
				node.PodCIDRs = append(node.PodCIDRs, netip.MustParsePrefix(c))
			}
			var got []string
			for _, e := range intervals(newTable(dataplane.IPv4).networksOf(node.PodCIDRs)) {
				a, _ := netip.AddrFromSlice(e.Key)
				text := a.String()
				if e.IntervalEnd {
					text += ")"
				}
				got = append(got, text)
			}
			if diff := cmp.Diff(test.want, strings.Join(got, " ")); diff != "" {
				t.Errorf("elements (-want +got):\n%s", diff)
			}
		})
	}
}

// FuzzElements encodes a frontend, a slot and an endpoint from the input and
// expects to parse the same, and feeds the input itself to the parsers, which
// must not panic, and must refuse what they would not encode the same way.
func FuzzElements(f *testing.F) {
	f.Add([]byte{10, 96, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0, 10, 1, 0, 1, 0x1f, 0x90, 0, 0}, uint16(3), false)
	f.Add(bytes.Repeat([]byte{0xfd}, 56), uint16(0xffff), true)
	f.Fuzz(func(t *testing.T, b []byte, slot uint16, v6 bool) {
		table := newTable(dataplane.IPv4)
		if v6 {
			table = newTable(dataplane.IPv6)
		}
		parseElement(b)
		_ = parseElements(b, func(element, bool) {})
		if f, _, err := table.parseFrontend(b); err == nil {
			l := list(slot & 1)
			key := table.slotElement(f, l, uint32(slot))
			if gotFrontend, gotList, got, err := table.parseSlot(key); err != nil || got != int(slot) || gotFrontend != f || gotList != l {
				t.Fatalf("slot %d of list %d of %v became %d of %d of %v, %v", slot, l, f, got, gotList, gotFrontend, err)
			}
			if gotFrontend, got, err := table.parseSticky(table.stickyElement(f, id(slot))); err != nil || got != id(slot) || gotFrontend != f {
				t.Fatalf("ID %d of %v became %d of %v, %v", slot, f, got, gotFrontend, err)
			}
			p := netip.PrefixFrom(f.Addr.Addr(), int(slot)%(8*table.addrLen+1)).Masked()
			if gotFrontend, got, err := table.parseRange(table.rangeElement(f, p), p.Bits()); err != nil || got != p || gotFrontend != f {
				t.Fatalf("range %v of %v became %v of %v, %v", p, f, got, gotFrontend, err)
			}
			a, err := table.parseAddrPort(b)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := table.parseAddrPort(table.addrPortElement(a)); err != nil || got != a {
				t.Fatalf("endpoint %v became %v, %v", a, got, err)
			}
			got, gotFrontend, err := table.parseHairpin(table.hairpinElement(a.Addr(), f))
			if err != nil || got != a.Addr() || gotFrontend != f {
				t.Fatalf("hairpin of %v and %v became %v and %v, %v", a, f, got, gotFrontend, err)
			}
		}
		if f, l, slot, err := table.parseSlot(b); err == nil && len(b) != len(table.slotElement(f, l, uint32(slot))) {
			t.Fatalf("%x was taken for slot %d of %v", b, slot, f)
		}
		if c, err := table.parseClass(b); err == nil && !bytes.Equal(table.classElement(c), b) {
			t.Fatalf("%x was taken for class %d", b, c)
		}
		_, _, _ = table.parseHairpin(b)
	})
}

// BenchmarkPlan is the part of an update that is spent before the kernel.
func BenchmarkPlan(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("endpoints=%d", n), func(b *testing.B) {
			list := make([]dataplane.Endpoint, n)
			for i := range list {
				list[i] = endpoint(i)
			}
			old := service(b, "s", []dataplane.Frontend{frontend(1)}, slices.Clone(list))
			list[n/2] = endpoint(5000)
			changes := []dataplane.Change{{Old: old, New: service(b, "s", old.Frontends, list)}}
			d := &Dataplane{tables: [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}}
			d.forget()
			b.ReportAllocs()
			for b.Loop() {
				d.plan(changes, nil).add(d.newBatch(), changes[0])
			}
		})
	}
}
