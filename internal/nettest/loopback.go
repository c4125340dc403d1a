package nettest

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ExposeLoopback sets the sysctl route_localnet on the node's link to Outside and lets
// Outside send packets for loopback addresses of both families to the node. Outside loses its
// own loopback addresses.
func (n *Network) ExposeLoopback() error {
	for _, h := range []*Host{n.Node, n.Outside} {
		if err := h.setSysctls(map[string]string{"ipv4/conf/eth0/route_localnet": "1"}); err != nil {
			return err
		}
	}
	if err := n.routeLoopback(); err != nil {
		return fmt.Errorf("route loopback addresses from %s to %s: %w", n.Outside.Name, n.Node.Name, err)
	}
	return nil
}

func (n *Network) routeLoopback() error {
	handle, err := netlink.NewHandleAt(netns.NsHandle(n.Outside.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	link, err := handle.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	own, err := handle.AddrList(lo, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the addresses of lo: %w", err)
	}
	var errs []error
	for _, addr := range own {
		errs = append(errs, handle.AddrDel(lo, &addr))
	}
	for _, r := range []struct {
		to  netip.Prefix
		via netip.Addr
	}{{netip.MustParsePrefix("127.0.0.0/8"), n.Node.IPv4}, {netip.MustParsePrefix("::1/128"), n.Node.IPv6}} {
		errs = append(errs, handle.RouteAdd(&netlink.Route{
			LinkIndex: link.Attrs().Index, Family: familyOf(r.via), Dst: ipNet(r.to), Gw: r.via.AsSlice(),
		}))
	}
	return errors.Join(errs...)
}
