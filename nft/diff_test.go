package nft

import (
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// TestChangeElementCount counts the elements that a change writes. The number must not depend
// on the number of endpoints of the Service.
func TestChangeElementCount(t *testing.T) {
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
		{"no change", full, full, 0, 0},
		{"one endpoint replaced", full, service(t, "full", full.Frontends, replaced), 1, 1},
		// the class, the slot of the removed endpoint, and the last slot
		{"one endpoint removed", full, service(t, "full", full.Frontends, slices.Delete(slices.Clone(list), 17, 18)), 3, 2},
		{"one endpoint added", full, service(t, "full", full.Frontends, append(slices.Clone(list), endpoint(5000))), 1, 2},
		{"frontend moved to a new name", full, service(t, "renamed", full.Frontends, slices.Clone(list)), 1, 1},
		{"local endpoint added", full, service(t, "full", full.Frontends, append(slices.Clone(list),
			dataplane.Endpoint{Addr: endpoint(5000).Addr, Local: true})), 1, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := &Dataplane{renderer: endpointRenderer{}, tables: [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}}
			d.resetState()
			changes := []dataplane.Change{{Old: test.old, New: test.new}}
			if test.old.Key != test.new.Key {
				changes = []dataplane.Change{{Old: test.old}, {New: test.new}}
			}
			p, b := d.planChanges(changes, map[dataplane.Key]error{}), d.newBatch()
			for _, c := range changes {
				p.addChange(b, c)
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
