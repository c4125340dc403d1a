// Package testbed is what benchmarks of Service proxies measure in: network namespaces
// for a client, a node and the endpoints, and a probe that tells by packets when a
// change has its effect, whatever program makes it.
//
// The addresses of endpoints are of two kinds. [WatchedCIDR] ones are on one host, where the
// probe sees what arrives. What is sent to others, in [BackgroundCIDR], is dropped by the
// node's routing: the probe would learn nothing from it. [Testbed.SetBackgroundReachable] has all
// of them on that host. Services may have any address in [ServiceCIDR].
package testbed

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// The networks of a [Testbed]. They do not depend on it, so that objects can be made
// before.
var (
	// ClusterCIDR has all pods in it.
	ClusterCIDR = netip.MustParsePrefix("10.0.0.0/8") //nolint:gochecknoglobals // a constant
	// BackgroundCIDR has the addresses of endpoints that nobody looks at.
	BackgroundCIDR = netip.MustParsePrefix("10.0.0.0/9") //nolint:gochecknoglobals // a constant
	// WatchedCIDR has the addresses of endpoints that the probe sees packets arrive at.
	WatchedCIDR = netip.MustParsePrefix("10.128.0.0/10") //nolint:gochecknoglobals // a constant
	// ServiceCIDR has the addresses of Services.
	ServiceCIDR = netip.MustParsePrefix("172.16.0.0/12") //nolint:gochecknoglobals // a constant

	// NodeIPv4 is the node's address, and MachineIPv4 that of a machine that Join makes a
	// neighbour of it.
	NodeIPv4    = netip.MustParseAddr("192.0.2.1")    //nolint:gochecknoglobals // a constant
	MachineIPv4 = netip.MustParseAddr("198.51.100.1") //nolint:gochecknoglobals // a constant

	clientCIDR = netip.MustParsePrefix("10.192.0.0/11") //nolint:gochecknoglobals // a constant: what probes come from
	podCIDR    = netip.MustParsePrefix("10.224.0.0/16") //nolint:gochecknoglobals // a constant: the client's and the endpoints' own addresses
)

// Testbed is a client, a node and a host that has the endpoints. Close removes it all.
type Testbed struct {
	network *nettest.Network
	// Node is where the Service proxy runs.
	Node *nettest.Host
	// Client is a pod that connects, and Endpoints the host of the endpoints.
	Client, Endpoints *nettest.Host
}

// Options say how a [Testbed] is made.
type Options struct {
	// Name enters the namespaces under /run/netns, as [nettest.Options] says. Empty
	// means anonymous ones, of which nothing can be left behind.
	Name string
}

// New makes the namespaces.
func New(opts Options) (*Testbed, error) {
	network, err := nettest.New(nettest.Options{Name: opts.Name, PodCIDRs: []netip.Prefix{podCIDR}})
	if err != nil {
		return nil, fmt.Errorf("make the namespaces of a benchmark: %w", err)
	}
	r := &Testbed{network: network, Node: network.Node}
	if err := r.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("make the namespaces of a benchmark: %w", err), network.Close())
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
		// What no Service has translated goes nowhere either. This is below the
		// routes that a proxy may have to addresses of Services.
		blackholeRoute(ServiceCIDR),
		blackholeRoute(clientCIDR),
	)
}

// NewMachine makes a host at [MachineIPv4] that outlives testbeds, such as an API server's.
// The caller closes it.
func NewMachine(name string) (*nettest.Host, error) {
	return nettest.NewStandaloneHost(name, MachineIPv4)
}

// Attach joins the node with a machine, until the testbed is closed. A machine is joined with
// one testbed at a time.
func (r *Testbed) Attach(machine *nettest.Host) error { return r.network.Attach(machine) }

// SetBackgroundReachable says whether endpoints in [BackgroundCIDR] are on the host of the endpoints,
// as Watched ones are, or nowhere.
func (r *Testbed) SetBackgroundReachable(background bool) error {
	if background {
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

// replaceRoutes sets routes of the node.
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

// Close removes the namespaces. Closing twice is no error.
func (r *Testbed) Close() error { return r.network.Close() }
