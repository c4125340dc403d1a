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

// loadDuration is how long a test makes changes under load.
const loadDuration = 3 * time.Second

// underLoad calls change repeatedly. Meanwhile it opens connections to the frontends from a
// pod, the node and the outside host, and checks that each reaches one of the endpoints.
func (topo *topology) underLoad(t *testing.T, services []*dataplane.Service, change func()) {
	t.Helper()
	start := time.Now()
	var done, failed atomic.Int64
	var stop atomic.Bool
	var clients sync.WaitGroup
	for _, s := range services {
		for _, from := range []*nettest.Host{topo.client, topo.net.Node, topo.net.Outside} {
			clients.Go(func() {
				f := s.Frontends[0]
				if f.Addr.Addr().IsUnspecified() {
					f.Addr = addrPortOf(topo.net.Node, s.Key.Family, f.Addr.Port())
				}
				for !stop.Load() {
					answer, err := connect(t, from, f.Protocol, f.Addr)
					done.Add(1)
					valid := slices.ContainsFunc(s.Endpoints, func(e dataplane.Endpoint) bool { return e.Addr == answer.Endpoint })
					if err == nil && valid {
						time.Sleep(time.Millisecond) // leave CPU time to parallel tests
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
		defer clients.Wait() // also if change fails the test
		defer stop.Store(true)
		for time.Since(start) < loadDuration {
			change()
			changes++
		}
	}()
	t.Logf("%d connections during %d changes, %d failed", done.Load(), changes, failed.Load())
	if done.Load() < 100 {
		t.Errorf("only %d connections in %v, too few for a load test", done.Load(), loadDuration)
	}
}

// loadServices returns a Service for each protocol, and TCP Services with node ports, session
// affinity and external traffic policy Local.
func (topo *topology) loadServices(pods ...int) []*dataplane.Service {
	topo.t.Helper()
	var services []*dataplane.Service
	for _, family := range families() {
		plain := topo.specOf(topo.endpoints(family, pods...))
		plain.Masquerade = dataplane.MasqueradeAlways
		sticky, local := plain, plain
		sticky.Affinity = time.Second // short, so that clients change endpoints during the test
		local.ExternalTrafficPolicyLocal, local.LocalEndpoints, local.Masquerade = true, plain.Endpoints, dataplane.MasqueradeFromNode
		both := local
		both.Affinity = time.Hour
		services = append(services,
			topo.serviceOfKind(dataplane.NodePort, "node-port", dataplane.TCP, nodePortFrontend(family, 30080), plain),
			topo.serviceOfKind(dataplane.ClusterIP, "sticky", dataplane.TCP, vip(family, 2, 80), sticky),
			topo.serviceOfKind(dataplane.LoadBalancer, "local", dataplane.TCP, vip(family, 3, 80), local),
			topo.serviceOfKind(dataplane.NodePort, "both", dataplane.TCP, nodePortFrontend(family, 30081), both))
	}
	for _, family := range families() {
		for _, p := range protocols() {
			services = append(services, topo.service("web", p, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, pods...)))
		}
	}
	return services
}

// testEndpointChangesUnderLoad keeps pods 0 and 2 as endpoints. It adds and removes pods 1, 3
// and 4, so that slots move and the number of endpoints changes. All pods serve throughout.
// The changes are as fast as the kernel accepts them, so that several happen between two
// steps of one packet. Such a race is fatal for a connection: after one untranslated packet,
// connection tracking does not translate the connection's later packets either, however often
// the client retransmits.
func (s suite) testEndpointChangesUnderLoad(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 5)
	topo.node.NodePortAddrs = topo.net.Node.Addrs()
	topo.replace(topo.loadServices(0, 2)...)
	topo.underLoad(t, topo.loadServices(0, 1, 2, 3, 4), func() {
		pods := []int{0, 2}
		for _, i := range []int{1, 3, 4} {
			if rand.IntN(2) == 0 { //nolint:gosec // no secret
				pods = append(pods, i)
			}
		}
		var changes []dataplane.Change
		for _, s := range topo.loadServices(pods...) {
			changes = append(changes, dataplane.Change{Old: topo.programmed[s.Key], New: s})
		}
		topo.applyUnchecked(changes)
	})
	topo.checkState("Apply under load")
}

func (s suite) testWarmRestartUnderLoad(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	topo.node.NodePortAddrs = topo.net.Node.Addrs()
	services := topo.loadServices(0, 1, 2)
	topo.replace(services...)
	topo.underLoad(t, services, topo.warmRestart)
}
