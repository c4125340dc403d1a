package dataplanetest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// affinityRecord holds the endpoint that each client last reached.
type affinityRecord struct {
	sync.Mutex
	endpoints map[string]netip.AddrPort
	lastStart map[string]time.Time     // start of the client's last connection
	idle      map[string]time.Duration // from the start of the previous connection to the last answer
}

func (s suite) testAffinity(t *testing.T) {
	t.Parallel()
	const timeout, long = 4 * time.Second, 3 * time.Hour
	topo := newTopology(t, s, 4)
	node := topo.net.Node
	topo.node.NodePortAddrs = node.Addrs()
	clients := []*nettest.Host{topo.client, topo.pods[0], node, topo.net.Outside}
	type variant struct {
		kind     dataplane.Kind
		frontend func(dataplane.Family) netip.AddrPort
		policy   bool
	}
	variants := map[string]variant{
		"cluster":    {dataplane.ClusterIP, func(f dataplane.Family) netip.AddrPort { return vip(f, 1, 80) }, false},
		"node":       {dataplane.NodePort, func(f dataplane.Family) netip.AddrPort { return nodePortFrontend(f, 30080) }, false},
		"local":      {dataplane.LoadBalancer, func(f dataplane.Family) netip.AddrPort { return vip(f, 2, 80) }, true},
		"local-node": {dataplane.NodePort, func(f dataplane.Family) netip.AddrPort { return nodePortFrontend(f, 30081) }, true},
	}
	var local []int // pods that outside clients may reach with ExternalTrafficPolicyLocal
	build := func(affinity time.Duration, pods ...int) []*dataplane.Service {
		local = pods[:max(len(pods)-1, 0)]
		var all []*dataplane.Service
		for name, v := range variants {
			all = append(all, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				spec := topo.specOf(topo.endpoints(family, pods...))
				spec.Affinity = affinity
				if spec.Masquerade = dataplane.MasqueradeAlways; v.policy {
					spec.Masquerade = dataplane.MasqueradeFromNode
					spec.ExternalTrafficPolicyLocal, spec.LocalEndpoints = true, localEndpoints(topo.endpoints(family, local...))
				}
				return topo.serviceOfKind(v.kind, name, p, v.frontend(family), spec)
			})...)
		}
		return all
	}
	// visit opens connections from every client to every Service and calls check with the
	// client's description, its previous endpoint and its new one.
	record := &affinityRecord{endpoints: map[string]netip.AddrPort{}, lastStart: map[string]time.Time{}, idle: map[string]time.Duration{}}
	visit := func(t *testing.T, times int, check func(t *testing.T, client string, before, now netip.AddrPort)) {
		t.Helper()
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for name, v := range variants {
				addr := v.frontend(family)
				if addr.Addr().IsUnspecified() {
					addr = addrPortOf(node, family, addr.Port())
				}
				client := fmt.Sprintf("%s from %s to %s of %s", p, from.Name, addr, name)
				for range times {
					began := time.Now()
					answer, err := connect(t, from, p, addr)
					if err != nil {
						t.Error(err)
						return
					}
					if v.policy && from == topo.net.Outside && !slices.Contains(topo.endpoints(family, local...), answer.Endpoint) {
						t.Errorf("%s reached %s, want a local endpoint", client, answer.Endpoint)
					}
					record.Lock()
					before := record.endpoints[client]
					record.endpoints[client] = answer.Endpoint
					record.idle[client], record.lastStart[client] = time.Since(record.lastStart[client]), began
					record.Unlock()
					check(t, client, before, answer.Endpoint)
				}
			}
		})
	}
	expectSameEndpoint := func(t *testing.T, client string, before, now netip.AddrPort) {
		t.Helper()
		if before.IsValid() && before != now {
			t.Errorf("%s reached %s before and %s now", client, before, now)
		}
	}
	// renew connects repeatedly, at intervals of total/4. It returns when each client has
	// kept its endpoint for the duration total without an idle period as long as the
	// timeout. If a busy machine delays a client for longer than the timeout, the client may
	// change its endpoint, and its duration starts again.
	renew := func(t *testing.T, total time.Duration) {
		t.Helper()
		const limit, rounding = 2 * time.Minute, 100 * time.Millisecond
		var mu sync.Mutex
		since, done := map[string]time.Time{}, map[string]bool{}
		for deadline := time.Now().Add(limit); len(done) < len(record.endpoints); time.Sleep(total / 4) {
			if time.Now().After(deadline) {
				t.Fatalf("within %s only %d of %d clients connected often enough to keep their endpoint for %s", limit, len(done), len(record.endpoints), total)
			}
			visit(t, 1, func(t *testing.T, client string, before, now netip.AddrPort) {
				t.Helper()
				record.Lock()
				idle, began := record.idle[client], record.lastStart[client]
				record.Unlock()
				mu.Lock()
				defer mu.Unlock()
				if _, known := since[client]; !known || idle > timeout-rounding {
					since[client] = time.Now()
					return
				}
				expectSameEndpoint(t, client, before, now)
				if began.Sub(since[client]) >= total {
					done[client] = true
				}
			})
			if t.Failed() {
				return
			}
		}
	}
	// moves returns a check function, and a function to call after the checks. At least one
	// client must have changed its endpoint; for a single client that is left to chance.
	moves := func() (check func(*testing.T, string, netip.AddrPort, netip.AddrPort), some func(*testing.T)) {
		var mu sync.Mutex
		moved := 0
		return func(_ *testing.T, _ string, before, now netip.AddrPort) {
				mu.Lock()
				defer mu.Unlock()
				if before != now {
					moved++
				}
			}, func(t *testing.T) {
				t.Helper()
				if moved == 0 {
					t.Error("no client changed its endpoint")
				}
			}
	}
	topo.replace(build(long, 0, 1, 2)...)
	t.Run("reconnect", func(t *testing.T) {
		visit(t, 5, expectSameEndpoint)
		spread := map[netip.AddrPort]bool{}
		for _, e := range record.endpoints {
			spread[e] = true
		}
		if len(spread) != 6 {
			t.Errorf("clients reached %d endpoints of both families, want 6", len(spread))
		}
	})
	t.Run("equal Replace", func(t *testing.T) {
		topo.replace(build(long, 0, 1, 2)...)
		visit(t, 1, expectSameEndpoint)
	})
	t.Run("warm restart", func(t *testing.T) {
		topo.warmRestart()
		visit(t, 1, expectSameEndpoint)
	})
	t.Run("endpoint added", func(t *testing.T) {
		topo.createOrUpdate(build(long, 0, 1, 2, 3)...)
		visit(t, 2, expectSameEndpoint)
	})
	expectRemoved := func(pod int) func(*testing.T, string, netip.AddrPort, netip.AddrPort) {
		return func(t *testing.T, client string, before, now netip.AddrPort) {
			t.Helper()
			for _, family := range families() {
				e := topo.endpoints(family, pod)[0]
				if now == e {
					t.Errorf("%s reached %s, which was removed", client, now)
				}
				if before == e {
					return
				}
			}
			expectSameEndpoint(t, client, before, now)
		}
	}
	t.Run("first endpoint removed", func(t *testing.T) {
		topo.createOrUpdate(build(long, 1, 2, 3)...) // moves the last endpoint to the first slot
		visit(t, 3, expectRemoved(0))
	})
	t.Run("warm restart after removal", func(t *testing.T) {
		topo.warmRestart()
		visit(t, 1, expectSameEndpoint)
	})
	t.Run("last endpoint removed", func(t *testing.T) {
		topo.createOrUpdate(build(long, 1, 2, 3, 0)...) // pod 0 is not local
		visit(t, 1, expectSameEndpoint)
		topo.createOrUpdate(build(long, 1, 2, 0)...)
		visit(t, 3, expectRemoved(3))
	})
	t.Run("timeout changed", func(t *testing.T) {
		topo.createOrUpdate(build(timeout, 1, 2, 0)...)
		visit(t, 1, expectSameEndpoint)
		// Each connection restarts the timeout.
		renew(t, timeout+timeout/2)
	})
	t.Run("timeout expires", func(t *testing.T) {
		time.Sleep(timeout + timeout/2)
		if s.limitations.AffinityOutlivesTimeout {
			visit(t, 1, expectSameEndpoint)
			return
		}
		check, some := moves()
		visit(t, 1, check)
		some(t)
		renew(t, 0)
	})
	t.Run("affinity disabled", func(t *testing.T) {
		topo.createOrUpdate(build(0, 1, 2, 0)...)
		check, some := moves()
		visit(t, 5, check)
		some(t)
	})
	t.Run("affinity enabled again", func(t *testing.T) {
		topo.createOrUpdate(build(long, 1, 2, 0)...)
		visit(t, 1, func(*testing.T, string, netip.AddrPort, netip.AddrPort) {})
		visit(t, 3, expectSameEndpoint)
	})
	t.Run("external traffic policy changes", func(t *testing.T) {
		// Endpoints remembered under policy Cluster need not be local: two of three pods
		// are, and there are many clients.
		for name, v := range variants {
			v.policy = false
			variants[name] = v
		}
		topo.createOrUpdate(build(long, 1, 2, 0)...)
		visit(t, 2, func(*testing.T, string, netip.AddrPort, netip.AddrPort) {})
		for name, v := range variants {
			v.policy = strings.HasPrefix(name, "local")
			variants[name] = v
		}
		topo.createOrUpdate(build(long, 1, 2, 0)...)
		visit(t, 1, func(*testing.T, string, netip.AddrPort, netip.AddrPort) {})
		visit(t, 2, expectSameEndpoint)
	})
	t.Run("no endpoints", func(t *testing.T) {
		topo.createOrUpdate(build(long)...)
		forEachClient(t, []*nettest.Host{topo.client, node, topo.net.Outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectRefused(t, from, p, vip(family, 1, 80))
			expectRefused(t, from, p, vip(family, 2, 80))
			expectRefused(t, from, p, addrPortOf(node, family, 30081))
		})
	})
}

