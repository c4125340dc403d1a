package nft

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// virtualServers is a Translator that passes cluster IPs through, and returns a virtual
// server for each other endpoint list.
type virtualServers struct{}

func (virtualServers) VirtualServers(s *dataplane.Service) (cluster, local netip.AddrPort) {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s.Key.String()))
	sum := h.Sum32()
	addr := func(l endpointList) netip.AddrPort {
		if s.Key.Family == dataplane.IPv6 {
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, 0xfa, 13: byte(l), 14: byte(sum >> 8), 15: byte(sum)}), 7)
		}
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{250, 29 + byte(l), byte(sum >> 8), byte(sum)}), 7)
	}
	if s.Key.Kind != dataplane.ClusterIP {
		cluster = addr(clusterEndpoints)
	}
	if s.ExternalTrafficPolicyLocal {
		local = addr(localEndpoints)
	}
	return cluster, local
}

// testTranslators returns the Translators to test with; nil means that the tables select
// endpoints.
func testTranslators() map[string]Translator {
	return map[string]Translator{"no translator": nil, "translator": virtualServers{}}
}

// translatorOf returns the Translator that d was opened with, or nil.
func translatorOf(d *Dataplane) Translator {
	r, _ := d.renderer.(virtualRenderer)
	return r.translator
}

// expectedVirtualBinding returns the VirtualBinding for each frontend of a Service.
func expectedVirtualBinding(s *dataplane.Service) VirtualBinding {
	r := VirtualBinding{Binding: dataplane.Binding{Service: s.Key.Service(), ServiceSpec: s.ServiceSpec}}
	r.Endpoints, r.LocalEndpoints, r.Affinity, r.Scheduler = nil, nil, 0, ""
	r.Served = [2]bool{len(s.Endpoints) > 0, len(s.LocalEndpoints) > 0}
	cluster, local := virtualServers{}.VirtualServers(s)
	r.Virtual[0] = cluster
	if s.ExternalTrafficPolicyLocal {
		r.Virtual[1] = local
	}
	for _, e := range slices.Concat(s.Endpoints, s.LocalEndpoints) {
		if e.Local {
			r.Local = append(r.Local, e.Addr.Addr())
		}
	}
	slices.SortFunc(r.Local, netip.Addr.Compare)
	r.Local = slices.Compact(r.Local)
	return r
}

// expectedState returns the state that Read returns when the kernel holds these Services.
func expectedState(d *Dataplane, services []*dataplane.Service) dataplane.State {
	state := dataplane.StateOf(slices.Values(services))
	if translatorOf(d) != nil {
		for f, b := range state {
			b.Endpoints, b.LocalEndpoints, b.Affinity, b.Scheduler = nil, nil, 0, ""
			state[f] = b
		}
	}
	return state
}

