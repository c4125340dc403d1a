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

// affinityRecord is the endpoint that each client was sent to.
type affinityRecord struct {
	sync.Mutex
	endpoints map[string]netip.AddrPort
	lastStart map[string]time.Time     // when the client's last connection began
	idle      map[string]time.Duration // from when the one before began until the last was answered
}

func (s suite) testAffinity(t *testing.T) {
	t.Parallel()
	const timeout, long = 4 * time.Second, 3 * time.Hour
	w := newTopology(t, s, 4)
	node := w.net.Node
	w.node.NodePortAddrs = node.Addrs()
	clients := []*nettest.Host{w.client, w.pods[0], node, w.net.Outside}
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
	var local []int // pods that outside clients may reach where the policy is Local
	build := func(affinity time.Duration, pods ...int) []*dataplane.Service {
		local = pods[:max(len(pods)-1, 0)]
		var all []*dataplane.Service
		for name, v := range variants {
			all = append(all, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				treatment := w.specOf(w.endpoints(family, pods...))
				treatment.Affinity = affinity
				if treatment.Masquerade = dataplane.MasqueradeAlways; v.policy {
					treatment.Masquerade = dataplane.MasqueradeFromNode
					treatment.ExternalTrafficPolicyLocal, treatment.LocalEndpoints = true, localEndpoints(w.endpoints(family, local...))
				}
				return w.serviceOfKind(v.kind, name, p, v.frontend(family), treatment)
			})...)
		}
		return all
	}
	// visit connects every client to every Service some times, and calls check
	// with who it is, the endpoint, and what it was before.
	was := &affinityRecord{endpoints: map[string]netip.AddrPort{}, lastStart: map[string]time.Time{}, idle: map[string]time.Duration{}}
	visit := func(t *testing.T, times int, check func(t *testing.T, who string, before, now netip.AddrPort)) {
		t.Helper()
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for name, v := range variants {
				addr := v.frontend(family)
				if addr.Addr().IsUnspecified() {
					addr = addrPortOf(node, family, addr.Port())
				}
				who := fmt.Sprintf("%s from %s to %s of %s", p, from.Name, addr, name)
				for range times {
					began := time.Now()
					answer, err := connect(t, from, p, addr)
					if err != nil {
						t.Error(err)
						return
					}
					if v.policy && from == w.net.Outside && !slices.Contains(w.endpoints(family, local...), answer.Endpoint) {
						t.Errorf("%s reached %s, which is not local", who, answer.Endpoint)
					}
					was.Lock()
					before := was.endpoints[who]
					was.endpoints[who] = answer.Endpoint
					was.idle[who], was.lastStart[who] = time.Since(was.lastStart[who]), began
					was.Unlock()
					check(t, who, before, answer.Endpoint)
				}
			}
		})
	}
	sticks := func(t *testing.T, who string, before, now netip.AddrPort) {
		t.Helper()
		if before.IsValid() && before != now {
			t.Errorf("%s reached %s, and now %s", who, before, now)
		}
	}
	// renew connects again and again, at intervals of a quarter of total, until each
	// client has stuck for that long without being idle for the timeout. A busy
	// machine may keep a client idle for longer. Then it need not stick, and its time
	// begins anew.
	renew := func(t *testing.T, total time.Duration) {
		t.Helper()
		const limit, rounding = 2 * time.Minute, 100 * time.Millisecond
		var mu sync.Mutex
		since, done := map[string]time.Time{}, map[string]bool{}
		for deadline := time.Now().Add(limit); len(done) < len(was.endpoints); time.Sleep(total / 4) {
			if time.Now().After(deadline) {
				t.Fatalf("within %s only %d of %d clients connected often enough to stick for %s", limit, len(done), len(was.endpoints), total)
			}
			visit(t, 1, func(t *testing.T, who string, before, now netip.AddrPort) {
				t.Helper()
				was.Lock()
				idle, began := was.idle[who], was.lastStart[who]
				was.Unlock()
				mu.Lock()
				defer mu.Unlock()
				if _, known := since[who]; !known || idle > timeout-rounding {
					since[who] = time.Now()
					return
				}
				sticks(t, who, before, now)
				if began.Sub(since[who]) >= total {
					done[who] = true
				}
			})
			if t.Failed() {
				return
			}
		}
	}
	// moves returns a check, and a function to call after it: of all clients
	// together some must have moved, which is a matter of chance for one.
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
					t.Error("no client reached another endpoint than before")
				}
			}
	}
	w.replace(build(long, 0, 1, 2)...)
	t.Run("reconnecting", func(t *testing.T) {
		visit(t, 5, sticks)
		spread := map[netip.AddrPort]bool{}
		for _, e := range was.endpoints {
			spread[e] = true
		}
		if len(spread) != 6 {
			t.Errorf("all clients together reached %d endpoints of both families, want 6", len(spread))
		}
	})
	t.Run("an equal Replace", func(t *testing.T) {
		w.replace(build(long, 0, 1, 2)...)
		visit(t, 1, sticks)
	})
	t.Run("a restart", func(t *testing.T) {
		w.warmRestart()
		visit(t, 1, sticks)
	})
	t.Run("another endpoint joins", func(t *testing.T) {
		w.createOrUpdate(build(long, 0, 1, 2, 3)...)
		visit(t, 2, sticks)
	})
	gone := func(pod int) func(*testing.T, string, netip.AddrPort, netip.AddrPort) {
		return func(t *testing.T, who string, before, now netip.AddrPort) {
			t.Helper()
			for _, family := range families() {
				e := w.endpoints(family, pod)[0]
				if now == e {
					t.Errorf("%s reached %s, which has left", who, now)
				}
				if before == e {
					return
				}
			}
			sticks(t, who, before, now)
		}
	}
	t.Run("the first endpoint leaves", func(t *testing.T) {
		w.createOrUpdate(build(long, 1, 2, 3)...) // and the last slot's takes its place
		visit(t, 3, gone(0))
	})
	t.Run("a restart after that", func(t *testing.T) {
		w.warmRestart()
		visit(t, 1, sticks)
	})
	t.Run("the last endpoint leaves", func(t *testing.T) {
		w.createOrUpdate(build(long, 1, 2, 3, 0)...) // pod 0 is not local
		visit(t, 1, sticks)
		w.createOrUpdate(build(long, 1, 2, 0)...)
		visit(t, 3, gone(3))
	})
	t.Run("another timeout", func(t *testing.T) {
		w.createOrUpdate(build(timeout, 1, 2, 0)...)
		visit(t, 1, sticks)
		// Each connection begins the time again.
		renew(t, timeout+timeout/2)
	})
	t.Run("the time passes", func(t *testing.T) {
		time.Sleep(timeout + timeout/2)
		if s.limitations.AffinityOutlivesTimeout {
			visit(t, 1, sticks)
			return
		}
		check, some := moves()
		visit(t, 1, check)
		some(t)
		renew(t, 0)
	})
	t.Run("no affinity", func(t *testing.T) {
		w.createOrUpdate(build(0, 1, 2, 0)...)
		check, some := moves()
		visit(t, 5, check)
		some(t)
	})
	t.Run("affinity again", func(t *testing.T) {
		w.createOrUpdate(build(long, 1, 2, 0)...)
		visit(t, 1, func(*testing.T, string, netip.AddrPort, netip.AddrPort) {})
		visit(t, 3, sticks)
	})
	t.Run("the policy changes", func(t *testing.T) {
		// What is remembered from before need not be local: the list has two of
		// three pods, and there are many clients.
		for name, v := range variants {
			v.policy = false
			variants[name] = v
		}
		w.createOrUpdate(build(long, 1, 2, 0)...)
		visit(t, 2, func(*testing.T, string, netip.AddrPort, netip.AddrPort) {})
		for name, v := range variants {
			v.policy = strings.HasPrefix(name, "local")
			variants[name] = v
		}
		w.createOrUpdate(build(long, 1, 2, 0)...)
		visit(t, 1, func(*testing.T, string, netip.AddrPort, netip.AddrPort) {})
		visit(t, 2, sticks)
	})
	t.Run("no endpoints", func(t *testing.T) {
		w.createOrUpdate(build(long)...)
		forEachClient(t, []*nettest.Host{w.client, node, w.net.Outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectRefused(t, from, p, vip(family, 1, 80))
			expectRefused(t, from, p, vip(family, 2, 80))
			expectRefused(t, from, p, addrPortOf(node, family, 30081))
		})
	})
}

