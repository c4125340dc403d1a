package flowoffload

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/nlconn"
	"fairlead.io/fairlead/nft"
	"fairlead.io/fairlead/sync"
)

const (
	threshold = 12
	podPort   = 8080
	// patience is how long tests wait for the kernel and the agent.
	patience = 20 * time.Second
)

// skipWithoutFlowtables skips a test on kernels without flowtables. `make test-vm` runs it in one that
// has them.
func skipWithoutFlowtables(t testing.TB) {
	t.Helper()
	if err := Check(nettest.NamespaceT(t).Fd()); errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
}

// testNode is a node whose pods serve TCP and UDP, with a Dataplane that offloads connections.
type testNode struct {
	*nettest.Network
	t    *testing.T
	nft  *nft.Dataplane
	dp   *Dataplane
	stop func()
	pods []*nettest.Host
	node dataplane.Node
	// forwarded counts packets in the hook forward.
	forwarded *nftables.Conn
}

func newTestNode(t *testing.T) *testNode {
	t.Helper()
	skipWithoutFlowtables(t)
	n := &testNode{Network: nettest.NewT(t, nettest.Options{UniquePorts: true}), t: t}
	for i := range 3 {
		n.addPod(fmt.Sprintf("pod%d", i+1))
	}
	n.node = dataplane.Node{NodePortAddrs: n.Node.Addrs(), PodCIDRs: n.PodCIDRs}
	var err error
	if n.nft, err = nft.Open(nft.Options{NetNS: n.Node.Fd()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.nft.Close() })
	n.start(Options{})
	t.Cleanup(func() { n.stop() })
	n.countForwarded()
	return n
}

func (n *testNode) addPod(name string) {
	n.t.Helper()
	pod := n.PodT(n.t, name)
	pod.ServeT(n.t, nettest.TCP, podPort)
	pod.ServeT(n.t, nettest.UDP, podPort)
	n.pods = append(n.pods, pod)
}

// start starts offloading, as a new process does.
func (n *testNode) start(o Options) {
	n.t.Helper()
	o.NetNS = n.Node.Fd()
	o.Threshold = threshold
	dp, err := New(n.nft, o)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- dp.Run(ctx) }()
	n.dp = dp
	n.stop = func() {
		cancel()
		if err := errors.Join(<-done, dp.Close()); err != nil {
			n.t.Error(err)
		}
		n.stop = func() {}
	}
}

func (n *testNode) replace(services ...*dataplane.Service) {
	n.t.Helper()
	if err := n.dp.Replace(n.t.Context(), n.node, slices.Values(services), nil); err != nil {
		n.t.Fatal(err)
	}
	n.awaitDevices()
}

func (n *testNode) apply(changes ...dataplane.Change) {
	n.t.Helper()
	if err := n.dp.Apply(n.t.Context(), changes); err != nil {
		n.t.Fatal(err)
	}
}

// eventually waits until the condition holds.
func (n *testNode) eventually(step string, condition func() error) {
	n.t.Helper()
	err := condition()
	for deadline := time.Now().Add(patience); err != nil && time.Now().Before(deadline); err = condition() {
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		n.t.Fatalf("%s: %v", step, err)
	}
}

// awaitDevices waits until the flowtable has the devices of the node, except lo.
func (n *testNode) awaitDevices() {
	n.t.Helper()
	n.eventually("devices of the flowtable", func() error {
		want := slices.DeleteFunc(n.deviceNames(), func(name string) bool { return name == "lo" })
		slices.Sort(want)
		if diff := cmp.Diff(want, n.hooked()); diff != "" {
			return fmt.Errorf("(-want +got):\n%s", diff)
		}
		if s := n.dp.stats(); !s.Ready || s.Devices != len(want) || s.Refused != 0 {
			return fmt.Errorf("%+v, want ready with %d devices", s, len(want))
		}
		return nil
	})
}

