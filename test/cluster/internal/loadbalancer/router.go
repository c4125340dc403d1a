package loadbalancer

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/test/cluster/internal/node"
	"fairlead.io/fairlead/test/cluster/internal/topology"
)

// router sets the routes from the client outside of the cluster.
type router struct {
	nowhere netlink.Link // drops all packets
	sources []netip.Addr // the client's addresses
}

// newRouter adds the client's addresses, and routes the load balancers' networks to an interface
// that drops all packets.
func newRouter() (*router, error) {
	r := &router{sources: topology.Client()}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	for _, address := range r.sources {
		if err := node.AddAddress(lo, netip.PrefixFrom(address, address.BitLen())); err != nil {
			return nil, fmt.Errorf("add address %s: %w", address, err)
		}
	}
	// A bridge without ports exists in every kernel that runs pods; a dummy interface may not.
	r.nowhere = &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "nowhere"}}
	err = netlink.LinkAdd(r.nowhere)
	if err == nil {
		err = netlink.LinkSetARPOff(r.nowhere)
	}
	if err == nil {
		err = netlink.LinkSetUp(r.nowhere)
	}
	if err != nil {
		return nil, fmt.Errorf("create interface nowhere: %w", err)
	}
	for _, network := range topology.LoadBalancerCIDRs() {
		if err := netlink.RouteReplace(r.drop(network)); err != nil {
			return nil, fmt.Errorf("add a route to %s: %w", network, err)
		}
	}
	return r, nil
}

// drop returns a route to the interface that drops packets.
func (r *router) drop(to netip.Prefix) *netlink.Route {
	return &netlink.Route{LinkIndex: r.nowhere.Attrs().Index, Dst: ipNet(to), Src: r.source(to.Addr())}
}

func (r *router) source(to netip.Addr) net.IP {
	for _, address := range r.sources {
		if address.Is4() == to.Is4() {
			return address.AsSlice()
		}
	}
	return nil
}

// set routes an address to nodes.
func (r *router) set(address netip.Addr, nodes []topology.Node) error {
	to := netip.PrefixFrom(address, address.BitLen())
	if len(nodes) == 0 {
		return netlink.RouteReplace(r.drop(to))
	}
	// A replaced multipath route of IPv6 can keep old hops.
	if err := r.remove(address); err != nil {
		return err
	}
	route := &netlink.Route{Dst: ipNet(to), Src: r.source(address)}
	for _, n := range nodes {
		gateway := n.IPv4
		if address.Is6() {
			gateway = n.IPv6
		}
		route.MultiPath = append(route.MultiPath, &netlink.NexthopInfo{Gw: gateway.AsSlice()})
	}
	return netlink.RouteReplace(route)
}

// remove removes the route to an address. Its network's route drops packets from then on.
func (r *router) remove(address netip.Addr) error {
	family := netlink.FAMILY_V4
	if address.Is6() {
		family = netlink.FAMILY_V6
	}
	to := ipNet(netip.PrefixFrom(address, address.BitLen()))
	routes, err := netlink.RouteListFiltered(family, &netlink.Route{Dst: to}, netlink.RT_FILTER_DST)
	if err != nil {
		return err
	}
	for _, route := range routes {
		if err := netlink.RouteDel(&route); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
