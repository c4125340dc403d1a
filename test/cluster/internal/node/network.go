package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// Interface is the name of a node's interface in the network of all nodes. The control plane
// creates it.
const Interface = "eth0"

// ConfigureNetwork sets the node's addresses and the routes to the pods of other nodes.
func ConfigureNetwork(ctx context.Context, cluster *topology.Cluster, n topology.Node) error {
	link, err := waitForLink(ctx, Interface)
	if err != nil {
		return err
	}
	for name, value := range map[string]string{
		"net/ipv4/ip_forward":                 "1",
		"net/ipv4/ip_unprivileged_port_start": "0", // as containerd sets it for pods
		"net/ipv6/conf/all/forwarding":        "1",
		"net/ipv6/conf/all/accept_dad":        "0",
		"net/ipv6/conf/default/accept_dad":    "0",
		// Packets between pods of a node pass the bridge.
		"net/bridge/bridge-nf-call-iptables":  "1",
		"net/bridge/bridge-nf-call-ip6tables": "1",
	} {
		if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
			return fmt.Errorf("set %s to %s: %w", name, value, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for i, host := range topology.Host() {
		address := netip.PrefixFrom(n.Addresses()[i], host.Bits())
		if err := AddAddress(link, address); err != nil {
			return fmt.Errorf("add address %s: %w", address, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, host := range topology.Host() {
		if err := AddRoute(link, netip.Prefix{}, host.Addr()); err != nil {
			return err
		}
	}
	for _, other := range cluster.AllNodes() {
		if other.Number == n.Number {
			continue
		}
		if err := AddPodRoutes(link, other); err != nil {
			return err
		}
	}
	return nil
}

func waitForLink(ctx context.Context, name string) (netlink.Link, error) {
	const period = 20 * time.Millisecond
	for {
		link, err := netlink.LinkByName(name)
		if err == nil || !errors.As(err, new(netlink.LinkNotFoundError)) {
			return link, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(period):
		}
	}
}

// AddAddress adds an address to an interface. IPv6 addresses can be used at once.
func AddAddress(link netlink.Link, address netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(address)}
	if address.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrReplace(link, a)
}

// AddPodRoutes adds the routes to the pods of a node.
func AddPodRoutes(link netlink.Link, n topology.Node) error {
	for i, pods := range n.PodCIDRs() {
		if err := AddRoute(link, pods, n.Addresses()[i]); err != nil {
			return err
		}
	}
	return nil
}

// AddRoute adds a route by way of a gateway. The zero prefix means the default route of the
// gateway's family.
func AddRoute(link netlink.Link, to netip.Prefix, gateway netip.Addr) error {
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway.AsSlice()}
	if to.IsValid() {
		route.Dst = ipNet(to)
	}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("add a route to %s by way of %s: %w", to, gateway, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
