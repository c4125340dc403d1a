package bench_test

import (
	"context"
	"fmt"
	"iter"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"fairlead/bench"
	"fairlead/dataplane"
	"fairlead/internal/nettest"
	"fairlead/nft"
	"fairlead/sync"

	"golang.org/x/sys/unix"
)

const endpointsPerService = 10

// sizes are the numbers of Services that a benchmark runs with.
func sizes() []int {
	if testing.Short() {
		return []int{100}
	}
	return []int{1_000, 10_000, 100_000}
}

// backends are what the benchmarks compare. Each opens in the namespace.
func backends() map[string]func(b *testing.B, netns int) dataplane.Dataplane {
	return map[string]func(b *testing.B, netns int) dataplane.Dataplane{
		"nft": func(b *testing.B, netns int) dataplane.Dataplane {
			d, err := nft.Open(nft.Options{NetNS: netns})
			if err != nil {
				b.Fatal(err)
			}
			return d
		},
	}
}

func node() dataplane.Node {
	return dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
}

// system is a syncer with a dataplane below it that holds a number of Services.
type system struct {
	syncer   *sync.Syncer
	commits  chan sync.Commit
	services []*dataplane.Service
}

func start(b *testing.B, open func(*testing.B, int) dataplane.Dataplane, n int) *system {
	b.Helper()
	ns, err := nettest.NewNamespace("")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := ns.Close(); err != nil {
			b.Error(err)
		}
	})
	dp := open(b, ns.Fd())
	s := &system{commits: make(chan sync.Commit, 1)}
	s.syncer = sync.New(dp, sync.Options{OnCommit: func(c sync.Commit) { s.commits <- c }})
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan error)
	go func() { stopped <- s.syncer.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-stopped; err != nil {
			b.Error(err)
		}
		if err := dp.Close(); err != nil {
			b.Error(err)
		}
	})
	all := make(map[dataplane.Key]*dataplane.Service, n)
	for i := range n {
		svc := bench.Service(i, endpointsPerService)
		s.services = append(s.services, svc)
		all[svc.Key] = svc
	}
	s.syncer.SetNode(node())
	s.syncer.Update(all)
	s.syncer.ListComplete()
	s.wait(b)
	return s
}

func (s *system) wait(b *testing.B) {
	b.Helper()
	if c := <-s.commits; c.Err != nil || len(c.Failed) > 0 {
		b.Fatalf("commit failed: %v %v", c.Err, c.Failed)
	}
}

// update hands one change to the syncer and waits until the kernel has
// acknowledged it.
func (s *system) update(b *testing.B, key dataplane.Key, svc *dataplane.Service) time.Duration {
	b.Helper()
	begin := time.Now()
	s.syncer.Update(map[dataplane.Key]*dataplane.Service{key: svc})
	s.wait(b)
	return time.Since(begin)
}

// BenchmarkUpdate is the time from the syncer's input to the kernel's
// acknowledgement, for one change at a time.
func BenchmarkUpdate(b *testing.B) {
	for name, open := range backends() {
		for _, n := range sizes() {
			b.Run(fmt.Sprintf("backend=%s/services=%d", name, n), func(b *testing.B) {
				s := start(b, open, n)
				b.Run("replace-endpoint", func(b *testing.B) { s.replaceEndpoint(b) })
				b.Run("add-service", func(b *testing.B) { s.addService(b) })
				b.Run("remove-endpoint", func(b *testing.B) { s.removeEndpoint(b) })
			})
		}
	}
}

func (s *system) replaceEndpoint(b *testing.B) {
	b.Helper()
	i, generation := 0, 1
	measure(b, func() time.Duration {
		if i++; i == len(s.services) {
			i = 0
			generation++
		}
		old := s.services[i]
		endpoints := slices.Clone(old.Endpoints)
		last := &endpoints[len(endpoints)-1]
		last.Addr = netip.AddrPortFrom(last.Addr.Addr(), last.Addr.Port()+uint16(generation))
		s.services[i] = bench.WithEndpoints(old, endpoints)
		return s.update(b, old.Key, s.services[i])
	})
}

