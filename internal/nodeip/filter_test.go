package nodeip

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// TestLocalRouteFilter checks which routes wake the watcher. Each notification makes it read all
// addresses, and the mode ipvs changes a local route for each added or deleted Service.
func TestLocalRouteFilter(t *testing.T) {
	t.Parallel()
	ns := nettest.NamespaceT(t)
	handle, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(handle.Close)
	lo, err := handle.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := handle.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	w, err := openWatcher(ns.Fd())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.close)
	// wakes reports whether a notification arrives. The kernel queues it before the change returns.
	wakes := func() bool {
		t.Helper()
		if err := w.notifications.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err := w.notifications.Receive()
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return err == nil
	}
	for wakes() { // addresses of lo
	}
	for _, tt := range []struct {
		prefix     string
		table, typ int
		want       bool
	}{
		{"192.0.2.90/32", unix.RT_TABLE_LOCAL, unix.RTN_LOCAL, true},
		{"2001:db8:5::1/128", unix.RT_TABLE_LOCAL, unix.RTN_LOCAL, true},
		{"192.0.2.91/32", 0xfa1d, unix.RTN_LOCAL, false},
		{"2001:db8:5::2/128", 0xfa1d, unix.RTN_LOCAL, false},
		{"192.0.2.92/32", 100, unix.RTN_LOCAL, false},
		{"192.0.2.93/32", unix.RT_TABLE_MAIN, unix.RTN_UNICAST, false},
	} {
		_, dst, err := net.ParseCIDR(tt.prefix)
		if err != nil {
			t.Fatal(err)
		}
		route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Table: tt.table, Type: tt.typ, Scope: netlink.SCOPE_HOST}
		for what, change := range map[string]func(*netlink.Route) error{"adding": handle.RouteReplace, "deleting": handle.RouteDel} {
			if what == "deleting" {
				if err := handle.RouteReplace(route); err != nil {
					t.Fatal(err)
				}
				wakes()
			}
			if err := change(route); err != nil {
				t.Fatalf("%s %s: %v", what, tt.prefix, err)
			}
			if got := wakes(); got != tt.want {
				t.Errorf("%s %s in table %d with type %d wakes the watcher: %t, want %t", what, tt.prefix, tt.table, tt.typ, got, tt.want)
			}
		}
	}
}
