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

// changeCost is the cost of one change in numbers that do not depend on the speed of the machine.
type changeCost struct {
	// notificationCount counts what the change writes to nftables.
	notificationCount
	// Allocations and AllocatedBytes are allocations of the whole process.
	Allocations, AllocatedBytes uint64
}

// TestChangeCostIndependentOfServices compares the cost of one change among 1,000 and among 20,000
// Services: the messages, elements and bytes that the change writes to the kernel, and the
// allocations of the process, which also grow with requests that write nothing. The test does not
// measure time: it fails on every machine if the cost of a change grows with the number of
// Services.
func TestChangeCostIndependentOfServices(t *testing.T) {
	few, many := 1000, 20_000
	for _, mode := range Modes() {
		t.Run(mode, func(t *testing.T) {
			costs := map[int]map[result.Change]changeCost{}
			for _, n := range []int{few, many} {
				var err error
				if costs[n], err = measureChangeCosts(t, mode, n); errors.Is(err, ipvs.ErrNotSupported) {
					t.Log(err)
					return
				} else if err != nil {
					t.Fatal(err)
				}
			}
			for _, change := range changes() {
				a, b := costs[few][change], costs[many][change]
				t.Logf("%s: among %d Services %+v, among %d %+v", change, few, a, many, b)
				if mode == backend.NFT && (a.Messages == 0 || a.Elements == 0) {
					t.Errorf("%s: got no nftables notifications", change)
				}
				if b.notificationCount != a.notificationCount {
					t.Errorf("%s: wrote %+v among %d Services, but %+v among %d", change, a.notificationCount, few, b.notificationCount, many)
				}
				// Maps and free lists cause small differences.
				if b.Allocations > a.Allocations+a.Allocations/10+5 {
					t.Errorf("%s: %d allocations among %d Services, but %d among %d", change, a.Allocations, few, b.Allocations, many)
				}
				if b.AllocatedBytes > a.AllocatedBytes+a.AllocatedBytes/5+1024 {
					t.Errorf("%s: %d bytes allocated among %d Services, but %d among %d", change, a.AllocatedBytes, few, b.AllocatedBytes, many)
				}
			}
		})
	}
}

// measureChangeCosts returns the median cost of each kind of change among n Services.
func measureChangeCosts(t *testing.T, mode string, n int) (map[result.Change]changeCost, error) {
	t.Helper()
	const endpoints, times = 10, 15
	services := newServices(n, endpoints)
	// Create the service class of Services with one more endpoint, so that no measured change
	// creates it.
	services[n-1] = services[n-1].WithEndpoint(cluster.WatchedAddr(0))
	costs := map[result.Change][]changeCost{}
	err := withLoadedTestbed(t.Context(), Options{Mode: mode}, services, func(s *pipelineUnderTest, _ *testbed.Probe) (err error) {
		notifications, err := newMonitor(s.testbed.Node.Fd())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, notifications.close()) }()
		change := func(kind result.Change, deltas ...kube.Delta) {
			if err != nil {
				return
			}
			if _, err = notifications.read(); err != nil {
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
			w.notificationCount, err = notifications.read()
			costs[kind] = append(costs[kind], w)
		}
		for i := range times {
			// Use the same addresses for every number of Services: sets may depend on the address.
			old := services[i]
			replaced := old.WithReplacedEndpoint(cluster.WatchedAddr(2*i + 1))
			change(result.ReplaceEndpoint, sliceDelta(replaced))
			change(result.ScaleUp, sliceDelta(replaced.WithEndpoint(cluster.WatchedAddr(2*i+2))))
			change(result.ScaleDown, sliceDelta(replaced))
			added := cluster.NewService(1<<17+i, endpoints)
			change(result.CreateService, kube.Delta{Services: []*corev1.Service{added.Object()}, EndpointSlices: sliceDelta(added).EndpointSlices})
			change(result.DeleteService, kube.Delta{
				DeletedServices: []types.NamespacedName{added.Name()}, DeletedEndpointSlices: []types.NamespacedName{added.SliceName()},
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

func median[T int | uint64](list []changeCost, field func(changeCost) T) T {
	values := make([]T, 0, len(list))
	for _, w := range list {
		values = append(values, field(w))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// TestMonitor checks that the monitor counts the elements of a change, and nothing if a change is
// repeated.
func TestMonitor(t *testing.T) {
	services := newServices(3, 10)
	err := withLoadedTestbed(t.Context(), Options{Mode: Modes()[0]}, services, func(s *pipelineUnderTest, _ *testbed.Probe) (err error) {
		notifications, err := newMonitor(s.testbed.Node.Fd())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, notifications.close()) }()
		for _, addr := range []netip.Addr{cluster.WatchedAddr(1), cluster.WatchedAddr(1), cluster.WatchedAddr(2)} {
			repeated := services[0].Endpoints[9] == addr
			services[0] = services[0].WithReplacedEndpoint(addr)
			if err := s.apply(sliceDelta(services[0])); err != nil {
				return err
			}
			if _, err := s.waitSynced(t.Context()); err != nil {
				return err
			}
			got, err := notifications.read()
			if err != nil {
				return err
			}
			// Replacing an endpoint changes one endpoint slot, which needs a few elements.
			const limit = 10
			isSmall := got.Elements > 0 && got.Elements < limit && got.Messages > 0 && got.Bytes > got.Elements
			if repeated && got != (notificationCount{}) || !repeated && !isSmall {
				return fmt.Errorf("repeated %t: got %+v, want a few elements, or none for a repeated change", repeated, got)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
