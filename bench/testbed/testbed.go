// Package testbed provides the environment for benchmarks of Service proxies: network namespaces
// for a client, a node and the endpoints, and a probe that measures with packets when a change
// takes effect, whichever program makes the change.
//
// Endpoint addresses are of two kinds. Watched addresses, in [WatchedCIDR], are on one host where
// the probe receives packets. The node's routing drops packets to background addresses, in
// [BackgroundCIDR], because the probe would learn nothing from them.
// [Testbed.SetBackgroundReachable] moves background addresses to the host of the watched ones.
// Services may have any address in [ServiceCIDR].
package testbed

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// Networks and addresses of every [Testbed]. They are constant, so that objects can be created
// before the testbed.
var (
	// ClusterCIDR contains the addresses of all pods.
	ClusterCIDR = netip.MustParsePrefix("10.0.0.0/8") //nolint:gochecknoglobals // a constant
	// BackgroundCIDR contains the addresses of endpoints that the probe does not watch.
	BackgroundCIDR = netip.MustParsePrefix("10.0.0.0/9") //nolint:gochecknoglobals // a constant
	// WatchedCIDR contains the addresses of endpoints where the probe receives packets.
	WatchedCIDR = netip.MustParsePrefix("10.128.0.0/10") //nolint:gochecknoglobals // a constant
	// ServiceCIDR contains the addresses of Services.
	ServiceCIDR = netip.MustParsePrefix("172.16.0.0/12") //nolint:gochecknoglobals // a constant

	// NodeIPv4 is the node's address. MachineIPv4 is the address of a machine that [Testbed.Attach]
	// connects to the node.
	NodeIPv4    = netip.MustParseAddr("192.0.2.1")    //nolint:gochecknoglobals // a constant
	MachineIPv4 = netip.MustParseAddr("198.51.100.1") //nolint:gochecknoglobals // a constant

	clientCIDR = netip.MustParsePrefix("10.192.0.0/11") //nolint:gochecknoglobals // a constant: source addresses of the probe
	podCIDR    = netip.MustParsePrefix("10.224.0.0/16") //nolint:gochecknoglobals // a constant: addresses of the client and of the host of the endpoints
)

// Testbed consists of a client, a node and a host that has the addresses of all endpoints. Close
// removes it.
type Testbed struct {
	network *nettest.Network
	// Node runs the Service proxy.
	Node *nettest.Host
	// Client is a pod that connects to Services. Endpoints is the host that has the addresses of
	// the endpoints.
	Client, Endpoints *nettest.Host
}

// Options configures a [Testbed].
type Options struct {
	// Name is the prefix of the namespaces' names under /run/netns, see [nettest.Options]. Empty
	// makes the namespaces anonymous, so that none outlives the process.
	Name string
}

// New creates the namespaces.
func New(opts Options) (*Testbed, error) {
	network, err := nettest.New(nettest.Options{Name: opts.Name, PodCIDRs: []netip.Prefix{podCIDR}})
	if err != nil {
		return nil, fmt.Errorf("create the namespaces of the testbed: %w", err)
	}
	r := &Testbed{network: network, Node: network.Node}
	if err := r.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("create the namespaces of the testbed: %w", err), network.Close())
	}
	return r, nil
}

func (r *Testbed) build() (err error) {
	if r.Client, err = r.network.AddPod("client"); err != nil {
		return err
	}
	if r.Endpoints, err = r.network.AddPod("endpoints"); err != nil {
		return err
	}
	for _, prefix := range []netip.Prefix{BackgroundCIDR, WatchedCIDR} {
		if err := r.Endpoints.AddNetwork(prefix); err != nil {
			return err
		}
	}
	return r.replaceRoutes(
		r.routeViaEndpoints(WatchedCIDR),
		blackholeRoute(BackgroundCIDR),
		// Drop packets to Services that no proxy translates. A proxy may add more specific
		// routes to the addresses of Services.
		blackholeRoute(ServiceCIDR),
		blackholeRoute(clientCIDR),
	)
}

// NewMachine creates a host at [MachineIPv4] that outlives testbeds, for example for an API
// server. The caller must close it.
func NewMachine(name string) (*nettest.Host, error) {
	return nettest.NewStandaloneHost(name, MachineIPv4)
}

// Attach connects a machine to the node until the testbed is closed. A machine can be attached to
// one testbed at a time.
func (r *Testbed) Attach(machine *nettest.Host) error { return r.network.Attach(machine) }

// SetBackgroundReachable routes packets to background addresses to the host of the endpoints, or
// drops them.
func (r *Testbed) SetBackgroundReachable(reachable bool) error {
	if reachable {
		return r.replaceRoutes(r.routeViaEndpoints(BackgroundCIDR))
	}
	return r.replaceRoutes(blackholeRoute(BackgroundCIDR))
}

func (r *Testbed) routeViaEndpoints(prefix netip.Prefix) *netlink.Route {
	return &netlink.Route{Dst: ipNet(prefix), Gw: r.Endpoints.IPv4.AsSlice()}
}

func blackholeRoute(prefix netip.Prefix) *netlink.Route {
	return &netlink.Route{Dst: ipNet(prefix), Type: unix.RTN_BLACKHOLE}
}

// replaceRoutes adds or replaces routes of the node.
func (r *Testbed) replaceRoutes(routes ...*netlink.Route) error {
	handle, err := netlink.NewHandleAt(netns.NsHandle(r.Node.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in the node's namespace: %w", err)
	}
	defer handle.Close()
	for _, route := range routes {
		if err := handle.RouteReplace(route); err != nil {
			return fmt.Errorf("set the node's route to %s: %w", route.Dst, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Close removes the namespaces. It may be called more than once.
func (r *Testbed) Close() error { return r.network.Close() }

// TrackConnections makes the node track connections and able to translate them, as a node does that
// masquerades pods. The rule matches no packet of the testbed. The node must have no Service proxy.
func (r *Testbed) TrackConnections() error {
	conn, err := nftables.New(nftables.WithNetNSFd(r.Node.Fd()))
	if err != nil {
		return fmt.Errorf("track the node's connections: %w", err)
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "nat"})
	for name, hook := range map[string]*nftables.ChainHook{
		"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput, "postrouting": nftables.ChainHookPostrouting,
	} {
		priority := nftables.ChainPriorityNATDest
		if hook == nftables.ChainHookPostrouting {
			priority = nftables.ChainPriorityNATSource
		}
		chain := conn.AddChain(&nftables.Chain{Table: table, Name: name, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: priority})
		if hook == nftables.ChainHookPostrouting {
			const sourceOffset = 12 // in the IPv4 header
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: sourceOffset, Len: 4},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: MachineIPv4.AsSlice()},
				&expr.Masq{},
			}})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("track the node's connections: %w", err)
	}
	return nil
}
