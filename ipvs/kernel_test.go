//go:build ipvs

// The tests with this build tag need a kernel with IPVS, which few test machines have. `make
// test-vm` runs them in virtual machines.

package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func openForTest(t testing.TB, netns int) dataplane.Dataplane {
	t.Helper()
	d, err := Open(Options{NetNS: netns})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestBehaviour(t *testing.T) {
	dataplanetest.Run(t, openForTest, limitations())
}

// TestExplanations repeats TestBehaviour and compares each connection with its explanation. That
// reads virtual servers for each connection, which takes long on an emulated processor.
func TestExplanations(t *testing.T) {
	dataplanetest.RunExplained(t, openForTest, limitations(), explainFlows)
}

func limitations() dataplanetest.Limitations {
	return dataplanetest.Limitations{AffinityOutlivesTimeout: true, NeedUniquePorts: true, HashMovesMore: true}
}

// topology is a network whose node has a Dataplane. Its moby handle changes and reads IPVS as
// another program would.
type topology struct {
	*nettest.Network
	t        *testing.T
	opts     Options
	dp       *Dataplane
	moby     *ipvs.Handle
	pods     []*nettest.Host
	services map[dataplane.Key]*dataplane.Service
}

const podPort = 8080

func newTopology(t *testing.T, opts Options, pods int) *topology {
	t.Helper()
	n := &topology{Network: nettest.NewT(t, nettest.Options{}), t: t, opts: opts, services: map[dataplane.Key]*dataplane.Service{}}
	n.opts.NetNS = n.Node.Fd()
	for i := range pods {
		pod := n.PodT(t, fmt.Sprintf("pod-%d", i))
		pod.ServeT(t, nettest.TCP, podPort)
		pod.ServeT(t, nettest.UDP, podPort)
		n.pods = append(n.pods, pod)
	}
	var err error
	if n.moby, err = ipvs.New(fmt.Sprintf("/proc/self/fd/%d", n.Node.Fd())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.moby.Close)
	n.openDataplane()
	t.Cleanup(func() {
		if err := n.dp.Close(); err != nil {
			t.Errorf("close Dataplane: %v", err)
		}
	})
	return n
}

func (n *topology) openDataplane() {
	n.t.Helper()
	var err error
	if n.dp, err = Open(n.opts); err != nil {
		n.t.Fatal(err)
	}
}

// restart closes the Dataplane, opens another one and replaces the state, as a restart of the
// process does.
func (n *topology) restart() {
	n.t.Helper()
	if err := n.dp.Close(); err != nil {
		n.t.Fatal(err)
	}
	n.openDataplane()
	n.replace(slices.Collect(maps.Values(n.services))...)
}

func (n *topology) replace(services ...*dataplane.Service) {
	n.t.Helper()
	node := dataplane.Node{PodCIDRs: n.PodCIDRs, NodePortAddrs: n.Node.Addrs()}
	if err := n.dp.Replace(n.t.Context(), node, slices.Values(services), nil); err != nil {
		n.t.Fatal(err)
	}
	n.services = map[dataplane.Key]*dataplane.Service{}
	for _, s := range services {
		n.services[s.Key] = s
	}
	n.checkRead()
}

func (n *topology) apply(s *dataplane.Service) {
	n.t.Helper()
	if err := n.dp.Apply(n.t.Context(), []dataplane.Change{{Old: n.services[s.Key], New: s}}); err != nil {
		n.t.Fatal(err)
	}
	n.services[s.Key] = s
	n.checkRead()
}

func (n *topology) remove(s *dataplane.Service) {
	n.t.Helper()
	if err := n.dp.Apply(n.t.Context(), []dataplane.Change{{Old: n.services[s.Key]}}); err != nil {
		n.t.Fatal(err)
	}
	delete(n.services, s.Key)
}

func (n *topology) checkRead() {
	n.t.Helper()
	got, err := n.dp.Read(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	if want := dataplane.StateOf(maps.Values(n.services)); !want.Equal(got) {
		n.t.Fatalf("the kernel does not have the programmed state:\n%s", want.Diff(got))
	}
}

// web returns a Service at 10.96.0.1:80 with the given pods as endpoints.
func (n *topology) web(protocol dataplane.Protocol, pods ...int) *dataplane.Service {
	n.t.Helper()
	return service(n.t, dataplane.ClusterIP, "web", "10.96.0.1:80/"+protocol.String(), n.spec(pods...))
}

func (n *topology) spec(pods ...int) dataplane.ServiceSpec {
	var spec dataplane.ServiceSpec
	for _, i := range pods {
		spec.Endpoints = append(spec.Endpoints, dataplane.Endpoint{Addr: netip.AddrPortFrom(n.pods[i].IPv4, podPort)})
	}
	return spec
}

// dump returns the virtual servers at an address as another program sees them, with their
// schedulers, destinations and weights.
func (n *topology) dump(addr string) string {
	n.t.Helper()
	var lines []string
	services, err := n.moby.GetServices()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, s := range services {
		if (&net.TCPAddr{IP: s.Address, Port: int(s.Port)}).String() != addr {
			continue
		}
		line := fmt.Sprintf("%s %s", dataplane.Protocol(s.Protocol), s.SchedName) //nolint:gosec // the kernel sends 8 bits
		destinations, err := n.moby.GetDestinations(s)
		if err != nil {
			n.t.Fatal(err)
		}
		var at []string
		for _, d := range destinations {
			at = append(at, fmt.Sprintf("%s:%d=%d", d.Address, d.Port, d.Weight))
		}
		slices.Sort(at)
		lines = append(lines, strings.Join(append([]string{line}, at...), " "))
	}
	slices.Sort(lines)
	return strings.Join(lines, "; ")
}

func (n *topology) expectDump(addr, want string) {
	n.t.Helper()
	if got := n.dump(addr); got != want {
		n.t.Errorf("virtual servers at %s: %q, want %q", addr, got, want)
	}
}

// eventually waits until condition returns true.
func eventually(t *testing.T, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not true within %v: %s", limit, what)
		}
	}
}

