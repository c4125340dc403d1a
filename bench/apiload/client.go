package apiload

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// linkName is the name of a client's interface in the client's namespace.
const linkName = "api"

// client is a network namespace with a link of its own to the API server.
type client struct {
	*nettest.Namespace

	handle *netlink.Handle
}

// machine is the host of the API server.
type machine struct {
	*nettest.Host

	links atomic.Int32
}

func apiServerAddr() netip.Addr { return netip.AddrFrom4([4]byte{198, 51, 100, 1}) }

func newMachine() (*machine, error) {
	host, err := nettest.NewStandaloneHost("api-server", apiServerAddr())
	if err != nil {
		return nil, err
	}
	return &machine{Host: host}, nil
}

// newClient creates a namespace with a link to the machine.
func (m *machine) newClient() (_ *client, err error) {
	c := &client{}
	if c.Namespace, err = nettest.NewNamespace(""); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("connect a client to the API server: %w", err), c.Close())
		}
	}()
	if c.handle, err = netlink.NewHandleAt(netns.NsHandle(c.Fd()), unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	server, err := netlink.NewHandleAt(netns.NsHandle(m.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer server.Close()
	n := m.links.Add(1)
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: linkName, TxQLen: -1})
	veth.PeerName, veth.PeerNamespace = fmt.Sprintf("client%d", n), netlink.NsFd(m.Fd())
	if err := c.handle.LinkAdd(veth); err != nil {
		return nil, err
	}
	const first, perLink = 0x0AFE0000, 4 // 10.254.0.0, and a /30 for each link
	network := uint32(first + perLink*n)
	addr := func(i uint32) net.IP {
		a := network + i
		return net.IPv4(byte(a>>24), byte(a>>16), byte(a>>8), byte(a)) //nolint:mnd // the bytes of an address
	}
	if err := setUp(server, veth.PeerName, addr(1)); err != nil {
		return nil, err
	}
	if err := setUp(c.handle, linkName, addr(2)); err != nil { //nolint:mnd // the second address
		return nil, err
	}
	loopback, err := c.handle.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	if err := c.handle.LinkSetUp(loopback); err != nil {
		return nil, err
	}
	return c, c.handle.RouteAdd(&netlink.Route{Gw: addr(1), Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
}

func setUp(handle *netlink.Handle, name string, addr net.IP) error {
	link, err := handle.LinkByName(name)
	if err != nil {
		return err
	}
	if err := handle.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: addr, Mask: net.CIDRMask(30, 32)}}); err != nil {
		return err
	}
	return handle.LinkSetUp(link)
}

// Dial connects from the namespace, with the signature of rest.Config's Dial.
func (c *client) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	return c.Dial(ctx, network, to)
}

// Traffic is the number of bytes on a client's link, with IP and TCP headers.
type Traffic struct{ Received, Sent uint64 }

func (t Traffic) minus(u Traffic) Traffic { return Traffic{t.Received - u.Received, t.Sent - u.Sent} }

func (c *client) traffic() (Traffic, error) {
	link, err := c.handle.LinkByName(linkName)
	if err != nil {
		return Traffic{}, fmt.Errorf("read the counters of a client's link: %w", err)
	}
	s := link.Attrs().Statistics
	return Traffic{Received: s.RxBytes, Sent: s.TxBytes}, nil
}

// connections returns the number of established TCP connections of the client.
func (c *client) connections() (n int, err error) {
	err = c.Do(func() error {
		table, err := os.ReadFile("/proc/thread-self/net/tcp")
		if err != nil {
			return err
		}
		remote := fmt.Sprintf("%08X:", le32(apiServerAddr()))
		for line := range strings.Lines(string(table)) {
			const remoteAddr, state, established = 2, 3, "01"
			if f := strings.Fields(line); len(f) > state && strings.HasPrefix(f[remoteAddr], remote) && f[state] == established {
				n++
			}
		}
		return nil
	})
	return n, err
}

// le32 returns an address as /proc/net/tcp shows it on little-endian machines.
func le32(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// waitQuiet waits until less than a packet with data arrives during the period.
func (c *client) waitQuiet(ctx context.Context, period, limit time.Duration) error {
	const small = 1000 // bytes
	for end := time.Now().Add(limit); ; {
		before, err := c.traffic()
		if err != nil {
			return err
		}
		if err := sleep(ctx, period); err != nil {
			return err
		}
		after, err := c.traffic()
		if err != nil {
			return err
		}
		if before.Received > 0 && after.minus(before).Received < small {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("a client still receives data after %s", limit)
		}
	}
}

func (c *client) Close() error {
	if c.handle != nil {
		c.handle.Close()
	}
	return c.Namespace.Close()
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
