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
	// LinkName is the dummy interface that the virtual addresses are bound to.
	LinkName = "fairlead0"
	// RouteTable is the routing table with the routes to cluster IPs.
	RouteTable = 0xfa1d
	// rulePriority is where its rule is: behind that of the table local and before
	// those that networks of pods have.
	rulePriority = 20
	// routeProtocol marks our routes (rtm_protocol).
	routeProtocol = 0xfa
)

// host is what is set up on the node besides IPVS: the interface, the rules, and
// the routes to cluster IPs.
//
// A cluster IP is bound by a local route instead of an address, for which the
// kernel takes quadratic time, and answers ARP if it is told nothing else. The
// routes are in a table of their own, which packets that arrive are looked up in:
// what the node itself sends keeps the address and the route that it would have
// anyway, and IPVS takes it on its way out, whatever the route.
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

// setUp makes the interface and the rules, where they are missing. It writes
// nothing if they are there. The error wraps unix.EOPNOTSUPP if the kernel has no
// dummy interfaces.
func (h *host) setUp() error {
	link, err := h.handle.LinkByName(LinkName)
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = LinkName
		if err = h.handle.LinkAdd(&netlink.Dummy{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("make the dummy interface %s: %w", LinkName, err)
		}
		link, err = h.handle.LinkByName(LinkName)
	}
	if err != nil {
		return fmt.Errorf("find the interface %s: %w", LinkName, err)
	}
	if link.Type() != "dummy" {
		return fmt.Errorf("the interface %s is of type %s, want dummy: it is somebody else's; remove or rename it", LinkName, link.Type())
	}
	h.link = link.Attrs().Index
	if link.Attrs().Flags&unix.IFF_UP == 0 {
		// No link-local address: nothing is sent from here.
		if err := h.setSysctls(map[string]string{"net/ipv6/conf/" + LinkName + "/addr_gen_mode": "1"}); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := h.handle.LinkSetUp(link); err != nil {
			return fmt.Errorf("set the interface %s up: %w", LinkName, err)
		}
	}
	for _, f := range families() {
		if err := h.setUpFamily(f); err != nil && !isFamilyUnsupported(f, err) {
			return err
		}
	}
	return nil
}

// linkIndex is the number of the interface, once it is set up.
func (h *host) linkIndex() int { return h.link }

func families() []dataplane.Family { return []dataplane.Family{dataplane.IPv4, dataplane.IPv6} }

// isFamilyUnsupported reports whether an error about a family is that of a kernel without IPv6,
// or with IPv6 switched off.
func isFamilyUnsupported(f dataplane.Family, err error) bool {
	if f != dataplane.IPv6 {
		return false
	}
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES)
}

func (h *host) setUpFamily(f dataplane.Family) error {
	there, err := h.hasLookupRule(f)
	if err != nil {
		return err
	}
	if !there {
		if err := h.handle.RuleAdd(lookupRule(f)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add the %s rule that looks up routing table %d: %w", f, RouteTable, err)
		}
	}
	// The internal addresses are the node's for its own connections as well, so
	// that there is a route when these are translated.
	answers, err := h.changeRoutes(unix.RTM_NEWROUTE, unix.RT_TABLE_LOCAL, []netip.Prefix{internalNet(f)})
	if err == nil {
		err = answers[0]
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("bind the internal addresses %s: %w", internalNet(f), err)
	}
	return nil
}

// lookupRule is `not iif lo lookup 64029`.
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
		return false, fmt.Errorf("list the %s routing rules: %w", f, err)
	}
	for _, r := range rules {
		if r.IifName == want.IifName && r.Invert {
			return true, nil
		}
	}
	return false, nil
}

// remove removes the interface, with which its routes go, and the rules.
func (h *host) remove() error {
	var errs []error
	for _, f := range families() {
		there, err := h.hasLookupRule(f)
		if err == nil && there {
			err = h.handle.RuleDel(lookupRule(f))
		}
		if err != nil && !isFamilyUnsupported(f, err) {
			errs = append(errs, fmt.Errorf("remove the %s rule: %w", f, err))
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
		errs = append(errs, fmt.Errorf("remove the interface %s: %w", LinkName, err))
	}
	return errors.Join(errs...)
}

// setSysctls sets the node's settings, by their paths below /proc/sys. It writes those
// that differ. That there is none is fs.ErrNotExist.
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
				errs = append(errs, fmt.Errorf("set the sysctl %s to %s: %w", strings.ReplaceAll(name, "/", "."), value, err))
			}
		}
		return errors.Join(errs...)
	})
}

// requiredSysctls returns the settings that the backend needs.
func requiredSysctls(strictARP bool) map[string]string {
	values := map[string]string{
		// Connections are known to connection tracking, for masquerading.
		"net/ipv4/vs/conntrack": "1",
		// Those to an endpoint that is gone end at once, rather than be dropped.
		"net/ipv4/vs/expire_nodest_conn": "1",
		// And a client who stuck to an endpoint that takes no more gets another.
		"net/ipv4/vs/expire_quiescent_template": "1",
	}
	if strictARP {
		values["net/ipv4/conf/all/arp_ignore"] = "1"
		values["net/ipv4/conf/all/arp_announce"] = "2"
	}
	return values
}