// testAffinityManyClients connects from many source addresses. When half of the endpoints are
// removed, the clients of the other half keep their endpoints.
func (s suite) testAffinityManyClients(t *testing.T) {
	t.Parallel()
	const number = 1500
	topo := newTopology(t, s, 4)
	networks := map[dataplane.Family]netip.Prefix{
		dataplane.IPv4: netip.MustParsePrefix("100.64.0.0/16"), dataplane.IPv6: netip.MustParsePrefix("2001:db8:64::/64"),
	}
	build := func(pods ...int) []*dataplane.Service {
		var all []*dataplane.Service
		for _, family := range families() {
			spec := topo.specOf(topo.endpoints(family, pods...))
			spec.Affinity = time.Hour
			all = append(all, topo.serviceOfKind(dataplane.ClusterIP, "sticky", dataplane.TCP, vip(family, 1, 80), spec))
		}
		return all
	}
	topo.replace(build(0, 1, 2, 3)...)
	before := map[netip.Addr]netip.AddrPort{}
	visit := func(check func(client netip.Addr, now netip.AddrPort)) {
		t.Helper()
		for _, family := range families() {
			client := networks[family].Addr()
			for range number / 2 {
				client = client.Next()
				answer, err := topo.net.Outside.ConnectFrom(t.Context(), client, vip(family, 1, 80))
				if err != nil {
					t.Fatal(err)
				}
				check(client, answer.Endpoint)
				before[client] = answer.Endpoint
			}
		}
	}
	for _, network := range networks {
		if err := topo.net.Outside.AddNetwork(network); err != nil {
			t.Fatal(err)
		}
	}
	visit(func(netip.Addr, netip.AddrPort) {})
	topo.createOrUpdate(build(1, 3)...)
	stayed := 0
	visit(func(client netip.Addr, now netip.AddrPort) {
		for _, family := range families() {
			for _, e := range topo.endpoints(family, 1, 3) {
				if before[client] != e {
					continue
				}
				if stayed++; now != e {
					t.Errorf("%s reached %s before and %s now", client, e, now)
				}
			}
		}
	})
	if stayed < number/3 || stayed > 2*number/3 {
		t.Errorf("%d of %d clients used the remaining half of the endpoints", stayed, number)
	}
	topo.warmRestart()
	visit(func(client netip.Addr, now netip.AddrPort) {
		if now != before[client] {
			t.Errorf("%s reached %s before and %s after a warm restart", client, before[client], now)
		}
	})
}