// deviceNames returns the names of the node's interfaces.
func (n *testNode) deviceNames() []string {
	n.t.Helper()
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: n.Node.Fd()})
	if err != nil {
		n.t.Fatal(err)
	}
	defer conn.Close()
	messages, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request | netlink.Dump}, Data: make([]byte, unix.SizeofIfInfomsg),
	})
	if err != nil {
		n.t.Fatal(err)
	}
	var names []string
	for _, m := range messages {
		name, _ := nlconn.Attribute(m.Data[unix.SizeofIfInfomsg:], unix.IFLA_IFNAME)
		names = append(names, unix.ByteSliceToString(name))
	}
	return names
}

// flowtable returns the flowtable in the kernel, an empty one without it.
func (n *testNode) flowtable() *nftables.Flowtable {
	n.t.Helper()
	conn, err := nftables.New(nftables.WithNetNSFd(n.Node.Fd()))
	if err != nil {
		n.t.Fatal(err)
	}
	flowtables, err := conn.ListFlowtables(&nftables.Table{Name: TableName, Family: nftables.TableFamilyINet})
	if err != nil || len(flowtables) != 1 {
		return &nftables.Flowtable{}
	}
	return flowtables[0]
}

// hooked returns the devices of the flowtable, sorted.
func (n *testNode) hooked() []string {
	n.t.Helper()
	return slices.Sorted(slices.Values(n.flowtable().Devices))
}

// countForwarded adds a table that counts the packets in the hook forward.
func (n *testNode) countForwarded() {
	n.t.Helper()
	conn, err := nftables.New(nftables.WithNetNSFd(n.Node.Fd()))
	if err != nil {
		n.t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Name: "test", Family: nftables.TableFamilyINet})
	chain := conn.AddChain(&nftables.Chain{
		Name: "forward", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityRaw,
	})
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Counter{}}})
	if err := conn.Flush(); err != nil {
		n.t.Fatal(err)
	}
	n.forwarded = conn
}

func (n *testNode) forwardedPackets() uint64 {
	n.t.Helper()
	table := &nftables.Table{Name: "test", Family: nftables.TableFamilyINet}
	rules, err := n.forwarded.GetRules(table, &nftables.Chain{Name: "forward", Table: table})
	if err != nil || len(rules) != 1 {
		n.t.Fatalf("%d rules, error %v", len(rules), err)
	}
	return rules[0].Exprs[0].(*expr.Counter).Packets
}

// offloaded reports whether the connection of a client has the status OFFLOAD.
func (n *testNode) offloaded(client netip.AddrPort) bool {
	n.t.Helper()
	const (
		ctaTupleOrig, ctaStatus          = 1, 3
		ctaTupleIP, ctaTupleProto        = 1, 2
		ctaIPv4Src, ctaIPv6Src           = 1, 3
		ctaProtoSrcPort                  = 2
		statusOffload             uint32 = 1 << 14 // IPS_OFFLOAD
	)
	conn, err := nlconn.Dial(unix.NETLINK_NETFILTER, n.Node.Fd())
	if err != nil {
		n.t.Fatal(err)
	}
	defer conn.Close()
	found := false
	request := netlink.Message{Header: netlink.Header{Type: unix.NFNL_SUBSYS_CTNETLINK<<8 | 1}, Data: []byte{0, 0, 0, 0}}
	_, err = conn.Dump(n.t.Context(), request, func(data []byte) error {
		orig, _ := nlconn.Attribute(data[4:], ctaTupleOrig)
		ip, _ := nlconn.Attribute(orig, ctaTupleIP)
		proto, _ := nlconn.Attribute(orig, ctaTupleProto)
		src, ok := nlconn.Attribute(ip, ctaIPv4Src)
		if !ok {
			src, _ = nlconn.Attribute(ip, ctaIPv6Src)
		}
		port, _ := nlconn.Attribute(proto, ctaProtoSrcPort)
		status, _ := nlconn.Attribute(data[4:], ctaStatus)
		addr, _ := netip.AddrFromSlice(src)
		if addr == client.Addr() && nlconn.Uint16(port, binary.BigEndian) == client.Port() && len(status) == 4 {
			found = found || binary.BigEndian.Uint32(status)&statusOffload != 0
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

// endpoints returns the pods with these indices as endpoints of a family.
func (n *testNode) endpoints(f dataplane.Family, pods ...int) (all []dataplane.Endpoint) {
	for _, i := range pods {
		addr := n.pods[i].IPv4
		if f == dataplane.IPv6 {
			addr = n.pods[i].IPv6
		}
		all = append(all, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, podPort), Local: true})
	}
	return all
}

// conn is a client's connection through a Service.
type conn struct {
	*nettest.Conn
	n      *testNode
	name   string
	client netip.AddrPort
	answer nettest.Answer
}

// open opens a connection, written as a frontend, and sends one request.
func (n *testNode) open(from *nettest.Host, to string) *conn {
	n.t.Helper()
	network, addr, _ := strings.Cut(to, " ")
	c, err := from.Open(n.t.Context(), network, netip.MustParseAddrPort(addr))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = c.Close() })
	open := &conn{Conn: c, n: n, name: fmt.Sprintf("%s from %s", to, from.Name)}
	client := c.Source()
	if client.Addr().IsUnspecified() { // a UDP socket before its first packet
		a := from.IPv4
		if netip.MustParseAddrPort(addr).Addr().Is6() {
			a = from.IPv6
		}
		client = netip.AddrPortFrom(a, client.Port())
	}
	open.client = client
	open.answer = open.ask(1)
	return open
}

