package dataplanetest

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// testRoundRobin counts connections to Services with [dataplane.RoundRobin]. Clients that use
// several Services alternately must not affect how the connections of one Service are distributed.
func (s suite) testRoundRobin(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 4)
	topo.node.NodePortAddrs = topo.net.Node.Addrs()
	const rounds = 10
	// The last Services have many frontends, so that a backend may share their endpoints.
	services := func(pods ...int) []*dataplane.Service {
		var all []*dataplane.Service
		for _, family := range families() {
			spec := topo.specOf(topo.endpoints(family, pods...))
			spec.Scheduler = dataplane.RoundRobin
			for n := range byte(3) {
				all = append(all, topo.serviceOfKind(dataplane.ClusterIP, fmt.Sprintf("web-%d", n), dataplane.TCP, vip(family, 1+n, 80), spec))
			}
			spec.Masquerade = dataplane.MasqueradeAlways
			all = append(all, topo.serviceOfKind(dataplane.NodePort, "web-0", dataplane.TCP, nodePortFrontend(family, 30080), spec))
			for n := range byte(2) {
				var many []netip.AddrPort
				for i := range byte(10) {
					many = append(many, vip(family, 100+20*n+i, 80))
				}
				key := dataplane.Key{Namespace: "default", Name: fmt.Sprintf("many-%d", n), Port: "tcp", Kind: dataplane.LoadBalancer}
				all = append(all, topo.newService(key, dataplane.TCP, many, spec))
			}
		}
		return all
	}
	// visit connects to the Services in turn and compares the numbers of connections by endpoint.
	visit := func(t *testing.T, pods ...int) {
		t.Helper()
		for _, family := range families() {
			addrs := []netip.AddrPort{
				vip(family, 1, 80), vip(family, 2, 80), vip(family, 3, 80), addrPortOf(topo.net.Node, family, 30080), vip(family, 100, 80), vip(family, 120, 80),
			}
			hits := make([]map[netip.AddrPort]int, len(addrs))
			for range rounds * len(pods) {
				for i, addr := range addrs {
					answer, err := connect(t, topo.client, dataplane.TCP, addr)
					if err != nil {
						t.Fatal(err)
					}
					if hits[i] == nil {
						hits[i] = map[netip.AddrPort]int{}
					}
					hits[i][answer.Endpoint]++
				}
			}
			for i, addr := range addrs {
				for _, e := range topo.endpoints(family, pods...) {
					if n := hits[i][e]; n != rounds {
						t.Errorf("%s got %d connections to %s, want %d: %v", e, n, addr, rounds, hits[i])
					}
				}
			}
		}
	}
	topo.applyAll(services(0, 1, 2))
	visit(t, 0, 1, 2)
	topo.applyAll(services(0, 1, 2, 3))
	visit(t, 0, 1, 2, 3)
	topo.applyAll(services(1, 3))
	visit(t, 1, 3)
}

