package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/sync"
)

// conntrackTest is a node with the nft backend, a syncer and a conntrack cleaner.
type conntrackTest struct {
	*nettest.Network

	t      *testing.T
	family dataplane.Family
	client *nettest.Host
	pods   map[string]*nettest.Host
	syncer *sync.Syncer
	node   dataplane.Node // must be set before start
	// setNode replaces the Node after start.
	setNode func(dataplane.Node)

	deleted atomic.Int64 // conntrack entries
	scans   atomic.Int64
}

func newConntrackTest(t *testing.T, family dataplane.Family, pods ...string) *conntrackTest {
	t.Helper()
	c := &conntrackTest{t: t, family: family, Network: nettest.NewT(t, nettest.Options{}), pods: map[string]*nettest.Host{}}
	c.client = c.PodT(t, "client")
	for _, name := range pods {
		c.pods[name] = c.PodT(t, name)
		c.pods[name].ServeT(t, nettest.UDP, podPort)
	}
	return c
}

// start starts the syncer and the cleaner. They run until stop is called or the test ends.
func (c *conntrackTest) start() (stop func()) {
	c.t.Helper()
	dp := dialBackend(c.t, c.Network, backend.NFT)
	cleaner := conntrack.New(conntrack.Options{NetNS: c.Node.Fd(), OnScan: func(l conntrack.ScanResult) {
		if l.Err != nil {
			c.t.Errorf("conntrack scan: %v", l.Err)
		}
		c.deleted.Add(int64(l.Deleted))
		c.scans.Add(1)
	}})
	c.syncer = sync.New(dp, sync.Options{OnCommit: cleaner.OnCommit})
	c.setNode = func(node dataplane.Node) {
		cleaner.SetNode(node)
		c.syncer.SetNode(node)
	}
	c.setNode(c.node)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- c.syncer.Run(ctx) }()
	go func() { done <- cleaner.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				c.t.Error(err)
			}
		}
		if err := dp.Close(); err != nil {
			c.t.Error(err)
		}
	}
	c.t.Cleanup(stop)
	return stop
}

// vip returns the frontend address that ends with this byte.
func (c *conntrackTest) vip(last byte) netip.AddrPort {
	if c.family == dataplane.IPv4 {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, last}), 53)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0x20, 1: 1, 2: 0xd, 3: 0xb8, 5: 0x96, 15: last}), 53)
}

func (c *conntrackTest) endpoint(pod string) netip.AddrPort {
	if c.family == dataplane.IPv4 {
		return netip.AddrPortFrom(c.pods[pod].IPv4, podPort)
	}
	return netip.AddrPortFrom(c.pods[pod].IPv6, podPort)
}

// setService programs a UDP Service; see newService.
func (c *conntrackTest) setService(last byte, pods, serving []string) {
	c.t.Helper()
	c.update(map[dataplane.Key]*dataplane.Service{c.key(last): c.newService(last, pods, serving)})
}

// newService returns a UDP Service at vip(last). The serving pods keep their flows but get no
// new ones.
func (c *conntrackTest) newService(last byte, pods, serving []string) *dataplane.Service {
	c.t.Helper()
	var treatment dataplane.ServiceSpec
	for _, pod := range pods {
		treatment.Endpoints = append(treatment.Endpoints, dataplane.Endpoint{Addr: c.endpoint(pod), Local: true})
	}
	var servingAddrs []netip.AddrPort
	for _, pod := range serving {
		servingAddrs = append(servingAddrs, c.endpoint(pod))
	}
	svc, err := dataplane.NewService(c.key(last), []dataplane.Frontend{{Protocol: dataplane.UDP, Addr: c.vip(last)}}, treatment)
	if err == nil {
		svc, err = svc.WithServing(servingAddrs)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return svc
}

func (c *conntrackTest) key(last byte) dataplane.Key {
	return dataplane.Key{Namespace: "default", Name: fmt.Sprint("s", last), Family: c.family}
}

func (c *conntrackTest) update(changes map[dataplane.Key]*dataplane.Service) {
	c.t.Helper()
	c.syncer.Update(changes)
	c.syncer.FinishInitialList()
	if err := c.syncer.WaitSynced(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
}

// awaitDeletion calls makeStale and waits until a stale entry is deleted.
func (c *conntrackTest) awaitDeletion(makeStale func()) {
	c.t.Helper()
	before := c.deleted.Load()
	makeStale()
	agenttest.Eventually(c.t, func() error {
		if c.deleted.Load() == before {
			return errors.New("no conntrack entry deleted")
		}
		return nil
	})
}

// open opens a flow that sends every datagram from the same port.
func (c *conntrackTest) open(to netip.AddrPort) *nettest.Conn {
	c.t.Helper()
	conn, err := c.client.Open(c.t.Context(), nettest.UDP, to)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// answeringHost sends a datagram and returns the name of the host that answers, "none" after the
// timeout, or "refused".
func (c *conntrackTest) answeringHost(conn *nettest.Conn, timeout time.Duration) string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), timeout)
	defer cancel()
	answer, err := conn.Ask(ctx)
	switch {
	case errors.Is(err, nettest.ErrTimeout):
		return "none"
	case errors.Is(err, nettest.ErrRefused):
		return "refused"
	case err != nil:
		c.t.Fatal(err)
	}
	return answer.Host
}