var clusterIP = netip.MustParseAddrPort("10.96.0.1:80")

func TestVirtualServerAddresses(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{Scheduler: "lc"}, 2)
	n.replace(n.web(dataplane.TCP, 0, 1), service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", n.spec(1)))
	a, b := n.pods[0].IPv4, n.pods[1].IPv4
	n.expectDump("10.96.0.1:80", fmt.Sprintf("TCP lc %s:8080=1 %s:8080=1", a, b))
	n.expectDump("250.29.0.1:30080", fmt.Sprintf("TCP lc %s:8080=1", b))
}

// TestPreservesUnmanagedServers checks that Fairlead never changes virtual servers at
// addresses without Services, identified by a firewall mark, or in excluded networks.
func TestPreservesUnmanagedServers(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{ExcludeCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.200.0/24")}}, 1)
	unmanaged := []*ipvs.Service{
		{Address: net.IPv4(192, 0, 2, 50).To4(), Protocol: unix.IPPROTO_TCP, Port: 80},
		{Address: net.IPv4(10, 96, 200, 1).To4(), Protocol: unix.IPPROTO_UDP, Port: 53},
		{FWMark: 7},
	}
	for _, s := range unmanaged {
		s.SchedName, s.AddressFamily, s.Netmask = "rr", unix.AF_INET, 0xffffffff
		if err := n.moby.NewService(s); err != nil {
			t.Fatal(err)
		}
		d := &ipvs.Destination{Address: net.IPv4(192, 0, 2, 60).To4(), Port: 80, Weight: 3, AddressFamily: unix.AF_INET}
		if err := n.moby.NewDestination(s, d); err != nil {
			t.Fatal(err)
		}
	}
	check := func(after string) {
		t.Helper()
		for _, s := range unmanaged {
			found, err := n.moby.GetDestinations(s)
			if err != nil || len(found) != 1 || found[0].Weight != 3 {
				t.Errorf("after %s the unmanaged virtual server %+v has destinations %v (error %v)", after, s, found, err)
			}
		}
	}
	n.replace(n.web(dataplane.TCP, 0))
	check("a Replace")
	n.restart()
	check("a restart")
	n.replace()
	check("a Replace without Services")

	excluded := service(t, dataplane.ClusterIP, "dns", "10.96.200.1:53/UDP", n.spec(0))
	var keyed *dataplane.Error
	err := n.dp.Apply(t.Context(), []dataplane.Change{{New: excluded}, {New: n.web(dataplane.TCP, 0)}})
	if !errors.As(err, &keyed) || len(keyed.Failed) != 1 || !errors.Is(keyed.Failed[excluded.Key], dataplane.ErrUnsupported) {
		t.Errorf("Service in an excluded network: error %v, want ErrUnsupported for this Service only", err)
	}
	check("adding a Service at its address")
	if err := n.dp.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(n.opts); err != nil {
		t.Fatal(err)
	}
	check("Cleanup")
	n.openDataplane()
}

// TestInternalAddressesUnreachable checks that clients cannot bypass source ranges by
// connecting to an internal address.
func TestInternalAddressesUnreachable(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 2)
	n.replace(
		service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", n.spec(0)),
		service(t, dataplane.NodePort, "web", "[::]:30080/TCP", dataplane.ServiceSpec{
			Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(n.pods[0].IPv6, podPort)}},
		}),
	)
	if err := n.Outside.Do(func() error {
		var errs []error
		for i, via := range []netip.Addr{n.Node.IPv4, n.Node.IPv6} {
			to := internalNets()[i]
			errs = append(errs, netlink.RouteAdd(&netlink.Route{
				Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}, Gw: via.AsSlice(),
			}))
		}
		return errors.Join(errs...)
	}); err != nil {
		t.Fatal(err)
	}
	for _, from := range []*nettest.Host{n.pods[1], n.Node, n.Outside} {
		for _, tt := range []struct{ nodePort, internal string }{
			{n.Node.IPv4.String() + ":30080", "250.29.0.1:30080"},
			{"[" + n.Node.IPv6.String() + "]:30080", "[fdfa:1d00::1]:30080"},
		} {
			if _, err := from.Connect(t.Context(), nettest.TCP, netip.MustParseAddrPort(tt.nodePort)); err != nil {
				t.Errorf("from %s: %v", from.Name, err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			if answer, err := from.Connect(ctx, nettest.TCP, netip.MustParseAddrPort(tt.internal)); err == nil {
				t.Errorf("from %s: %s answers %+v", from.Name, tt.internal, answer)
			}
			cancel()
		}
	}
}

// TestCleanup checks that Cleanup removes all objects without a Dataplane.
func TestCleanup(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 1)
	n.replace(n.web(dataplane.TCP, 0), service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", n.spec(0)))
	if err := n.dp.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Cleanup(n.opts); err != nil {
			t.Fatal(err)
		}
	}
	services, err := n.moby.GetServices()
	if err != nil || len(services) != 0 {
		t.Errorf("virtual servers after Cleanup: %v (error %v)", services, err)
	}
	if err := n.Node.Do(func() error {
		if _, err := netlink.LinkByName(LinkName); err == nil {
			t.Errorf("interface %s exists after Cleanup", LinkName)
		}
		rules, err := netlink.RuleList(netlink.FAMILY_ALL)
		for _, r := range rules {
			if r.Table == RouteTable {
				t.Errorf("routing rule %v exists after Cleanup", r)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	n.openDataplane()
	if state, err := n.dp.Read(t.Context()); err != nil || len(state) != 0 {
		t.Errorf("nftables rules after Cleanup: %v (error %v)", state, err)
	}
}

// TestDrift checks that changes by other programs cause a drift signal, and that Replace
// repairs them.
func TestDrift(t *testing.T) {
	t.Parallel()
	ours := &ipvs.Service{
		Address: net.IPv4(10, 96, 0, 1).To4(), Protocol: unix.IPPROTO_TCP, Port: 80,
		SchedName: "rr", AddressFamily: unix.AF_INET, Netmask: 0xffffffff,
	}
	for _, tt := range []struct {
		name string
		do   func(n *topology) error
	}{
		{"a virtual server is deleted", func(n *topology) error { return n.moby.DelService(ours) }},
		{"a virtual server gets another scheduler", func(n *topology) error {
			other := *ours
			other.SchedName = "lc"
			return n.moby.UpdateService(&other)
		}},
		{"a destination is deleted", func(n *topology) error {
			return n.moby.DelDestination(ours, &ipvs.Destination{
				Address: n.pods[0].IPv4.AsSlice(), Port: podPort, AddressFamily: unix.AF_INET,
			})
		}},
		{"a destination gets another weight", func(n *topology) error {
			return n.moby.UpdateDestination(ours, &ipvs.Destination{
				Address: n.pods[0].IPv4.AsSlice(), Port: podPort, AddressFamily: unix.AF_INET, Weight: 5,
			})
		}},
		{"a destination is added", func(n *topology) error {
			return n.moby.NewDestination(ours, &ipvs.Destination{
				Address: n.pods[1].IPv4.AsSlice(), Port: podPort, AddressFamily: unix.AF_INET, Weight: 1,
			})
		}},
		{"a virtual server is added at a Service's address", func(n *topology) error {
			other := *ours
			other.Port = 81
			return n.moby.NewService(&other)
		}},
		{"all virtual servers are flushed", func(n *topology) error { return n.moby.Flush() }},
		{"the interface is deleted", func(n *topology) error {
			return n.Node.Do(func() error {
				link, err := netlink.LinkByName(LinkName)
				if err != nil {
					return err
				}
				return netlink.LinkDel(link)
			})
		}},
		{"an address is unbound", func(n *topology) error {
			return n.Node.Do(func() error {
				return netlink.RouteDel(&netlink.Route{
					Table: RouteTable, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
					Dst: &net.IPNet{IP: net.IPv4(10, 96, 0, 1).To4(), Mask: net.CIDRMask(32, 32)},
				})
			})
		}},
		{"the rule is deleted", func(n *topology) error {
			return n.Node.Do(func() error { return netlink.RuleDel(lookupRule(dataplane.IPv4)) })
		}},
		{"the tables are deleted", func(n *topology) error {
			return nft.Cleanup(nft.Options{NetNS: n.Node.Fd(), Table: TableName})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newTopology(t, Options{}, 2)
			n.replace(n.web(dataplane.TCP, 0))
			want := n.dump("10.96.0.1:80")
			if err := tt.do(n); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			select {
			case <-n.dp.Drift():
			case <-time.After(30 * time.Second):
				t.Fatal("no drift")
			}
			t.Logf("drift signal after %v", time.Since(start))
			if tt.name == "the tables are deleted" {
				select {
				case <-n.dp.Lost():
				case <-time.After(30 * time.Second):
					t.Error("no signal that the tables are lost")
				}
			}
			if dryRun := n.dryRun(n.web(dataplane.TCP, 0)); len(dryRun.Writes) == 0 {
				t.Error("a dry run would write nothing")
			}
			n.replace(n.web(dataplane.TCP, 0))
			n.expectDump("10.96.0.1:81", "")
			eventually(t, 3*resyncPeriod, "the virtual server is repaired", func() bool { return n.dump("10.96.0.1:80") == want })
			for _, from := range []*nettest.Host{n.pods[1], n.Node, n.Outside} {
				if answer, err := from.Connect(t.Context(), nettest.TCP, clusterIP); err != nil || answer.Host != "pod-0" {
					t.Errorf("from %s: answer %+v, error %v, want an answer of pod-0", from.Name, answer, err)
				}
			}
		})
	}
}

// TestFlush checks that connections fail only for a moment after another program has deleted
// all virtual servers, as kube-proxy does when it starts in its mode nftables.
func TestFlush(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 2)
	n.replace(n.web(dataplane.TCP, 0))
	time.Sleep(time.Second) // rounds of checkForLoss without a loss
	select {
	case <-n.dp.Lost():
		t.Fatal("a loss without a cause")
	default:
	}
	for round := range 3 {
		if err := n.moby.Flush(); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		select {
		case <-n.dp.Lost(): // resync would signal only drift
		case <-time.After(30 * time.Second):
			t.Fatal("no loss")
		}
		noticed := time.Since(start)
		n.replace(n.web(dataplane.TCP, 0))
		repaired := time.Since(start)
		for _, from := range []*nettest.Host{n.pods[1], n.Node, n.Outside} {
			if answer, err := from.Connect(t.Context(), nettest.TCP, clusterIP); err != nil || answer.Host != "pod-0" {
				t.Errorf("round %d: from %s: answer %+v, error %v, want an answer of pod-0", round, from.Name, answer, err)
			}
		}
		t.Logf("round %d: noticed after %v, repaired after %v, answered after %v", round, noticed, repaired, time.Since(start))
	}
}

// TestGetServer checks that getServer returns the same settings as a dump.
func TestGetServer(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 1)
	s := n.web(dataplane.TCP, 0)
	s.Affinity, s.Scheduler = time.Hour, "lc"
	n.replace(s, service(t, dataplane.NodePort, "web", "[::]:30080/UDP", dataplane.ServiceSpec{}))
	k, err := dialIPVS(n.Node.Fd())
	if err != nil {
		t.Fatal(err)
	}
	defer k.close() //nolint:errcheck // only read from
	all, err := k.dumpServers()
	if err != nil || len(all) != 2 {
		t.Fatalf("virtual servers %v, error %v, want two", all, err)
	}
	for sv, want := range all {
		if got, exists, err := k.getServer(sv); err != nil || !exists || got != want {
			t.Errorf("%s is %+v (%t, error %v), in the dump %+v", sv, got, exists, err, want)
		}
		sv.addr = netip.AddrPortFrom(sv.addr.Addr(), 1)
		if got, exists, err := k.getServer(sv); err != nil || exists {
			t.Errorf("%s is %+v (%t, error %v), want that it does not exist", sv, got, exists, err)
		}
	}
}

// TestOptionsEqualDump checks that socket options return the same virtual servers and destinations
// as a dump over netlink.
func TestOptionsEqualDump(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 1)
	var many []string
	for i := range 100 {
		many = append(many, fmt.Sprintf("10.244.7.%d:%d", i+1, 8000+i))
	}
	affine, hashed := n.web(dataplane.UDP, 0), n.web(dataplane.TCP, 0)
	affine.Affinity, affine.Scheduler, hashed.Scheduler = time.Hour, "lc", dataplane.SourceHash
	affine.Key.Name = "affine"
	n.replace(affine, hashed,
		service(t, dataplane.ClusterIP, "none", "10.96.0.2:65535/SCTP", dataplane.ServiceSpec{}),
		service(t, dataplane.ClusterIP, "many", "10.96.0.3:443/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt(many...)}),
		service(t, dataplane.ClusterIP, "six", "[fd00:96::1]:80/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt("[fd00:244::1]:80")}),
	)
	n.apply(service(t, dataplane.ClusterIP, "many", "10.96.0.3:443/TCP", dataplane.ServiceSpec{Endpoints: endpointsAt(many[1:]...)}))
	if err := n.moby.NewService(&ipvs.Service{FWMark: 7, SchedName: "rr", AddressFamily: unix.AF_INET, Netmask: 0xffffffff}); err != nil {
		t.Fatal(err)
	}
	k, err := dialIPVS(n.Node.Fd())
	if err != nil {
		t.Fatal(err)
	}
	defer k.close() //nolint:errcheck // only read from
	dumped, err := k.dumpServers()
	if err != nil || len(dumped) != 5 {
		t.Fatalf("dumped %v, error %v, want 5 virtual servers", dumped, err)
	}
	got := map[serverKey]settings{}
	for _, f := range families() {
		read := map[serverKey]serverState{}
		complete, count, err := k.readServers(f, func(s serverKey, state serverState) { read[s] = state })
		if err != nil || complete != (f == dataplane.IPv4) || complete && count != 5 {
			t.Errorf("%s: complete %t, %d virtual servers, error %v, want 5 of IPv4", f, complete, count, err)
		}
		for s, state := range read {
			got[s] = state.settings
			var want []addressedDestination
			if err := k.forEachDestination(s, func(b []byte) {
				addr, d := parseDestination(b, addressFamily(s.addr.Addr()))
				want = append(want, addressedDestination{addr, d})
			}); err != nil {
				t.Error(err)
			}
			if f == dataplane.IPv4 && state.destinations != len(want) {
				t.Errorf("%s has %d destinations, want %d", s, state.destinations, len(want))
			}
			for _, expected := range []int{unknownNumber, 0, len(want), len(want) + 1} {
				if have, err := k.readDestinations(s, expected); err != nil || !slices.Equal(have, want) {
					t.Errorf("%s with %d expected: read %v, error %v, want %v", s, expected, have, err, want)
				}
			}
		}
	}
	if !maps.Equal(got, dumped) {
		t.Errorf("read %v, dumped %v", got, dumped)
	}
	if have, err := k.readDestinations(tcpServer("192.0.2.1:1"), unknownNumber); err != nil || len(have) > 0 {
		t.Errorf("read %v, error %v of a missing virtual server, want none", have, err)
	}
}

// TestNoDrift checks that changes by the Dataplane, and changes of unmanaged virtual servers,
// are not reported as drift.
func TestNoDrift(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 3)
	n.replace(n.web(dataplane.TCP, 0))
	unmanaged := &ipvs.Service{
		Address: net.IPv4(192, 0, 2, 50).To4(), Protocol: unix.IPPROTO_TCP, Port: 80,
		SchedName: "rr", AddressFamily: unix.AF_INET, Netmask: 0xffffffff,
	}
	if err := n.moby.NewService(unmanaged); err != nil {
		t.Fatal(err)
	}
	for end, i := time.Now().Add(resyncPeriod*5/2), 0; time.Now().Before(end); i++ {
		n.apply(n.web(dataplane.TCP, i%3, (i+1)%3))
		time.Sleep(50 * time.Millisecond)
		select {
		case <-n.dp.Drift():
			t.Fatal("drift")
		default:
		}
	}
}

// TestTCPDrain checks that a removed TCP endpoint keeps its connections, also across a
// restart, accepts no new ones, and is deleted when its connections have ended.
func TestTCPDrain(t *testing.T) {
	t.Parallel()
	// Draining also counts closed connections. The kernel decides how long it keeps them,
	// except for one that only the client has closed.
	n := newTopology(t, Options{}, 2)
	n.replace(n.web(dataplane.TCP, 0))
	old, err := n.Outside.Open(t.Context(), nettest.TCP, clusterIP)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(want string) {
		t.Helper()
		if answer, err := old.Ask(t.Context()); err != nil || answer.Host != want {
			t.Errorf("existing connection: answer %+v, error %v, want an answer of %s", answer, err, want)
		}
	}
	answer("pod-0")
	a, b := n.pods[0].IPv4, n.pods[1].IPv4
	draining := fmt.Sprintf("TCP rr %s:8080=0 %s:8080=1", a, b)
	n.apply(n.web(dataplane.TCP, 1))
	check := func(after string) {
		t.Helper()
		answer("pod-0")
		for range 5 {
			if answer, err := n.Outside.Connect(t.Context(), nettest.TCP, clusterIP); err != nil || answer.Host != "pod-1" {
				t.Errorf("after %s a new connection gets answer %+v (error %v), want an answer of pod-1", after, answer, err)
			}
		}
		n.expectDump("10.96.0.1:80", draining)
	}
	check("the removal")
	time.Sleep(resyncPeriod * 3 / 2)
	check("a resync")
	n.restart()
	check("a restart")
	time.Sleep(resyncPeriod * 3 / 2)
	check("a restart and a resync")

	n.apply(n.web(dataplane.TCP, 0, 1))
	n.expectDump("10.96.0.1:80", fmt.Sprintf("TCP rr %s:8080=1 %s:8080=1", a, b))
	answer("pod-0")
	if err := old.Close(); err != nil {
		t.Error(err)
	}
}

// TestIdleEndpointRemoved checks that an endpoint without connections is deleted soon.
func TestIdleEndpointRemoved(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 2)
	n.replace(n.web(dataplane.TCP, 0, 1))
	n.apply(n.web(dataplane.TCP, 1))
	want := fmt.Sprintf("TCP rr %s:8080=1", n.pods[1].IPv4)
	eventually(t, 3*resyncPeriod, "the endpoint is deleted", func() bool { return n.dump("10.96.0.1:80") == want })
}

// TestDrainLimit checks that DrainLimit ends a drain although a connection remains.
func TestDrainLimit(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{DrainLimit: 2 * time.Second}, 2)
	n.replace(n.web(dataplane.TCP, 0))
	old, err := n.Outside.Open(t.Context(), nettest.TCP, clusterIP)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if _, err := old.Ask(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.apply(n.web(dataplane.TCP, 1))
	want := fmt.Sprintf("TCP rr %s:8080=1", n.pods[1].IPv4)
	eventually(t, 3*resyncPeriod, "the endpoint is deleted", func() bool { return n.dump("10.96.0.1:80") == want })
}

// isBound reports whether an address is bound to the node.
func (n *topology) isBound(addr string) bool {
	n.t.Helper()
	h, err := openHost(n.Node.Fd())
	if err != nil {
		n.t.Fatal(err)
	}
	defer h.close() //nolint:errcheck // only read from
	link, err := h.handle.LinkByName(LinkName)
	if err != nil {
		n.t.Fatal(err)
	}
	h.link = link.Attrs().Index
	all, err := h.boundAddrs()
	if err != nil {
		n.t.Fatal(err)
	}
	return all[netip.MustParseAddr(addr)]
}

// TestDeletedServiceDrains checks that a deleted Service keeps its connections, including the
// node's own, and accepts no new ones, also if it was deleted while no Dataplane was running.
// Programs of the node are not reachable at its address. A new Service at the same frontend
// takes over the connections.
func TestDeletedServiceDrains(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 3)
	listener, err := n.Node.Listen(t.Context(), "tcp", netip.MustParseAddrPort("0.0.0.0:80"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	n.Node.ServeT(t, nettest.TCP, podPort)
	to := func(host *nettest.Host) dataplane.ServiceSpec {
		return dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(host.IPv4, podPort), Local: true}}}
	}
	nodePort := netip.AddrPortFrom(n.Node.IPv4, 30080)
	services := []*dataplane.Service{
		n.web(dataplane.TCP, 0),
		service(t, dataplane.ClusterIP, "host", "10.96.0.2:80/TCP", to(n.Node)),
		service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", n.spec(0)),
	}
	addrs := []netip.AddrPort{clusterIP, netip.MustParseAddrPort("10.96.0.2:80"), nodePort}
	n.replace(services...)
	clients := []*nettest.Host{n.pods[2], n.Node, n.Outside}
	var open []*nettest.Conn
	for _, addr := range addrs {
		for _, from := range clients {
			conn, err := from.Open(t.Context(), nettest.TCP, addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			open = append(open, conn)
		}
	}
	check := func(after string) {
		t.Helper()
		for _, conn := range open {
			if _, err := conn.Ask(t.Context()); err != nil {
				t.Errorf("after %s: %v", after, err)
			}
		}
		for _, addr := range addrs[:2] {
			for _, from := range clients {
				ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
				if conn, err := from.Open(ctx, nettest.TCP, addr); !errors.Is(err, nettest.ErrTimeout) {
					t.Errorf("after %s: new connection from %s to %s: %v, error %v, want a timeout", after, from.Name, addr, conn, err)
				}
				cancel()
			}
		}
		n.expectDump("10.96.0.1:80", fmt.Sprintf("TCP rr %s:8080=0", n.pods[0].IPv4))
		n.expectDump("250.29.0.1:30080", fmt.Sprintf("TCP rr %s:8080=0", n.pods[0].IPv4))
	}
	for _, s := range services {
		n.remove(s)
	}
	check("the deletion")
	time.Sleep(resyncPeriod * 3 / 2)
	check("a resync")
	n.restart()
	check("a restart")
	time.Sleep(resyncPeriod * 3 / 2)
	check("a restart and a resync")
	n.replace(services...)
	if err := n.dp.Close(); err != nil {
		t.Fatal(err)
	}
	n.openDataplane()
	n.replace()
	check("a deletion without a Dataplane")

	n.apply(n.web(dataplane.TCP, 1))
	n.expectDump("10.96.0.1:80", fmt.Sprintf("TCP rr %s:8080=0 %s:8080=1", n.pods[0].IPv4, n.pods[1].IPv4))
	for _, from := range clients {
		if answer, err := from.Connect(t.Context(), nettest.TCP, clusterIP); err != nil || answer.Host != "pod-1" {
			t.Errorf("from %s: answer %+v, error %v, want an answer of pod-1", from.Name, answer, err)
		}
	}
	for _, conn := range open {
		if _, err := conn.Ask(t.Context()); err != nil {
			t.Errorf("after adding another Service: %v", err)
		}
	}
}