// wantVirtualBindings fails the test unless the kernel holds the virtual bindings of these
// Services and the ports of their endpoints.
func wantVirtualBindings(t *testing.T, d *Dataplane, services ...*dataplane.Service) {
	t.Helper()
	got, err := d.ReadVirtualBindings(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ports := [2]map[uint16]bool{{}, {}}
	for _, s := range services {
		for _, e := range slices.Concat(s.Endpoints, s.LocalEndpoints) {
			ports[familyIndex(s.Key.Family)][e.Addr.Port()] = true
		}
		for _, f := range s.Frontends {
			if g, want := got[f], expectedVirtualBinding(s); !g.Equal(want) || g.Service != want.Service {
				t.Errorf("%s: got %s of %s, want %s of %s", f, g, g.Service, want, want.Service)
			}
			delete(got, f)
		}
	}
	for f, r := range got {
		t.Errorf("%s: unexpected binding %s", f, r)
	}
	for i, table := range d.tables {
		c, err := d.readSets(t.Context(), table)
		if err != nil {
			t.Fatal(err)
		}
		for port := range c.portSet {
			if !ports[i][port] {
				t.Fatalf("%s: endpoint-ports contains %d, which no endpoint has", table, port)
			}
		}
		for port := range ports[i] {
			if !c.portSet[port] {
				t.Fatalf("%s: endpoint-ports lacks %d, which an endpoint has", table, port)
			}
		}
	}
	state, err := d.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := expectedState(d, services).Diff(state); diff != "" {
		t.Errorf("unexpected state from Read:\n%s", diff)
	}
}

// TestSwitchTranslator switches a table between selecting endpoints itself and a Translator,
// in both directions. No elements of the previous mode may be left.
func TestSwitchTranslator(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.1.3"]
	_, ns := newDataplane(t)
	for range 3 {
		for name, translator := range testTranslators() {
			d := openInNamespace(t, ns, translator)
			mustReplace(t, d, nodeWithAllSettings(), sampleServices(t)...)
			wantState(t, d, sampleServices(t)...)
			d.now = func() time.Time { return time.Now().Add(time.Hour) }
			mustApply(t, d) // remove unused classes
			fresh, other := newDataplane(t, translator)
			mustReplace(t, fresh, nodeWithAllSettings(), sampleServices(t)...)
			want := sortedLines(runNFT(t, other, binary, "list ruleset"))
			if diff := cmp.Diff(want, sortedLines(runNFT(t, ns, binary, "list ruleset"))); diff != "" {
				t.Errorf("after switching to %s (-new +changed):\n%s", name, diff)
			}
		}
	}
}

// TestDriftWithTranslator edits elements that are different in tables with a Translator.
func TestDriftWithTranslator(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"a virtual server is deleted":                           "delete element ip fairlead endpoints-3 { 203.0.113.3 . tcp . 443 . fa1d:0 }",
		"a virtual server is changed":                           "flush map ip fairlead endpoints-3; add element ip fairlead endpoints-3 { 203.0.113.3 . tcp . 443 . fa1d:0 : 10.1.0.9 . 9 }",
		"a virtual server is added to a passed-through Service": "add element ip fairlead endpoints-1 { 10.96.0.1 . tcp . 80 . fa1d:0 : 10.1.0.9 . 9 }",
		"a second slot is added":                                "add element ip fairlead endpoints-3 { 203.0.113.3 . tcp . 443 . fa1d:1 : 10.1.0.9 . 9 }",
		"the ports are deleted":                                 "flush set ip fairlead endpoint-ports",
		"a port is added":                                       "add element ip fairlead endpoint-ports { 7 }",
		"endpoint-ports has a catch-all":                        "add element ip fairlead endpoint-ports { * }",
		"endpoint-ports has another type":                       "flush table ip fairlead; delete set ip fairlead endpoint-ports; add set ip fairlead endpoint-ports { type mark; }",
		"a Service is passed through":                           "delete element ip fairlead services { 10.96.0.2 . udp . 53 }; add element ip fairlead services { 10.96.0.2 . udp . 53 : 100:1 }",
		"a Service is rejected":                                 "delete element ip fairlead services { 10.96.0.1 . tcp . 80 }; add element ip fairlead services { 10.96.0.1 . tcp . 80 : 0:0 }",
		"passed-through connections are not accepted":           "flush chain ip fairlead class-1-through",
		"undeclared ports are not rejected":                     "flush chain ip fairlead undeclared",
		"undeclared ports are accepted":                         "flush chain ip fairlead filter-prerouting-post-dnat",
		"an affinity map is added":                              "add map ip fairlead timeouts { type ipv4_addr . inet_proto . inet_service : classid; }; add element ip fairlead timeouts { 10.96.0.1 . tcp . 80 : 1:80 }",
		"hairpin is flushed":                                    "flush set ip fairlead hairpin",
		"the table is deleted":                                  "delete table ip fairlead",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testDrift(t, script, virtualServers{})
		})
	}
}

