package trace

import (
	"errors"
	"fmt"
	"net/netip"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/nft"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Host answers questions about the node from its routing tables and from IPVS. It implements
// [nft.Host].
type Host struct {
	netns  int
	handle *netlink.Handle
	// balance is set if IPVS selects endpoints.
	balance bool
}

// OpenHost opens a Host for a network namespace, 0 for the namespace of the calling thread.
// balance says whether IPVS selects endpoints.
func OpenHost(ns int, balance bool) (*Host, error) {
	at := netns.None()
	if ns != 0 {
		at = netns.NsHandle(ns)
	}
	handle, err := netlink.NewHandleAt(at, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket for routes: %w", err)
	}
	return &Host{netns: ns, handle: handle, balance: balance}, nil
}

// Close closes the connection to the kernel.
func (h *Host) Close() { h.handle.Close() }

// IsLocal implements [nft.Host].
func (h *Host) IsLocal(addr netip.Addr) (bool, error) {
	route, ok, err := h.route(addr)
	return ok && route.Type == unix.RTN_LOCAL, err
}

// Destinations implements [nft.Host].
func (h *Host) Destinations(p dataplane.Protocol, server netip.AddrPort, client netip.Addr) (nft.Balance, bool, error) {
	if !h.balance {
		return nft.Balance{}, false, nil
	}
	return ipvs.Destinations(h.netns, p, server, client)
}

// SourceFor returns the address that the node uses for packets to addr. ok is false if the node
// has no route.
func (h *Host) SourceFor(addr netip.Addr) (source netip.Addr, ok bool, err error) {
	route, ok, err := h.route(addr)
	if err != nil || !ok {
		return netip.Addr{}, false, err
	}
	source, ok = netip.AddrFromSlice(route.Src)
	return source.Unmap(), ok, nil
}

// InterfaceTo returns the name of the interface through which the node reaches addr. Packets from
// addr usually arrive on it. ok is false if the node has no route.
func (h *Host) InterfaceTo(addr netip.Addr) (name string, ok bool, err error) {
	route, ok, err := h.route(addr)
	if err != nil || !ok {
		return "", false, err
	}
	link, err := h.handle.LinkByIndex(route.LinkIndex)
	if err != nil {
		return "", false, fmt.Errorf("find the interface of the route to %s: %w", addr, err)
	}
	return link.Attrs().Name, true, nil
}

func (h *Host) route(addr netip.Addr) (netlink.Route, bool, error) {
	routes, err := h.handle.RouteGet(addr.AsSlice())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES):
		return netlink.Route{}, false, nil
	case err != nil:
		return netlink.Route{}, false, fmt.Errorf("look up the route to %s: %w", addr, err)
	case len(routes) == 0:
		return netlink.Route{}, false, nil
	}
	return routes[0], true, nil
}