// TestDeletedServiceRemoved checks that a deleted Service is removed with its address and drop
// rule when its connections have ended, or after DrainLimit.
func TestDeletedServiceRemoved(t *testing.T) {
	t.Parallel()
	for _, connected := range []bool{false, true} {
		t.Run(fmt.Sprintf("connected=%t", connected), func(t *testing.T) {
			t.Parallel()
			n := newTopology(t, Options{DrainLimit: 7 * time.Second}, 1)
			nodePort := service(t, dataplane.NodePort, "web", "0.0.0.0:30080/UDP", n.spec(0))
			n.replace(n.web(dataplane.TCP, 0), nodePort)
			if connected {
				conn, err := n.Outside.Open(t.Context(), nettest.TCP, clusterIP)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := conn.Ask(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			n.remove(n.web(dataplane.TCP, 0))
			n.remove(nodePort)
			if !n.isBound("10.96.0.1") {
				t.Error("the address was unbound before the virtual server was deleted")
			}
			eventually(t, 3*time.Second, "the UDP virtual server is deleted", func() bool { return n.dump("250.29.0.3:30080") == "" })
			eventually(t, 5*resyncPeriod, "the virtual server is deleted", func() bool { return n.dump("10.96.0.1:80") == "" })
			eventually(t, 3*time.Second, "the address is unbound", func() bool { return !n.isBound("10.96.0.1") })
			if err := n.Outside.AddAddr(clusterIP.Addr()); err != nil {
				t.Fatal(err)
			}
			n.Outside.ServeT(t, nettest.TCP, 80)
			eventually(t, 3*time.Second, "the address is reachable on another host", func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
				defer cancel()
				_, err := n.Node.Connect(ctx, nettest.TCP, clusterIP)
				return err == nil
			})
			select {
			case <-n.dp.Drift():
				t.Error("drift")
			case <-time.After(resyncPeriod * 3 / 2):
			}
		})
	}
}

// TestUDPFlowMoves checks that a UDP flow moves to another endpoint when its endpoint is
// removed.
func TestUDPFlowMoves(t *testing.T) {
	t.Parallel()
	for _, from := range []string{"outside", "node", "pod"} {
		t.Run("from "+from, func(t *testing.T) {
			t.Parallel()
			n := newTopology(t, Options{}, 2)
			n.replace(n.web(dataplane.UDP, 0))
			client := map[string]*nettest.Host{"outside": n.Outside, "node": n.Node, "pod": n.PodT(t, "client")}[from]
			flow, err := client.Open(t.Context(), nettest.UDP, clusterIP)
			if err != nil {
				t.Fatal(err)
			}
			defer flow.Close()
			if answer, err := flow.Ask(t.Context()); err != nil || answer.Host != "pod-0" {
				t.Fatalf("answer %+v, error %v, want an answer of pod-0", answer, err)
			}
			n.apply(n.web(dataplane.UDP, 1))
			eventually(t, 5*time.Second, "the flow moves", func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
				defer cancel()
				answer, err := flow.Ask(ctx)
				return err == nil && answer.Host == "pod-1"
			})
			n.expectDump("10.96.0.1:80", fmt.Sprintf("UDP rr %s:8080=1", n.pods[1].IPv4))
		})
	}
}