// TestTwoDataplanes uses two Dataplanes with different table names in one namespace.
func TestTwoDataplanes(t *testing.T) {
	t.Parallel()
	binary := nftBinaries(t)["1.1.3"]
	first, ns := newDataplane(t)
	const name = "fairlead-virtual"
	opts := Options{NetNS: ns.Fd(), Table: name, Translator: virtualServers{}}
	second := openWithOptions(t, ns, opts)
	listing := func(table string) string {
		t.Helper()
		return runNFT(t, ns, binary, "list table ip "+table) + runNFT(t, ns, binary, "list table ip6 "+table)
	}
	mustReplace(t, first, nodeWithAllSettings(), sampleServices(t)...)
	before := listing(TableName)
	mustReplace(t, second, nodeWithAllSettings(), sampleServices(t)...)
	wantNoDrift(t, first)
	mustApply(t, second, dataplane.Change{Old: sampleServices(t)[0]})
	mustReplace(t, second, nodeWithAllSettings(), sampleServices(t)...)
	wantState(t, second, sampleServices(t)...)
	wantState(t, first, sampleServices(t)...)
	wantNoDrift(t, first)
	if diff := cmp.Diff(before, listing(TableName)); diff != "" {
		t.Errorf("tables of the first Dataplane (-before +after):\n%s", diff)
	}
	runNFT(t, ns, binary, "flush set ip fairlead hairpin")
	drainNotifications(t, first)
	wantNoDrift(t, second)

	runNFT(t, ns, binary, "delete table ip fairlead")
	runNFT(t, ns, binary, "table ip fairlead {\n counter dropped-invalid { packets 3 bytes 4 }\n}")
	for _, c := range []*CounterReader{NewCounterReader(opts), NewCounterReader(Options{NetNS: ns.Fd()})} {
		want := uint64(3)
		if c.table == name {
			want = 0
		}
		counts, err := c.Read(t.Context())
		if err := errors.Join(err, c.Close()); err != nil {
			t.Fatal(err)
		}
		if i := slices.IndexFunc(counts, func(c CounterValue) bool { return c.Name == string(droppedInvalid) }); counts[i].Packets != want {
			t.Errorf("table %s: got %+v, want %d packets", c.table, counts[i], want)
		}
	}

	mustReplace(t, first, nodeWithAllSettings(), sampleServices(t)...)
	other := listing(name)
	if err := Cleanup(Options{NetNS: ns.Fd()}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("table ip "+name+"\ntable ip6 "+name+"\n", runNFT(t, ns, binary, "list tables")); diff != "" {
		t.Errorf("tables after Cleanup of the first Dataplane (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(other, listing(name)); diff != "" {
		t.Errorf("tables of the second Dataplane (-before +after):\n%s", diff)
	}
	if err := Cleanup(opts); err != nil {
		t.Fatal(err)
	}
	if left := runNFT(t, ns, binary, "list tables"); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}

// TestPortChangeElementCount checks that changing one endpoint writes only its port, however
// many ports the Service has.
func TestPortChangeElementCount(t *testing.T) {
	t.Parallel()
	d, ns := newDataplane(t, virtualServers{})
	list := make([]dataplane.Endpoint, 30_000)
	for i := range list {
		list[i] = dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.MustParseAddr("10.1.0.1"), uint16(i+1))} //nolint:gosec // fits
	}
	makeService := func(list []dataplane.Endpoint) *dataplane.Service {
		return service(t, "ports", []dataplane.Frontend{frontend(1), frontend(2)}, slices.Clone(list))
	}
	mustReplace(t, d, nodeWithPodCIDRs())
	full, most, few := makeService(list), makeService(list[1:]), makeService(list[:2])
	before := generation(t, d)
	mustApply(t, d, dataplane.Change{New: full})
	if commits := int(generation(t, d) - before); commits < len(list)/(2*transactionSize) {
		t.Errorf("%d ports were added in only %d commits", len(list), commits)
	}
	wantVirtualBindings(t, d, full)
	b := d.newBatch()
	change := dataplane.Change{Old: full, New: most}
	d.planChanges([]dataplane.Change{change}, nil).addChange(b, change)
	if n := b.elements(); n != 1 {
		t.Errorf("removing one endpoint writes %d elements, want 1", n)
	}
	mustApply(t, d, change)
	wantVirtualBindings(t, d, most)
	again := openInNamespace(t, ns, virtualServers{})
	before = generation(t, d)
	mustReplace(t, again, nodeWithPodCIDRs(), most)
	if generation(t, d) != before {
		t.Error("an equal Replace changed the ruleset")
	}
	mustReplace(t, again, nodeWithPodCIDRs(), few)
	wantVirtualBindings(t, again, few)
	mustApply(t, again, dataplane.Change{Old: few})
	wantVirtualBindings(t, again)
}

