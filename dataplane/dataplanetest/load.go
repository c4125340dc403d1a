package dataplanetest

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fairlead/dataplane"
	"fairlead/internal/nettest"
)

// loadTime is how long a test changes things under load.
const loadTime = 3 * time.Second

// underLoad opens connections to the frontends, from a pod, the node and
// outside, for as long as change runs, and checks that each reaches one of the
// endpoints.
func (w *world) underLoad(t *testing.T, services []*dataplane.Service, change func(ctx context.Context)) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), loadTime)
	defer stop()
	var done, failed atomic.Int64
	var clients sync.WaitGroup
	for _, s := range services {
		for _, from := range []*nettest.Host{w.client, w.net.Node, w.net.Outside} {
			clients.Go(func() {
				f := s.Frontends[0]
				for ctx.Err() == nil {
					// Not with ctx: the last connection is not cut short.
					answer, err := from.Connect(t.Context(), network(f.Protocol), f.Addr)
					done.Add(1)
					valid := slices.ContainsFunc(s.Endpoints, func(e dataplane.Endpoint) bool { return e.Addr == answer.Endpoint })
					if err == nil && valid {
						time.Sleep(time.Millisecond) // Others need this machine too.
						continue
					}
					if failed.Add(1) < 10 {
						t.Errorf("connection from %s to %s: answer %+v, error %v", from.Name, f, answer, err)
					}
				}
			})
		}
	}
	change(ctx)
	stop()
	clients.Wait()
	t.Logf("%d connections, %d failed", done.Load(), failed.Load())
	if done.Load() < 100 {
		t.Errorf("only %d connections in %v: this is no load", done.Load(), loadTime)
	}
}

func (w *world) loadServices(pods ...int) []*dataplane.Service {
	w.t.Helper()
	var services []*dataplane.Service
	for _, family := range families() {
		for _, p := range protocols() {
			services = append(services, w.service("web", p, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, pods...)))
		}
	}
	return services
}

// Pods 0 and 2 stay; 1, 3 and 4 come and go, so that slots move and the number
// of endpoints changes; all of them serve all the time.
func testFlapUnderLoad(t *testing.T, open Opener) {
	t.Helper()
	w := newWorld(t, open, 5)
	w.replace(w.loadServices(0, 2)...)
	changes := 0
	w.underLoad(t, w.loadServices(0, 1, 2, 3, 4), func(ctx context.Context) {
		for ctx.Err() == nil {
			pods := []int{0, 2}
			for _, i := range []int{1, 3, 4} {
				if rand.IntN(2) == 0 { //nolint:gosec // no secret
					pods = append(pods, i)
				}
			}
			w.put(w.loadServices(pods...)...)
			changes++
		}
	})
	t.Logf("%d changes of %d Services", changes, len(w.held))
}

func testRestartUnderLoad(t *testing.T, open Opener) {
	t.Helper()
	w := newWorld(t, open, 3)
	services := w.loadServices(0, 1, 2)
	w.replace(services...)
	restarts := 0
	w.underLoad(t, services, func(ctx context.Context) {
		for ctx.Err() == nil {
			w.restart()
			restarts++
		}
	})
	t.Logf("%d restarts", restarts)
}
