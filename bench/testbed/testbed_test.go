package testbed_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// proxiedTestbed is a testbed with Fairlead's nftables backend on its node.
type proxiedTestbed struct {
	*testbed.Testbed
	probe *testbed.Probe
	dp    *nft.Dataplane
}

func newProxiedTestbed(t *testing.T) *proxiedTestbed {
	t.Helper()
	r, err := testbed.New(testbed.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &proxiedTestbed{Testbed: r}
	if w.probe, err = r.NewProbe(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.probe.Close() })
	if w.dp, err = nft.Open(nft.Options{NetNS: r.Node.Fd()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.dp.Close() })
	return w
}

// program replaces all Services with one Service that has the given endpoints, or with none if
// there are no endpoints.
func (w *proxiedTestbed) program(t *testing.T, endpoints ...netip.Addr) {
	t.Helper()
	var list []dataplane.Endpoint
	for _, addr := range endpoints {
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, 8000)})
	}
	key := dataplane.Key{Namespace: "default", Name: "s", Port: "http", Family: dataplane.IPv4}
	s, err := dataplane.NewService(key, []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: vip()}}, dataplane.ServiceSpec{Endpoints: list})
	if err != nil {
		t.Fatal(err)
	}
	node := dataplane.Node{PodCIDRs: []netip.Prefix{testbed.ClusterCIDR}}
	services := func(yield func(*dataplane.Service) bool) {
		if len(endpoints) > 0 {
			yield(s)
		}
	}
	if err := w.dp.Replace(t.Context(), node, services, nil); err != nil {
		t.Fatal(err)
	}
}

func vip() netip.AddrPort { return netip.MustParseAddrPort("172.16.0.1:80") }

func backgroundAddr(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, n}) }
func watchedAddr(n byte) netip.Addr    { return netip.AddrFrom4([4]byte{10, 128, 0, n}) }

// interval is a period of time in which a change took effect.
type interval struct{ from, to time.Duration }

// programLater changes the endpoints 20 ms after the call. It returns the time of the call, and a
// channel for the interval of the change, relative to the call.
func (w *proxiedTestbed) programLater(t *testing.T, endpoints ...netip.Addr) (event time.Time, happened <-chan interval) {
	t.Helper()
	const delay = 20 * time.Millisecond
	event = time.Now()
	done := make(chan interval, 1)
	time.AfterFunc(delay, func() {
		from := time.Since(event)
		w.program(t, endpoints...)
		done <- interval{from, time.Since(event)}
	})
	return event, done
}

// requireWithin measures until an observed time lies in the interval of the change. Observations
// may be slightly early, by the last packets that could have shown the change. They are late while
// the machine is busy, so it measures again then.
func requireWithin(t *testing.T, measure func() (observed time.Duration, happened <-chan interval)) {
	t.Helper()
	const before, after = 10 * time.Millisecond, 200 * time.Millisecond
	for deadline := time.Now().Add(time.Minute); ; {
		observed, happened := measure()
		h := <-happened
		if observed < h.from-before || observed > h.to+after && time.Now().After(deadline) {
			t.Fatalf("observed the change after %s, but it happened between %s and %s", observed, h.from, h.to)
		}
		if observed <= h.to+after {
			return
		}
	}
}

func TestFirstArrival(t *testing.T) {
	w := newProxiedTestbed(t)
	requireWithin(t, func() (time.Duration, <-chan interval) {
		w.program(t, backgroundAddr(1), backgroundAddr(2), watchedAddr(1))
		// A packet to watchedAddr(1) does not end the wait.
		event, happened := w.programLater(t, backgroundAddr(1), backgroundAddr(2), watchedAddr(1), watchedAddr(2))
		s, err := w.probe.FirstArrival(t.Context(), event, vip(), testbed.ToEndpoint(watchedAddr(2)))
		if err != nil {
			t.Fatal(err)
		}
		return s.After, happened
	})
}

// TestThrottleUntil checks that the probe limits its rate while it is throttled, and only in that
// measurement.
func TestThrottleUntil(t *testing.T) {
	w := newProxiedTestbed(t)
	measure := func() (s testbed.Observation, happened <-chan interval) {
		w.program(t, backgroundAddr(1))
		event, happened := w.programLater(t, watchedAddr(1))
		s, err := w.probe.FirstArrival(t.Context(), event, vip(), testbed.ToAnyEndpoint)
		if err != nil {
			t.Fatal(err)
		}
		return s, happened
	}
	var s testbed.Observation
	requireWithin(t, func() (time.Duration, <-chan interval) {
		w.probe.ThrottleUntil(make(chan struct{})) // never
		var happened <-chan interval
		s, happened = measure()
		return s.After, happened
	})
	limit := func() int { return int(s.After/(100*time.Microsecond)) + 1 }
	if s.Packets > limit() {
		t.Errorf("sent %d packets in %s, want %d or fewer", s.Packets, s.After, limit())
	}
	// The next measurement is not throttled. A busy machine can be as slow as a throttled probe, so
	// this may need many attempts.
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		var happened <-chan interval
		s, happened = measure()
		if <-happened; s.Packets > limit() {
			return
		}
	}
	t.Errorf("sent %d packets in %s after a throttled measurement, want more", s.Packets, s.After)
}

