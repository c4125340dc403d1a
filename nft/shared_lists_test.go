package nft

import (
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// TestManyFrontendsElementCount counts elements. Their number must grow with the sum of
// frontends and endpoints. The cost of changing one endpoint must depend on neither.
func TestManyFrontendsElementCount(t *testing.T) {
	t.Parallel()
	const frontends, count = 200, 100
	var list []dataplane.Endpoint
	for n := range count {
		list = append(list, dataplane.Endpoint{Addr: endpoint(n).Addr, Local: true})
	}
	ranges := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.0/24")}
	makeService := func(n int, list []dataplane.Endpoint) *dataplane.Service {
		spec := dataplane.ServiceSpec{Endpoints: slices.Clone(list), SourceRanges: ranges}
		return serviceWithFrontends(t, "many", dataplane.LoadBalancer, netip.MustParseAddr("203.0.113.1"), n, spec)
	}
	replaced := slices.Clone(list)
	replaced[17] = dataplane.Endpoint{Addr: endpoint(5000).Addr, Local: true}
	const perFrontend = 2                // in the sets services and lists
	const whole = 1 + 2*count + 2        // list size; slots and hairpin elements; source ranges
	const replacing, removing = 4, 2 * 3 // slot and hairpin element; list size, two slots and hairpin elements
	for _, test := range []struct {
		name     string
		old, new *dataplane.Service
		max      int
	}{
		{"created", nil, makeService(frontends, list), frontends*perFrontend + whole},
		{"one frontend added", makeService(frontends, list), makeService(frontends+1, list), perFrontend},
		{"one endpoint replaced", makeService(frontends, list), makeService(frontends, replaced), replacing},
		{"one endpoint removed", makeService(frontends, list), makeService(frontends, slices.Delete(slices.Clone(list), 17, 18)), removing},
		{"one endpoint added", makeService(frontends, list), makeService(frontends, append(slices.Clone(list), replaced[17])), removing},
		{"deleted", makeService(frontends, list), nil, frontends*perFrontend + whole},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := &Dataplane{renderer: endpointRenderer{}, tables: [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}, minSharedFrontends: minSharedFrontends}
			d.resetState()
			if test.old != nil {
				d.allocateListID(test.old)
			}
			changes := []dataplane.Change{{Old: test.old, New: test.new}}
			b := d.newBatch()
			d.planChanges(changes, map[dataplane.Key]error{}).addChange(b, changes[0])
			if n := b.tables[0].elements; n > test.max {
				t.Errorf("%d elements are written, want at most %d", n, test.max)
			}
		})
	}
}

// TestListIDAllocator allocates all list IDs. A released ID must not be the next to be
// allocated.
func TestListIDAllocator(t *testing.T) {
	t.Parallel()
	key := func(n int) dataplane.Key {
		return dataplane.Key{Namespace: "default", Name: "s", Port: string(rune(n)), Family: dataplane.IPv4, Kind: dataplane.ExternalIP}
	}
	ids := newListIDAllocator()
	ids.reserve(5)
	first := ids.allocate(key(1))
	if first != 6 || ids.allocate(key(1)) != first {
		t.Errorf("got list ID %d first and %d second", first, ids.allocate(key(1)))
	}
	ids.release(key(1))
	if n := ids.allocate(key(2)); n == first || n == 5 {
		t.Errorf("list ID %d was allocated again at once", n)
	}
	ids.last = maxListID
	if n := ids.allocate(key(3)); n != 1 {
		t.Errorf("list ID %d follows the last one, want 1", n)
	}
	for n := listID(1); n <= maxListID; n++ {
		ids.used[n] = true
	}
	if n := ids.allocate(key(4)); n != 0 {
		t.Errorf("list ID %d was allocated, but all are in use", n)
	}
}

// TestListElementEncoding checks that list IDs survive encoding and parsing, and that foreign
// values are rejected.
func TestListElementEncoding(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		table := newTable(family)
		for _, n := range []listID{1, 7, 8, maxListID} {
			for l := range numEndpointLists {
				got, gotList, slot, err := table.parseListSlot(table.encodeListSlotKey(n, l, 65_535))
				if err != nil || got != n || gotList != l || slot != 65_535 {
					t.Errorf("list ID %d became %d, list %d, slot %d, error %v", n, got, gotList, slot, err)
				}
				if c := n.sizeClass(l, 300, selectRandom); c.size() != 300 || c.shard() != n.shard() || c.endpointList() != l {
					t.Errorf("size class of list ID %d is %s", n, c)
				}
			}
		}
		for _, b := range [][]byte{nil, {1, 2, 3}, table.encodeListID(0), {0, 0, 0, 0}, table.encodeListSlotKey(1, 0, 0)[4:]} {
			if n, _, err := table.parseListID(b); err == nil {
				t.Errorf("%x was parsed as list ID %d", b, n)
			}
		}
	}
}
