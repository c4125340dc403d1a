package nft

import (
	"fmt"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// BenchmarkPlanChanges measures the user-space part of an update.
func BenchmarkPlanChanges(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("endpoints=%d", n), func(b *testing.B) {
			list := make([]dataplane.Endpoint, n)
			for i := range list {
				list[i] = endpoint(i)
			}
			old := service(b, "s", []dataplane.Frontend{frontend(1)}, slices.Clone(list))
			list[n/2] = endpoint(5000)
			changes := []dataplane.Change{{Old: old, New: service(b, "s", old.Frontends, list)}}
			d := &Dataplane{renderer: endpointRenderer{}, tables: [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}}
			d.resetState()
			b.ReportAllocs()
			for b.Loop() {
				d.planChanges(changes, nil).addChange(d.newBatch(), changes[0])
			}
		})
	}
}
