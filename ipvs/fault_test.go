package ipvs

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"

	"golang.org/x/sys/unix"
)

// sequence returns the Services as an argument of Replace.
func sequence(services ...*dataplane.Service) func(func(*dataplane.Service) bool) {
	return slices.Values(services)
}

// failNext makes the next n operations that start with prefix fail.
func (f *fakeNode) failNext(n int, prefix string) {
	f.skipOrderChecks = true
	f.fault = func(what string) error {
		if n > 0 && strings.HasPrefix(what, prefix) {
			n--
			return unix.ENOMEM
		}
		return nil
	}
}

func expectFailed(t *testing.T, err error, keys ...dataplane.Key) {
	t.Helper()
	var keyed *dataplane.Error
	if !errors.As(err, &keyed) || len(keyed.Failed) != len(keys) {
		t.Fatalf("error %v, want one for %v", err, keys)
	}
	for _, k := range keys {
		if keyed.Failed[k] == nil {
			t.Errorf("error %v, want one for %s", err, k)
		}
	}
}

// TestBindFailure checks that a Service fails if its address cannot be bound, as does the next
// Service at that address. No virtual server may exist there, because a restart could not
// identify it as managed.
func TestBindFailure(t *testing.T) {
	t.Parallel()
	d, f := newFakeNode(t)
	one := service(t, dataplane.ClusterIP, "one", "10.96.0.1:80/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80")})
	two := service(t, dataplane.ClusterIP, "two", "10.96.0.1:81/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80")})
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(), nil); err != nil {
		t.Fatal(err)
	}
	f.failNext(2, "bind")
	expectFailed(t, d.Apply(t.Context(), []dataplane.Change{{New: one}}), one.Key)
	expectFailed(t, d.Apply(t.Context(), []dataplane.Change{{New: two}}), two.Key)
	if len(f.servers) > 0 {
		t.Errorf("virtual servers %v at an address that is not bound", f.servers)
	}
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(one, two), nil); err != nil {
		t.Fatal(err)
	}
	f.expect("after Replace", map[dataplane.Key]*dataplane.Service{one.Key: one, two.Key: two}, nil)
}

// TestCheckForLoss checks that a missing virtual server counts as lost, but not while Replace is
// due or its state is unknown anyway.
func TestCheckForLoss(t *testing.T) {
	t.Parallel()
	d, f := newFakeNode(t)
	svc := service(t, dataplane.ClusterIP, "one", "10.96.0.1:80/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80")})
	check := func(when string, want bool) {
		t.Helper()
		d.checkForLoss()
		for name, signal := range map[string]<-chan struct{}{"loss": d.Lost(), "drift": d.Drift()} {
			select {
			case <-signal:
				if !want {
					t.Errorf("%s: a signal of %s", when, name)
				}
			default:
				if want {
					t.Errorf("%s: no signal of %s", when, name)
				}
			}
		}
	}
	check("before the first Replace", false)
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(svc), nil); err != nil {
		t.Fatal(err)
	}
	check("after Replace", false)
	clear(f.servers)
	f.failNext(1, "count virtual servers")
	check("if the virtual servers cannot be counted", false)
	check("after a flush", true)
	d.checkForLoss()
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(svc), nil); err != nil {
		t.Fatal(err)
	}
	check("after the repair, which covers an earlier signal", false)
	f.failNext(1, "add the destination")
	moved := service(t, dataplane.ClusterIP, "one", "10.96.0.1:80/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.2:80")})
	if err := d.Apply(t.Context(), []dataplane.Change{{Old: svc, New: moved}}); err == nil {
		t.Fatal("no error")
	}
	clear(f.servers)
	check("after a failed write", false)
}

