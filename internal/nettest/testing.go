package nettest

import "net/netip"

// TB is the part of testing.TB that the helpers for tests need. The package
// does not import testing, for the sake of programs.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// NewT is [New] for a test: it fails the test on an error, and closes the
// network when the test ends.
func NewT(t TB, options Options) *Network {
	t.Helper()
	n, err := New(options)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close the test network: %v", err)
		}
	})
	return n
}

// PodT is [Network.AddPod] for a test.
func (n *Network) PodT(t TB, name string, addrs ...netip.Addr) *Host {
	t.Helper()
	pod, err := n.AddPod(name, addrs...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return pod
}

// ServeT is [Host.Serve] for a test.
func (h *Host) ServeT(t TB, network string, ports ...uint16) *Server {
	t.Helper()
	s, err := h.Serve(network, ports...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return s
}

// ServeAtT is [Host.ServeAt] for a test.
func (h *Host) ServeAtT(t TB, network string, addrs []netip.Addr, ports ...uint16) *Server {
	t.Helper()
	s, err := h.ServeAt(network, addrs, ports...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return s
}

// SegmentConnT is [Host.OpenSegmentConn] for a test, which closes it.
func (h *Host) SegmentConnT(t TB, addr netip.Addr) *SegmentConn {
	t.Helper()
	w, err := h.OpenSegmentConn(addr)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
	return w
}