// testAffinityConcurrentConnections opens several concurrent connections from each of many
// new clients.
func (s suite) testAffinityConcurrentConnections(t *testing.T) {
	t.Parallel()
	const clients, connections = 150, 6
	topo := newTopology(t, s, 4)
	networks := map[dataplane.Family]netip.Prefix{
		dataplane.IPv4: netip.MustParsePrefix("100.64.0.0/16"), dataplane.IPv6: netip.MustParsePrefix("2001:db8:64::/64"),
	}
	topo.replace()
	for family, network := range networks {
		if err := topo.net.Outside.AddNetwork(network); err != nil {
			t.Fatal(err)
		}
		spec := topo.specOf(topo.endpoints(family, 0, 1, 2, 3))
		spec.Affinity = time.Hour
		topo.createOrUpdate(topo.serviceOfKind(dataplane.ClusterIP, "sticky", dataplane.TCP, vip(family, 1, 80), spec))
		client := network.Addr()
		for range clients {
			client = client.Next()
			var answers [connections]nettest.Answer
			var together sync.WaitGroup
			for i := range answers {
				together.Go(func() {
					var err error
					if answers[i], err = topo.net.Outside.ConnectFrom(t.Context(), client, vip(family, 1, 80)); err != nil {
						t.Error(err)
					}
				})
			}
			together.Wait()
			for _, answer := range answers {
				if answer.Endpoint != answers[0].Endpoint {
					t.Fatalf("%s reached %s and %s", client, answers[0].Endpoint, answer.Endpoint)
				}
			}
		}
	}
}
