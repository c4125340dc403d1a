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
	"fairlead.io/fairlead/bench/rig"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
)

// work is what one change costs, in numbers that do not depend on the machine.
type work struct {
	// announced is what the kernel announces of nftables for it.
	announced
	// Allocations and AllocatedBytes are those of the whole program.
	Allocations, AllocatedBytes uint64
}

// TestWorkFollowsTheChange compares what one change costs among 1,000 Services
// and among 20,000: the messages, elements and bytes that it changes in the kernel,
// and what the program allocates, which also tells of messages that change nothing.
// It is no matter of time, so it fails on any machine once a change costs more the
// more Services there are.
func TestWorkFollowsTheChange(t *testing.T) {
	few, many := 1000, 20_000
	for _, mode := range Modes() {
		t.Run(mode, func(t *testing.T) {
			of := map[int]map[result.Change]work{}
			for _, n := range []int{few, many} {
				var err error
				if of[n], err = workOf(t, mode, n); errors.Is(err, ipvs.ErrNotSupported) {
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
				if b.announced != a.announced {
					t.Errorf("%s: the kernel is told %+v among %d Services, and %+v among %d", change, a.announced, few, b.announced, many)
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

// workOf returns what changes cost among n Services: the median of some.
func workOf(t *testing.T, mode string, n int) (map[result.Change]work, error) {
	t.Helper()
	const endpoints, times = 10, 15
	services := some(n, endpoints)
	// The class of one endpoint more is there already.
	services[n-1] = services[n-1].With(cluster.Watched(0))
	costs := map[result.Change][]work{}
	err := loaded(t.Context(), Options{Mode: mode}, services, func(s *subject, _ *rig.Probe) (err error) {
		told, err := listen(s.rig.Node.Fd())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, told.close()) }()
		change := func(kind result.Change, deltas ...kube.Delta) {
			if err != nil {
				return
			}
			if _, err = told.take(); err != nil {
				return
			}
			var w work
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			if err = s.deliver(deltas...); err != nil {
				return
			}
			if _, err = s.settled(t.Context()); err != nil {
				return
			}
			runtime.ReadMemStats(&after)
			w.Allocations, w.AllocatedBytes = after.Mallocs-before.Mallocs, after.TotalAlloc-before.TotalAlloc
			w.announced, err = told.take()
			costs[kind] = append(costs[kind], w)
		}
		for i := range times {
			// The same addresses at every number of Services, as elements may be in
			// different sets by address.
			old := services[i]
			replaced := old.Replaced(cluster.Watched(2*i + 1))
			change(result.ReplaceEndpoint, sliceOf(replaced))
			change(result.ScaleUp, sliceOf(replaced.With(cluster.Watched(2*i+2))))
			change(result.ScaleDown, sliceOf(replaced))
			more := cluster.New(1<<17+i, endpoints)
			change(result.CreateService, kube.Delta{Services: []*corev1.Service{more.Object()}, EndpointSlices: sliceOf(more).EndpointSlices})
			change(result.DeleteService, kube.Delta{
				DeletedServices: []types.NamespacedName{more.Name()}, DeletedEndpointSlices: []types.NamespacedName{more.SliceName()},
			})
		}
		return err
	})
	medians := map[result.Change]work{}
	for kind, list := range costs {
		medians[kind] = work{
			announced: announced{
				Messages: median(list, func(w work) int { return w.Messages }),
				Elements: median(list, func(w work) int { return w.Elements }),
				Bytes:    median(list, func(w work) int { return w.Bytes }),
			},
			Allocations:    median(list, func(w work) uint64 { return w.Allocations }),
			AllocatedBytes: median(list, func(w work) uint64 { return w.AllocatedBytes }),
		}
	}
	return medians, err
}

func median[T int | uint64](list []work, of func(work) T) T {
	values := make([]T, 0, len(list))
	for _, w := range list {
		values = append(values, of(w))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// TestAnnounced checks that what is counted is what a change consists of.
func TestAnnounced(t *testing.T) {
	services := some(3, 10)
	err := loaded(t.Context(), Options{Mode: Modes()[0]}, services, func(s *subject, _ *rig.Probe) (err error) {
		told, err := listen(s.rig.Node.Fd())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, told.close()) }()
		for _, addr := range []netip.Addr{cluster.Watched(1), cluster.Watched(1), cluster.Watched(2)} {
			repeated := services[0].Endpoints[9] == addr
			services[0] = services[0].Replaced(addr)
			if err := s.deliver(sliceOf(services[0])); err != nil {
				return err
			}
			if _, err := s.settled(t.Context()); err != nil {
				return err
			}
			got, err := told.take()
			if err != nil {
				return err
			}
			// One slot goes over from one endpoint to the other, whatever it takes.
			const most = 10
			few := got.Elements > 0 && got.Elements < most && got.Messages > 0 && got.Bytes > got.Elements
			if repeated && got != (announced{}) || !repeated && !few {
				return fmt.Errorf("repeated %t: got %+v, want a few elements, or nothing if the change is repeated", repeated, got)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
