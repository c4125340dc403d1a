package conntrack

import (
	"fmt"
	"testing"
)

// BenchmarkCountOffloaded measures a count in a table of other entries. Package flowoffload tests the
// result with flowtables, which many kernels lack.
func BenchmarkCountOffloaded(b *testing.B) {
	for _, entries := range []int{1_000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("entries=%d", entries), func(b *testing.B) {
			ns := newNamespace(b)
			k := openTable(b, ns)
			others := make([]testEntry, entries)
			for i := range others {
				others[i] = newTestEntry(fmt.Sprintf("10.%d.%d.1:%d", 1+i>>16, i>>8&0xff, 1024+i&0xff), "10.97.0.10:53", "10.0.0.9:5353")
			}
			insertEntries(b, k, others...)
			b.ReportAllocs()
			for b.Loop() {
				count, err := CountOffloaded(b.Context(), ns.Fd())
				if err != nil || count != 0 {
					b.Fatalf("%d connections, error %v", count, err)
				}
			}
		})
	}
}