// testAffinityManyClients has as many addresses as clients. Half of the endpoints leave: the
// others' clients stay.
func (s suite) testAffinityManyClients(t *testing.T) {
	t.Parallel()
	const number = 1500
	w := newTopology(t, s, 4)
	networks := map[dataplane.Family]netip.Prefix{
		dataplane.IPv4: netip.MustParsePrefix("100.64.0.0/16"), dataplane.IPv6: netip.MustParsePrefix("2001:db8:64::/64"),
	}
	build := func(pods ...int) []*dataplane.Service {
		var all []*dataplane.Service
		for _, family := range families() {
			treatment := w.specOf(w.endpoints(family, pods...))
			treatment.Affinity = time.Hour
			all = append(all, w.serviceOfKind(dataplane.ClusterIP, "sticky", dataplane.TCP, vip(family, 1, 80), treatment))
		}
		return all
	}
	w.replace(build(0, 1, 2, 3)...)
	before := map[netip.Addr]netip.AddrPort{}
	visit := func(check func(client netip.Addr, now netip.AddrPort)) {
		t.Helper()
		for _, family := range families() {
			client := networks[family].Addr()
			for range number / 2 {
				client = client.Next()
				answer, err := w.net.Outside.ConnectFrom(t.Context(), client, vip(family, 1, 80))
				if err != nil {
					t.Fatal(err)
				}
				check(client, answer.Endpoint)
				before[client] = answer.Endpoint
			}
		}
	}
	for _, network := range networks {
		if err := w.net.Outside.AddNetwork(network); err != nil {
			t.Fatal(err)
		}
	}
	visit(func(netip.Addr, netip.AddrPort) {})
	w.createOrUpdate(build(1, 3)...)
	stayed := 0
	visit(func(client netip.Addr, now netip.AddrPort) {
		for _, family := range families() {
			for _, e := range w.endpoints(family, 1, 3) {
				if before[client] != e {
					continue
				}
				if stayed++; now != e {
					t.Errorf("%s reached %s, and now %s", client, e, now)
				}
			}
		}
	})
	if stayed < number/3 || stayed > 2*number/3 {
		t.Errorf("%d clients of %d were at half of the endpoints", stayed, number)
	}
	w.warmRestart()
	visit(func(client netip.Addr, now netip.AddrPort) {
		if now != before[client] {
			t.Errorf("%s reached %s, and after a restart %s", client, before[client], now)
		}
	})
}

// testAffinityConcurrentConnections lets clients that nothing is remembered of connect several times at once.
func (s suite) testAffinityConcurrentConnections(t *testing.T) {
	t.Parallel()
	const clients, connections = 150, 6
	w := newTopology(t, s, 4)
	networks := map[dataplane.Family]netip.Prefix{
		dataplane.IPv4: netip.MustParsePrefix("100.64.0.0/16"), dataplane.IPv6: netip.MustParsePrefix("2001:db8:64::/64"),
	}
	w.replace()
	for family, network := range networks {
		if err := w.net.Outside.AddNetwork(network); err != nil {
			t.Fatal(err)
		}
		treatment := w.specOf(w.endpoints(family, 0, 1, 2, 3))
		treatment.Affinity = time.Hour
		w.createOrUpdate(w.serviceOfKind(dataplane.ClusterIP, "sticky", dataplane.TCP, vip(family, 1, 80), treatment))
		client := network.Addr()
		for range clients {
			client = client.Next()
			var answers [connections]nettest.Answer
			var together sync.WaitGroup
			for i := range answers {
				together.Go(func() {
					var err error
					if answers[i], err = w.net.Outside.ConnectFrom(t.Context(), client, vip(family, 1, 80)); err != nil {
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
