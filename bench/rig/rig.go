// Package rig is what benchmarks of Service proxies measure in: network namespaces
// for a client, a node and the endpoints, and a probe that tells by packets when a
// change has its effect, whatever program makes it.
//
// The addresses of endpoints are of two kinds. [Watched] ones are on one host, where the
// probe sees what arrives. What is sent to others, in [Background], is dropped by the
// node's routing: the probe would learn nothing from it. [Rig.Answer] has all
// of them on that host. Services may have any address in [ServiceCIDR].
package rig

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

// The networks of a [Rig]. They do not depend on it, so that objects can be made
// before.
var (
	// ClusterCIDR has all pods in it.
	ClusterCIDR = netip.MustParsePrefix("10.0.0.0/8") //nolint:gochecknoglobals // a constant
	// Background has the addresses of endpoints that nobody looks at.
	Background = netip.MustParsePrefix("10.0.0.0/9") //nolint:gochecknoglobals // a constant
	// Watched has the addresses of endpoints that the probe sees packets arrive at.
	Watched = netip.MustParsePrefix("10.128.0.0/10") //nolint:gochecknoglobals // a constant
	// ServiceCIDR has the addresses of Services.
	ServiceCIDR = netip.MustParsePrefix("172.16.0.0/12") //nolint:gochecknoglobals // a constant

	// NodeIPv4 is the node's address, and MachineIPv4 that of a machine that Join makes a
	// neighbour of it.
	NodeIPv4    = netip.MustParseAddr("192.0.2.1")    //nolint:gochecknoglobals // a constant
	MachineIPv4 = netip.MustParseAddr("198.51.100.1") //nolint:gochecknoglobals // a constant

	clients = netip.MustParsePrefix("10.192.0.0/11") //nolint:gochecknoglobals // a constant: what probes come from
	pods    = netip.MustParsePrefix("10.224.0.0/16") //nolint:gochecknoglobals // a constant: the client's and the endpoints' own addresses
)

// Rig is a client, a node and a host that has the endpoints. Close removes it all.
type Rig struct {
	network *nettest.Network
	// Node is where the Service proxy runs.
	Node *nettest.Host
	// Client is a pod that connects, and Endpoints the host of the endpoints.
	Client, Endpoints *nettest.Host
}

// Options say how a [Rig] is made.
type Options struct {
	// Name enters the namespaces under /run/netns, as [nettest.Options] says. Empty
	// means anonymous ones, of which nothing can be left behind.
	Name string
}

// New makes the namespaces.
func New(opts Options) (*Rig, error) {
	network, err := nettest.New(nettest.Options{Name: opts.Name, PodCIDRs: []netip.Prefix{pods}})
	if err != nil {
		return nil, fmt.Errorf("make the namespaces of a benchmark: %w", err)
	}
	r := &Rig{network: network, Node: network.Node}
	if err := r.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("make the namespaces of a benchmark: %w", err), network.Close())
	}
	return r, nil
}

func (r *Rig) build() (err error) {
	if r.Client, err = r.network.AddPod("client"); err != nil {
		return err
	}
	if r.Endpoints, err = r.network.AddPod("endpoints"); err != nil {
		return err
	}
	for _, prefix := range []netip.Prefix{Background, Watched} {
		if err := r.Endpoints.AddNetwork(prefix); err != nil {
			return err
		}
	}
	return r.routes(
		r.toEndpoints(Watched),
		blackhole(Background),
		// What no Service has translated goes nowhere either. This is below the
		// routes that a proxy may have to addresses of Services.
		blackhole(ServiceCIDR),
		blackhole(clients),
	)
}

// NewMachine makes a host at [MachineIPv4] that outlives rigs, such as an API server's.
// The caller closes it.
func NewMachine(name string) (*nettest.Host, error) { return nettest.NewMachine(name, MachineIPv4) }

// Join joins the node with a machine, until the rig is closed. A machine is joined with
// one rig at a time.
func (r *Rig) Join(machine *nettest.Host) error { return r.network.Join(machine) }

// Answer says whether endpoints in [Background] are on the host of the endpoints,
// as Watched ones are, or nowhere.
func (r *Rig) Answer(background bool) error {
	if background {
		return r.routes(r.toEndpoints(Background))
	}
	return r.routes(blackhole(Background))
}

func (r *Rig) toEndpoints(prefix netip.Prefix) *netlink.Route {
	return &netlink.Route{Dst: ipNet(prefix), Gw: r.Endpoints.IPv4.AsSlice()}
}

func blackhole(prefix netip.Prefix) *netlink.Route {
	return &netlink.Route{Dst: ipNet(prefix), Type: unix.RTN_BLACKHOLE}
}

// routes sets routes of the node.
func (r *Rig) routes(routes ...*netlink.Route) error {
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
func (r *Rig) Close() error { return r.network.Close() }