// TestPortsKeptWhenServiceFails checks that ports which may belong to a failed Service are
// kept until a Replace resolves the failure.
func TestPortsKeptWhenServiceFails(t *testing.T) {
	t.Parallel()
	d, _ := newDataplane(t, rejectedVirtualServers{})
	mustReplace(t, d, nodeWithPodCIDRs(), service(t, "s", []dataplane.Frontend{frontend(1)}, endpoints(1)))
	bad := service(t, "bad", []dataplane.Frontend{frontend(1)}, []dataplane.Endpoint{{Addr: netip.MustParseAddrPort("10.1.0.1:81")}})
	bad.Key.Kind = dataplane.ExternalIP
	err := d.Replace(t.Context(), nodeWithPodCIDRs(), slices.Values([]*dataplane.Service{bad}), nil)
	if failure, ok := errors.AsType[*dataplane.Error](err); !ok || failure.Failed[bad.Key] == nil {
		t.Fatalf("got error %v, want an error for %s", err, bad.Key)
	}
	c, err := d.readSets(t.Context(), d.tables[0])
	if err != nil {
		t.Fatal(err)
	}
	if !c.portSet[8080] {
		t.Errorf("endpoint-ports is %v, want it to contain 8080", c.portSet)
	}
	mustReplace(t, d, nodeWithPodCIDRs())
	wantVirtualBindings(t, d)
}

// rejectedVirtualServers is a Translator whose virtual servers the kernel rejects, except for
// cluster IPs.
type rejectedVirtualServers struct{}

func (rejectedVirtualServers) VirtualServers(s *dataplane.Service) (cluster, local netip.AddrPort) {
	if s.Key.Kind != dataplane.ClusterIP {
		cluster = netip.MustParseAddrPort("[fd00::1]:80")
	}
	return cluster, netip.AddrPort{}
}

// podVirtualServers is a Translator with a pod as virtual server for each endpoint list.
type podVirtualServers struct{ cluster, local *nettest.Host }

func (p podVirtualServers) VirtualServers(s *dataplane.Service) (cluster, local netip.AddrPort) {
	i := familyIndex(s.Key.Family)
	if s.Key.Kind != dataplane.ClusterIP {
		cluster = netip.AddrPortFrom(p.cluster.Addrs()[i], 7000)
	}
	return cluster, netip.AddrPortFrom(p.local.Addrs()[i], 7000)
}