// testSourceHash connects to Services with [dataplane.SourceHash] from many addresses. It counts
// the clients of each endpoint, and the clients that move when an endpoint is removed or added.
func (s suite) testSourceHash(t *testing.T) {
	t.Parallel()
	const number, pods = 220, 10
	topo := newTopology(t, s, pods)
	topo.node.NodePortAddrs = topo.net.Node.Addrs()
	networks := map[dataplane.Family]netip.Prefix{
		dataplane.IPv4: netip.MustParsePrefix("100.64.0.0/16"), dataplane.IPv6: netip.MustParsePrefix("2001:db8:64::/64"),
	}
	for _, network := range networks {
		if err := topo.net.Outside.AddNetwork(network); err != nil {
			t.Fatal(err)
		}
	}
	var all []int
	for n := range pods {
		all = append(all, n)
	}
	build := func(scheduler string, pods ...int) []*dataplane.Service {
		var services []*dataplane.Service
		for _, family := range families() {
			spec := topo.specOf(topo.endpoints(family, pods...))
			spec.Scheduler = scheduler
			services = append(services, topo.serviceOfKind(dataplane.ClusterIP, "web", dataplane.TCP, vip(family, 1, 80), spec))
			var many []netip.AddrPort
			for i := range byte(10) {
				many = append(many, vip(family, 100+i, 80))
			}
			key := dataplane.Key{Namespace: "default", Name: "many", Port: "tcp", Kind: dataplane.LoadBalancer}
			services = append(services, topo.newService(key, dataplane.TCP, many, spec))
		}
		return services
	}
	// visit returns the endpoint that each client reaches.
	visit := func(t *testing.T, n byte) map[netip.Addr]netip.AddrPort {
		t.Helper()
		reached := map[netip.Addr]netip.AddrPort{}
		for _, family := range families() {
			client := networks[family].Addr()
			for range number {
				client = client.Next()
				answer, err := topo.net.Outside.ConnectFrom(t.Context(), client, vip(family, n, 80))
				if err != nil {
					t.Fatal(err)
				}
				reached[client] = answer.Endpoint
			}
		}
		return reached
	}
	topo.applyAll(build(dataplane.SourceHash, all...))
	first := visit(t, 1)
	t.Run("shares", func(t *testing.T) {
		// The shares of the endpoints differ by as much as 1,024 random parts, and clients are few.
		clients := map[netip.AddrPort]int{}
		for _, e := range first {
			clients[e]++
		}
		const mean = number / pods
		sigma := math.Sqrt(mean * (1 + mean/(1024/pods)))
		for _, family := range families() {
			for _, e := range topo.endpoints(family, all...) {
				if deviation := float64(clients[e]-mean) / sigma; math.Abs(deviation) > 5 || clients[e] == 0 {
					t.Errorf("%s has %d of %d clients, %.1f sigma from its share", e, clients[e], number, deviation)
				}
			}
		}
	})
	t.Run("a client keeps its endpoint", func(t *testing.T) {
		// Another source port, another connection, and another Service with the same endpoints.
		for name, again := range map[string]map[netip.Addr]netip.AddrPort{"again": visit(t, 1), "to a shared list": visit(t, 100)} {
			if !maps.Equal(first, again) {
				t.Errorf("%s: clients reached other endpoints: %v and %v", name, first, again)
			}
		}
		topo.warmRestart()
		if !maps.Equal(first, visit(t, 1)) {
			t.Error("clients reached other endpoints after a warm restart")
		}
	})
	// compare returns how many clients have moved, and how many of these have reached the
	// endpoint of the pod before or after.
	compare := func(t *testing.T, before, after map[netip.Addr]netip.AddrPort, pod int) (moved, ofPod int) {
		t.Helper()
		own := append(topo.endpoints(dataplane.IPv4, pod), topo.endpoints(dataplane.IPv6, pod)...)
		for client, e := range before {
			if after[client] == e {
				continue
			}
			if moved++; slices.Contains(own, e) || slices.Contains(own, after[client]) {
				ofPod++
			}
		}
		return moved, ofPod
	}
	const removed = 4
	var others []int
	for _, n := range all {
		if n != removed {
			others = append(others, n)
		}
	}
	for _, n := range []byte{1, 100} {
		t.Run(fmt.Sprintf("an endpoint is removed and added again, Service %d", n), func(t *testing.T) {
			topo.applyAll(build(dataplane.SourceHash, all...))
			before := visit(t, n)
			topo.applyAll(build(dataplane.SourceHash, others...))
			without := visit(t, n)
			moved, ofPod := compare(t, before, without, removed)
			s.limitations.checkMovement(t, "removed", moved, ofPod, 2*number, pods)
			topo.applyAll(build(dataplane.SourceHash, all...))
			moved, ofPod = compare(t, without, visit(t, n), removed)
			s.limitations.checkMovement(t, "added", moved, ofPod, 2*number, pods)
		})
	}
	t.Run("with another kind of balancing and back", func(t *testing.T) {
		topo.applyAll(build(dataplane.SourceHash, all...))
		before := visit(t, 1)
		topo.applyAll(build("", all...))
		expectEndpoints(t, topo.client, dataplane.TCP, vip(dataplane.IPv4, 1, 80), topo.endpoints(dataplane.IPv4, all...))
		topo.applyAll(build(dataplane.SourceHash, all...))
		if !maps.Equal(before, visit(t, 1)) {
			t.Error("clients reached other endpoints")
		}
		topo.applyAll(build(dataplane.SourceHash))
		expectRefused(t, topo.client, dataplane.TCP, vip(dataplane.IPv4, 1, 80))
	})
}