// ask sends requests, and checks that they reach the same endpoint.
func (c *conn) ask(times int) nettest.Answer {
	c.n.t.Helper()
	var answer nettest.Answer
	for range times {
		var err error
		if answer, err = c.Ask(c.n.t.Context()); err != nil {
			c.n.t.Fatalf("%s: %v", c.name, err)
		}
		if c.answer != (nettest.Answer{}) && answer != c.answer {
			c.n.t.Fatalf("%s: answer %+v after %+v", c.name, answer, c.answer)
		}
	}
	return answer
}

// bypasses reports whether none of the packets of some requests passes the hook forward. Nothing else
// may use the network.
func (c *conn) bypasses() bool {
	c.n.t.Helper()
	before := c.n.forwardedPackets()
	c.ask(10)
	return c.n.forwardedPackets() == before
}

// awaitOffload sends requests until the connection is offloaded, and checks that its packets then bypass the hook.
func (c *conn) awaitOffload() {
	c.n.t.Helper()
	c.n.eventually(c.name+" is offloaded", func() error {
		c.ask(2)
		if !c.n.offloaded(c.client) {
			return errors.New("no status OFFLOAD")
		}
		return nil
	})
	c.n.eventually(c.name+" bypasses the hook forward", func() error {
		if !c.bypasses() {
			return errors.New("packets in the hook forward")
		}
		return nil
	})
}

// wantNormal checks that the connection is not offloaded after many packets.
func (c *conn) wantNormal() {
	c.n.t.Helper()
	c.ask(2 * threshold)
	if c.n.offloaded(c.client) || c.bypasses() {
		c.n.t.Errorf("%s is offloaded", c.name)
	}
}