// routeHandle returns a netlink handle for the host's links and routes.
func routeHandle(t *testing.T, h *nettest.Host) *netlink.Handle {
	t.Helper()
	handle, err := netlink.NewHandleAt(netns.NsHandle(h.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(handle.Close)
	return handle
}

func hostIPNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// bindAddrs makes addresses local to the node, as IPVS needs it, with local routes in a table
// that applies to packets from outside.
func bindAddrs(t *testing.T, node *nettest.Host, addrs ...netip.Addr) {
	t.Helper()
	const table = 100
	handle := routeHandle(t, node)
	lo, err := handle.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rule := netlink.NewRule()
		rule.Family, rule.Table, rule.IifName, rule.Invert, rule.Priority = family, table, "lo", true, 100
		if err := handle.RuleAdd(rule); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range addrs {
		route := &netlink.Route{LinkIndex: lo.Attrs().Index, Table: table, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Dst: hostIPNet(a)}
		if err := handle.RouteAdd(route); err != nil {
			t.Fatal(err)
		}
	}
}

// TestVirtualServers checks that connections reach the virtual server, here a pod, of the
// list that applies to the client.
func TestVirtualServers(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	servers := podVirtualServers{network.PodT(t, "cluster"), network.PodT(t, "local")}
	client := network.PodT(t, "client")
	for _, pod := range []*nettest.Host{servers.cluster, servers.local} {
		pod.ServeT(t, nettest.TCP, 7000)
	}
	d := openWithOptions(t, network.Node.Namespace, Options{Translator: servers})
	node := dataplane.Node{PodCIDRs: network.PodCIDRs, NodePortAddrs: network.Node.Addrs()}
	var services []*dataplane.Service
	for i, frontends := range [][]string{{"203.0.113.1:80", "0.0.0.0:30080"}, {"[2001:db8:113::1]:80", "[::]:30080"}} {
		endpoints := []dataplane.Endpoint{{Addr: netip.AddrPortFrom(client.Addrs()[i], 8080)}} // without a server
		for kind, addr := range map[dataplane.Kind]string{dataplane.ExternalIP: frontends[0], dataplane.NodePort: frontends[1]} {
			f := dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort(addr)}
			key := dataplane.Key{Namespace: "default", Name: "s", Family: dataplane.FamilyOf(f.Addr.Addr()), Kind: kind}
			s, err := dataplane.NewService(key, []dataplane.Frontend{f}, dataplane.ServiceSpec{
				Endpoints: endpoints, ExternalTrafficPolicyLocal: true, LocalEndpoints: slices.Clone(endpoints), Affinity: time.Hour,
			})
			if err != nil {
				t.Fatal(err)
			}
			services = append(services, s)
		}
	}
	mustReplace(t, d, node, services...)
	for _, s := range services {
		to := s.Frontends[0].Addr
		if s.Key.Kind == dataplane.NodePort {
			to = netip.AddrPortFrom(network.Node.Addrs()[familyIndex(s.Key.Family)], to.Port())
		}
		for from, want := range map[*nettest.Host]*nettest.Host{
			client: servers.cluster, network.Node: servers.cluster, network.Outside: servers.local,
		} {
			answer, err := from.Connect(t.Context(), nettest.TCP, to)
			if err != nil || answer.Host != want.Name {
				t.Errorf("%s from %s: answer %+v, error %v, want an answer from %s", to, from.Name, answer, err, want.Name)
			}
		}
	}
}

// TestPassThrough makes cluster IPs local to the node. Connections to a frontend must reach
// the input hook, where a Translator takes them over. All other packets must be rejected,
// except at an address that the node owns.
func TestPassThrough(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	node := network.Node
	pod := network.PodT(t, "pod")
	client := network.PodT(t, "client")
	d := openInNamespace(t, node.Namespace, virtualServers{})
	bound := []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:96::1")}
	owned := []netip.Addr{netip.MustParseAddr("10.96.0.2"), netip.MustParseAddr("fd00:96::2")}
	bindAddrs(t, node, bound...)
	var services []*dataplane.Service
	for i := range bound {
		if err := node.AddAddr(owned[i]); err != nil {
			t.Fatal(err)
		}
		for n, addr := range []netip.Addr{bound[i], owned[i]} {
			for _, p := range protocols() {
				f := dataplane.Frontend{Protocol: p, Addr: netip.AddrPortFrom(addr, 80)}
				s := service(t, fmt.Sprintf("s-%d-%s", n, p), []dataplane.Frontend{f}, []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.Addrs()[i], 8080)}})
				services = append(services, s)
			}
		}
	}
	node.ServeAtT(t, nettest.TCP, owned, 80, 81)
	mustReplace(t, d, dataplane.Node{PodCIDRs: network.PodCIDRs}, services...)
	binary := nftBinaries(t)["1.1.3"]
	runNFT(t, node.Namespace, binary, `table inet translator {
		counter taken { }
		counter late { }
		chain input {
			type filter hook input priority 99
			ip daddr { 10.96.0.1, 10.96.0.2 } meta priority != none counter name late
			ip6 daddr { fd00:96::1, fd00:96::2 } meta priority != none counter name late
			ip daddr 10.96.0.1 meta l4proto { tcp, udp, sctp } th dport 80 counter name taken drop
			ip6 daddr fd00:96::1 meta l4proto { tcp, udp, sctp } th dport 80 counter name taken drop
			ip daddr 10.96.0.1 counter name late
			ip6 daddr fd00:96::1 counter name late
		}
	}
	`)
	taken := 0
	for i := range bound {
		for _, from := range []*nettest.Host{client, network.Outside} {
			for _, p := range protocols() {
				protocol := map[dataplane.Protocol]string{dataplane.TCP: nettest.TCP, dataplane.UDP: nettest.UDP, dataplane.SCTP: nettest.SCTP}[p]
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				answer, err := from.Connect(ctx, protocol, netip.AddrPortFrom(bound[i], 80))
				cancel()
				now := counterPackets(t, runNFT(t, node.Namespace, binary, "list counter inet translator taken"))
				if !errors.Is(err, nettest.ErrTimeout) || now == taken {
					t.Errorf("%s from %s to %s: answer %+v, error %v, %d packets at the input hook; want packets and a timeout", p, from.Name, bound[i], answer, err, now-taken)
				}
				taken = now
				if answer, err := from.Connect(t.Context(), protocol, netip.AddrPortFrom(bound[i], 81)); !errors.Is(err, nettest.ErrRefused) {
					t.Errorf("%s from %s to an undeclared port of %s: answer %+v, error %v, want it refused", p, from.Name, bound[i], answer, err)
				}
			}
			if err := from.Ping(t.Context(), bound[i]); !errors.Is(err, nettest.ErrRefused) {
				t.Errorf("ping from %s to %s: error %v, want it refused", from.Name, bound[i], err)
			}
			if err := from.ProbeProtocol(t.Context(), nettest.ESP, bound[i]); !errors.Is(err, nettest.ErrRefused) {
				t.Errorf("ESP from %s to %s: error %v, want it refused", from.Name, bound[i], err)
			}
			for _, port := range []uint16{80, 81} {
				if _, err := from.Connect(t.Context(), nettest.TCP, netip.AddrPortFrom(owned[i], port)); err != nil {
					t.Errorf("%s to port %d of an address of the node: %v", from.Name, port, err)
				}
			}
		}
	}
	if n := counterPackets(t, runNFT(t, node.Namespace, binary, "list counter inet translator late")); n != 0 {
		t.Errorf("%d packets passed that should have been rejected, or had a modified priority", n)
	}
	for _, table := range []string{"ip", "ip6"} {
		// Five packets for each of two clients; packets to the address of the node are not counted.
		if n := counterPackets(t, runNFT(t, node.Namespace, binary, "list counter "+table+" fairlead rejected-undeclared-port")); n < 10 {
			t.Errorf("%s: %d packets were counted, want at least 10", table, n)
		}
	}
}