func (c *conntrackTest) checkAnswer(conn *nettest.Conn, step, want string) {
	c.t.Helper()
	timeout := connectTimeout
	if want == "none" {
		timeout = noAnswerTimeout
	}
	if got := c.answeringHost(conn, timeout); got != want {
		c.t.Errorf("%s: answer from %s, want %s", step, got, want)
	}
}

// setNodeAndWait replaces the Node and waits for two conntrack scans after the kernel has it. The
// second scan cannot have started earlier. Because the cleaner receives a Node before the kernel
// does, a flow may be deleted twice.
func (c *conntrackTest) setNodeAndWait(node dataplane.Node) {
	c.t.Helper()
	c.setNode(node)
	c.update(nil)
	before := c.scans.Load()
	agenttest.Eventually(c.t, func() error {
		if c.scans.Load() < before+2 {
			return errors.New("no conntrack scan")
		}
		return nil
	})
}

// TestStaleUDPFlows checks that flows of clients with a fixed source port follow changes of the
// Service with the next datagram, and stay with endpoints that are still in use.
func TestStaleUDPFlows(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			c := newConntrackTest(t, family, "a", "b")
			c.start()
			early := c.open(c.vip(1)) // before the Service exists
			c.checkAnswer(early, "no Service", "none")
			c.setService(2, []string{"a", "b"}, nil)
			c.checkAnswer(early, "only another Service", "none")
			// Flows of another Service: if all were deleted, some would change their
			// endpoint.
			otherFlows := map[*nettest.Conn]string{}
			for range 16 {
				conn := c.open(c.vip(2))
				otherFlows[conn] = c.answeringHost(conn, connectTimeout)
			}

			c.awaitDeletion(func() { c.setService(1, []string{"a"}, nil) })
			c.checkAnswer(early, "Service added", "a")

			c.setService(1, []string{"a", "b"}, nil)
			c.checkAnswer(early, "second endpoint added", "a")
			c.setService(1, []string{"b"}, []string{"a"})
			c.checkAnswer(early, "endpoint terminating but serving", "a")
			// This commit writes nothing to the kernel.
			c.awaitDeletion(func() { c.setService(1, []string{"b"}, nil) })
			c.checkAnswer(early, "endpoint removed", "b")

			c.awaitDeletion(func() { c.setService(1, nil, nil) })
			c.checkAnswer(early, "last endpoint removed", "refused")
			c.setService(1, []string{"a"}, nil)
			c.checkAnswer(early, "first endpoint added", "a")

			c.awaitDeletion(func() { c.update(map[dataplane.Key]*dataplane.Service{c.key(1): nil}) })
			c.checkAnswer(early, "Service deleted", "none")

			for conn, host := range otherFlows {
				c.checkAnswer(conn, "flow of another Service", host)
			}
		})
	}
}