// TestOffload checks which connections are offloaded, and that a connection is not before the threshold.
func TestOffload(t *testing.T) {
	n := newTestNode(t)
	const v4, v6 = dataplane.IPv4, dataplane.IPv6
	always := func(f dataplane.Family, pods ...int) dataplane.ServiceSpec {
		return dataplane.ServiceSpec{Endpoints: n.endpoints(f, pods...), Masquerade: dataplane.MasqueradeAlways}
	}
	n.replace(
		dataplanetest.NewService(t, "web", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, 1, 2)}, "tcp 10.96.0.10:80"),
		dataplanetest.NewService(t, "web6", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v6, 1, 2)}, "tcp [fd00:96::10]:80"),
		dataplanetest.NewService(t, "dns", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, 1, 2)}, "udp 10.96.0.53:53"),
		dataplanetest.NewService(t, "dns6", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v6, 1, 2)}, "udp [fd00:96::53]:53"),
		dataplanetest.NewService(t, "sticky", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, 0, 1, 2), Affinity: time.Hour}, "tcp 10.96.0.11:80"),
		dataplanetest.NewService(t, "self", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, 0)}, "tcp 10.96.0.12:80", "udp 10.96.0.12:80"),
		dataplanetest.NewService(t, "masqueraded", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, 1), Masquerade: dataplane.MasqueradeOffCluster}, "tcp 10.96.0.13:80"),
		dataplanetest.NewService(t, "node", dataplane.NodePort, always(v4, 1), "tcp 0.0.0.0:30080", "udp 0.0.0.0:30080"),
		dataplanetest.NewService(t, "node6", dataplane.NodePort, always(v6, 1), "tcp [::]:30080"),
		dataplanetest.NewService(t, "external", dataplane.LoadBalancer, always(v4, 1), "tcp 203.0.113.1:80"),
	)
	pod, outside := n.pods[0], n.Outside
	for _, test := range []struct {
		name string
		from *nettest.Host
		to   string
		// source is the address that the endpoint sees, invalid for the client's.
		source netip.Addr
		want   bool
	}{
		{"TCP to a cluster IP", pod, "tcp 10.96.0.10:80", netip.Addr{}, true},
		{"TCP over IPv6", pod, "tcp [fd00:96::10]:80", netip.Addr{}, true},
		{"UDP", pod, "udp 10.96.0.53:53", netip.Addr{}, n.dp.table.withUDP},
		{"UDP over IPv6", pod, "udp [fd00:96::53]:53", netip.Addr{}, n.dp.table.withUDP},
		{"session affinity", outside, "tcp 10.96.0.11:80", netip.Addr{}, true},
		{"hairpin", pod, "tcp 10.96.0.12:80", n.Node.IPv4, true},
		{"hairpin with UDP", pod, "udp 10.96.0.12:80", n.Node.IPv4, n.dp.table.withUDP},
		{"client outside the pod network", outside, "tcp 10.96.0.13:80", n.Node.IPv4, true},
		{"node port", outside, "tcp 192.0.2.1:30080", n.Node.IPv4, true},
		{"node port with UDP", outside, "udp 192.0.2.1:30080", n.Node.IPv4, n.dp.table.withUDP},
		{"node port over IPv6", outside, "tcp [2001:db8::1]:30080", n.Node.IPv6, true},
		{"load balancer", outside, "tcp 203.0.113.1:80", n.Node.IPv4, true},
		{"no Service", outside, "tcp " + n.endpoints(v4, 1)[0].Addr.String(), netip.Addr{}, false},
		{"the node itself", n.Node, "tcp 10.96.0.10:80", netip.Addr{}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			n.t = t
			c := n.open(test.from, test.to)
			if test.source.IsValid() && !isGateway(c.answer.Source.Addr()) && c.answer.Source.Addr() != test.source {
				t.Errorf("the endpoint sees %s, want a masqueraded client", c.answer.Source)
			}
			if n.offloaded(c.client) {
				t.Error("offloaded before the threshold")
			}
			if test.want {
				c.awaitOffload()
			} else if test.from != n.Node { // whose packets never pass the hook forward
				c.wantNormal()
			} else if c.ask(2 * threshold); n.offloaded(c.client) {
				t.Error("offloaded")
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	n.t = t
	if s := n.dp.stats(); s.Offloaded < 6 {
		t.Errorf("%+v, want at least 6 offloaded connections", s)
	}
}

// isGateway reports whether an address is the node's address on a pod's link.
func isGateway(a netip.Addr) bool {
	return a == netip.MustParseAddr("169.254.1.1") || a.IsLinkLocalUnicast()
}

// TestEndOfFlows checks what ends an offloaded connection, and that connections continue otherwise.
func TestEndOfFlows(t *testing.T) {
	const to, udp = "tcp 10.96.0.10:80", "udp 10.96.0.10:80"
	service := func(n *testNode, pods ...int) *dataplane.Service {
		return dataplanetest.NewService(n.t, "web", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, pods...)}, to)
	}
	t.Run("idle", func(t *testing.T) {
		n := newTestNode(t)
		n.replace(service(n, 1))
		n.setSysctl("nf_flowtable_tcp_timeout", "1")
		c := n.open(n.pods[0], to)
		c.awaitOffload()
		n.eventually("the idle connection leaves the flowtable", func() error {
			if n.offloaded(c.client) {
				return errors.New("status OFFLOAD")
			}
			return nil
		})
		c.ask(1)
		c.awaitOffload()
	})
	t.Run("removed endpoint with TCP", func(t *testing.T) {
		n := newTestNode(t)
		n.replace(service(n, 1))
		c := n.open(n.pods[0], to)
		c.awaitOffload()
		n.apply(dataplane.Change{Old: service(n, 1), New: service(n, 2)})
		c.ask(5) // continues, as without a flowtable
		if answer := n.open(n.pods[0], to).answer; answer.Host != "pod3" {
			t.Errorf("a new connection reaches %s, want pod3", answer.Host)
		}
		n.apply(dataplane.Change{Old: service(n, 2)})
		c.ask(5)
		if c, err := n.pods[0].Connect(t.Context(), nettest.TCP, netip.MustParseAddrPort("10.96.0.10:80")); err == nil {
			t.Errorf("a removed Service accepts a connection: %+v", c)
		}
	})
	t.Run("removed endpoint with UDP", func(t *testing.T) {
		n := newTestNode(t)
		dns := func(pods ...int) *dataplane.Service {
			return dataplanetest.NewService(n.t, "dns", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, pods...)}, udp)
		}
		cleaner := conntrack.New(conntrack.Options{NetNS: n.Node.Fd()})
		go func() { _ = cleaner.Run(t.Context()) }()
		n.replace(dns(1))
		cleaner.OnCommit(sync.Commit{Op: sync.OpReplace, Changes: []dataplane.Change{{New: dns(1)}}})
		c := n.open(n.pods[0], udp)
		if n.dp.table.withUDP {
			c.awaitOffload()
		} else {
			c.wantNormal()
		}
		change := dataplane.Change{Old: dns(1), New: dns(2)}
		n.apply(change)
		cleaner.OnCommit(sync.Commit{Op: sync.OpApply, Changes: []dataplane.Change{change}})
		start := time.Now()
		n.eventually("the client reaches the new endpoint", func() error {
			// A datagram that is on its way while the flow ends can be lost, so ask again like a resolver.
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			answer, err := c.Ask(ctx)
			if err == nil && answer.Host != "pod3" {
				err = fmt.Errorf("answer %+v", answer)
			}
			return err
		})
		t.Logf("after %s", time.Since(start))
		if time.Since(start) > 2*time.Second {
			t.Errorf("the client reaches the new endpoint after %s", time.Since(start))
		}
		c.answer = nettest.Answer{}
		if n.dp.table.withUDP {
			c.awaitOffload()
		}
	})
	t.Run("source ranges", func(t *testing.T) {
		n := newTestNode(t)
		restricted := func(ranges ...netip.Prefix) *dataplane.Service {
			return dataplanetest.NewService(n.t, "lb", dataplane.LoadBalancer, dataplane.ServiceSpec{
				Endpoints: n.endpoints(dataplane.IPv4, 1), SourceRanges: ranges, Masquerade: dataplane.MasqueradeAlways,
			}, "tcp 203.0.113.1:80")
		}
		outside, nobody := netip.PrefixFrom(n.Outside.IPv4, 32), netip.MustParsePrefix("198.51.100.0/24")
		n.replace(restricted(outside))
		c := n.open(n.Outside, "tcp 203.0.113.1:80")
		c.awaitOffload()
		n.apply(dataplane.Change{Old: restricted(outside), New: restricted(nobody)})
		c.ask(5)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if answer, err := n.Outside.Connect(ctx, nettest.TCP, netip.MustParseAddrPort("203.0.113.1:80")); err == nil {
			t.Errorf("a client outside the source ranges reaches %+v", answer)
		}
	})
	t.Run("number of active connections", func(t *testing.T) {
		n := newTestNode(t)
		n.replace(service(n, 1))
		n.setSysctl("nf_flowtable_tcp_timeout", "2")
		active := func(want int, lasting ...*conn) {
			t.Helper()
			n.eventually("number of active connections", func() error {
				for _, c := range lasting {
					c.ask(1)
				}
				if s := n.dp.Stats(t.Context()); s.Active != want {
					return fmt.Errorf("%+v, want %d active", s, want)
				}
				return nil
			})
		}
		n.open(n.pods[0], to) // stays below the threshold
		active(0)
		first, second := n.open(n.pods[0], to), n.open(n.Outside, to)
		first.awaitOffload()
		active(1, first)
		second.awaitOffload()
		active(2, first, second)
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		active(1, second)
	})
	t.Run("removal", func(t *testing.T) {
		n := newTestNode(t)
		n.replace(service(n, 1))
		c := n.open(n.pods[0], to)
		c.awaitOffload()
		n.stop()
		if !c.bypasses() {
			t.Error("the flowtable ends with the process")
		}
		if err := Remove(n.Node.Fd()); err != nil {
			t.Fatal(err)
		}
		c.wantNormal()
	})
}

