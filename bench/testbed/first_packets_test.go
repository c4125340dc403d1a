package testbed_test

import (
	"net/netip"
	"strings"
	"testing"

	"fairlead.io/fairlead/bench/testbed"
)

// TestFirstPackets sends first packets to a Service and to its endpoint, and to a Service without
// endpoints, to which no packet arrives.
func TestFirstPackets(t *testing.T) {
	w := newProxiedTestbed(t)
	w.program(t, watchedAddr(1), watchedAddr(2))
	f, err := w.OpenFirstPackets()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	send := func(to netip.AddrPort) {
		t.Helper()
		took, err := f.Send([]netip.AddrPort{to, to, to, to, to})
		if err != nil || took <= 0 {
			t.Fatalf("packets to %s took %s each, error %v", to, took, err)
		}
	}
	send(vip())
	send(netip.AddrPortFrom(watchedAddr(1), 8000))
	if err := f.CheckArrived(); err != nil {
		t.Error(err)
	}
	if err := f.ForgetConnections(); err != nil {
		t.Error(err)
	}
	w.program(t)
	send(vip())
	if err := f.CheckArrived(); err == nil || !strings.Contains(err.Error(), "10 of 15") {
		t.Errorf("error %v after 5 packets without an endpoint, want one with %q", err, "10 of 15")
	}
}

// TestFirstPacketsWithoutProxy sends packets through a node that only tracks connections.
func TestFirstPacketsWithoutProxy(t *testing.T) {
	r, err := testbed.New(testbed.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	if err := r.TrackConnections(); err != nil {
		t.Fatal(err)
	}
	f, err := r.OpenFirstPackets()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	to := netip.AddrPortFrom(watchedAddr(1), 8000)
	if _, err := f.Send([]netip.AddrPort{to, to}); err != nil {
		t.Fatal(err)
	}
	if err := f.CheckArrived(); err != nil {
		t.Error(err)
	}
}
