package nodeip_test

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/nodeip"
)

// testHost is a network namespace with a Watch of its addresses.
type testHost struct {
	t         *testing.T
	handle    *netlink.Handle
	delivered chan []netip.Addr
	latest    atomic.Pointer[nodeip.Addresses]
}

func startWatch(t *testing.T) *testHost {
	t.Helper()
	ns := nettest.NamespaceT(t)
	handle, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(handle.Close)
	h := &testHost{t: t, handle: handle, delivered: make(chan []netip.Addr, 1000)}
	for _, name := range []string{"lo", "veth0", "veth1"} {
		if name == "veth0" {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = name
			if err := handle.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "veth1"}); err != nil {
				t.Fatal(err)
			}
			for _, link := range []string{"veth0", "veth1"} { // only the test adds link-local addresses
				h.changeLink(func(l netlink.Link) error { return handle.LinkSetIP6AddrGenMode(l, 1) }, link)
			}
		}
		h.changeLink(handle.LinkSetUp, name)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- nodeip.Watch(ctx, nodeip.Options{NetNS: ns.Fd()}, func(addrs nodeip.Addresses) { h.delivered <- addrs.All; h.latest.Store(&addrs) })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Watch returned an error: %v", err)
		}
	})
	return h
}

func (h *testHost) changeLink(change func(netlink.Link) error, name string) {
	h.t.Helper()
	link, err := h.handle.LinkByName(name)
	if err == nil {
		err = change(link)
	}
	if err != nil {
		h.t.Fatalf("%s: %v", name, err)
	}
}

func (h *testHost) newAddr(p string, flags int) *netlink.Addr {
	prefix := netip.MustParsePrefix(p)
	return &netlink.Addr{IPNet: &net.IPNet{
		IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
	}, Flags: flags}
}

func (h *testHost) addAddr(link, prefix string, flags int) {
	h.t.Helper()
	h.changeLink(func(l netlink.Link) error { return h.handle.AddrAdd(l, h.newAddr(prefix, flags)) }, link)
}

func (h *testHost) removeAddr(link, prefix string) {
	h.t.Helper()
	h.changeLink(func(l netlink.Link) error { return h.handle.AddrDel(l, h.newAddr(prefix, 0)) }, link)
}

// waitFor waits until exactly these addresses are delivered, besides loopback addresses.
func (h *testHost) waitFor(want ...string) {
	h.t.Helper()
	addrs := []string{}
	deadline := time.After(10 * time.Second)
	for {
		select {
		case got := <-h.delivered:
			if !slices.IsSortedFunc(got, netip.Addr.Compare) {
				h.t.Errorf("not sorted: %s", got)
			}
			addrs = addrs[:0]
			for _, a := range got {
				if !a.IsLoopback() {
					addrs = append(addrs, a.String())
				}
			}
			if slices.Equal(addrs, want) {
				return
			}
		case <-deadline:
			h.t.Fatalf("addresses (-want +got):\n%s", cmp.Diff(want, addrs))
		}
	}
}

// waitForFlag waits until the only IPv6 address of the interface has a flag.
func (h *testHost) waitForFlag(link string, flag int) {
	h.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		var addrs []netlink.Addr
		h.changeLink(func(l netlink.Link) (err error) {
			addrs, err = h.handle.AddrList(l, unix.AF_INET6)
			return err
		}, link)
		if len(addrs) == 1 && addrs[0].Flags&flag != 0 {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s has %v, want flag %#x", link, addrs, flag)
		}
	}
}

// expectNoDelivery fails the test if addresses are delivered.
func (h *testHost) expectNoDelivery() {
	h.t.Helper()
	select {
	case got := <-h.delivered:
		h.t.Errorf("delivered without a change: %s", got)
	case <-time.After(100 * time.Millisecond):
	}
}

func TestInitialDelivery(t *testing.T) {
	t.Parallel()
	h := startWatch(t)
	got := <-h.delivered
	want := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	h.expectNoDelivery()
}