// setSysctl sets a sysctl of the node below net.netfilter.
func (n *testNode) setSysctl(name, value string) {
	n.t.Helper()
	if err := n.Node.Do(func() error { return os.WriteFile("/proc/sys/net/netfilter/"+name, []byte(value), 0) }); err != nil {
		n.t.Fatal(err)
	}
}

// TestDevices checks that devices that come and go join and leave the flowtable.
func TestDevices(t *testing.T) {
	n := newTestNode(t)
	const to = "tcp 10.96.0.10:80"
	service := func(pods ...int) *dataplane.Service {
		return dataplanetest.NewService(t, "web", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, pods...)}, to)
	}
	n.replace(service(1))
	c := n.open(n.pods[0], to)
	c.awaitOffload()
	n.addPod("new")
	n.awaitDevices()
	n.apply(dataplane.Change{Old: service(1), New: service(3)})
	second := n.open(n.pods[0], to)
	if second.answer.Host != "new" {
		t.Fatalf("a new connection reaches %s, want new", second.answer.Host)
	}
	second.awaitOffload()
	if err := n.pods[1].Close(); err != nil {
		t.Fatal(err)
	}
	n.awaitDevices()
	if n.offloaded(c.client) {
		n.eventually("the connection to the removed pod leaves the flowtable", func() error {
			if n.offloaded(c.client) {
				return errors.New("status OFFLOAD")
			}
			return nil
		})
	}
	second.awaitOffload()
}