// TestCheckForLossCost checks that a check reads all virtual servers only if their number has
// changed, and at most once a second, and that it tells virtual servers of other programs apart.
func TestCheckForLossCost(t *testing.T) {
	t.Parallel()
	for _, services := range []int{1, 1_000} {
		d, f := newFakeNode(t)
		f.skipOrderChecks = true // the checks are slow
		var all []*dataplane.Service
		for i := range services {
			all = append(all, service(t, dataplane.ClusterIP, fmt.Sprintf("web-%d", i), fmt.Sprintf("10.96.%d.%d:80/TCP", i/256, i%256),
				dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80")}))
		}
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(all...), nil); err != nil {
			t.Fatal(err)
		}
		add := func(addr string) func() {
			return func() { f.servers[tcpServer(addr)] = &fakeServer{dests: map[netip.AddrPort]*destination{}} }
		}
		remove := func(addr string) func() { return func() { delete(f.servers, tcpServer(addr)) } }
		later := func() { d.lastList = d.lastList.Add(-listPeriod) }
		for _, tt := range []struct {
			name        string
			do          func()
			lists       int
			loss, drift bool
		}{
			{"the first check", func() {}, 1, false, false},
			{"the next check", func() {}, 0, false, false},
			{"another program adds a virtual server", add("192.0.2.1:80"), 1, false, false},
			{"it adds another one at once", add("192.0.2.2:80"), 0, false, false},
			{"a second later", later, 1, false, false},
			{"nothing changes", func() {}, 0, false, false},
			{"another program replaces one of Fairlead's", func() { later(); add("192.0.2.3:80")(); add("192.0.2.4:80")(); remove("10.96.0.0:80")() }, 1, true, true},
			{"it returns", func() { later(); add("10.96.0.0:80")() }, 1, false, false},
			{"another program adds one at a Service's address", func() { later(); add("10.96.0.0:81")() }, 1, false, true},
			{"it deletes it", func() { later(); remove("10.96.0.0:81")() }, 0, false, false},
			{"all are deleted", func() { clear(f.servers) }, 0, true, true},
		} {
			f.serverLists, f.destinationDumps = 0, 0
			tt.do()
			d.checkForLoss()
			if f.serverLists != tt.lists || f.destinationDumps > 0 {
				t.Errorf("%d Services, %s: %d lists and %d dumps, want %d and none", services, tt.name, f.serverLists, f.destinationDumps, tt.lists)
			}
			if loss, drift := len(d.lost) > 0, len(d.drift) > 0; loss != tt.loss || drift != tt.drift {
				t.Errorf("%d Services, %s: loss %t, drift %t, want %t and %t", services, tt.name, loss, drift, tt.loss, tt.drift)
			}
			d.clearDrift()
		}
	}
}

// TestDeleteFailure checks that a failed deletion is an error without a key. The next Replace
// finds the virtual server by its address and deletes it.
func TestDeleteFailure(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"delete", "bind"} {
		d, f := newFakeNode(t)
		s := service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP", dataplane.ServiceSpec{})
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(s), nil); err != nil {
			t.Fatal(err)
		}
		f.failNext(1, what)
		var keyed *dataplane.Error
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(), nil); err == nil || errors.As(err, &keyed) {
			t.Errorf("error %v, want one without keys", err)
		}
		d = f.openDataplane()
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(), nil); err != nil {
			t.Error(err)
		}
		f.expect("after a restart", nil, nil)
	}
}

// TestDrainedServiceDeleteFailure checks that a failed deletion of a drained Service causes a
// Replace, which deletes it. Meanwhile nothing is reachable at its address.
func TestDrainedServiceDeleteFailure(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"delete the virtual server", "bind", "rules", "all requests"} {
		d, f := newFakeNode(t)
		s := service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80")})
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(s), nil); err != nil {
			t.Fatal(err)
		}
		if err := d.Apply(t.Context(), []dataplane.Change{{Old: s}}); err != nil {
			t.Fatal(err)
		}
		addr := s.Frontends[0].Addr
		delete(f.servers[serverKey{dataplane.TCP, addr}].dests, netip.MustParseAddrPort("10.0.0.1:80"))
		if err := d.finishServerDrains(serverKey{dataplane.TCP, addr}, nil); err != nil {
			t.Fatal(err)
		}
		f.failNext(1, what)
		f.skipOrderChecks = false
		if _, err := d.deleteRetired(math.MaxInt); err == nil {
			t.Errorf("%s fails: no error", what)
		}
		select {
		case <-d.Drift():
		default:
			t.Errorf("%s fails: no drift", what)
		}
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(), nil); err != nil {
			t.Error(err)
		}
		f.expect("after Replace", nil, nil)
	}
}