// TestStaleNodePortFlows checks the same for a node port with session affinity. While the node port
// does not exist, a server of the node answers on its address.
func TestStaleNodePortFlows(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			const port = 30053
			c := newConntrackTest(t, family, "a", "b")
			address, unspecified := c.Node.IPv4, netip.IPv4Unspecified()
			if family == dataplane.IPv6 {
				address, unspecified = c.Node.IPv6, netip.IPv6Unspecified()
			}
			c.node.NodePortAddrs = []netip.Addr{address}
			c.Node.ServeT(t, nettest.UDP, port)
			c.client = c.Outside
			c.start()
			key := dataplane.Key{Namespace: "default", Name: "node", Family: family, Kind: dataplane.NodePort}
			setNodePort := func(number uint16, pods ...string) {
				t.Helper()
				treatment := dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeAlways, Affinity: time.Hour}
				for _, pod := range pods {
					treatment.Endpoints = append(treatment.Endpoints, dataplane.Endpoint{Addr: c.endpoint(pod), Local: true})
				}
				frontend := dataplane.Frontend{Protocol: dataplane.UDP, Addr: netip.AddrPortFrom(unspecified, number)}
				svc, err := dataplane.NewService(key, []dataplane.Frontend{frontend}, treatment)
				if err != nil {
					t.Fatal(err)
				}
				c.update(map[dataplane.Key]*dataplane.Service{key: svc})
			}
			c.update(nil)
			conn := c.open(netip.AddrPortFrom(address, port))
			c.checkAnswer(conn, "no node port", "node")
			c.awaitDeletion(func() { setNodePort(port, "a") })
			c.checkAnswer(conn, "node port added", "a")
			setNodePort(port, "a", "b")
			c.checkAnswer(conn, "second endpoint added", "a")
			c.awaitDeletion(func() { setNodePort(port, "b") })
			c.checkAnswer(conn, "endpoint removed", "b")
			c.awaitDeletion(func() { setNodePort(port+1, "b") })
			c.checkAnswer(conn, "node port changed", "node")
			c.awaitDeletion(func() { setNodePort(port, "b") })
			c.checkAnswer(conn, "node port changed back", "b")
			c.setNodeAndWait(dataplane.Node{})
			c.checkAnswer(conn, "node port address removed", "node")
			c.setNodeAndWait(dataplane.Node{NodePortAddrs: []netip.Addr{address}})
			c.checkAnswer(conn, "node port address added", "b")
			c.awaitDeletion(func() { c.update(map[dataplane.Key]*dataplane.Service{key: nil}) })
			c.checkAnswer(conn, "Service deleted", "node")
		})
	}
}

// TestStaleFlowsAfterRestart checks that the first scan finds flows that became stale while the
// agent was down.
func TestStaleFlowsAfterRestart(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			c := newConntrackTest(t, family, "a", "b")
			stop := c.start()
			c.setService(1, []string{"a"}, nil)
			c.setService(2, []string{"a", "b"}, nil)
			moves, stays := c.open(c.vip(1)), c.open(c.vip(2))
			c.checkAnswer(moves, "before the restart", "a")
			host := c.answeringHost(stays, connectTimeout)
			stop()
			c.checkAnswer(moves, "while stopped", "a")
			c.start()
			c.awaitDeletion(func() {
				c.update(map[dataplane.Key]*dataplane.Service{
					c.key(1): c.newService(1, []string{"b"}, nil), c.key(2): c.newService(2, []string{"a", "b"}, nil),
				})
			})
			c.checkAnswer(moves, "after the restart", "b")
			c.checkAnswer(stays, "endpoint unchanged", host)
		})
	}
}

// setProtocolService programs a Service with the given protocol at vip(last).
func (c *conntrackTest) setProtocolService(protocol dataplane.Protocol, last byte, pods ...string) {
	c.t.Helper()
	var treatment dataplane.ServiceSpec
	for _, pod := range pods {
		treatment.Endpoints = append(treatment.Endpoints, dataplane.Endpoint{Addr: c.endpoint(pod), Local: true})
	}
	svc, err := dataplane.NewService(c.key(last), []dataplane.Frontend{{Protocol: protocol, Addr: c.vip(last)}}, treatment)
	if err != nil {
		c.t.Fatal(err)
	}
	c.update(map[dataplane.Key]*dataplane.Service{svc.Key: svc})
}

