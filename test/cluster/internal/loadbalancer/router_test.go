package loadbalancer

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/test/cluster/internal/node"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// TestRoutes checks the routes to an address of each family in the kernel while its nodes change.
func TestRoutes(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Fatal("needs root")
	}
	done := make(chan error)
	go func() {
		// The thread stays locked, so it and its network namespace end with the goroutine.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = checkRoutes(t)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func checkRoutes(t *testing.T) error {
	t.Helper()
	lan := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lan"}}
	if err := netlink.LinkAdd(lan); err != nil {
		return err
	}
	for _, address := range topology.Host() {
		if err := node.AddAddress(lan, address); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(lan); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	r, err := newRouter()
	if err != nil {
		return err
	}
	nodes := (&topology.Cluster{Nodes: 3, Zones: 1}).AllNodes()
	ipv4, ipv6 := netip.MustParseAddr("172.30.1.7"), netip.MustParseAddr("fd00:172:30:1::7")
	for _, step := range []struct {
		name     string
		change   func(netip.Addr) error
		gateways []string // the possible ones, IPv4 and IPv6; none means that packets are dropped
	}{
		{"no route", func(netip.Addr) error { return nil }, nil},
		{"two nodes", func(a netip.Addr) error { return r.set(a, nodes[:2]) }, []string{"172.30.0.11", "172.30.0.12", "fd00:172:30::b", "fd00:172:30::c"}},
		{"another node", func(a netip.Addr) error { return r.set(a, nodes[2:]) }, []string{"172.30.0.13", "fd00:172:30::d"}},
		{"no node", func(a netip.Addr) error { return r.set(a, nil) }, nil},
		{"a node again", func(a netip.Addr) error { return r.set(a, nodes[:1]) }, []string{"172.30.0.11", "fd00:172:30::b"}},
		{"removed", r.remove, nil},
	} {
		for i, address := range []netip.Addr{ipv4, ipv6} {
			if err := step.change(address); err != nil {
				return fmt.Errorf("%s: %s: %w", step.name, address, err)
			}
			routes, err := netlink.RouteGet(address.AsSlice())
			if err != nil || len(routes) != 1 {
				return fmt.Errorf("%s: %s: routes %v: %w", step.name, address, routes, err)
			}
			got, want := routes[0], topology.Client()[i]
			if source, _ := netip.AddrFromSlice(got.Src); source.Unmap() != want {
				t.Errorf("%s: %s: source %s, want %s", step.name, address, source, want)
			}
			if len(step.gateways) == 0 {
				if got.LinkIndex != r.nowhere.Attrs().Index {
					t.Errorf("%s: %s: route %v, want one that drops packets", step.name, address, got)
				}
				continue
			}
			gateway, _ := netip.AddrFromSlice(got.Gw)
			found := false
			for _, g := range step.gateways {
				found = found || g == gateway.Unmap().String()
			}
			if !found {
				t.Errorf("%s: %s: gateway %s, want one of %s", step.name, address, gateway, step.gateways)
			}
		}
	}
	return nil
}
