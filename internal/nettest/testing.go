package nettest

import (
	"net/netip"
	"os"
	"runtime"
	"strings"
)

// TB is the part of testing.TB that the test helpers need. The package does not import
// testing, because programs import the package too.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
}

// kernelArchitecture returns GOARCH of the kernel. It is empty if the kernel does not report its
// architecture, as before Linux 6.1.
func kernelArchitecture() string {
	data, err := os.ReadFile("/proc/sys/kernel/arch")
	if err != nil {
		return ""
	}
	name := strings.TrimSpace(string(data))
	if goarch, differs := map[string]string{"x86_64": "amd64", "aarch64": "arm64"}[name]; differs {
		return goarch
	}
	return name
}

// skipEmulated skips a test of a program that an emulator runs on a kernel of another
// architecture. QEMU's user mode does not translate the netlink messages of netfilter.
func skipEmulated(t TB) {
	t.Helper()
	if kernel := kernelArchitecture(); kernel != "" && kernel != runtime.GOARCH {
		t.Skipf("needs a kernel for %s, this one is for %s", runtime.GOARCH, kernel)
	}
}

// NamespaceT calls [NewNamespace] without a name. It fails the test on an error, and closes the
// namespace when the test ends.
func NamespaceT(t TB) *Namespace {
	t.Helper()
	skipEmulated(t)
	ns, err := NewNamespace("")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := ns.Close(); err != nil {
			t.Errorf("close network namespace: %v", err)
		}
	})
	return ns
}

// NewT calls [New]. It fails the test on an error, and closes the network when the test ends.
func NewT(t TB, options Options) *Network {
	t.Helper()
	skipEmulated(t)
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
