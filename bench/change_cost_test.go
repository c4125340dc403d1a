package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
)

// changeCost is what one change costs, in numbers that do not depend on the machine.
type changeCost struct {
	// announced is what the kernel announces of nftables for it.
	notificationCount
	// Allocations and AllocatedBytes are those of the whole program.
	Allocations, AllocatedBytes uint64
}

// TestChangeCostIndependentOfServices compares what one change costs among 1,000 Services
// and among 20,000: the messages, elements and bytes that it changes in the kernel,
// and what the program allocates, which also tells of messages that change nothing.
// It is no matter of time, so it fails on any machine once a change costs more the
// more Services there are.
func TestChangeCostIndependentOfServices(t *testing.T) {
	few, many := 1000, 20_000
	for _, mode := range Modes() {
		t.Run(mode, func(t *testing.T) {
			of := map[int]map[result.Change]changeCost{}
			for _, n := range []int{few, many} {
				var err error
				if of[n], err = measureChangeCosts(t, mode, n); errors.Is(err, ipvs.ErrNotSupported) {
					t.Log(err)
					return
				} else if err != nil {
					t.Fatal(err)
				}
			}
			for _, change := range changes() {
				a, b := of[few][change], of[many][change]
				t.Logf("%s: among %d Services %+v, among %d %+v", change, few, a, many, b)
				if mode == backend.NFT && (a.Messages == 0 || a.Elements == 0) {
					t.Errorf("%s: nothing was announced", change)
				}
				if b.notificationCount != a.notificationCount {
					t.Errorf("%s: the kernel is told %+v among %d Services, and %+v among %d", change, a.notificationCount, few, b.notificationCount, many)
				}
				// Maps and free lists make a small difference either way.
				if b.Allocations > a.Allocations+a.Allocations/10+5 {
					t.Errorf("%s: %d allocations among %d Services, and %d among %d", change, a.Allocations, few, b.Allocations, many)
				}
				if b.AllocatedBytes > a.AllocatedBytes+a.AllocatedBytes/5+1024 {
					t.Errorf("%s: %d bytes allocated among %d Services, and %d among %d", change, a.AllocatedBytes, few, b.AllocatedBytes, many)
				}
			}
		})
	}
}

// measureChangeCosts returns what changes cost among n Services: the median of some.
func measureChangeCosts(t *testing.T, mode string, n int) (map[result.Change]changeCost, error) {
	t.Helper()
	const endpoints, times = 10, 15
	services := newServices(n, endpoints)
	// The class of one endpoint more is there already.
	services[n-1] = services[n-1].WithEndpoint(cluster.WatchedAddr(0))
	costs := map[result.Change][]changeCost{}
	err := withLoadedTestbed(t.Context(), Options{Mode: mode}, services, func(s *pipelineUnderTest, _ *testbed.Probe) (err error) {
		told, err := newMonitor(s.testbed.Node.Fd())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, told.close()) }()
		change := func(kind result.Change, deltas ...kube.Delta) {
			if err != nil {
				return
			}
			if _, err = told.read(); err != nil {
				return
			}
			var w changeCost
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			if err = s.apply(deltas...); err != nil {
				return
			}
			if _, err = s.waitSynced(t.Context()); err != nil {
				return
			}
			runtime.ReadMemStats(&after)
			w.Allocations, w.AllocatedBytes = after.Mallocs-before.Mallocs, after.TotalAlloc-before.TotalAlloc
			w.notificationCount, err = told.read()
			costs[kind] = append(costs[kind], w)
		}
		for i := range times {
			// The same addresses at every number of Services, as elements may be in
			// different sets by address.
			old := services[i]
			replaced := old.WithReplacedEndpoint(cluster.WatchedAddr(2*i + 1))
			change(result.ReplaceEndpoint, sliceDelta(replaced))
			change(result.ScaleUp, sliceDelta(replaced.WithEndpoint(cluster.WatchedAddr(2*i+2))))
			change(result.ScaleDown, sliceDelta(replaced))
			more := cluster.NewService(1<<17+i, endpoints)
			change(result.CreateService, kube.Delta{Services: []*corev1.Service{more.Object()}, EndpointSlices: sliceDelta(more).EndpointSlices})
			change(result.DeleteService, kube.Delta{
				DeletedServices: []types.NamespacedName{more.Name()}, DeletedEndpointSlices: []types.NamespacedName{more.SliceName()},
			})
		}
		return err
	})
	medians := map[result.Change]changeCost{}
	for kind, list := range costs {
		medians[kind] = changeCost{
			notificationCount: notificationCount{
				Messages: median(list, func(w changeCost) int { return w.Messages }),
				Elements: median(list, func(w changeCost) int { return w.Elements }),
				Bytes:    median(list, func(w changeCost) int { return w.Bytes }),
			},
			Allocations:    median(list, func(w changeCost) uint64 { return w.Allocations }),
			AllocatedBytes: median(list, func(w changeCost) uint64 { return w.AllocatedBytes }),
		}
	}
	return medians, err
}

func median[T int | uint64](list []changeCost, of func(changeCost) T) T {
	values := make([]T, 0, len(list))
	for _, w := range list {
		values = append(values, of(w))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// TestMonitor checks that what is counted is what a change consists of.
func TestMonitor(t *testing.T) {
	services := newServices(3, 10)
	err := withLoadedTestbed(t.Context(), Options{Mode: Modes()[0]}, services, func(s *pipelineUnderTest, _ *testbed.Probe) (err error) {
		told, err := newMonitor(s.testbed.Node.Fd())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, told.close()) }()
		for _, addr := range []netip.Addr{cluster.WatchedAddr(1), cluster.WatchedAddr(1), cluster.WatchedAddr(2)} {
			repeated := services[0].Endpoints[9] == addr
			services[0] = services[0].WithReplacedEndpoint(addr)
			if err := s.apply(sliceDelta(services[0])); err != nil {
				return err
			}
			if _, err := s.waitSynced(t.Context()); err != nil {
				return err
			}
			got, err := told.read()
			if err != nil {
				return err
			}
			// One slot goes over from one endpoint to the other, whatever it takes.
			const most = 10
			few := got.Elements > 0 && got.Elements < most && got.Messages > 0 && got.Bytes > got.Elements
			if repeated && got != (notificationCount{}) || !repeated && !few {
				return fmt.Errorf("repeated %t: got %+v, want a few elements, or nothing if the change is repeated", repeated, got)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
