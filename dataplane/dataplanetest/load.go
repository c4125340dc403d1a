package dataplanetest

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// loadDuration is how long a test changes things under load.
const loadDuration = 3 * time.Second

// underLoad calls change again and again. Meanwhile it opens connections to the
// frontends, from a pod, the node and outside, and checks that each reaches one
// of the endpoints.
func (w *topology) underLoad(t *testing.T, services []*dataplane.Service, change func()) {
	t.Helper()
	start := time.Now()
	var done, failed atomic.Int64
	var stop atomic.Bool
	var clients sync.WaitGroup
	for _, s := range services {
		for _, from := range []*nettest.Host{w.client, w.net.Node, w.net.Outside} {
			clients.Go(func() {
				f := s.Frontends[0]
				if f.Addr.Addr().IsUnspecified() {
					f.Addr = addrPortOf(w.net.Node, s.Key.Family, f.Addr.Port())
				}
				for !stop.Load() {
					answer, err := connect(t, from, f.Protocol, f.Addr)
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
	changes := 0
	func() {
		defer clients.Wait() // also when change ends the test
		defer stop.Store(true)
		for time.Since(start) < loadDuration {
			change()
			changes++
		}
	}()
	t.Logf("%d connections during %d changes, %d failed", done.Load(), changes, failed.Load())
	if done.Load() < 100 {
		t.Errorf("only %d connections in %v: this is no load", done.Load(), loadDuration)
	}
}

// loadServices returns a Service of each protocol, and TCP ones that are treated
// in other ways.
func (w *topology) loadServices(pods ...int) []*dataplane.Service {
	w.t.Helper()
	var services []*dataplane.Service
	for _, family := range families() {
		plain := w.specOf(w.endpoints(family, pods...))
		plain.Masquerade = dataplane.MasqueradeAlways
		sticky, local := plain, plain
		sticky.Affinity = time.Second // so that clients are sent elsewhere now and then
		local.ExternalTrafficPolicyLocal, local.LocalEndpoints, local.Masquerade = true, plain.Endpoints, dataplane.MasqueradeFromNode
		both := local
		both.Affinity = time.Hour
		services = append(services,
			w.serviceOfKind(dataplane.NodePort, "node-port", dataplane.TCP, nodePortFrontend(family, 30080), plain),
			w.serviceOfKind(dataplane.ClusterIP, "sticky", dataplane.TCP, vip(family, 2, 80), sticky),
			w.serviceOfKind(dataplane.LoadBalancer, "local", dataplane.TCP, vip(family, 3, 80), local),
			w.serviceOfKind(dataplane.NodePort, "both", dataplane.TCP, nodePortFrontend(family, 30081), both))
	}
	for _, family := range families() {
		for _, p := range protocols() {
			services = append(services, w.service("web", p, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, pods...)))
		}
	}
	return services
}

// Pods 0 and 2 stay; 1, 3 and 4 come and go, so that slots move and the number
// of endpoints changes; all of them serve all the time. The changes follow each
// other as fast as the kernel takes them, so that several come between two steps
// of one packet: a packet that is not translated makes connection tracking leave
// the rest of its connection alone too, however often the client tries again.
func (s suite) testEndpointChangesUnderLoad(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 5)
	w.node.NodePortAddrs = w.net.Node.Addrs()
	w.replace(w.loadServices(0, 2)...)
	w.underLoad(t, w.loadServices(0, 1, 2, 3, 4), func() {
		pods := []int{0, 2}
		for _, i := range []int{1, 3, 4} {
			if rand.IntN(2) == 0 { //nolint:gosec // no secret
				pods = append(pods, i)
			}
		}
		var changes []dataplane.Change
		for _, s := range w.loadServices(pods...) {
			changes = append(changes, dataplane.Change{Old: w.programmed[s.Key], New: s})
		}
		w.applyUnchecked(changes)
	})
	w.checkState("apply under load")
}

func (s suite) testWarmRestartUnderLoad(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 3)
	w.node.NodePortAddrs = w.net.Node.Addrs()
	services := w.loadServices(0, 1, 2)
	w.replace(services...)
	w.underLoad(t, services, w.warmRestart)
}
