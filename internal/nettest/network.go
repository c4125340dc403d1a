package nettest

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Options configures a [Network]. The zero value is valid.
type Options struct {
	// Name adds the namespaces to /run/netns as NAME-node, NAME-outside and NAME-<pod>, for
	// use with `ip netns exec`. New first removes namespaces that an earlier process left
	// under this name, so two processes must not use the same name. Empty means anonymous
	// namespaces.
	Name string
	// PodCIDRs are the ranges of pod addresses, one per family. The defaults are
	// 10.244.0.0/16 and fd00:10:244::/64.
	PodCIDRs []netip.Prefix
	// UniquePorts makes TCP clients avoid recently used source ports, as UDP and SCTP
	// clients always do. Otherwise the kernel chooses the port and may use one port for
	// connections to different addresses.
	UniquePorts bool
	// OnConnect, if not nil, is called at the start of each [Host.Connect] and
	// [Host.ConnectFrom] of the network's hosts. The function that it returns, if not nil, is
	// called with the result.
	OnConnect func(ConnectAttempt) func(Answer, error)
}

// ConnectAttempt is a connection that a host is about to open.
type ConnectAttempt struct {
	From    *Host
	Network string // tcp, udp or sctp
	// Source is the client's address. It is zero if the kernel selects it.
	Source netip.Addr
	To     netip.AddrPort
}

// Network is a node, its pods, and a host outside the pod network. Its methods may be called
// concurrently.
type Network struct {
	// Node forwards packets between the other hosts. Its addresses are 192.0.2.1 and
	// 2001:db8::1. Its default routes lead to Outside: netfilter sees packets that the node
	// sends only if their destination has a route.
	Node *Host
	// Outside is a client outside the pod network with the addresses 192.0.2.2 and
	// 2001:db8::2. It reaches all other hosts through Node. It drops packets from the node
	// that are not addressed to it.
	Outside *Host
	// PodCIDRs are the ranges of pod addresses, one per family.
	PodCIDRs []netip.Prefix

	name        string
	uniquePorts bool
	onConnect   func(ConnectAttempt) func(Answer, error)

	mu       sync.Mutex
	links    int          // number of links created; used in link names and hardware addresses
	next     []netip.Addr // the last assigned address of each of PodCIDRs
	pods     map[string]*Host
	attached []string // the node's links to hosts added by Attach
}

// Host is a standalone in a [Network]: a namespace with a name and one address per family.
type Host struct {
	*Namespace
	// Name is the host name in the answers of the host's servers.
	Name string
	// IPv4 and IPv6 are the host's addresses. A pod that was added with a single family has
	// the zero Addr for the other family.
	IPv4, IPv6 netip.Addr

	network *Network
	link    string // name of the node's end of a pod's veth

	lastPort atomic.Uint32 // see nextSourcePort

	mu         sync.Mutex
	closed     bool
	extraAddrs []netip.Addr // from AddAddr
	servers    map[*Server]struct{}
	sctp       map[netip.Addr]*sctpStack
}

// gateways returns the addresses of the node on every pod link.
func gateways() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{169, 254, 1, 1}), netip.MustParseAddr("fe80::1")}
}

// New creates a network without pods. The caller closes it.
func New(options Options) (*Network, error) {
	n := &Network{name: options.Name, uniquePorts: options.UniquePorts, onConnect: options.OnConnect, PodCIDRs: options.PodCIDRs, pods: map[string]*Host{}}
	if len(n.PodCIDRs) == 0 {
		n.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/64")}
	}
	for _, p := range n.PodCIDRs {
		n.next = append(n.next, p.Masked().Addr())
	}
	if n.name != "" {
		if err := RemoveNamespaces(n.name); err != nil {
			return nil, err
		}
	}
	if err := n.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("create network: %w", err), n.Close())
	}
	return n, nil
}

