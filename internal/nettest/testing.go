package nettest

import "net/netip"

// TB is the part of testing.TB that the test helpers need. The package does not import
// testing, because programs import the package too.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// NewT calls [New]. It fails the test on an error, and closes the network when the test ends.
func NewT(t TB, options Options) *Network {
	t.Helper()
	n, err := New(options)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close test network: %v", err)
		}
	})
	return n
}

// PodT calls [Network.AddPod] and fails the test on an error.
func (n *Network) PodT(t TB, name string, addrs ...netip.Addr) *Host {
	t.Helper()
	pod, err := n.AddPod(name, addrs...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return pod
}

// ServeT calls [Host.Serve] and fails the test on an error.
func (h *Host) ServeT(t TB, network string, ports ...uint16) *Server {
	t.Helper()
	s, err := h.Serve(network, ports...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return s
}

// ServeAtT calls [Host.ServeAt] and fails the test on an error.
func (h *Host) ServeAtT(t TB, network string, addrs []netip.Addr, ports ...uint16) *Server {
	t.Helper()
	s, err := h.ServeAt(network, addrs, ports...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return s
}

// SegmentConnT calls [Host.OpenSegmentConn]. It fails the test on an error, and closes the
// SegmentConn when the test ends.
func (h *Host) SegmentConnT(t TB, addr netip.Addr) *SegmentConn {
	t.Helper()
	c, err := h.OpenSegmentConn(addr)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
	return c
}