// TestPassThroughMasqueraded forwards passed-through connections to a pod without
// translation, which otherwise only a Translator can do. The pod must see the node's address
// if the masquerade policy requires it.
func TestPassThroughMasqueraded(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	node := network.Node
	pod := network.PodT(t, "pod")
	client := network.PodT(t, "client")
	d := openInNamespace(t, node.Namespace, virtualServers{})
	handle := routeHandle(t, node)
	var services []*dataplane.Service
	for i, vip := range []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:96::1")} {
		if err := pod.AddAddr(vip); err != nil {
			t.Fatal(err)
		}
		via, err := handle.RouteGet(pod.Addrs()[i].AsSlice())
		if err != nil {
			t.Fatal(err)
		}
		err = handle.RouteAdd(&netlink.Route{
			LinkIndex: via[0].LinkIndex, Dst: hostIPNet(vip), Gw: pod.Addrs()[i].AsSlice(), Flags: int(netlink.FLAG_ONLINK),
		})
		if err != nil {
			t.Fatal(err)
		}
		for n, m := range []dataplane.Masquerade{dataplane.MasqueradeOffCluster, dataplane.MasqueradeAlways} {
			f := dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(vip, uint16(80+n))} //nolint:gosec // fits
			s := service(t, m.String(), []dataplane.Frontend{f}, []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.Addrs()[i], 8080)}})
			s.Masquerade = m
			services = append(services, s)
		}
	}
	pod.ServeT(t, nettest.TCP, 80, 81)
	mustReplace(t, d, dataplane.Node{PodCIDRs: network.PodCIDRs}, services...)
	runNFT(t, node.Namespace, nftBinaries(t)["1.1.3"], "flush chain ip fairlead filter-forward\nflush chain ip6 fairlead filter-forward\n")
	for _, s := range services {
		for _, from := range []*nettest.Host{client, network.Outside} {
			i := familyIndex(s.Key.Family)
			masqueraded := from != client || s.Masquerade == dataplane.MasqueradeAlways
			answer, err := from.Connect(t.Context(), nettest.TCP, s.Frontends[0].Addr)
			if err != nil || (answer.Source.Addr() == from.Addrs()[i]) == masqueraded || !strings.HasPrefix(answer.Endpoint.String(), s.Frontends[0].Addr.String()) {
				t.Errorf("%s of %s from %s: answer %+v, error %v, want it masqueraded: %t", s.Frontends[0], s.Key, from.Name, answer, err, masqueraded)
			}
		}
	}
}