func (n *Network) build() error {
	var err error
	if n.Node, err = n.newHost("node", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")); err != nil {
		return err
	}
	if n.Outside, err = n.newHost("outside", netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")); err != nil {
		return err
	}
	err = n.Node.setSysctls(map[string]string{
		"ipv4/ip_forward":          "1",
		"ipv6/conf/all/forwarding": "1",
	})
	if err != nil {
		return err
	}
	return connect(
		linkEnd{host: n.Node, link: "eth0", mac: hardwareAddr(0, 1), addrs: n.Node.prefixes(24, 64), routes: defaultRoutes(n.Outside.Addrs())},
		linkEnd{host: n.Outside, link: "eth0", mac: hardwareAddr(0, 2), addrs: n.Outside.prefixes(24, 64), routes: defaultRoutes(n.Node.Addrs())},
	)
}

// newHost creates a host that has only a loopback device.
func (n *Network) newHost(name string, v4, v6 netip.Addr) (*Host, error) {
	var path string
	if n.name != "" {
		path = n.name + "-" + name
	}
	ns, err := NewNamespace(path)
	if err != nil {
		return nil, err
	}
	h := &Host{
		Namespace: ns, Name: name, IPv4: v4, IPv6: v6, network: n,
		servers: map[*Server]struct{}{}, sctp: map[netip.Addr]*sctpStack{},
	}
	h.lastPort.Store(rand.Uint32()) //nolint:gosec // arbitrary start
	if err := h.prepare(); err != nil {
		return nil, errors.Join(fmt.Errorf("host %s: %w", name, err), ns.Close())
	}
	return h, nil
}