// TestUDPFlowStaysWhileServing checks that a terminating UDP endpoint keeps its flows while it
// serves.
func TestUDPFlowStaysWhileServing(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 2)
	n.replace(n.web(dataplane.UDP, 0))
	flow, err := n.Outside.Open(t.Context(), nettest.UDP, clusterIP)
	if err != nil {
		t.Fatal(err)
	}
	defer flow.Close()
	check := func(after string) {
		t.Helper()
		if answer, err := flow.Ask(t.Context()); err != nil || answer.Host != "pod-0" {
			t.Errorf("%s: answer %+v, error %v, want an answer of pod-0", after, answer, err)
		}
	}
	check("at first")
	terminating, err := n.web(dataplane.UDP, 1).WithServing([]netip.AddrPort{netip.AddrPortFrom(n.pods[0].IPv4, podPort)})
	if err != nil {
		t.Fatal(err)
	}
	n.apply(terminating)
	for range 3 {
		time.Sleep(2 * udpDrainGrace)
		check("while it serves")
		if answer, err := n.Outside.Connect(t.Context(), nettest.UDP, clusterIP); err != nil || answer.Host != "pod-1" {
			t.Errorf("new flow: answer %+v, error %v, want an answer of pod-1", answer, err)
		}
	}
	n.restart()
	check("after a restart")
	time.Sleep(resyncPeriod * 3 / 2)
	check("after a resync")
	n.apply(n.web(dataplane.UDP, 1))
	eventually(t, 5*time.Second, "the flow moves", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		answer, err := flow.Ask(ctx)
		return err == nil && answer.Host == "pod-1"
	})
}