// TestBoundAddressService makes an address local to the node that has no frontend, or no
// frontend at this port. Neither a program on the node nor the host that has the address may
// get connections to it.
func TestBoundAddressService(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	node := network.Node
	client := network.PodT(t, "client")
	d := openInNamespace(t, node.Namespace, virtualServers{})
	addrs := []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:96::1")}
	bindAddrs(t, node, addrs...)
	for _, addr := range addrs {
		if err := network.Outside.AddAddr(addr); err != nil {
			t.Fatal(err)
		}
	}
	network.Outside.ServeT(t, nettest.TCP, 80)
	for _, wild := range []string{"0.0.0.0:80", "[::]:80"} {
		l, err := node.Listen(t.Context(), map[bool]string{true: "tcp4", false: "tcp6"}[wild[0] == '0'], netip.MustParseAddrPort(wild))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
	}
	mustReplace(t, d, dataplane.Node{})
	expect := func(when string, fromNode, fromPod error) {
		t.Helper()
		var checks sync.WaitGroup
		for _, addr := range addrs {
			for from, want := range map[*nettest.Host]error{node: fromNode, client: fromPod} {
				if want == nil && addr.Is4() && from == client {
					continue // the node has no route for answers from the address
				}
				checks.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
					defer cancel()
					conn, err := from.Open(ctx, nettest.TCP, netip.AddrPortFrom(addr, 80))
					if err == nil {
						_ = conn.Close()
					}
					if !errors.Is(err, want) {
						t.Errorf("%s: %s from %s: error %v, want %v", when, addr, from.Name, err, want)
					}
				})
			}
		}
		checks.Wait()
	}
	expect("not bound", nil, nil)
	var bound, services []*dataplane.Service
	for _, addr := range addrs {
		bound = append(bound, BoundAddressService(addr))
		f := dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(addr, 81)}
		services = append(services, service(t, "s", []dataplane.Frontend{f}, nil))
	}
	add := func(services []*dataplane.Service) []dataplane.Change {
		var all []dataplane.Change
		for _, s := range services {
			all = append(all, dataplane.Change{New: s})
		}
		return all
	}
	remove := func(services []*dataplane.Service) []dataplane.Change {
		var all []dataplane.Change
		for _, s := range services {
			all = append(all, dataplane.Change{Old: s})
		}
		return all
	}
	mustApply(t, d, add(bound)...)
	expect("bound", nettest.ErrTimeout, nettest.ErrTimeout)
	mustApply(t, d, add(services)...)
	expect("frontend at another port", nettest.ErrRefused, nettest.ErrRefused)
	before := generation(t, d)
	mustReplace(t, openInNamespace(t, node.Namespace, virtualServers{}), dataplane.Node{}, slices.Concat(bound, services)...)
	if generation(t, d) != before {
		t.Error("an equal Replace changed the ruleset")
	}
	wantVirtualBindings(t, d, services...)
	mustApply(t, d, remove(services)...)
	expect("frontend removed", nettest.ErrTimeout, nettest.ErrTimeout)
	mustReplace(t, d, dataplane.Node{}, bound...)
	expect("Replace", nettest.ErrTimeout, nettest.ErrTimeout)
	mustApply(t, d, remove(bound)...)
	expect("no longer bound", nil, nil)
}