func (s *system) addService(b *testing.B) {
	b.Helper()
	i := len(s.services)
	measure(b, func() time.Duration {
		svc := bench.Service(i, endpointsPerService)
		took := s.update(b, svc.Key, svc)
		b.StopTimer()
		s.update(b, svc.Key, nil)
		b.StartTimer()
		return took
	})
}

func (s *system) removeEndpoint(b *testing.B) {
	b.Helper()
	i := 0
	measure(b, func() time.Duration {
		if i++; i == len(s.services) {
			i = 0
		}
		full := s.services[i]
		took := s.update(b, full.Key, bench.WithEndpoints(full, slices.Clone(full.Endpoints[1:])))
		b.StopTimer()
		s.update(b, full.Key, full)
		b.StartTimer()
		return took
	})
}

// measure runs op b.N times and reports the percentiles of what it returns.
func measure(b *testing.B, op func() time.Duration) {
	b.Helper()
	b.ReportAllocs()
	runtime.GC() // what the set-up has left
	var took []time.Duration
	for b.Loop() {
		took = append(took, op())
	}
	for _, p := range []int{50, 90, 99} {
		b.ReportMetric(float64(bench.Percentile(took, p).Nanoseconds())/1e3, fmt.Sprintf("p%d-µs", p))
	}
}

// BenchmarkColdStart is the time for a first Replace in an empty kernel, and
// for a second one, which only reads. It also reports which part of the
// first is spent in the kernel.
func BenchmarkColdStart(b *testing.B) {
	for name, open := range backends() {
		for _, n := range sizes() {
			b.Run(fmt.Sprintf("backend=%s/services=%d", name, n), func(b *testing.B) {
				services := make([]*dataplane.Service, n)
				for i := range services {
					services[i] = bench.Service(i, endpointsPerService)
				}
				var cold, warm time.Duration
				var user, kernel time.Duration
				for b.Loop() {
					b.StopTimer()
					ns, err := nettest.NewNamespace("")
					if err != nil {
						b.Fatal(err)
					}
					d := open(b, ns.Fd())
					runtime.GC()
					b.StartTimer()
					u0, k0 := cpu(b)
					cold += replace(b, d, slices.Values(services))
					u1, k1 := cpu(b)
					b.StopTimer()
					user += u1 - u0
					kernel += k1 - k0
					warm += replace(b, d, slices.Values(services))
					if err := d.Close(); err != nil {
						b.Error(err)
					}
					if err := ns.Close(); err != nil {
						b.Error(err)
					}
					b.StartTimer()
				}
				b.ReportMetric(float64(cold.Microseconds())/1e3/float64(b.N), "cold-ms")
				b.ReportMetric(float64(warm.Microseconds())/1e3/float64(b.N), "warm-ms")
				b.ReportMetric(100*float64(kernel)/float64(kernel+user), "%kernel")
			})
		}
	}
}

// BenchmarkMemory reports the memory that is held for a Service with its
// endpoints: by the Service itself, the syncer and the backend, with all of
// them programmed.
func BenchmarkMemory(b *testing.B) {
	for name, open := range backends() {
		for _, n := range sizes() {
			b.Run(fmt.Sprintf("backend=%s/services=%d", name, n), func(b *testing.B) {
				var held uint64
				for b.Loop() {
					before := heap()
					s := start(b, open, n)
					held += heap() - before
					runtime.KeepAlive(s)
				}
				b.ReportMetric(float64(held)/float64(b.N)/float64(n), "B/service")
			})
		}
	}
}

// heap returns the bytes of live objects.
func heap() uint64 {
	runtime.GC()
	runtime.GC() // what finalizers have kept
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func replace(b *testing.B, d dataplane.Dataplane, services iter.Seq[*dataplane.Service]) time.Duration {
	b.Helper()
	begin := time.Now()
	if err := d.Replace(context.Background(), node(), services, nil); err != nil {
		b.Fatal(err)
	}
	return time.Since(begin)
}

// cpu returns the time that this process has spent in user mode and in the
// kernel.
func cpu(b *testing.B) (user, kernel time.Duration) {
	b.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano()), time.Duration(r.Stime.Nano())
}
