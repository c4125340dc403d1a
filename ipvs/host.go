package ipvs

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// LinkName is the name of the dummy interface that cluster IPs are bound to.
	LinkName = "fairlead0"
	// RouteTable is the routing table with the routes to cluster IPs.
	RouteTable = 0xfa1d
	// rulePriority is the priority of the rule that looks up RouteTable: after table local,
	// and before the rules of pod networks.
	rulePriority = 20
	// routeProtocol marks the backend's routes (rtm_protocol).
	routeProtocol = 0xfa
)

// host configures the node's network except for IPVS and nftables: the interface, the routing
// rules, and the routes to cluster IPs.
//
// Cluster IPs are bound by local routes and not by addresses of the interface, because the
// kernel needs quadratic time for many addresses, and answers ARP requests for them by
// default. The routes are in a dedicated table that is looked up only for incoming packets.
// Packets from the node keep their usual source address and route, and IPVS handles them on
// output, whatever the route.
type host struct {
	netns  int
	handle *netlink.Handle
	routes *nlconn.Conn
	link   int
}

func openHost(netns int) (*host, error) {
	h := &host{netns: netns}
	err := inNamespace(netns, func() error {
		var err error
		if h.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open netlink socket for interfaces: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if h.routes, err = nlconn.Dial(unix.NETLINK_ROUTE, netns); err != nil {
		h.handle.Close()
		return nil, err
	}
	return h, nil
}

func (h *host) close() error {
	h.handle.Close()
	return h.routes.Close()
}

// setUp creates the interface and the routing rules if they do not exist, and otherwise writes
// nothing. The error wraps unix.EOPNOTSUPP if the kernel has no dummy interfaces.
func (h *host) setUp() error {
	link, err := h.handle.LinkByName(LinkName)
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = LinkName
		if err = h.handle.LinkAdd(&netlink.Dummy{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("create dummy interface %s: %w", LinkName, err)
		}
		link, err = h.handle.LinkByName(LinkName)
	}
	if err != nil {
		return fmt.Errorf("find interface %s: %w", LinkName, err)
	}
	if link.Type() != "dummy" {
		return fmt.Errorf("interface %s is of type %s, want dummy: another program created it; remove or rename it", LinkName, link.Type())
	}
	h.link = link.Attrs().Index
	if link.Attrs().Flags&unix.IFF_UP == 0 {
		// The interface needs no link-local address, because nothing is sent from it.
		if err := h.setSysctls(map[string]string{"net/ipv6/conf/" + LinkName + "/addr_gen_mode": "1"}); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := h.handle.LinkSetUp(link); err != nil {
			return fmt.Errorf("set interface %s up: %w", LinkName, err)
		}
	}
	for _, f := range families() {
		if err := h.setUpFamily(f); err != nil && !isFamilyUnsupported(f, err) {
			return err
		}
	}
	return nil
}

// linkIndex returns the index of the interface after setUp.
func (h *host) linkIndex() int { return h.link }

func families() []dataplane.Family { return []dataplane.Family{dataplane.IPv4, dataplane.IPv6} }

// isFamilyUnsupported reports whether err means that the kernel has no IPv6 or that IPv6 is
// disabled.
func isFamilyUnsupported(f dataplane.Family, err error) bool {
	if f != dataplane.IPv6 {
		return false
	}
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES)
}

func (h *host) setUpFamily(f dataplane.Family) error {
	exists, err := h.hasLookupRule(f)
	if err != nil {
		return err
	}
	if !exists {
		if err := h.handle.RuleAdd(lookupRule(f)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add %s rule that looks up routing table %d: %w", f, RouteTable, err)
		}
	}
	// Connections of the node need a route to the internal addresses after translation, so
	// these are bound to the node too.
	answers, err := h.changeRoutes(unix.RTM_NEWROUTE, unix.RT_TABLE_LOCAL, []netip.Prefix{internalNet(f)})
	if err == nil {
		err = answers[0]
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("bind internal addresses %s: %w", internalNet(f), err)
	}
	return nil
}

// lookupRule returns the rule `not iif lo lookup 64029`.
func lookupRule(f dataplane.Family) *netlink.Rule {
	r := netlink.NewRule()
	r.Family = unix.AF_INET
	if f == dataplane.IPv6 {
		r.Family = unix.AF_INET6
	}
	r.Priority, r.Table, r.IifName, r.Invert = rulePriority, RouteTable, "lo", true
	return r
}

func (h *host) hasLookupRule(f dataplane.Family) (bool, error) {
	want := lookupRule(f)
	rules, err := h.handle.RuleListFiltered(want.Family, want, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PRIORITY)
	if err != nil {
		return false, fmt.Errorf("list %s routing rules: %w", f, err)
	}
	for _, r := range rules {
		if r.IifName == want.IifName && r.Invert {
			return true, nil
		}
	}
	return false, nil
}

// remove deletes the routing rules and the interface; the kernel deletes its routes.
func (h *host) remove() error {
	var errs []error
	for _, f := range families() {
		exists, err := h.hasLookupRule(f)
		if err == nil && exists {
			err = h.handle.RuleDel(lookupRule(f))
		}
		if err != nil && !isFamilyUnsupported(f, err) {
			errs = append(errs, fmt.Errorf("delete %s rule: %w", f, err))
		}
	}
	link, err := h.handle.LinkByName(LinkName)
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		return errors.Join(errs...)
	}
	if err == nil && link.Type() == "dummy" {
		err = h.handle.LinkDel(link)
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("delete interface %s: %w", LinkName, err))
	}
	return errors.Join(errs...)
}

// setSysctls sets sysctls, identified by their paths below /proc/sys. It writes only values
// that differ. The error wraps fs.ErrNotExist if the kernel lacks a sysctl.
func (h *host) setSysctls(values map[string]string) error {
	return inNamespace(h.netns, func() error {
		var errs []error
		for name, value := range values {
			path := "/proc/sys/" + name
			have, err := os.ReadFile(path)
			if err == nil && strings.TrimSpace(string(have)) == value {
				continue
			}
			if err == nil {
				err = os.WriteFile(path, []byte(value), 0)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("set sysctl %s to %s: %w", strings.ReplaceAll(name, "/", "."), value, err))
			}
		}
		return errors.Join(errs...)
	})
}

// requiredSysctls returns the sysctls that the backend needs.
func requiredSysctls(strictARP bool) map[string]string {
	values := map[string]string{
		// Add connections to connection tracking, for masquerading.
		"net/ipv4/vs/conntrack": "1",
		// End connections to a deleted destination immediately instead of dropping their
		// packets.
		"net/ipv4/vs/expire_nodest_conn": "1",
		// Select another endpoint for a client whose persistence entry leads to a destination
		// with weight 0.
		"net/ipv4/vs/expire_quiescent_template": "1",
	}
	if strictARP {
		values["net/ipv4/conf/all/arp_ignore"] = "1"
		values["net/ipv4/conf/all/arp_announce"] = "2"
	}
	return values
}
