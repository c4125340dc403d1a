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

// sequence returns a sequence of Services, as Replace takes it.
func sequence(services ...*dataplane.Service) func(func(*dataplane.Service) bool) {
	return slices.Values(services)
}

// failNext makes the first n of what is asked with this beginning fail.
func (f *fakeNode) failNext(n int, beginning string) {
	f.skipOrderChecks = true
	f.fault = func(what string) error {
		if n > 0 && strings.HasPrefix(what, beginning) {
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

// An address that could not be bound is missing for the next port of it as well,
// and there is no virtual server that a restart would not tell for ours.
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
	f.expect("at last", map[dataplane.Key]*dataplane.Service{one.Key: one, two.Key: two}, nil)
}

// What could not be removed is no matter of a Service that is wanted, and still an
// error: the next Replace tries again, and finds it by its address.
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
			t.Errorf("error %v, want one that is about no Service", err)
		}
		d = f.openDataplane()
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(), nil); err != nil {
			t.Error(err)
		}
		f.expect("after a restart", nil, nil)
	}
}

// What could not be removed once a deleted Service has drained leads to a Replace, which
// tries again. Nothing is reached there until then.
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
		f.expect("at last", nil, nil)
	}
}

// A deleted Service whose connections drain is taken back by one at the same frontend,
// and by one that has another of its ports, as far as that goes. It ends at once for an
// external address, whose connections are translated.
func TestDrainingServiceReused(t *testing.T) {
	t.Parallel()
	d, f := newFakeNode(t)
	endpoints := dataplane.ServiceSpec{Endpoints: endpointsAt("10.0.0.1:80")}
	web := service(t, dataplane.ClusterIP, "web", "10.96.0.1:80/TCP 10.96.0.1:81/TCP", endpoints)
	same := service(t, dataplane.ClusterIP, "same", "10.96.0.1:81/TCP 10.96.0.1:82/TCP", endpoints)
	external := service(t, dataplane.ExternalIP, "external", "10.96.0.1:80/TCP", endpoints)
	services := map[dataplane.Key]*dataplane.Service{}
	step := func(name string, c dataplane.Change, leaving ...string) {
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
			if len(leaving) != len(d.retiring) {
				t.Errorf("%s %v are leaving, want %v", when, d.retiring, leaving)
			}
			for _, addr := range leaving {
				if !d.retiring[serverKey{dataplane.TCP, netip.MustParseAddrPort(addr)}] {
					t.Errorf("%s %v are leaving, want %v", when, d.retiring, leaving)
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
			t.Errorf("after %s a restart asks for %v", name, n)
		}
	}
	if err := d.Replace(t.Context(), dataplane.Node{}, sequence(web), nil); err != nil {
		t.Fatal(err)
	}
	step("the deletion", dataplane.Change{Old: web}, "10.96.0.1:80", "10.96.0.1:81")
	step("another Service at one of the frontends", dataplane.Change{New: same}, "10.96.0.1:80")
	step("an external address", dataplane.Change{New: external})
	internal := preferredAddr(external, clusterEndpoints)
	step("the deletion of that", dataplane.Change{Old: external}, internal.String())
}

// A new Service that could not be programmed is dropped by the rules, as its address
// may be bound: programs of the node are not to be reached there.
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
		t.Errorf("the rules have %v and drop at %v, want that connections are dropped", rule.Service, f.droppedAddrs)
	}
}

// A scheduler whose module is not loaded yet is loaded, and the Service complete.
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

// A Replace does not give endpoints that have left more time.
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
		t.Errorf("it may drain until %v, before the Replace until %v", until(), before)
	}
}

// A change takes as many requests as it is large, however many Services there are.
func TestRequestCount(t *testing.T) {
	t.Parallel()
	web := func(i int, endpoints ...string) *dataplane.Service {
		return service(t, dataplane.ClusterIP, fmt.Sprintf("web-%d", i), fmt.Sprintf("10.96.%d.%d:80/TCP", i/256, i%256),
			dataplane.ServiceSpec{Endpoints: endpointsAt(endpoints...)})
	}
	for _, services := range []int{10, 2_000} {
		d, f := newFakeNode(t)
		f.skipOrderChecks = true // to check the order takes long
		var held []*dataplane.Service
		for i := range services {
			held = append(held, web(i, "10.0.0.1:80", "10.0.0.2:80"))
		}
		if err := d.Replace(t.Context(), dataplane.Node{}, sequence(held...), nil); err != nil {
			t.Fatal(err)
		}
		more, fewer, gone := web(3, "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"), web(3, "10.0.0.1:80"), web(3)
		for _, tt := range []struct {
			name     string
			old, new *dataplane.Service
			requests int
		}{
			{"an endpoint comes", held[3], more, 1},
			{"two leave", more, fewer, 2},
			{"one comes back", fewer, held[3], 1},
			{"all leave", held[3], gone, 2},
			{"the Service goes, whose endpoints drain", gone, nil, 0},
			{"it comes back", nil, held[3], 2},
			{"it goes with its endpoints", held[3], nil, 2},
			{"it comes back again", nil, held[3], 2},
			{"nothing changes", held[3], held[3], 0},
		} {
			f.requests, f.destinationDumps = nil, 0
			if err := d.Apply(t.Context(), []dataplane.Change{{Old: tt.old, New: tt.new}}); err != nil {
				t.Fatal(err)
			}
			if len(f.requests) != tt.requests || f.destinationDumps > 0 {
				t.Errorf("%d Services, %s: %d requests %v and %d lists read, want %d and none", services, tt.name, len(f.requests), f.requests, f.destinationDumps, tt.requests)
			}
			for _, r := range f.requests {
				if want := netip.MustParseAddrPort("10.96.0.3:80"); r.addr != want {
					t.Errorf("%d Services, %s: %s, want requests about %s alone", services, tt.name, r, want)
				}
			}
		}
	}
}