// TestDrainingServiceReused checks that new Services reuse the draining virtual servers of a
// deleted Service at the same frontends. A virtual server is deleted immediately if nftables
// translates its frontend now, as for an external address.
func TestDrainingServiceReused(t *testing.T) {
	t.Parallel()
	d, f := newFakeNode(t)
	endpoints := dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80")}
	web := service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP 10.96.0.1:81/TCP", endpoints)
	same := service(t, dataplane.ClusterIP, "same", "10.96.0.1:81/TCP 10.96.0.1:82/TCP", endpoints)
	external := service(t, dataplane.ExternalIP, "external", "10.96.0.1:80/TCP", endpoints)
	services := map[dataplane.Key]*dataplane.Service{}
	step := func(name string, c dataplane.Change, retiring ...string) {
		t.Helper()
		if err := d.Apply(t.Context(), []dataplane.Change{c}); err != nil {
			t.Fatal(err)
		}
		if delete(services, c.Key()); c.New != nil {
			services[c.Key()] = c.New
		}
		check := func(when string) {
			t.Helper()
			f.expect(when, services, nil)
			if len(retiring) != len(d.retiring) {
				t.Errorf("%s %v are retiring, want %v", when, d.retiring, retiring)
			}
			for _, addr := range retiring {
				if !d.retiring[serverKey{dataplane.TCP, netip.MustParseAddrPort(addr)}] {
					t.Errorf("%s %v are retiring, want %v", when, d.retiring, retiring)
				}
			}
		}
		check("after " + name)
		d = f.openDataplane()
		asked := len(f.requests)
		if err := d.Replace(t.Context(), dataplane.Node{}, maps.Values(services), nil); err != nil {
			t.Fatal(err)
		}
		check("after a restart after " + name)
		if n := f.requests[asked:]; len(n) > 0 {
			t.Errorf("after %s a restart sends %v", name, n)
		}
	}
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(web), nil); err != nil {
		t.Fatal(err)
	}
	step("the deletion", dataplane.Change{Old: web}, "10.96.0.1:80", "10.96.0.1:81")
	step("adding another Service at one of the frontends", dataplane.Change{New: same}, "10.96.0.1:80")
	step("adding an external address", dataplane.Change{New: external})
	internal := preferredAddr(external, clusterEndpoints)
	step("deleting the external address", dataplane.Change{Old: external}, internal.String())
}

// TestFailedServiceHasDropRule checks that a new Service that failed has the drop rule for its
// address, which may be bound. Without the rule, clients would reach programs of the node.
func TestFailedServiceHasDropRule(t *testing.T) {
	t.Parallel()
	d, f := newFakeNode(t)
	s := service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80")})
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(), nil); err != nil {
		t.Fatal(err)
	}
	f.failNext(1, "add the virtual server")
	expectFailed(t, d.Apply(t.Context(), []dataplane.Change{{New: s}}), s.Key)
	if rule, open := f.rules[s.Frontends[0]]; open || !f.droppedAddrs[s.Frontends[0].Addr.Addr()] {
		t.Errorf("the rules have %v and drop connections to %v, want only the drop rule", rule.Service, f.droppedAddrs)
	}
}

// TestSchedulerModuleLoaded checks that Apply loads the module of a scheduler and then
// programs the complete Service.
func TestSchedulerModuleLoaded(t *testing.T) {
	t.Parallel()
	d, f := newFakeNode(t)
	s := service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP",
		dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80", "10.0.0.2:80"), Scheduler: "wlc"})
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(), nil); err != nil {
		t.Fatal(err)
	}
	if err := d.Apply(t.Context(), []dataplane.Change{{New: s}}); err != nil {
		t.Error(err)
	}
	f.expect("with another scheduler", map[dataplane.Key]*dataplane.Service{s.Key: s}, nil)
	if !slices.Equal(f.loadedModules, []string{"ip_vs_wlc"}) {
		t.Errorf("loaded %v, want the scheduler's module once", f.loadedModules)
	}
}

