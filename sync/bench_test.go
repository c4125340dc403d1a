package sync_test

import (
	"context"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/sync"
)

// These benchmarks show that the cost of an event does not grow with the number of Services. They
// measure the syncer alone: the dataplane is a no-op or the fake, whose Apply has a cost
// proportional to the changes.

// nopDataplane is a dataplane without any cost.
type nopDataplane struct{}

func (nopDataplane) Replace(context.Context, dataplane.Node, iter.Seq[*dataplane.Service], func(int)) error {
	return nil
}
func (nopDataplane) Apply(context.Context, []dataplane.Change) error { return nil }
func (nopDataplane) Read(context.Context) (dataplane.State, error)   { return nil, nil }
func (nopDataplane) Drift() <-chan struct{}                          { return nil }
func (nopDataplane) Close() error                                    { return nil }

var serviceCounts = []int{1_000, 10_000, 100_000}

// BenchmarkUpdate measures the time from Update of one Service to the return of the dataplane's
// Apply, one event at a time.
func BenchmarkUpdate(b *testing.B) {
	for name, open := range map[string]func() dataplane.Dataplane{
		"nothing": func() dataplane.Dataplane { return nopDataplane{} },
		"fake":    func() dataplane.Dataplane { return fake.New(fake.Options{}) },
	} {
		for _, n := range serviceCounts {
			b.Run(fmt.Sprintf("dataplane=%s/services=%d", name, n), func(b *testing.B) {
				ends := make(chan time.Time, 1)
				s := sync.New(open(), sync.Options{OnCommit: func(c sync.Commit) { ends <- c.End }})
				services, others := runLoaded(b, s, n, ends)
				latencies := make([]time.Duration, 0, 1<<20)
				change := updates{}
				runtime.GC()
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					j := i * 7919 % n // spread over the table
					next := others[j]
					services[j], others[j] = next, services[j]
					clear(change)
					change[next.Key] = next
					started := time.Now()
					s.Update(change)
					latencies = append(latencies, (<-ends).Sub(started))
					i++
				}
				percentiles(b, latencies)
			})
		}
	}
}

// BenchmarkBatch measures 100 Services changed by one Update.
func BenchmarkBatch(b *testing.B) {
	for _, n := range serviceCounts {
		b.Run(fmt.Sprintf("services=%d/changed=100", n), func(b *testing.B) {
			ends := make(chan time.Time, 1)
			s := sync.New(nopDataplane{}, sync.Options{OnCommit: func(c sync.Commit) { ends <- c.End }})
			services, others := runLoaded(b, s, n, ends)
			change := updates{}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				clear(change)
				for range 100 {
					j := i * 7919 % n
					services[j], others[j] = others[j], services[j]
					change[services[j].Key] = services[j]
					i++
				}
				s.Update(change)
				<-ends
			}
		})
	}
}

// BenchmarkStart measures the first Replace, and the memory that the syncer uses for each Service
// in addition to the Service.
func BenchmarkStart(b *testing.B) {
	for _, n := range serviceCounts {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			all := updates{}
			for i := range n {
				s := service(i, 10)
				all[s.Key] = s
			}
			var held uint64
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				before := heap()
				b.StartTimer()
				ctx, cancel := context.WithCancel(b.Context())
				ended := make(chan struct{})
				s := sync.New(nopDataplane{}, sync.Options{})
				s.Update(all)
				s.FinishInitialList()
				go func() {
					_ = s.Run(ctx)
					close(ended)
				}()
				if err := s.WaitSynced(ctx); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				held = heap() - before
				cancel()
				<-ended
				runtime.KeepAlive(s)
				b.StartTimer()
			}
			b.ReportMetric(float64(held)/float64(n), "held-B/service")
		})
	}
}

// heap returns the number of bytes in use.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// runLoaded runs s with n Services of 10 endpoints until b ends. It returns the Services, and a
// variant of each with one endpoint replaced.
func runLoaded(b *testing.B, s *sync.Syncer, n int, ends <-chan time.Time) (services, others []*dataplane.Service) {
	b.Helper()
	all := updates{}
	for i := range n {
		v := service(i, 10)
		all[v.Key] = v
		services = append(services, v)
		other := *v
		other.Endpoints = slices.Concat(v.Endpoints[1:], service(i, 11).Endpoints[10:])
		others = append(others, &other)
	}
	s.Update(all)
	s.FinishInitialList()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		_ = s.Run(ctx)
		close(ended)
	}()
	b.Cleanup(func() {
		cancel()
		<-ended
	})
	<-ends
	return services, others
}

func percentiles(b *testing.B, latencies []time.Duration) {
	b.Helper()
	slices.Sort(latencies)
	for _, p := range []int{50, 90, 99} {
		b.ReportMetric(float64(latencies[(len(latencies)-1)*p/100]), fmt.Sprintf("p%d-ns", p))
	}
}