func TestAddAndRemove(t *testing.T) {
	t.Parallel()
	h := startWatch(t)
	h.waitFor()
	h.addAddr("veth0", "192.0.2.1/24", 0)
	h.waitFor("192.0.2.1")
	h.addAddr("veth0", "2001:db8::1/64", unix.IFA_F_NODAD)
	h.waitFor("192.0.2.1", "2001:db8::1")
	h.addAddr("lo", "198.51.100.7/32", 0)
	h.waitFor("192.0.2.1", "198.51.100.7", "2001:db8::1")
	h.removeAddr("veth0", "192.0.2.1/24")
	h.waitFor("198.51.100.7", "2001:db8::1")
	h.changeLink(h.handle.LinkDel, "veth0") // deletes its addresses too
	h.waitFor("198.51.100.7")
}

// TestAddressOnTwoInterfaces checks that an address of two interfaces is delivered once, until
// both have lost it.
func TestAddressOnTwoInterfaces(t *testing.T) {
	t.Parallel()
	h := startWatch(t)
	h.waitFor()
	h.addAddr("veth0", "192.0.2.1/32", 0)
	h.waitFor("192.0.2.1")
	h.addAddr("veth1", "192.0.2.1/32", 0)
	h.expectNoDelivery()
	h.removeAddr("veth0", "192.0.2.1/32")
	h.expectNoDelivery()
	h.removeAddr("veth1", "192.0.2.1/32")
	h.waitFor()
}

// TestPointToPoint checks that the node's address of a point-to-point link is delivered, not
// the peer's.
func TestPointToPoint(t *testing.T) {
	t.Parallel()
	h := startWatch(t)
	h.waitFor()
	for _, link := range [][2]string{{"192.0.2.1/32", "192.0.2.2/32"}, {"2001:db8::1/128", "2001:db8::2/128"}} {
		ours := h.newAddr(link[0], unix.IFA_F_NODAD)
		ours.Peer = h.newAddr(link[1], 0).IPNet
		h.changeLink(func(l netlink.Link) error { return h.handle.AddrAdd(l, ours) }, "veth0")
	}
	h.waitFor("192.0.2.1", "2001:db8::1")
}

// TestDuplicateAddressDetection checks that an IPv6 address is delivered after duplicate
// address detection, and never if another host has it.
func TestDuplicateAddressDetection(t *testing.T) {
	t.Parallel()
	h := startWatch(t)
	h.waitFor()
	h.addAddr("veth0", "2001:db8::1/64", 0)
	h.expectNoDelivery() // detection takes the kernel a second
	h.waitFor("2001:db8::1")
	h.addAddr("veth1", "2001:db8::1/64", 0)
	h.waitForFlag("veth1", unix.IFA_F_DADFAILED)
	h.removeAddr("veth0", "2001:db8::1/64")
	h.waitFor()
}

func TestDeprecatedAddress(t *testing.T) {
	t.Parallel()
	h := startWatch(t)
	h.waitFor()
	old := h.newAddr("2001:db8::1/64", unix.IFA_F_NODAD)
	old.ValidLft = 3600 // with a preferred lifetime of zero
	h.changeLink(func(l netlink.Link) error { return h.handle.AddrAdd(l, old) }, "veth0")
	h.waitFor("2001:db8::1")
}

// TestNotificationOverflow checks that no address is missed if the socket buffer overflows.
func TestNotificationOverflow(t *testing.T) {
	t.Parallel()
	const n = 2000
	release := make(chan struct{})
	ns := nettest.NamespaceT(t)
	handle, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	first, last := make(chan struct{}), make(chan int, n)
	done := make(chan error, 1)
	go func() {
		done <- nodeip.Watch(ctx, nodeip.Options{NetNS: ns.Fd()}, func(a nodeip.Addresses) {
			addrs := a.All
			last <- len(addrs)
			select {
			case <-first:
			default:
				close(first)
				<-release // stop receiving
			}
		})
	}()
	<-first
	for i := range n {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, byte(i>>8), byte(i)), Mask: net.CIDRMask(32, 32)}}
		if err := handle.AddrAdd(lo, addr); err != nil {
			t.Fatal(err)
		}
	}
	close(release)
	deadline := time.After(10 * time.Second)
	got := 0
	for got != n {
		select {
		case got = <-last:
		case <-deadline:
			t.Fatalf("%d addresses delivered, want %d", got, n)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch returned an error: %v", err)
	}
}