// TestNodeEndpoints translates packets that the node sends to a bound address to an address
// of the node. Like IPVS, it translates behind our chains and without a new routing decision.
// The packets must reach the endpoint with their original mark.
func TestNodeEndpoints(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	node := network.Node
	d := openInNamespace(t, node.Namespace, virtualServers{})
	var services []*dataplane.Service
	script := "table inet translator {\n counter kept { }\n counter lost { }\n"
	var sent, answered strings.Builder
	for i, addr := range []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:96::1")} {
		services = append(services, BoundAddressService(addr))
		ip := []string{"ip", "ip6"}[i]
		for _, p := range []dataplane.Protocol{dataplane.TCP, dataplane.UDP} {
			f := dataplane.Frontend{Protocol: p, Addr: netip.AddrPortFrom(addr, 80)}
			services = append(services, service(t, p.String(), []dataplane.Frontend{f}, []dataplane.Endpoint{{Addr: netip.AddrPortFrom(node.Addrs()[i], 6443)}}))
			l4 := strings.ToLower(p.String())
			fmt.Fprintf(&sent, "%s daddr %s %s dport 80 %s daddr set %s %s dport set 6443\n", ip, addr, l4, ip, node.Addrs()[i], l4)
			fmt.Fprintf(&answered, "%s saddr %s %s sport 6443 %s saddr set %s %s sport set 80\n", ip, node.Addrs()[i], l4, ip, addr, l4)
		}
	}
	mustReplace(t, d, dataplane.Node{}, services...)
	script += "chain sent {\n type filter hook output priority -98\n" + sent.String() + "}\n" +
		"chain answered {\n type filter hook output priority -300\n meta mark set 0x80000005\n" + answered.String() + "}\n" +
		"chain seen {\n type filter hook postrouting priority 0\n" +
		"th dport 6443 meta mark 0x80000005 counter name kept\n th dport 6443 meta mark != 0x80000005 counter name lost\n}\n}\n"
	binary := nftBinaries(t)["1.1.3"]
	runNFT(t, node.Namespace, binary, script)
	node.ServeT(t, nettest.TCP, 6443)
	node.ServeT(t, nettest.UDP, 6443)
	for _, protocol := range []string{nettest.TCP, nettest.UDP} {
		for _, addr := range []string{"10.96.0.1:80", "[fd00:96::1]:80"} {
			if answer, err := node.Connect(t.Context(), protocol, netip.MustParseAddrPort(addr)); err != nil || answer.Host != node.Name {
				t.Errorf("%s to %s: answer %+v, error %v, want an answer from the node", protocol, addr, answer, err)
			}
		}
	}
	kept, lost := counterPackets(t, runNFT(t, node.Namespace, binary, "list counter inet translator kept")), counterPackets(t, runNFT(t, node.Namespace, binary, "list counter inet translator lost"))
	if kept == 0 || lost > 0 {
		t.Errorf("%d packets kept their mark, %d lost it", kept, lost)
	}
}