// TestRepair checks that the flowtable is complete again after another program has changed it.
func TestRepair(t *testing.T) {
	n := newTestNode(t)
	const to = "tcp 10.96.0.10:80"
	n.replace(dataplanetest.NewService(t, "web", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, 1)}, to))
	c := n.open(n.pods[0], to)
	c.awaitOffload()
	other, err := nftables.New(nftables.WithNetNSFd(n.Node.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	hooks, err := openHooks(n.Node.Fd())
	if err != nil {
		t.Fatal(err)
	}
	defer hooks.close() //nolint:errcheck // only a test
	table := n.dp.table
	for _, test := range []struct {
		name   string
		change func() error
	}{
		{"deleted table", func() error { other.DelTable(table.nf); return other.Flush() }},
		{"deleted rules", func() error { other.FlushChain(table.forward); return other.Flush() }},
		{"removed device", func() error { return hooks.remove(n.hooked()[0]) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			n.t = t
			if err := test.change(); err != nil {
				t.Fatal(err)
			}
			n.awaitDevices()
			c.awaitOffload()
		})
	}
}

// TestRestart checks that a restart with the same settings keeps the flowtable, and that one with other
// settings creates the table again.
func TestRestart(t *testing.T) {
	n := newTestNode(t)
	const to = "tcp 10.96.0.10:80"
	service := dataplanetest.NewService(t, "web", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, 1)}, to)
	gone := dataplanetest.NewService(t, "gone", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, 1)}, "tcp 10.96.0.11:80")
	n.replace(service, gone)
	c := n.open(n.pods[0], to)
	c.awaitOffload()
	n.stop()
	handle := n.flowtable().Handle
	n.addPod("new")
	n.start(Options{})
	n.replace(service)
	if got := n.flowtable().Handle; got != handle || n.dp.stats().Offloaded == 0 {
		t.Errorf("a restart creates the table again: handle %d after %d, %+v", got, handle, n.dp.stats())
	}
	c.awaitOffload()
	content, err := n.dp.table.read(n.dp.conn, true)
	if err != nil || len(content.frontends) != 1 {
		t.Errorf("frontends %v, error %v, want one", content.frontends, err)
	}
	n.stop()
	n.start(Options{Hardware: true})
	if err := n.dp.Replace(t.Context(), n.node, slices.Values([]*dataplane.Service{service}), nil); err != nil {
		t.Fatal(err)
	}
	// The driver of veth does not support hardware offload, so no device takes part.
	n.eventually("all devices are refused", func() error {
		if s := n.dp.stats(); !s.Ready || s.Devices != 0 || s.Refused != len(n.deviceNames())-1 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	c.wantNormal()
}

// TestUnsupported checks that Services work on a kernel without flowtables, and that this is reported once.
func TestUnsupported(t *testing.T) {
	if err := Check(nettest.NamespaceT(t).Fd()); err == nil {
		t.Skip("this kernel has flowtables")
	}
	network := nettest.NewT(t, nettest.Options{})
	pod := network.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, podPort)
	inner, err := nft.Open(nft.Options{NetNS: network.Node.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	var failures []error
	d, err := New(inner, Options{NetNS: network.Node.Fd(), OnFailure: func(err error) { failures = append(failures, err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	service := dataplanetest.NewService(t, "web", dataplane.ClusterIP, dataplane.ServiceSpec{
		Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.IPv4, podPort)}},
	}, "tcp 10.96.0.10:80")
	for range 2 {
		if err := d.Replace(t.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{service}), nil); err != nil {
			t.Fatal(err)
		}
	}
	if answer, err := network.Outside.Connect(t.Context(), nettest.TCP, service.Frontends[0].Addr); err != nil || answer.Host != "pod" {
		t.Errorf("answer %+v, error %v", answer, err)
	}
	if len(failures) != 1 || !errors.Is(failures[0], ErrUnsupported) || d.stats().Ready {
		t.Errorf("reported %v, %+v", failures, d.stats())
	}
}

// TestLoadModules checks that a kernel without flowtables is asked to load their modules, and what the
// error says if this fails.
func TestLoadModules(t *testing.T) {
	namespace := nettest.NamespaceT(t)
	if err := Check(namespace.Fd()); !errors.Is(err, ErrUnsupported) {
		t.Skip("this kernel has flowtables, or loads them on demand")
	}
	conn, err := nftables.New(nftables.WithNetNSFd(namespace.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	for name, loaded := range map[string]error{"cannot be loaded": errors.New("no module directory"), "without effect": nil} {
		var asked []string
		err := newTable(DefaultThreshold, false, true).create(conn, func(names ...string) error { asked = names; return loaded })
		if !errors.Is(err, ErrUnsupported) || loaded != nil && !errors.Is(err, loaded) {
			t.Errorf("modules %s: error %v", name, err)
		}
		if diff := cmp.Diff([]string{"nf_flow_table_inet", "nft_flow_offload"}, asked); diff != "" {
			t.Errorf("modules %s (-want +got):\n%s", name, diff)
		}
	}
}

func TestDeletesOffloadedFlows(t *testing.T) {
	t.Parallel()
	for release, want := range map[string]bool{
		"6.3.9": false, "6.4.0": true, "6.4": true, "6.12.43+deb13-cloud-amd64": true, "7.0.0": true, "5.15.0-1": false, "": false, "new": false,
	} {
		if got := releaseDeletesOffloadedFlows(release); got != want {
			t.Errorf("%q: %t, want %t", release, got, want)
		}
	}
}
