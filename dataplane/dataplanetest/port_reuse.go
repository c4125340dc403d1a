package dataplanetest

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// testMasqueradedPortReuse gives a connection the masqueraded source port of an earlier one that the
// endpoint still keeps in TIME_WAIT. If the new SYN looks older, the endpoint answers with an ACK
// instead of a SYN-ACK (RFC 9293, section 3.10.7.4). The client's reset must reach the endpoint
// and end the TIME_WAIT. As long as it does not, the connection hangs, whatever the node does:
// connection tracking keeps its source port.
func (s suite) testMasqueradedPortReuse(t *testing.T) {
	t.Parallel()
	if s.limitations.NeedUniquePorts {
		t.Skip("the client uses one source port for many connections")
	}
	for _, family := range families() {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			s.reuseMasqueradedPort(t, family)
		})
	}
}

func (s suite) reuseMasqueradedPort(t *testing.T, family dataplane.Family) {
	t.Helper()
	topo := newBareTopology(t, s)
	outside := topo.net.Outside
	pod := topo.net.PodT(t, "pod")
	endpoint, to := addrPortOf(pod, family, endpointPort), vip(family, 1, 80)
	// The server closes its connections first, so that TIME_WAIT is on its side.
	server, err := pod.ServeIdentity(nettest.TCP, endpoint, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	spec := topo.specOf([]netip.AddrPort{endpoint})
	spec.Masquerade = dataplane.MasqueradeAlways
	topo.replace(topo.serviceOfKind(dataplane.LoadBalancer, "web", dataplane.TCP, to, spec))

	// The kernel masquerades a source port from 600 to 1023 with a port from that range. A
	// connection from the same source replaces the one in connection tracking and gets
	// another port, so after 800 of them the endpoint has most of the 424 ports in TIME_WAIT.
	const firstPort, ports, connections = 600, 424, 800
	client := addrPortOf(outside, family, firstPort)
	err = outside.Do(func() error {
		for range connections {
			if err := connectAndClose(client, to); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	conn := outside.SegmentConnT(t, addrOf(outside, family))
	allowResets, err := outside.DropResets()
	if err != nil {
		t.Fatal(err)
	}
	// The endpoint accepts a SYN whose sequence number is higher than the earlier connection's. Half
	// of all numbers are not; the multiples of spread, modulo 2^32, are distributed evenly.
	const spread = 2654435769
	for port := uint16(firstPort + 1); port < firstPort+ports; port++ {
		repeated := portReuseClient{t, conn, nettest.Segment{
			Source: addrPortOf(outside, family, port), Destination: to, Seq: uint32(port) * spread, Flags: nettest.SYN,
		}}
		if repeated.connect() != nettest.ACK {
			continue
		}
		for range 3 {
			// The kernel sends at most one such ACK in 500 ms.
			if got := repeated.connect(); got != nettest.ACK && got != 0 {
				t.Errorf("reset lost: answer with flags %#x to a repeated SYN, want ACK or nothing", got)
			}
		}
		if err := allowResets(); err != nil {
			t.Fatal(err)
		}
		// The ACK that ends the loop above may be the last one for 500 ms. After the reset the
		// connection gets another source port, which may be in use as well.
		for deadline := time.Now().Add(time.Minute); ; {
			if got := repeated.connect(); got == nettest.SYN|nettest.ACK {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("the client's resets do not end the TIME_WAIT of the endpoint")
			}
		}
	}
	t.Fatalf("no SYN from %d ports met a TIME_WAIT", ports)
}

// portReuseClient sends a SYN.
type portReuseClient struct {
	t    *testing.T
	conn *nettest.SegmentConn
	syn  nettest.Segment
}

// connect sends the SYN and returns the flags of the answer, or 0 without an answer. The client's host
// resets every answer.
func (c portReuseClient) connect() nettest.TCPFlags {
	c.t.Helper()
	before := len(c.conn.Received())
	if err := c.conn.Send(c.syn); err != nil {
		c.t.Fatal(err)
	}
	for deadline := time.Now().Add(600 * time.Millisecond); time.Now().Before(deadline); time.Sleep(100 * time.Microsecond) {
		for _, s := range c.conn.Received()[before:] {
			if s.Source == c.syn.Destination && s.Destination == c.syn.Source {
				return s.Flags
			}
		}
	}
	return 0
}

// connectAndClose opens a connection from an address and port, and closes it after the server.
func connectAndClose(from, to netip.AddrPort) (err error) {
	domain := unix.AF_INET
	sockaddr := func(a netip.AddrPort) unix.Sockaddr {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	if from.Addr().Is6() {
		domain = unix.AF_INET6
		sockaddr = func(a netip.AddrPort) unix.Sockaddr {
			return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
		}
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("create socket: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("set SO_REUSEADDR: %w", err)
	}
	if err := unix.Bind(fd, sockaddr(from)); err != nil {
		return fmt.Errorf("bind to %s: %w", from, err)
	}
	// The previous connection exists until the server's last ACK has arrived.
	for deadline := time.Now().Add(nettest.DefaultTimeout); ; time.Sleep(100 * time.Microsecond) {
		err := unix.Connect(fd, sockaddr(to))
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EADDRNOTAVAIL) || time.Now().After(deadline) {
			return fmt.Errorf("connect from %s to %s: %w", from, to, err)
		}
	}
	for buf := make([]byte, 16); ; {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return fmt.Errorf("read from %s: %w", to, err)
		}
		if n == 0 {
			return nil
		}
	}
}