// TestReplaceKeepsDrainDeadlines checks that Replace does not extend drains.
func TestReplaceKeepsDrainDeadlines(t *testing.T) {
	t.Parallel()
	d, _ := newFakeNode(t)
	web := func(endpoints ...string) *dataplane.Service {
		return service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt(endpoints...)})
	}
	old, now := web("10.0.0.1:80", "10.0.0.2:80"), web("10.0.0.1:80")
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(old), nil); err != nil {
		t.Fatal(err)
	}
	if err := d.Apply(t.Context(), []dataplane.Change{{Old: old, New: now}}); err != nil {
		t.Fatal(err)
	}
	until := func() time.Time {
		return d.draining[serverKey{dataplane.TCP, netip.MustParseAddrPort("10.96.0.1:80")}][netip.MustParseAddrPort("10.0.0.2:80")]
	}
	before := until()
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(now), nil); err != nil {
		t.Fatal(err)
	}
	if before.IsZero() || !until().Equal(before) {
		t.Errorf("the drain ends at %v, before the Replace at %v", until(), before)
	}
}

// TestRequestCount checks that the numbers of requests, bound addresses and changed rules depend on
// the change, not on the number of Services.
func TestRequestCount(t *testing.T) {
	t.Parallel()
	web := func(i int, endpoints ...string) *dataplane.Service {
		return service(t, dataplane.ClusterIP, fmt.Sprintf("web-%d", i), fmt.Sprintf("10.96.%d.%d:80/TCP", i/256, i%256),
			dataplane.ServiceSpec{Endpoints: endpointsAt(endpoints...)})
	}
	for _, services := range []int{1_000, 20_000} {
		d, f := newFakeNode(t)
		f.skipOrderChecks = true // the checks are slow
		var initial []*dataplane.Service
		for i := range services {
			initial = append(initial, web(i, "10.0.0.1:80", "10.0.0.2:80"))
		}
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(initial...), nil); err != nil {
			t.Fatal(err)
		}
		grown, shrunk, empty := web(3, "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"), web(3, "10.0.0.1:80"), web(3)
		for _, tt := range []struct {
			name                            string
			old, new                        *dataplane.Service
			requests, bindings, ruleChanges int
		}{
			{"an endpoint is added", initial[3], grown, 1, 0, 1},
			{"two are removed", grown, shrunk, 2, 0, 1},
			{"one is added again", shrunk, initial[3], 1, 0, 1},
			{"all are removed", initial[3], empty, 2, 0, 1},
			{"the Service is deleted while its endpoints drain", empty, nil, 0, 0, 1},
			{"the Service is added again", nil, initial[3], 2, 0, 1},
			{"the Service is deleted with its endpoints", initial[3], nil, 2, 0, 1},
			{"the Service is added once more", nil, initial[3], 2, 0, 1},
			{"nothing changes", initial[3], initial[3], 0, 0, 1},
			{"another Service is added", nil, web(services, "10.0.0.1:80", "10.0.0.2:80"), 3, 1, 2},
		} {
			f.requests, f.serverLists, f.destinationDumps, f.bindings, f.ruleChanges = nil, 0, 0, 0, 0
			if err := d.Apply(t.Context(), []dataplane.Change{{Old: tt.old, New: tt.new}}); err != nil {
				t.Fatal(err)
			}
			if len(f.requests) != tt.requests || f.serverLists+f.destinationDumps > 0 {
				t.Errorf("%d Services, %s: %d requests %v and %d reads, want %d and none",
					services, tt.name, len(f.requests), f.requests, f.serverLists+f.destinationDumps, tt.requests)
			}
			if f.bindings != tt.bindings || f.ruleChanges != tt.ruleChanges {
				t.Errorf("%d Services, %s: %d bindings and %d changes of rules, want %d and %d",
					services, tt.name, f.bindings, f.ruleChanges, tt.bindings, tt.ruleChanges)
			}
			for _, r := range f.requests {
				want := netip.MustParseAddrPort("10.96.0.3:80")
				if tt.old == nil {
					want = tt.new.Frontends[0].Addr
				}
				if r.addr != want {
					t.Errorf("%d Services, %s: %s, want requests about %s only", services, tt.name, r, want)
				}
			}
		}
	}
}