func TestMinInterval(t *testing.T) {
	w := newProxiedTestbed(t)
	w.probe.MinInterval = 100 * time.Microsecond
	var s testbed.Observation
	requireWithin(t, func() (time.Duration, <-chan interval) {
		w.program(t, backgroundAddr(1))
		event, happened := w.programLater(t, watchedAddr(1))
		var err error
		if s, err = w.probe.FirstArrival(t.Context(), event, vip(), testbed.ToAnyEndpoint); err != nil {
			t.Fatal(err)
		}
		return s.After, happened
	})
	if limit := int(s.After/w.probe.MinInterval) + 1; s.Packets > limit {
		t.Errorf("sent %d packets in %s, want %d or fewer", s.Packets, s.After, limit)
	}
}

func TestLastArrival(t *testing.T) {
	w := newProxiedTestbed(t)
	requireWithin(t, func() (time.Duration, <-chan interval) {
		w.program(t, backgroundAddr(1), backgroundAddr(2), watchedAddr(1))
		event, happened := w.programLater(t, backgroundAddr(1), backgroundAddr(2))
		s, err := w.probe.LastArrival(t.Context(), event, vip(), testbed.ToEndpoint(watchedAddr(1)), 50)
		if err != nil {
			t.Fatal(err)
		}
		return s.After, happened
	})
	requireWithin(t, func() (time.Duration, <-chan interval) {
		w.program(t, watchedAddr(1))
		event, happened := w.programLater(t)
		s, err := w.probe.LastArrival(t.Context(), event, vip(), testbed.ToAnyEndpoint, 20)
		if err != nil {
			t.Fatal(err)
		}
		return s.After, happened
	})
}

func TestNotObserved(t *testing.T) {
	w := newProxiedTestbed(t)
	w.program(t, backgroundAddr(1))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.probe.FirstArrival(ctx, time.Now(), vip(), testbed.ToAnyEndpoint); !errors.Is(err, testbed.ErrNotObserved) {
		t.Errorf("error %v, want ErrNotObserved", err)
	}
}

func TestWaitAllAnswer(t *testing.T) {
	w := newProxiedTestbed(t)
	if err := w.SetBackgroundReachable(true); err != nil {
		t.Fatal(err)
	}
	requireWithin(t, func() (time.Duration, <-chan interval) {
		w.program(t)
		event, happened := w.programLater(t, backgroundAddr(1))
		after, err := w.probe.WaitAllAnswer(t.Context(), event, []netip.AddrPort{vip()})
		if err != nil {
			t.Fatal(err)
		}
		return after, happened
	})
	if err := w.SetBackgroundReachable(false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.probe.WaitAllAnswer(ctx, time.Now(), []netip.AddrPort{vip()}); !errors.Is(err, testbed.ErrNotObserved) {
		t.Errorf("error %v, want ErrNotObserved", err)
	}
}

func TestCountArrivals(t *testing.T) {
	w := newProxiedTestbed(t)
	w.program(t, watchedAddr(1), watchedAddr(2))
	const n = 1000
	counts, err := w.probe.CountArrivals(t.Context(), vip(), n)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := counts[watchedAddr(1)], counts[watchedAddr(2)]; a+b != n || a < n/3 || b < n/3 {
		t.Errorf("%d connections arrived at %v, want about half of them at each endpoint", n, counts)
	}
}

// TestAddresses checks the documented addresses of the hosts.
func TestAddresses(t *testing.T) {
	machine, err := testbed.NewMachine("machine")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = machine.Close() })
	machine.ServeT(t, nettest.TCP, 80)
	w := newProxiedTestbed(t)
	if err := w.Attach(machine); err != nil {
		t.Fatal(err)
	}
	a, err := w.Node.Connect(t.Context(), nettest.TCP, netip.AddrPortFrom(testbed.MachineIPv4, 80))
	if err != nil || a.Source.Addr() != testbed.NodeIPv4 || w.Node.IPv4 != testbed.NodeIPv4 {
		t.Errorf("the machine received %+v, error %v; want a connection from %s", a, err, testbed.NodeIPv4)
	}
}