// TestSchedulers checks that Services can use every scheduler of the kernel, and change it.
func TestSchedulers(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 2)
	n.replace()
	for _, name := range append(Schedulers(), dataplane.SourceHash) { // mh comes before
		s := n.web(dataplane.TCP, 0, 1)
		if name != DefaultScheduler {
			s.Scheduler = name
		}
		if name == "twos" { // Debian includes it since 6.12
			err := n.dp.Apply(t.Context(), []dataplane.Change{{Old: n.services[s.Key], New: s}})
			if err != nil && !strings.Contains(err.Error(), "ip_vs_twos") {
				t.Errorf("%s: %v", name, err)
			}
			n.replace(n.services[s.Key])
			if err != nil {
				continue
			}
		}
		n.apply(s)
		if name == dataplane.SourceHash {
			name = maglev
		}
		n.expectDump("10.96.0.1:80", fmt.Sprintf("TCP %s %s:8080=1 %s:8080=1", name, n.pods[0].IPv4, n.pods[1].IPv4))
		for range 3 {
			if _, err := n.Outside.Connect(t.Context(), nettest.TCP, clusterIP); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestUnknownScheduler checks that a missing scheduler affects only its own Service.
func TestUnknownScheduler(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 1)
	n.replace()
	bad := service(t, dataplane.ClusterIP, "bad", "10.96.0.2:80/TCP", n.spec(0))
	bad.Scheduler = "nosuch"
	good := n.web(dataplane.TCP, 0)
	check := func(err error) {
		t.Helper()
		var keyed *dataplane.Error
		if !errors.As(err, &keyed) || len(keyed.Failed) != 1 || keyed.Failed[bad.Key] == nil {
			t.Fatalf("error %v, want one for %s only", err, bad.Key)
		}
		if text := keyed.Failed[bad.Key].Error(); !strings.Contains(text, "scheduler nosuch") || !strings.Contains(text, "ip_vs_nosuch") {
			t.Errorf("error %q, want the scheduler and its module in it", text)
		}
		if _, err := n.Outside.Connect(t.Context(), nettest.TCP, clusterIP); err != nil {
			t.Error(err)
		}
		if _, err := n.Outside.Connect(t.Context(), nettest.TCP, netip.MustParseAddrPort("10.96.0.2:80")); err == nil {
			t.Error("the Service with the unknown scheduler answers")
		}
	}
	check(n.dp.Apply(t.Context(), []dataplane.Change{{New: bad}, {New: good}}))
	check(n.dp.Replace(t.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{bad, good}), nil))
	if _, err := Open(Options{NetNS: n.Node.Fd(), Scheduler: "nosuch"}); err == nil || !strings.Contains(err.Error(), `"nosuch": must be one of [`) {
		t.Errorf("error %v, want the valid schedulers in it", err)
	}
}