// TestUnansweredTCPConnections checks a client whose SYN was sent to an endpoint that does not
// answer. When the endpoint is replaced, a retransmitted SYN reaches the new endpoint.
// Established connections of other clients stay.
func TestUnansweredTCPConnections(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			c := newConntrackTest(t, family, "old", "new")
			for _, pod := range c.pods {
				pod.ServeT(t, nettest.TCP, podPort)
			}
			c.start()
			c.setProtocolService(dataplane.TCP, 1, "old")
			c.setProtocolService(dataplane.TCP, 2, "new")
			open, err := c.client.Open(t.Context(), nettest.TCP, c.vip(2))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = open.Close() })

			blackhole(t, c.pods["old"], c.client)
			answers := make(chan string, 1)
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), 50*time.Second)
				defer cancel()
				answer, err := c.client.Connect(ctx, nettest.TCP, c.vip(1))
				answers <- fmt.Sprint(answer.Host, " ", err)
			}()
			select {
			case answer := <-answers:
				t.Fatalf("answer %s while the endpoint is unreachable, want none", answer)
			case <-time.After(300 * time.Millisecond):
			}
			c.setProtocolService(dataplane.TCP, 1, "new")
			if got := <-answers; got != "new <nil>" {
				t.Errorf("endpoint replaced: answer %s, want new", got)
			}
			if answer, err := open.Ask(t.Context()); err != nil || answer.Host != "new" {
				t.Errorf("established connection: answer %+v, error %v; want new", answer, err)
			}
		})
	}
}

