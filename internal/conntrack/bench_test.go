package conntrack

import (
	"context"
	"fmt"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// BenchmarkScan measures one scan of a table without stale entries, from the change to the
// kernel's answer: with the kernel's filter (Linux 5.8) and without. In one commit, endpoints
// of one port or of many ports are removed.
func BenchmarkScan(b *testing.B) {
	for _, entries := range []int{0, 1_000, 10_000, 100_000} {
		k := openTable(b, newNamespace(b))
		unrelated := make([]testEntry, entries)
		for i := range unrelated {
			unrelated[i] = newTestEntry(fmt.Sprintf("10.%d.%d.1:%d", 1+i>>16, i>>8&0xff, 1024+i&0xff), "10.97.0.10:53", "10.0.0.9:5353")
		}
		insertEntries(b, k, unrelated...)
		for _, tt := range []struct {
			name    string
			ports   int
			narrows bool
		}{{"one", 1, true}, {"many", 100, true}, {"one-unfiltered", 1, false}} {
			b.Run(fmt.Sprintf("entries=%d/changes=%s", entries, tt.name), func(b *testing.B) {
				c := New(Options{})
				c.open = func() (table, error) {
					if tt.narrows {
						return uncloseable{k}, nil
					}
					return unfiltered{k}, nil
				}
				var pairs []string
				for i := range tt.ports {
					pairs = append(pairs, fmt.Sprintf("s%d 10.96.0.%d:%d -> 10.0.0.1:53 10.0.0.2:53", i, i, 53+i),
						fmt.Sprintf("s%d 10.96.0.%d:%d -> 10.0.0.1:53", i, i, 53+i))
				}
				var s candidates
				services := map[dataplane.Key]*dataplane.Service{}
				for _, change := range parseChanges(pairs...) {
					s.addChange(change)
					services[change.Key()] = change.New
				}
				c.index.update(services)
				b.ReportAllocs()
				for b.Loop() {
					if err := c.scan(b.Context(), c.index.queries(&s), func(f flow) bool { return c.index.isStale(f, &s) }); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

type uncloseable struct{ *netlinkTable }

func (uncloseable) close() error { return nil }

// unfiltered is a kernel that ignores filters.
type unfiltered struct{ *netlinkTable }

func (unfiltered) close() error { return nil }

func (u unfiltered) dump(ctx context.Context, q query, visit func(flow) bool) ([]entry, bool, error) {
	return u.dumpFiltered(ctx, q, nil, visit)
}