// TestChurnOrdering checks that connections of the node and of pods to Services that come and
// go reach an endpoint or time out. The virtual server must never answer for lack of
// destinations, and a program of the node must never answer.
func TestChurnOrdering(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 2)
	client := n.PodT(t, "client")
	listener, err := n.Node.Listen(t.Context(), "tcp", netip.MustParseAddrPort("0.0.0.0:80"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	n.replace()
	stop, done := make(chan struct{}), make(chan int)
	for _, from := range []*nettest.Host{n.Node, client} {
		go func() {
			reached := 0
			for {
				select {
				case <-stop:
					done <- reached
					return
				default:
				}
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				answer, err := from.Connect(ctx, nettest.TCP, clusterIP)
				cancel()
				switch {
				case err == nil && strings.HasPrefix(answer.Host, "pod-"):
					reached++
				case err == nil, errors.Is(err, nettest.ErrRefused):
					t.Errorf("from %s: answer %+v, error %v, want an answer of a pod or a timeout", from.Name, answer, err)
				}
			}
		}()
	}
	changes := 0
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); changes++ {
		s := n.web(dataplane.TCP, 0, 1)
		n.apply(s)
		if changes%2 == 0 {
			time.Sleep(20 * time.Millisecond)
		}
		n.remove(s)
	}
	close(stop)
	reached := []int{<-done, <-done}
	t.Logf("%d changes, %v connections", changes, reached)
	if slices.Min(reached) == 0 {
		t.Errorf("%v connections of the node and of a pod reached an endpoint, want some of each", reached)
	}
}