func (h *Host) prepare() error {
	err := h.setSysctls(map[string]string{
		// A namespace inherits some of these values from the standalone.
		"ipv4/ip_forward":                  "0",
		"ipv4/conf/all/rp_filter":          "0",
		"ipv4/conf/default/rp_filter":      "0",
		"ipv4/conf/all/accept_redirects":   "0",
		"ipv4/conf/all/send_redirects":     "0",
		"ipv4/conf/default/send_redirects": "0",
		"ipv6/conf/all/disable_ipv6":       "0",
		"ipv6/conf/default/disable_ipv6":   "0",
		"ipv6/conf/all/forwarding":         "0",
		"ipv6/conf/default/accept_ra":      "0",
		// Disable generated link-local addresses and duplicate address detection.
		"ipv6/conf/all/accept_dad":           "0",
		"ipv6/conf/default/accept_dad":       "0",
		"ipv6/conf/default/addr_gen_mode":    "1",
		"ipv6/conf/default/accept_redirects": "0",
		// Disable ICMP rate limits, so that no refusal is lost. For IPv6 limit only a type
		// that is never sent, because the mask must not be empty.
		"ipv4/icmp_ratemask": "0",
		"ipv6/icmp/ratemask": "100",
		// Allow unprivileged ICMP sockets.
		"ipv4/ping_group_range": "0 2147483647",
	})
	if err != nil {
		return err
	}
	handle, err := netlink.NewHandleAt(netns.NsHandle(h.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := handle.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// setSysctls writes files under /proc/sys/net, which apply to the host's namespace.
func (h *Host) setSysctls(values map[string]string) error {
	return h.Do(func() error {
		for file, value := range values {
			if err := os.WriteFile(filepath.Join("/proc/sys/net", file), []byte(value), 0); err != nil {
				return fmt.Errorf("write sysctl: %w", err)
			}
		}
		return nil
	})
}

// Addrs returns the addresses of the host, IPv4 first.
func (h *Host) Addrs() []netip.Addr {
	return slices.DeleteFunc([]netip.Addr{h.IPv4, h.IPv6}, func(a netip.Addr) bool { return !a.IsValid() })
}

// NodeInterface returns the name of the node's interface to the host. It is empty for the node
// itself, and for a host that [Network.Attach] has attached.
func (h *Host) NodeInterface() string {
	switch {
	case h.link != "":
		return h.link
	case h.network.Outside == h:
		return "eth0"
	default:
		return ""
	}
}

// AddAddr adds an address to the host's loopback device. Servers started later listen on it
// too. It adds no routes: other hosts reach the address of the outside host through their
// default routes. The host does not choose the address as a source address for connections to
// other hosts, and does not masquerade with it.
func (h *Host) AddAddr(addr netip.Addr) error {
	handle, err := netlink.NewHandleAt(netns.NsHandle(h.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("add address %s to %s: open netlink: %w", addr, h.Name, err)
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err == nil {
		more := linkEnd{addrs: []netip.Prefix{netip.PrefixFrom(addr, addr.BitLen())}, deprecated: true}
		err = more.configure(handle, lo.Attrs().Index, nil)
	}
	if err != nil {
		return fmt.Errorf("add address %s to %s: %w", addr, h.Name, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.extraAddrs = append(h.extraAddrs, addr)
	return nil
}

// AddNetwork adds all addresses of a network to the host, for use with [Host.ConnectFrom].
// Like AddAddr, it adds no routes.
func (h *Host) AddNetwork(network netip.Prefix) error {
	handle, err := netlink.NewHandleAt(netns.NsHandle(h.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("add network %s to %s: open netlink: %w", network, h.Name, err)
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err == nil {
		err = handle.RouteAdd(&netlink.Route{
			LinkIndex: lo.Attrs().Index, Family: familyOf(network.Addr()), Dst: ipNet(network),
			Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
		})
	}
	if err != nil {
		return fmt.Errorf("add network %s to %s: %w", network, h.Name, err)
	}
	return h.setSysctls(map[string]string{"ipv6/ip_nonlocal_bind": "1"})
}

func (h *Host) prefixes(bits4, bits6 int) []netip.Prefix {
	prefixes := make([]netip.Prefix, 0, 2)
	for _, a := range h.Addrs() {
		prefixes = append(prefixes, netip.PrefixFrom(a, prefixLen(a, bits4, bits6)))
	}
	return prefixes
}

func prefixLen(a netip.Addr, bits4, bits6 int) int {
	if a.Is4() {
		return bits4
	}
	return bits6
}

// AddPod adds a pod to the node and returns when the pod is reachable. The pod gets the given
// addresses, at most one per family, or by default the next free addresses of PodCIDRs. Pod
// names must be unique. Closing the pod or the Network removes the pod.
func (n *Network) AddPod(name string, addrs ...netip.Addr) (*Host, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pods[name] != nil {
		return nil, fmt.Errorf("add pod %s: name is in use", name)
	}
	if len(addrs) == 0 {
		for i := range n.next {
			n.next[i] = n.next[i].Next()
			addrs = append(addrs, n.next[i])
		}
	}
	var v4, v6 netip.Addr
	for _, a := range addrs {
		if a.Is4() {
			v4 = a
		} else {
			v6 = a
		}
	}
	pod, err := n.newHost(name, v4, v6)
	if err != nil {
		return nil, fmt.Errorf("add pod: %w", err)
	}
	n.links++
	pod.link = fmt.Sprintf("veth%d", n.links)
	err = connect(
		linkEnd{host: n.Node, link: pod.link, mac: hardwareAddr(n.links, 1), addrs: gatewayPrefixes(), routes: pod.hostRoutes(n.Node)},
		linkEnd{host: pod, link: "eth0", mac: hardwareAddr(n.links, 2), addrs: pod.prefixes(32, 128), routes: defaultRoutes(gateways())},
	)
	if err != nil {
		// pod.Close locks n.mu.
		return nil, errors.Join(fmt.Errorf("add pod %s: %w", name, err), n.deleteLink(pod.link), pod.Namespace.Close())
	}
	n.pods[name] = pod
	return pod, nil
}

// Bypass adds a link that carries everything that one host sends to the addresses of another,
// bypassing the node. Packets in the opposite direction keep their route, so the node sees
// one direction only.
func (n *Network) Bypass(from, to *Host) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.links++
	link := fmt.Sprintf("bypass%d", n.links)
	routes := make([]route, 0, 2)
	for _, a := range to.Addrs() {
		source := from.IPv4
		if a.Is6() {
			source = from.IPv6
		}
		routes = append(routes, route{to: netip.PrefixFrom(a, a.BitLen()), source: source})
	}
	err := connect(
		linkEnd{host: from, link: link, mac: hardwareAddr(n.links, 1), routes: routes},
		linkEnd{host: to, link: link, mac: hardwareAddr(n.links, 2)},
	)
	if err != nil {
		return fmt.Errorf("create link that bypasses the node: %w", err)
	}
	return nil
}

// NewStandaloneHost creates a host that belongs to no Network and can outlive the networks
// that it is attached to with [Network.Attach]. The caller closes it.
func NewStandaloneHost(name string, addr netip.Addr) (*Host, error) {
	h, err := new(Network).newHost(name, addr, netip.Addr{})
	if err != nil {
		return nil, err
	}
	if err := h.addLoopbackAddr(addr); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// addLoopbackAddr adds the host's address to its loopback device.
func (h *Host) addLoopbackAddr(addr netip.Addr) error {
	handle, err := netlink.NewHandleAt(netns.NsHandle(h.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("host %s: open netlink: %w", h.Name, err)
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err == nil {
		own := linkEnd{addrs: []netip.Prefix{netip.PrefixFrom(addr, addr.BitLen())}}
		err = own.configure(handle, lo.Attrs().Index, nil)
	}
	if err != nil {
		return fmt.Errorf("host %s: %w", h.Name, err)
	}
	return nil
}

// Attach adds an IPv4 link between the node and a host created by [NewStandaloneHost].
// Closing the Network removes the link. Attach a host to one Network at a time, because the
// nodes of all Networks have the same addresses.
func (n *Network) Attach(standalone *Host) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.links++
	link := fmt.Sprintf("attach%d", n.links)
	to := func(a, from *Host) []route {
		return []route{{to: netip.PrefixFrom(a.IPv4, a.IPv4.BitLen()), source: from.IPv4}}
	}
	n.attached = append(n.attached, link)
	err := connect(
		linkEnd{host: n.Node, link: link, mac: hardwareAddr(n.links, 1), routes: to(standalone, n.Node)},
		linkEnd{host: standalone, link: link, mac: hardwareAddr(n.links, 2), routes: to(n.Node, standalone)},
	)
	if err != nil {
		return fmt.Errorf("attach %s: %w", standalone.Name, err)
	}
	return nil
}

// Close removes all pods, the node and the outside host, and stops their servers. It may be
// called more than once.
func (n *Network) Close() error {
	n.mu.Lock()
	var errs []error
	// Remove the links of attached hosts, so that they can be attached to another network.
	for _, link := range n.attached {
		errs = append(errs, n.deleteLink(link))
	}
	// Close the node first: the kernel removes its links with it. Removing them one by one
	// takes 50 ms each.
	hosts := []*Host{n.Node, n.Outside}
	for _, pod := range n.pods {
		hosts = append(hosts, pod)
	}
	n.mu.Unlock()
	for _, h := range hosts {
		if h != nil {
			errs = append(errs, h.Close())
		}
	}
	return errors.Join(errs...)
}

// Close stops the host's servers and removes the host from its network. After Close no packet
// reaches the host. It may be called more than once.
func (h *Host) Close() error {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil
	}
	h.closed = true
	servers := make([]*Server, 0, len(h.servers))
	for s := range h.servers {
		servers = append(servers, s)
	}
	h.mu.Unlock()

	var errs []error
	for _, s := range servers {
		errs = append(errs, s.Close())
	}
	h.mu.Lock()
	stacks := h.sctp
	h.sctp = nil
	h.mu.Unlock()
	for _, s := range stacks {
		errs = append(errs, s.close())
	}
	if h.link != "" {
		errs = append(errs, h.network.unlink(h))
	}
	errs = append(errs, h.Namespace.Close())
	return errors.Join(errs...)
}

// unlink removes the pod's link. The kernel would remove it too, but some time after the end
// of the namespace.
func (n *Network) unlink(pod *Host) error {
	n.mu.Lock()
	if n.pods[pod.Name] == pod {
		delete(n.pods, pod.Name)
	}
	n.mu.Unlock()
	if err := n.deleteLink(pod.link); err != nil {
		return fmt.Errorf("remove pod %s: %w", pod.Name, err)
	}
	return nil
}

// deleteLink removes a link by the name of the node's end. It returns nil if the link does
// not exist.
func (n *Network) deleteLink(name string) error {
	fd := n.Node.Fd()
	if fd < 0 {
		return nil // The link was removed with the node.
	}
	handle, err := netlink.NewHandleAt(netns.NsHandle(fd), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("delete link %s: open netlink: %w", name, err)
	}
	defer handle.Close()
	link, err := handle.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil {
		err = handle.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// linkEnd is one end of a veth pair and its configuration.
type linkEnd struct {
	host   *Host
	link   string
	mac    net.HardwareAddr
	addrs  []netip.Prefix
	routes []route
	// deprecated addresses are not chosen as source addresses if the host has others.
	deprecated bool
}

// route is a route through a link. If gateway is the zero Addr, the destination is on the
// link.
type route struct {
	to      netip.Prefix
	gateway netip.Addr
	source  netip.Addr
}

func (r route) neighbour() netip.Addr { return cmp.Or(r.gateway, r.to.Addr()) }

func defaultRoutes(via []netip.Addr) []route {
	routes := make([]route, 0, len(via))
	for _, gw := range via {
		unspecified := netip.IPv4Unspecified()
		if gw.Is6() {
			unspecified = netip.IPv6Unspecified()
		}
		routes = append(routes, route{to: netip.PrefixFrom(unspecified, 0), gateway: gw})
	}
	return routes
}

// hostRoutes returns the node's routes to the pod h. They set the source address, because the
// kernel would otherwise choose the gateway address of the link.
func (h *Host) hostRoutes(node *Host) []route {
	routes := make([]route, 0, 2)
	for _, a := range h.Addrs() {
		source := node.IPv4
		if a.Is6() {
			source = node.IPv6
		}
		routes = append(routes, route{to: netip.PrefixFrom(a, a.BitLen()), source: source})
	}
	return routes
}

func gatewayPrefixes() []netip.Prefix {
	prefixes := make([]netip.Prefix, 0, 2)
	for _, a := range gateways() {
		prefixes = append(prefixes, netip.PrefixFrom(a, prefixLen(a, 32, 64)))
	}
	return prefixes
}

// hardwareAddr returns a locally administered address for one end of a link.
func hardwareAddr(link, side int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x00, byte(side), byte(link >> 16), byte(link >> 8), byte(link)}
}

// connect creates a veth pair between two hosts, with addresses, neighbours and routes, and
// waits until it carries packets.
func connect(a, b linkEnd) error {
	handleA, err := netlink.NewHandleAt(netns.NsHandle(a.host.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in %s: %w", a.host.Name, err)
	}
	defer handleA.Close()
	handleB, err := netlink.NewHandleAt(netns.NsHandle(b.host.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in %s: %w", b.host.Name, err)
	}
	defer handleB.Close()

	veth := netlink.NewVeth(netlink.LinkAttrs{Name: a.link, HardwareAddr: a.mac, TxQLen: -1})
	veth.PeerName = b.link
	veth.PeerHardwareAddr = b.mac
	veth.PeerNamespace = netlink.NsFd(b.host.Fd())
	if err := handleA.LinkAdd(veth); err != nil {
		return fmt.Errorf("create link from %s to %s: %w", a.host.Name, b.host.Name, err)
	}
	linkA, err := setLinkUp(handleA, a)
	if err != nil {
		return err
	}
	linkB, err := setLinkUp(handleB, b)
	if err != nil {
		return err
	}
	if err := a.configure(handleA, linkA, b.mac); err != nil {
		return fmt.Errorf("configure link %s of %s: %w", a.link, a.host.Name, err)
	}
	if err := b.configure(handleB, linkB, a.mac); err != nil {
		return fmt.Errorf("configure link %s of %s: %w", b.link, b.host.Name, err)
	}
	if err := waitLinkUp(handleA, a); err != nil {
		return err
	}
	return waitLinkUp(handleB, b)
}

func setLinkUp(handle *netlink.Handle, e linkEnd) (int, error) {
	link, err := handle.LinkByName(e.link)
	if err != nil {
		return 0, fmt.Errorf("find link %s of %s: %w", e.link, e.host.Name, err)
	}
	if err := handle.LinkSetUp(link); err != nil {
		return 0, fmt.Errorf("set link %s of %s up: %w", e.link, e.host.Name, err)
	}
	return link.Attrs().Index, nil
}

// waitLinkUp waits until a link is operational. The end that is set up first has no carrier
// at that time, and the kernel drops its packets until a worker has noticed the carrier.
func waitLinkUp(handle *netlink.Handle, e linkEnd) error {
	deadline := time.Now().Add(kernelTimeout)
	for {
		link, err := handle.LinkByName(e.link)
		if err != nil {
			return fmt.Errorf("find link %s of %s: %w", e.link, e.host.Name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("link %s of %s is not up: %s", e.link, e.host.Name, link.Attrs().OperState)
		}
		time.Sleep(time.Millisecond)
	}
}

func (e linkEnd) configure(handle *netlink.Handle, index int, peer net.HardwareAddr) error {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}
	for _, p := range e.addrs {
		addr := &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD, Scope: unix.RT_SCOPE_UNIVERSE}
		if p.Addr().IsLinkLocalUnicast() {
			// The kernel does not masquerade with an address of this scope.
			addr.Scope = unix.RT_SCOPE_LINK
		}
		if p.Addr().Is4() {
			addr.Flags = 0
		}
		if e.deprecated {
			addr.Scope = unix.RT_SCOPE_LINK
			addr.ValidLft = math.MaxUint32 // valid forever with preferred lifetime 0, which is deprecated
		}
		if err := handle.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", p, err)
		}
		if err := waitAddrLocal(handle, p.Addr()); err != nil {
			return err
		}
	}
	for _, r := range e.routes {
		neighbour := r.neighbour()
		err := handle.NeighSet(&netlink.Neigh{
			LinkIndex: index, Family: familyOf(neighbour), State: netlink.NUD_PERMANENT, IP: neighbour.AsSlice(), HardwareAddr: peer,
		})
		if err != nil {
			return fmt.Errorf("add neighbour %s: %w", neighbour, err)
		}
		nl := &netlink.Route{LinkIndex: index, Family: familyOf(neighbour), Dst: ipNet(r.to), Scope: netlink.SCOPE_UNIVERSE}
		if r.gateway.IsValid() {
			nl.Gw = r.gateway.AsSlice()
			nl.Flags = int(netlink.FLAG_ONLINK)
		} else {
			nl.Scope = netlink.SCOPE_LINK
		}
		if r.source.IsValid() {
			nl.Src = r.source.AsSlice()
		}
		if err := handle.RouteAdd(nl); err != nil {
			return fmt.Errorf("add route to %s: %w", r.to, err)
		}
	}
	return nil
}

// kernelTimeout limits how long the kernel's workers may take on a busy machine. While many network
// namespaces come and go, they wait for the lock of all network devices.
const kernelTimeout = time.Minute

// waitAddrLocal waits until the host accepts packets to its address. For an IPv6 address, a
// kernel worker adds the local route after the address, even without duplicate address
// detection.
func waitAddrLocal(handle *netlink.Handle, addr netip.Addr) error {
	if addr.IsLinkLocalUnicast() {
		return nil // never a destination in these networks
	}
	deadline := time.Now().Add(kernelTimeout)
	for {
		routes, err := handle.RouteGet(addr.AsSlice())
		if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("address %s is not local: routes %v: %w", addr, routes, cmp.Or(err, os.ErrDeadlineExceeded))
		}
		time.Sleep(time.Millisecond)
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
