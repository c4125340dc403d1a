package bench_test

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"fairlead.io/fairlead/bench"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
	"fairlead.io/fairlead/sync"
)

const endpointsPerService = 10

// serviceCounts returns the numbers of Services to run a benchmark with.
func serviceCounts() []int {
	if testing.Short() {
		return []int{100}
	}
	return []int{1_000, 10_000, 100_000}
}

// backend is a backend under benchmark.
type backend struct {
	name string
	open func(b *testing.B, netns int) dataplane.Dataplane
}

// backends returns all backends of this build: nft, and ipvs with the build tag ipvs.
func backends() []backend {
	return append([]backend{{"nft", func(b *testing.B, netns int) dataplane.Dataplane {
		b.Helper()
		d, err := nft.Open(nft.Options{NetNS: netns})
		if err != nil {
			b.Fatal(err)
		}
		return d
	}}}, ipvsBackends()...)
}

func node() dataplane.Node {
	return dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
}

// newServices returns n Services.
func newServices(n, endpoints int) []*dataplane.Service {
	services := make([]*dataplane.Service, n)
	for i := range services {
		services[i] = bench.Service(i, endpoints)
	}
	return services
}

// newNamespace returns an empty network namespace.
func newNamespace(b *testing.B) *nettest.Namespace {
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
	return ns
}

// fixture is a syncer with a dataplane that holds a number of Services.
type fixture struct {
	syncer   *sync.Syncer
	commits  chan sync.Commit
	services []*dataplane.Service
}

// start programs Services in a new network namespace.
func start(b *testing.B, open func(*testing.B, int) dataplane.Dataplane, services []*dataplane.Service) *fixture {
	b.Helper()
	dp := open(b, newNamespace(b).Fd())
	s := &fixture{commits: make(chan sync.Commit, 1), services: services}
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
	all := make(map[dataplane.Key]*dataplane.Service, len(services))
	for _, svc := range services {
		all[svc.Key] = svc
	}
	s.syncer.SetNode(node())
	s.syncer.Update(all)
	s.syncer.FinishInitialList()
	s.wait(b)
	return s
}

func (s *fixture) wait(b *testing.B) {
	b.Helper()
	if c := <-s.commits; c.Err != nil || len(c.Failed) > 0 {
		b.Fatalf("commit failed: %v %v", c.Err, c.Failed)
	}
}

// update passes one change to the syncer and waits until the kernel acknowledges it.
func (s *fixture) update(b *testing.B, key dataplane.Key, svc *dataplane.Service) time.Duration {
	b.Helper()
	begin := time.Now()
	s.syncer.Update(map[dataplane.Key]*dataplane.Service{key: svc})
	s.wait(b)
	return time.Since(begin)
}

// measure runs op b.N times and reports percentiles of the returned durations.
func measure(b *testing.B, op func() time.Duration) {
	b.Helper()
	b.ReportAllocs()
	runtime.GC() // garbage of the setup must not count
	var took []time.Duration
	for b.Loop() {
		took = append(took, op())
	}
	for _, p := range []int{50, 90, 99} {
		b.ReportMetric(float64(bench.Percentile(took, p).Nanoseconds())/1e3, fmt.Sprintf("p%d-µs", p))
	}
}
