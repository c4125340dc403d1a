package conntrack

import (
	"context"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// BenchmarkChangeRate measures the processor time of commits that remove and add an endpoint of a UDP
// Service without flows, at a constant rate, with and without the kernel's events. It also measures how
// long the last change takes to delete a stale entry. Choose the number of commits with -benchtime, such
// as 1780x.
func BenchmarkChangeRate(b *testing.B) {
	for _, entries := range []int{1, 100_000} {
		if testing.Short() && entries > 1 {
			continue
		}
		for _, rate := range []int{10, 200} {
			for _, follow := range []bool{false, true} {
				b.Run(fmt.Sprintf("entries=%d/rate=%d/follow=%t", entries, rate, follow), func(b *testing.B) {
					ns := newNamespace(b)
					k, own := openTable(b, ns), openTable(b, ns) // for the Cleaner, and for this goroutine
					unrelated := make([]testEntry, entries)
					for i := range unrelated {
						unrelated[i] = newTestEntry(fmt.Sprintf("10.%d.%d.1:%d", 1+i>>16, i>>8&0xff, 1024+i&0xff), "10.97.0.10:53", "10.0.0.9:5353")
					}
					insertEntries(b, own, unrelated...)
					scans, deleted := 0, make(chan time.Time, 1)
					c := New(Options{OnScan: func(l ScanResult) {
						if l.Err != nil {
							b.Error(l.Err)
						}
						if scans++; l.Deleted > 0 {
							deleted <- time.Now()
						}
					}})
					c.open = func() (table, error) {
						if follow {
							return uncloseable{k}, nil
						}
						return deaf{uncloseable{k}}, nil
					}
					ctx, cancel := context.WithCancel(b.Context())
					done := make(chan error)
					go func() { done <- c.Run(ctx) }()
					const one, two = "idle 10.96.9.9:9 -> 10.0.9.1:9", "idle 10.96.9.9:9 -> 10.0.9.1:9 10.0.9.2:9"
					const dns, dns2 = "dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53"
					c.OnCommit(replaceCommit("", two, "", dns2))
					time.Sleep(2 * rescanDelay)
					remove, add := applyCommit(two, one), applyCommit(one, two)
					start, ticker := processorTime(b), time.NewTicker(time.Second/time.Duration(rate))
					for b.Loop() {
						<-ticker.C
						c.OnCommit(remove)
						c.OnCommit(add)
					}
					b.ReportMetric(float64((processorTime(b)-start).Microseconds())/1000/float64(b.N), "cpu-ms/commit")
					b.ReportMetric(float64(scans)/float64(b.N), "scans/commit")
					insertEntries(b, own, newTestEntry("10.1.0.1:1", "10.96.0.10:53", "10.0.0.2:53"))
					last := time.Now()
					c.OnCommit(applyCommit(dns2, dns))
					b.ReportMetric(float64((<-deleted).Sub(last).Microseconds())/1000, "last-ms")
					cancel()
					if err := <-done; err != nil {
						b.Error(err)
					}
				})
			}
		}
	}
}

// processorTime returns the processor time of the process, which includes the kernel's dumps.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// deaf is a kernel without events.
type deaf struct{ uncloseable }

func (deaf) listen() (flowEvents, error) { return nil, ErrEventsOff }
