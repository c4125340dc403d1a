package rig_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/bench/rig"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// world is a rig with Fairlead's nftables backend on its node.
type world struct {
	*rig.Rig
	probe *rig.Probe
	dp    *nft.Dataplane
}

func newWorld(t *testing.T) *world {
	t.Helper()
	r, err := rig.New(rig.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{Rig: r}
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

// set programs one Service with these endpoints, at once.
func (w *world) set(t *testing.T, endpoints ...netip.Addr) {
	t.Helper()
	var list []dataplane.Endpoint
	for _, addr := range endpoints {
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, 8000)})
	}
	key := dataplane.Key{Namespace: "default", Name: "s", Port: "http", Family: dataplane.IPv4}
	s, err := dataplane.NewService(key, []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: vip()}}, dataplane.Treatment{Endpoints: list})
	if err != nil {
		t.Fatal(err)
	}
	node := dataplane.Node{PodCIDRs: []netip.Prefix{rig.ClusterCIDR}}
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

func background(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, n}) }
func watched(n byte) netip.Addr    { return netip.AddrFrom4([4]byte{10, 128, 0, n}) }

// while is when something happened: between two times.
type while struct{ from, to time.Duration }

// late changes the endpoints some time after it is called, and returns when it was
// called and, once that is over, when the change was.
func (w *world) late(t *testing.T, endpoints ...netip.Addr) (event time.Time, happened <-chan while) {
	t.Helper()
	const delay = 20 * time.Millisecond
	event = time.Now()
	done := make(chan while, 1)
	time.AfterFunc(delay, func() {
		from := time.Since(event)
		w.set(t, endpoints...)
		done <- while{from, time.Since(event)}
	})
	return event, done
}

// within checks what was seen against when it happened: not before, but for the last
// packets that could have shown it, and not much later, which is for busy machines.
func within(t *testing.T, seen time.Duration, happened <-chan while) {
	t.Helper()
	const before, after = 10 * time.Millisecond, 200 * time.Millisecond
	if h := <-happened; seen < h.from-before || seen > h.to+after {
		t.Errorf("seen after %s what happened between %s and %s", seen, h.from, h.to)
	}
}

func TestFirstArrival(t *testing.T) {
	w := newWorld(t)
	w.set(t, background(1), background(2), watched(1))
	// An address that is watched, but not waited for, makes no difference.
	event, happened := w.late(t, background(1), background(2), watched(1), watched(2))
	s, err := w.probe.FirstArrival(t.Context(), event, vip(), rig.At(watched(2)))
	if err != nil {
		t.Fatal(err)
	}
	within(t, s.After, happened)
}

// Gently, the probe leaves the processor to others until it is told that it may not.
func TestGently(t *testing.T) {
	w := newWorld(t)
	w.set(t, background(1))
	event, happened := w.late(t, watched(1))
	never := make(chan struct{})
	w.probe.Gently(never)
	s, err := w.probe.FirstArrival(t.Context(), event, vip(), rig.Anywhere)
	if err != nil {
		t.Fatal(err)
	}
	within(t, s.After, happened)
	most := func() int { return int(s.After/(100*time.Microsecond)) + 1 }
	if s.Packets > most() {
		t.Errorf("sent %d packets in %s, want %d or fewer", s.Packets, s.After, most())
	}
	// It does not hold for the next time, which shows unless the machine is busy.
	for range 20 {
		w.set(t, background(1))
		event, happened = w.late(t, watched(1))
		if s, err = w.probe.FirstArrival(t.Context(), event, vip(), rig.Anywhere); err != nil {
			t.Fatal(err)
		}
		if <-happened; s.Packets > most() {
			return
		}
	}
	t.Errorf("sent %d packets in %s after having been gentle before, want more", s.Packets, s.After)
}

func TestLastArrival(t *testing.T) {
	w := newWorld(t)
	w.set(t, background(1), background(2), watched(1))
	event, happened := w.late(t, background(1), background(2))
	s, err := w.probe.LastArrival(t.Context(), event, vip(), rig.At(watched(1)), 50)
	if err != nil {
		t.Fatal(err)
	}
	within(t, s.After, happened)
	w.set(t, watched(1))
	event, happened = w.late(t)
	if s, err = w.probe.LastArrival(t.Context(), event, vip(), rig.Anywhere, 20); err != nil {
		t.Fatal(err)
	}
	within(t, s.After, happened)
}

func TestNotSeen(t *testing.T) {
	w := newWorld(t)
	w.set(t, background(1))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.probe.FirstArrival(ctx, time.Now(), vip(), rig.Anywhere); !errors.Is(err, rig.ErrNotSeen) {
		t.Errorf("error %v, want ErrNotSeen", err)
	}
}

func TestAnswers(t *testing.T) {
	w := newWorld(t)
	if err := w.Answer(true); err != nil {
		t.Fatal(err)
	}
	event, happened := w.late(t, background(1))
	after, err := w.probe.Answers(t.Context(), event, []netip.AddrPort{vip()})
	if err != nil {
		t.Fatal(err)
	}
	within(t, after, happened)
	if err := w.Answer(false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.probe.Answers(ctx, time.Now(), []netip.AddrPort{vip()}); !errors.Is(err, rig.ErrNotSeen) {
		t.Errorf("error %v, want ErrNotSeen", err)
	}
}

func TestSpread(t *testing.T) {
	w := newWorld(t)
	w.set(t, watched(1), watched(2))
	const n = 1000
	counts, err := w.probe.Spread(t.Context(), vip(), n)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := counts[watched(1)], counts[watched(2)]; a+b != n || a < n/3 || b < n/3 {
		t.Errorf("%d connections went to %v, want half of them to each", n, counts)
	}
}

// TestAddresses checks that hosts are where objects say that they are.
func TestAddresses(t *testing.T) {
	machine, err := rig.NewMachine("machine")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = machine.Close() })
	machine.ServeT(t, nettest.TCP, 80)
	w := newWorld(t)
	if err := w.Join(machine); err != nil {
		t.Fatal(err)
	}
	a, err := w.Node.Connect(t.Context(), nettest.TCP, netip.AddrPortFrom(rig.MachineIPv4, 80))
	if err != nil || a.Source.Addr() != rig.NodeIPv4 || w.Node.IPv4 != rig.NodeIPv4 {
		t.Errorf("the machine has seen %+v, %v, want one of %s", a, err, rig.NodeIPv4)
	}
}