// checkMovement checks how many clients have moved because one of n endpoints was removed or
// added.
func (l Limitations) checkMovement(t *testing.T, change string, moved, ofEndpoint, clients, n int) {
	t.Helper()
	share := clients / n
	t.Logf("an endpoint of %d was %s: %d of %d clients moved, %d of them from or to this endpoint", n, change, moved, clients, ofEndpoint)
	if moved < share/3 || moved > 3*share {
		t.Errorf("%s: %d of %d clients moved, want about %d", change, moved, clients, share)
	}
	if moved != ofEndpoint && !l.HashMovesMore {
		t.Errorf("%s: %d clients moved between other endpoints", change, moved-ofEndpoint)
	}
}

// testBalancingWithAffinity checks that session affinity selects the endpoint of all connections
// but the first, whatever the scheduler.
func (s suite) testBalancingWithAffinity(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	clients := []*nettest.Host{topo.client, topo.pods[0], topo.net.Outside}
	schedulers := []string{dataplane.RoundRobin, dataplane.SourceHash}
	build := func(pods ...int) []*dataplane.Service {
		var all []*dataplane.Service
		for n, scheduler := range schedulers {
			for _, family := range families() {
				spec := topo.specOf(topo.endpoints(family, pods...))
				spec.Scheduler, spec.Affinity = scheduler, time.Hour
				all = append(all, topo.serviceOfKind(dataplane.ClusterIP, fmt.Sprintf("sticky-%d", n), dataplane.TCP, vip(family, byte(1+n), 80), spec)) //nolint:gosec // two
			}
		}
		return all
	}
	visit := func(t *testing.T) map[string]netip.AddrPort {
		t.Helper()
		reached := map[string]netip.AddrPort{}
		for n := range schedulers {
			for _, family := range families() {
				for _, from := range clients {
					answer, err := connect(t, from, dataplane.TCP, vip(family, byte(1+n), 80)) //nolint:gosec // two
					if err != nil {
						t.Fatal(err)
					}
					reached[fmt.Sprintf("%s from %s, %s", schedulers[n], from.Name, family)] = answer.Endpoint
				}
			}
		}
		return reached
	}
	topo.applyAll(build(0, 1))
	first := visit(t)
	topo.applyAll(build(0, 1, 2))
	for range 3 {
		if again := visit(t); !maps.Equal(first, again) {
			t.Errorf("clients reached %v first and %v later", first, again)
		}
	}
	topo.applyAll(build(2))
	for client, e := range visit(t) {
		if e.Addr() != topo.pods[2].IPv4 && e.Addr() != topo.pods[2].IPv6 {
			t.Errorf("%s reached %s, which was removed", client, e)
		}
	}
}

// applyAll programs exactly these Services: the first ones with Replace, changes with Apply. It
// does not compare what Read returns, because that depends on the backend's default scheduler.
func (topo *topology) applyAll(services []*dataplane.Service) {
	topo.t.Helper()
	if len(topo.programmed) == 0 {
		topo.explained.startChange()
		defer topo.explained.endChange()
		if err := topo.dp.Replace(topo.t.Context(), topo.node, slices.Values(services), nil); err != nil {
			topo.t.Fatalf("Replace: %v", err)
		}
		for _, s := range services {
			topo.programmed[s.Key] = s
		}
		return
	}
	changes := make([]dataplane.Change, 0, len(services))
	for _, s := range services {
		changes = append(changes, dataplane.Change{Old: topo.programmed[s.Key], New: s})
	}
	topo.applyUnchecked(changes)
}