func TestTimeouts(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{TCPTimeout: 600 * time.Second, UDPTimeout: 20 * time.Second}, 0)
	before, err := n.moby.GetConfig()
	if err != nil {
		t.Fatal(err)
	}
	n.replace()
	got, err := n.moby.GetConfig()
	if err != nil {
		t.Fatal(err)
	}
	want := ipvs.Config{TimeoutTCP: 600 * time.Second, TimeoutTCPFin: before.TimeoutTCPFin, TimeoutUDP: 20 * time.Second}
	if *got != want {
		t.Errorf("timeouts %+v, want %+v", *got, want)
	}
}

func TestSysctls(t *testing.T) {
	t.Parallel()
	for _, strict := range []bool{false, true} {
		n := newTopology(t, Options{StrictARP: strict}, 0)
		want := requiredSysctls(strict)
		arp := map[bool]string{false: "0", true: "1"}[strict]
		want["net/ipv4/conf/all/arp_ignore"] = arp
		check := func() {
			t.Helper()
			if err := n.Node.Do(func() error {
				for name, value := range want {
					if got, err := os.ReadFile("/proc/sys/" + name); err != nil || strings.TrimSpace(string(got)) != value {
						t.Errorf("strict ARP %t: %s is %q (error %v), want %s", strict, name, got, err, value)
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		n.replace()
		check()
	}
}

// TestPreservesUnmanagedInterface checks that an interface of the same name and another type
// is not changed.
func TestPreservesUnmanagedInterface(t *testing.T) {
	t.Parallel()
	n := newTopology(t, Options{}, 0)
	if err := n.Node.Do(func() error {
		link, err := netlink.LinkByName(LinkName)
		if err != nil {
			return err
		}
		if err := netlink.LinkDel(link); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = LinkName
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	}); err != nil {
		t.Fatal(err)
	}
	err := n.dp.Replace(t.Context(), dataplane.Node{}, slices.Values[[]*dataplane.Service](nil), nil)
	if err == nil || !strings.Contains(err.Error(), "fairlead0 is of type bridge") {
		t.Errorf("error %v, want the interface's type in it", err)
	}
	if err := Cleanup(n.opts); err != nil {
		t.Error(err)
	}
	if err := n.Node.Do(func() error {
		_, err := netlink.LinkByName(LinkName)
		return err
	}); err != nil {
		t.Errorf("the interface was deleted: %v", err)
	}
}