// TestUnansweredSCTPAssociations checks that the next INIT of an SCTP client with a fixed source
// port, which is common in telecommunications, reaches the new endpoint.
func TestUnansweredSCTPAssociations(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			c := newConntrackTest(t, family, "old", "new")
			c.start()
			arrived := make(chan string, 1000)
			for name, pod := range c.pods {
				packets := rawSCTP(t, pod, c.endpoint(name).Addr())
				go func() {
					buf := make([]byte, 1500)
					for {
						if _, _, err := packets.ReadFrom(buf); err != nil {
							return
						}
						arrived <- name
					}
				}()
			}
			from := c.client.IPv4
			if family == dataplane.IPv6 {
				from = c.client.IPv6
			}
			client := rawSCTP(t, c.client, from)
			reaches := func(want string) error {
				if _, err := client.WriteTo(initPacket(36412, c.vip(1).Port()), &net.IPAddr{IP: c.vip(1).Addr().AsSlice()}); err != nil {
					return err
				}
				select {
				case got := <-arrived:
					if got != want {
						return fmt.Errorf("INIT arrived at %s, want %s", got, want)
					}
					return nil
				case <-time.After(connectTimeout):
					return errors.New("INIT did not arrive")
				}
			}
			c.setProtocolService(dataplane.SCTP, 1, "old")
			for range 2 {
				if err := reaches("old"); err != nil {
					t.Fatal(err)
				}
			}
			c.awaitDeletion(func() { c.setProtocolService(dataplane.SCTP, 1, "new") })
			if err := reaches("new"); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestStaleFlowsDuringFrequentChanges checks UDP flows and SCTP packets with fixed source ports while
// another Service changes so often that the cleaner follows the kernel's events: changes without flows
// cause no scan, and flows that began before and after still move to another endpoint.
func TestStaleFlowsDuringFrequentChanges(t *testing.T) {
	t.Parallel()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			c := newConntrackTest(t, family, "a", "b")
			c.start()
			arrived := make(chan string, 1000)
			for name, pod := range c.pods {
				packets := rawSCTP(t, pod, c.endpoint(name).Addr())
				go func() {
					buf := make([]byte, 1500)
					for {
						if _, _, err := packets.ReadFrom(buf); err != nil {
							return
						}
						arrived <- name
					}
				}()
			}
			from := c.client.IPv4
			if family == dataplane.IPv6 {
				from = c.client.IPv6
			}
			client := rawSCTP(t, c.client, from)
			const sctpService, idleService = 3, 9
			checkINIT := func(step, want string) {
				t.Helper()
				vip := c.vip(sctpService)
				if _, err := client.WriteTo(initPacket(36412, vip.Port()), &net.IPAddr{IP: vip.Addr().AsSlice()}); err != nil {
					t.Fatal(err)
				}
				select {
				case got := <-arrived:
					if got != want {
						t.Errorf("%s: INIT arrived at %s, want %s", step, got, want)
					}
				case <-time.After(connectTimeout):
					t.Errorf("%s: INIT did not arrive, want it at %s", step, want)
				}
			}
			changeIdleServices := func(times int) {
				t.Helper()
				for range times {
					c.setService(idleService, []string{"a"}, nil)
					c.setService(idleService, []string{"a", "b"}, nil)
					c.setProtocolService(dataplane.SCTP, idleService+1, "a")
					c.setProtocolService(dataplane.SCTP, idleService+1, "a", "b")
					time.Sleep(100 * time.Millisecond)
				}
			}
			c.setService(1, []string{"a"}, nil)
			c.setProtocolService(dataplane.SCTP, sctpService, "a")
			before := c.open(c.vip(1))
			c.checkAnswer(before, "before frequent changes", "a")
			checkINIT("before frequent changes", "a")

			changeIdleServices(30)
			time.Sleep(2 * time.Second) // rescans
			begin, scans := time.Now(), c.scans.Load()
			changeIdleServices(5)
			if n := c.scans.Load() - scans; n > 1+int64(time.Since(begin)/(10*time.Second)) { // the cleaner verifies every 10 seconds
				t.Errorf("%d scans for 5 changes of Services without flows in %s, want one every 10 seconds", n, time.Since(begin))
			}
			after := c.open(c.vip(1))
			c.checkAnswer(after, "after frequent changes", "a")
			early := c.open(c.vip(2)) // before the Service exists
			c.checkAnswer(early, "no Service", "none")

			c.awaitDeletion(func() { c.setService(1, []string{"b"}, nil) })
			c.checkAnswer(before, "endpoint replaced, flow from before", "b")
			c.checkAnswer(after, "endpoint replaced, flow from after", "b")
			c.awaitDeletion(func() { c.setService(2, []string{"a"}, nil) })
			c.checkAnswer(early, "Service added", "a")
			c.awaitDeletion(func() { c.setProtocolService(dataplane.SCTP, sctpService, "b") })
			checkINIT("endpoint replaced", "b")
			c.awaitDeletion(func() { c.setProtocolService(dataplane.SCTP, sctpService, "a") })
			checkINIT("endpoint replaced again", "a")
		})
	}
}

// rawSCTP returns a raw socket for SCTP packets on one of the host's addresses.
func rawSCTP(t *testing.T, host *nettest.Host, addr netip.Addr) net.PacketConn {
	t.Helper()
	network := "ip4:132"
	if addr.Is6() {
		network = "ip6:132"
	}
	var conn net.PacketConn
	err := host.Do(func() (err error) {
		conn, err = net.ListenPacket(network, addr.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// initPacket returns an SCTP packet with an INIT chunk (RFC 9260, section 3.3.2).
func initPacket(source, destination uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, source)
	b = binary.BigEndian.AppendUint16(b, destination)
	b = append(b, make([]byte, 8)...)                // verification tag, checksum
	b = append(b, 1, 0, 0, 20)                       // INIT, flags, length
	b = binary.BigEndian.AppendUint32(b, 0x12345678) // initiate tag
	b = binary.BigEndian.AppendUint32(b, 1<<16)      // receiver window
	b = append(b, 0, 1, 0, 1)                        // streams
	b = binary.BigEndian.AppendUint32(b, 1)          // initial TSN
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// blackhole makes the pod discard its packets to the client.
func blackhole(t *testing.T, pod, client *nettest.Host) {
	t.Helper()
	handle, err := netlink.NewHandleAt(netns.NsHandle(pod.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	for _, addr := range client.Addrs() {
		to := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
		if err := handle.RouteReplace(&netlink.Route{Dst: to, Type: unix.RTN_BLACKHOLE}); err != nil {
			t.Fatal(err)
		}
	}
}
