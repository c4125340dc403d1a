package ipvs

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"fairlead.io/fairlead/dataplane"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OtherServer is a virtual server that Fairlead does not manage.
type OtherServer struct {
	Protocol dataplane.Protocol
	Addr     netip.AddrPort
}

// OtherServers returns the virtual servers of the thread's network namespace that Fairlead does
// not manage and that match selects. It returns none if the kernel has no IPVS.
func OtherServers(match func(OtherServer) bool) (others []OtherServer, err error) {
	err = withIPVS(func(c *ipvsConn) error {
		h, err := openHost(0)
		if err != nil {
			return err
		}
		defer h.close() //nolint:errcheck // nothing was written
		bound, servers, err := readServers(c, h)
		if err != nil {
			return err
		}
		for s := range servers {
			other := OtherServer{s.protocol, s.addr}
			if !isInternal(s.addr.Addr()) && !bound[s.addr.Addr()] && match(other) {
				others = append(others, other)
			}
		}
		return nil
	})
	return others, err
}

// readServers returns the addresses bound to Fairlead's interface, and all virtual servers.
func readServers(c *ipvsConn, h *host) (bound map[netip.Addr]bool, servers map[serverKey]settings, err error) {
	if bound, err = readBoundAddrs(h); err != nil {
		return nil, nil, err
	}
	servers, err = c.dumpServers()
	return bound, servers, err
}

// readBoundAddrs returns the addresses bound to Fairlead's interface, if that exists.
func readBoundAddrs(h *host) (map[netip.Addr]bool, error) {
	if link, err := h.handle.LinkByName(LinkName); err == nil {
		h.link = link.Attrs().Index
	}
	return h.boundAddrs()
}

// DeleteOtherServers deletes virtual servers and returns how many existed.
func DeleteOtherServers(others []OtherServer) (deleted int, err error) {
	if len(others) == 0 {
		return 0, nil
	}
	err = withIPVS(func(c *ipvsConn) error {
		requests := make([]request, len(others))
		for i, s := range others {
			requests[i] = request{command: delService, serverKey: serverKey{s.Protocol, s.Addr}}
		}
		answers, err := c.run(requests)
		for i, answer := range answers {
			switch {
			case answer == nil:
				deleted++
			case !isNotFound(answer):
				err = errors.Join(err, fmt.Errorf("%s: %w", requests[i], answer))
			}
		}
		return err
	})
	return deleted, err
}

// ActiveConnections returns the number of active connections of virtual servers. Closed TCP
// connections and UDP flows are not active.
func ActiveConnections(others []OtherServer) (active int, err error) {
	if len(others) == 0 {
		return 0, nil
	}
	servers := make([]serverKey, len(others))
	for i, s := range others {
		servers[i] = serverKey{s.Protocol, s.Addr}
	}
	err = withIPVS(func(c *ipvsConn) error {
		active, err = c.countActive(servers)
		return err
	})
	return active, err
}

// countActive returns the number of active connections of virtual servers.
func (c *ipvsConn) countActive(servers []serverKey) (active int, err error) {
	for _, s := range servers {
		destinations, err := c.dumpDestinations(s)
		if err != nil {
			return 0, err
		}
		for _, d := range destinations {
			active += int(d.active)
		}
	}
	return active, nil
}

// withIPVS calls fn with a connection to IPVS of the thread's network namespace. It does nothing
// if the kernel has not loaded IPVS, because a request would make the kernel load the module.
func withIPVS(fn func(*ipvsConn) error) error {
	if _, err := os.Stat("/proc/thread-self/net/ip_vs"); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	c, err := dialIPVS(0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(fn(c), c.close())
}

// kubeProxyAddrs returns the addresses that kube-proxy in its mode ipvs has bound.
func (h *host) kubeProxyAddrs() (map[netip.Addr]bool, error) {
	addrs := map[netip.Addr]bool{}
	link, err := h.handle.LinkByName("kube-ipvs0")
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		return addrs, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find interface kube-ipvs0: %w", err)
	}
	list, err := h.handle.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of interface kube-ipvs0: %w", err)
	}
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			addrs[addr.Unmap()] = true
		}
	}
	return addrs, nil
}