func TestNoSuchNamespace(t *testing.T) {
	t.Parallel()
	err := nodeip.Watch(t.Context(), nodeip.Options{NetNS: 1 << 20}, func(nodeip.Addresses) { t.Error("delivered") })
	if err == nil {
		t.Error("no error")
	}
}

// TestLocalRoutes checks which local routes are delivered, and that changes are.
func TestLocalRoutes(t *testing.T) {
	t.Parallel()
	h := startWatch(t)
	await := func(want ...string) {
		t.Helper()
		var got []string
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			got = nil
			if latest := h.latest.Load(); latest != nil {
				for _, route := range latest.Routes {
					got = append(got, route.String())
				}
			}
			if slices.Equal(got, want) {
				return
			}
		}
		t.Fatalf("local routes (-want +got):\n%s", cmp.Diff(want, got))
	}
	change := func(fn func(*netlink.Route) error, prefix string, table, typ int) {
		t.Helper()
		p := netip.MustParsePrefix(prefix)
		h.changeLink(func(l netlink.Link) error {
			scope := netlink.SCOPE_LINK
			if typ == unix.RTN_LOCAL {
				scope = netlink.SCOPE_HOST
			}
			return fn(&netlink.Route{
				LinkIndex: l.Attrs().Index, Type: typ, Table: table, Scope: scope, Family: familyOf(p),
				Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
			})
		}, "veth0")
	}
	h.addAddr("veth0", "10.0.0.1/24", 0)
	await()
	change(h.handle.RouteAdd, "192.0.2.90/32", unix.RT_TABLE_LOCAL, unix.RTN_LOCAL)
	await("192.0.2.90/32")
	change(h.handle.RouteAdd, "2001:db8:5::/64", unix.RT_TABLE_LOCAL, unix.RTN_LOCAL)
	await("192.0.2.90/32", "2001:db8:5::/64")
	// Routes such as those of a transparent proxy, and of other networks.
	change(h.handle.RouteAdd, "0.0.0.0/0", 100, unix.RTN_LOCAL)
	change(h.handle.RouteAdd, "203.0.113.0/24", unix.RT_TABLE_MAIN, unix.RTN_UNICAST)
	change(h.handle.RouteAdd, "198.51.100.0/24", unix.RT_TABLE_LOCAL, unix.RTN_LOCAL)
	await("192.0.2.90/32", "198.51.100.0/24", "2001:db8:5::/64")
	change(h.handle.RouteDel, "192.0.2.90/32", unix.RT_TABLE_LOCAL, unix.RTN_LOCAL)
	await("198.51.100.0/24", "2001:db8:5::/64")
}

// TestVirtualAddresses checks which addresses are virtual.
func TestVirtualAddresses(t *testing.T) {
	t.Parallel()
	h := startWatch(t)
	h.addAddr("veth0", "10.0.0.1/24", 0)
	h.addAddr("lo", "10.96.0.10/32", 0)
	h.addAddr("lo", "10.0.0.2/32", 0)
	h.addAddr("veth0", "10.0.0.2/24", 0)
	want := []string{"10.96.0.10"}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "nodelocaldns"
	if err := h.handle.LinkAdd(&netlink.Dummy{LinkAttrs: attrs}); err != nil {
		t.Logf("this kernel has no dummy interfaces: %v", err)
	} else {
		h.addAddr("nodelocaldns", "10.96.0.11/32", 0)
		want = append(want, "10.96.0.11")
	}
	var got []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		got = nil
		if latest := h.latest.Load(); latest != nil {
			for _, addr := range latest.Virtual {
				if !addr.IsLoopback() {
					got = append(got, addr.String())
				}
			}
		}
		if slices.Equal(got, want) {
			return
		}
	}
	t.Errorf("virtual addresses (-want +got):\n%s", cmp.Diff(want, got))
}

func familyOf(p netip.Prefix) int {
	if p.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
