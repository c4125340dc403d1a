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

// program programs one Service with these endpoints, at once.
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

// interval is when something happened: between two times.
type interval struct{ from, to time.Duration }

// programLater changes the endpoints some time after it is called, and returns when it was
// called and, once that is over, when the change was.
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

// checkWithin checks what was seen against when it happened: not before, but for the last
// packets that could have shown it, and not much later, which is for busy machines.
func checkWithin(t *testing.T, seen time.Duration, happened <-chan interval) {
	t.Helper()
	const before, after = 10 * time.Millisecond, 200 * time.Millisecond
	if h := <-happened; seen < h.from-before || seen > h.to+after {
		t.Errorf("seen after %s what happened between %s and %s", seen, h.from, h.to)
	}
}

func TestFirstArrival(t *testing.T) {
	w := newProxiedTestbed(t)
	w.program(t, backgroundAddr(1), backgroundAddr(2), watchedAddr(1))
	// An address that is watched, but not waited for, makes no difference.
	event, happened := w.programLater(t, backgroundAddr(1), backgroundAddr(2), watchedAddr(1), watchedAddr(2))
	s, err := w.probe.FirstArrival(t.Context(), event, vip(), testbed.ToEndpoint(watchedAddr(2)))
	if err != nil {
		t.Fatal(err)
	}
	checkWithin(t, s.After, happened)
}

// Gently, the probe leaves the processor to others until it is told that it may not.
func TestThrottleUntil(t *testing.T) {
	w := newProxiedTestbed(t)
	w.program(t, backgroundAddr(1))
	event, happened := w.programLater(t, watchedAddr(1))
	never := make(chan struct{})
	w.probe.ThrottleUntil(never)
	s, err := w.probe.FirstArrival(t.Context(), event, vip(), testbed.ToAnyEndpoint)
	if err != nil {
		t.Fatal(err)
	}
	checkWithin(t, s.After, happened)
	most := func() int { return int(s.After/(100*time.Microsecond)) + 1 }
	if s.Packets > most() {
		t.Errorf("sent %d packets in %s, want %d or fewer", s.Packets, s.After, most())
	}
	// It does not hold for the next time, which shows unless the machine is busy.
	for range 20 {
		w.program(t, backgroundAddr(1))
		event, happened = w.programLater(t, watchedAddr(1))
		if s, err = w.probe.FirstArrival(t.Context(), event, vip(), testbed.ToAnyEndpoint); err != nil {
			t.Fatal(err)
		}
		if <-happened; s.Packets > most() {
			return
		}
	}
	t.Errorf("sent %d packets in %s after having been gentle before, want more", s.Packets, s.After)
}

func TestLastArrival(t *testing.T) {
	w := newProxiedTestbed(t)
	w.program(t, backgroundAddr(1), backgroundAddr(2), watchedAddr(1))
	event, happened := w.programLater(t, backgroundAddr(1), backgroundAddr(2))
	s, err := w.probe.LastArrival(t.Context(), event, vip(), testbed.ToEndpoint(watchedAddr(1)), 50)
	if err != nil {
		t.Fatal(err)
	}
	checkWithin(t, s.After, happened)
	w.program(t, watchedAddr(1))
	event, happened = w.programLater(t)
	if s, err = w.probe.LastArrival(t.Context(), event, vip(), testbed.ToAnyEndpoint, 20); err != nil {
		t.Fatal(err)
	}
	checkWithin(t, s.After, happened)
}

func TestNotObserved(t *testing.T) {
	w := newProxiedTestbed(t)
	w.program(t, backgroundAddr(1))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.probe.FirstArrival(ctx, time.Now(), vip(), testbed.ToAnyEndpoint); !errors.Is(err, testbed.ErrNotObserved) {
		t.Errorf("error %v, want ErrNotSeen", err)
	}
}

func TestWaitAllAnswer(t *testing.T) {
	w := newProxiedTestbed(t)
	if err := w.SetBackgroundReachable(true); err != nil {
		t.Fatal(err)
	}
	event, happened := w.programLater(t, backgroundAddr(1))
	after, err := w.probe.WaitAllAnswer(t.Context(), event, []netip.AddrPort{vip()})
	if err != nil {
		t.Fatal(err)
	}
	checkWithin(t, after, happened)
	if err := w.SetBackgroundReachable(false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.probe.WaitAllAnswer(ctx, time.Now(), []netip.AddrPort{vip()}); !errors.Is(err, testbed.ErrNotObserved) {
		t.Errorf("error %v, want ErrNotSeen", err)
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
		t.Errorf("%d connections went to %v, want half of them to each", n, counts)
	}
}

// TestAddresses checks that hosts are where objects say that they are.
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
		t.Errorf("the machine has seen %+v, %v, want one of %s", a, err, testbed.NodeIPv4)
	}
}
