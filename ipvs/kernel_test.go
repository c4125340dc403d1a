//go:build ipvs

// The tests with this build tag need a kernel that has IPVS, which few machines
// for tests have: `make test-vm` runs them in virtual machines.

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
	dataplanetest.Run(t, openForTest, dataplanetest.Limitations{AffinityOutlivesTimeout: true, NeedUniquePorts: true})
}

// topology is a network whose node has a Dataplane, and others who use IPVS beside it:
// they do so by the library that others use.
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
	w := &topology{Network: nettest.NewT(t, nettest.Options{}), t: t, opts: opts, services: map[dataplane.Key]*dataplane.Service{}}
	w.opts.NetNS = w.Node.Fd()
	for i := range pods {
		pod := w.PodT(t, fmt.Sprintf("pod-%d", i))
		pod.ServeT(t, nettest.TCP, podPort)
		pod.ServeT(t, nettest.UDP, podPort)
		w.pods = append(w.pods, pod)
	}
	var err error
	if w.moby, err = ipvs.New(fmt.Sprintf("/proc/self/fd/%d", w.Node.Fd())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.moby.Close)
	w.openDataplane()
	t.Cleanup(func() {
		if err := w.dp.Close(); err != nil {
			t.Errorf("close the Dataplane: %v", err)
		}
	})
	return w
}

func (w *topology) openDataplane() {
	w.t.Helper()
	var err error
	if w.dp, err = Open(w.opts); err != nil {
		w.t.Fatal(err)
	}
}

// restart is what happens when the program does.
func (w *topology) restart() {
	w.t.Helper()
	if err := w.dp.Close(); err != nil {
		w.t.Fatal(err)
	}
	w.openDataplane()
	w.replace(slices.Collect(maps.Values(w.services))...)
}

func (w *topology) replace(services ...*dataplane.Service) {
	w.t.Helper()
	node := dataplane.Node{PodCIDRs: w.PodCIDRs, NodePortAddrs: w.Node.Addrs()}
	if err := w.dp.Replace(w.t.Context(), node, slices.Values(services), nil); err != nil {
		w.t.Fatal(err)
	}
	w.services = map[dataplane.Key]*dataplane.Service{}
	for _, s := range services {
		w.services[s.Key] = s
	}
	w.checkRead()
}

func (w *topology) apply(s *dataplane.Service) {
	w.t.Helper()
	if err := w.dp.Apply(w.t.Context(), []dataplane.Change{{Old: w.services[s.Key], New: s}}); err != nil {
		w.t.Fatal(err)
	}
	w.services[s.Key] = s
	w.checkRead()
}

func (w *topology) remove(s *dataplane.Service) {
	w.t.Helper()
	if err := w.dp.Apply(w.t.Context(), []dataplane.Change{{Old: w.services[s.Key]}}); err != nil {
		w.t.Fatal(err)
	}
	delete(w.services, s.Key)
}

func (w *topology) checkRead() {
	w.t.Helper()
	got, err := w.dp.Read(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	if want := dataplane.StateOf(maps.Values(w.services)); !want.Equal(got) {
		w.t.Fatalf("the kernel does not hold what was programmed:\n%s", want.Diff(got))
	}
}

// web returns a Service at 10.96.0.1:80 with these pods as endpoints.
func (w *topology) web(protocol dataplane.Protocol, pods ...int) *dataplane.Service {
	w.t.Helper()
	return service(w.t, dataplane.ClusterIP, "web", "10.96.0.1:80/"+protocol.String(), w.spec(pods...))
}

func (w *topology) spec(pods ...int) dataplane.ServiceSpec {
	var treatment dataplane.ServiceSpec
	for _, i := range pods {
		treatment.Endpoints = append(treatment.Endpoints, dataplane.Endpoint{Addr: netip.AddrPortFrom(w.pods[i].IPv4, podPort)})
	}
	return treatment
}

// dump returns what the kernel has at an address, as others see it: the virtual
// server with its scheduler, and each destination with its weight.
func (w *topology) dump(addr string) string {
	w.t.Helper()
	var lines []string
	services, err := w.moby.GetServices()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, s := range services {
		if (&net.TCPAddr{IP: s.Address, Port: int(s.Port)}).String() != addr {
			continue
		}
		line := fmt.Sprintf("%s %s", dataplane.Protocol(s.Protocol), s.SchedName) //nolint:gosec // it is one
		destinations, err := w.moby.GetDestinations(s)
		if err != nil {
			w.t.Fatal(err)
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

func (w *topology) expectDump(addr, want string) {
	w.t.Helper()
	if got := w.dump(addr); got != want {
		w.t.Errorf("at %s is %q, want %q", addr, got, want)
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

var clusterIP = netip.MustParseAddrPort("10.96.0.1:80")

func TestVirtualServerAddresses(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{Scheduler: "lc"}, 2)
	w.replace(w.web(dataplane.TCP, 0, 1), service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", w.spec(1)))
	a, b := w.pods[0].IPv4, w.pods[1].IPv4
	w.expectDump("10.96.0.1:80", fmt.Sprintf("TCP lc %s:8080=1 %s:8080=1", a, b))
	w.expectDump("250.29.0.1:30080", fmt.Sprintf("TCP lc %s:8080=1", b))
}

// Others' virtual servers stay, whatever happens to ours: at addresses that are not
// Services', by firewall mark, and in networks that are excluded.
func TestPreservesUnmanagedServers(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{ExcludeCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.200.0/24")}}, 1)
	theirs := []*ipvs.Service{
		{Address: net.IPv4(192, 0, 2, 50).To4(), Protocol: unix.IPPROTO_TCP, Port: 80},
		{Address: net.IPv4(10, 96, 200, 1).To4(), Protocol: unix.IPPROTO_UDP, Port: 53},
		{FWMark: 7},
	}
	for _, s := range theirs {
		s.SchedName, s.AddressFamily, s.Netmask = "rr", unix.AF_INET, 0xffffffff
		if err := w.moby.NewService(s); err != nil {
			t.Fatal(err)
		}
		d := &ipvs.Destination{Address: net.IPv4(192, 0, 2, 60).To4(), Port: 80, Weight: 3, AddressFamily: unix.AF_INET}
		if err := w.moby.NewDestination(s, d); err != nil {
			t.Fatal(err)
		}
	}
	stay := func(after string) {
		t.Helper()
		for _, s := range theirs {
			found, err := w.moby.GetDestinations(s)
			if err != nil || len(found) != 1 || found[0].Weight != 3 {
				t.Errorf("after %s another's virtual server %+v has the destinations %v (error %v)", after, s, found, err)
			}
		}
	}
	w.replace(w.web(dataplane.TCP, 0))
	stay("a Replace")
	w.restart()
	stay("a restart")
	w.replace()
	stay("a Replace by nothing")

	excluded := service(t, dataplane.ClusterIP, "dns", "10.96.200.1:53/UDP", w.spec(0))
	var keyed *dataplane.Error
	err := w.dp.Apply(t.Context(), []dataplane.Change{{New: excluded}, {New: w.web(dataplane.TCP, 0)}})
	if !errors.As(err, &keyed) || len(keyed.Failed) != 1 || !errors.Is(keyed.Failed[excluded.Key], dataplane.ErrUnsupported) {
		t.Errorf("a Service in an excluded network: error %v, want it refused, and it alone", err)
	}
	stay("a Service at its address")
	if err := w.dp.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(w.opts); err != nil {
		t.Fatal(err)
	}
	stay("a cleanup")
	w.openDataplane()
}

// Nobody gets round source ranges by connecting to an internal address.
func TestInternalAddressesUnreachable(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 2)
	w.replace(
		service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", w.spec(0)),
		service(t, dataplane.NodePort, "web", "[::]:30080/TCP", dataplane.ServiceSpec{
			Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(w.pods[0].IPv6, podPort)}},
		}),
	)
	if err := w.Outside.Do(func() error {
		var errs []error
		for i, via := range []netip.Addr{w.Node.IPv4, w.Node.IPv6} {
			to := internalNets()[i]
			errs = append(errs, netlink.RouteAdd(&netlink.Route{
				Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}, Gw: via.AsSlice(),
			}))
		}
		return errors.Join(errs...)
	}); err != nil {
		t.Fatal(err)
	}
	for _, from := range []*nettest.Host{w.pods[1], w.Node, w.Outside} {
		for _, tt := range []struct{ nodePort, internal string }{
			{w.Node.IPv4.String() + ":30080", "250.29.0.1:30080"},
			{"[" + w.Node.IPv6.String() + "]:30080", "[fdfa:1d00::1]:30080"},
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

// Cleanup removes what was made, without knowing what that was.
func TestCleanup(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 1)
	w.replace(w.web(dataplane.TCP, 0), service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", w.spec(0)))
	if err := w.dp.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Cleanup(w.opts); err != nil {
			t.Fatal(err)
		}
	}
	services, err := w.moby.GetServices()
	if err != nil || len(services) != 0 {
		t.Errorf("virtual servers are left: %v (error %v)", services, err)
	}
	if err := w.Node.Do(func() error {
		if _, err := netlink.LinkByName(LinkName); err == nil {
			t.Errorf("the interface %s is left", LinkName)
		}
		rules, err := netlink.RuleList(netlink.FAMILY_ALL)
		for _, r := range rules {
			if r.Table == RouteTable {
				t.Errorf("the rule %v is left", r)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	w.openDataplane()
	if state, err := w.dp.Read(t.Context()); err != nil || len(state) != 0 {
		t.Errorf("the rules are left: %v (error %v)", state, err)
	}
}

// What others do to ours is found within ten seconds, and repaired by a Replace.
func TestDrift(t *testing.T) {
	t.Parallel()
	ours := &ipvs.Service{
		Address: net.IPv4(10, 96, 0, 1).To4(), Protocol: unix.IPPROTO_TCP, Port: 80,
		SchedName: "rr", AddressFamily: unix.AF_INET, Netmask: 0xffffffff,
	}
	for _, tt := range []struct {
		name string
		do   func(w *topology) error
	}{
		{"a virtual server is deleted", func(w *topology) error { return w.moby.DelService(ours) }},
		{"a virtual server gets another scheduler", func(w *topology) error {
			other := *ours
			other.SchedName = "lc"
			return w.moby.UpdateService(&other)
		}},
		{"a destination is deleted", func(w *topology) error {
			return w.moby.DelDestination(ours, &ipvs.Destination{
				Address: w.pods[0].IPv4.AsSlice(), Port: podPort, AddressFamily: unix.AF_INET,
			})
		}},
		{"a destination gets another weight", func(w *topology) error {
			return w.moby.UpdateDestination(ours, &ipvs.Destination{
				Address: w.pods[0].IPv4.AsSlice(), Port: podPort, AddressFamily: unix.AF_INET, Weight: 5,
			})
		}},
		{"a destination is added", func(w *topology) error {
			return w.moby.NewDestination(ours, &ipvs.Destination{
				Address: w.pods[1].IPv4.AsSlice(), Port: podPort, AddressFamily: unix.AF_INET, Weight: 1,
			})
		}},
		{"a virtual server is added at a Service's address", func(w *topology) error {
			other := *ours
			other.Port = 81
			return w.moby.NewService(&other)
		}},
		{"all virtual servers are flushed", func(w *topology) error { return w.moby.Flush() }},
		{"the interface is deleted", func(w *topology) error {
			return w.Node.Do(func() error {
				link, err := netlink.LinkByName(LinkName)
				if err != nil {
					return err
				}
				return netlink.LinkDel(link)
			})
		}},
		{"an address is unbound", func(w *topology) error {
			return w.Node.Do(func() error {
				return netlink.RouteDel(&netlink.Route{
					Table: RouteTable, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
					Dst: &net.IPNet{IP: net.IPv4(10, 96, 0, 1).To4(), Mask: net.CIDRMask(32, 32)},
				})
			})
		}},
		{"the rule is deleted", func(w *topology) error {
			return w.Node.Do(func() error { return netlink.RuleDel(lookupRule(dataplane.IPv4)) })
		}},
		{"the tables are deleted", func(w *topology) error {
			return nft.Cleanup(nft.Options{NetNS: w.Node.Fd(), Table: TableName})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newTopology(t, Options{}, 2)
			w.replace(w.web(dataplane.TCP, 0))
			want := w.dump("10.96.0.1:80")
			if err := tt.do(w); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			select {
			case <-w.dp.Drift():
			case <-time.After(30 * time.Second):
				t.Fatal("no drift")
			}
			t.Logf("noticed after %v", time.Since(start))
			if tt.name == "the tables are deleted" {
				select {
				case <-w.dp.Lost():
				case <-time.After(30 * time.Second):
					t.Error("the loss of the tables is not reported")
				}
			}
			w.replace(w.web(dataplane.TCP, 0))
			w.expectDump("10.96.0.1:81", "")
			eventually(t, 3*resyncPeriod, "all is as it was", func() bool { return w.dump("10.96.0.1:80") == want })
			for _, from := range []*nettest.Host{w.pods[1], w.Node, w.Outside} {
				if answer, err := from.Connect(t.Context(), nettest.TCP, clusterIP); err != nil || answer.Host != "pod-0" {
					t.Errorf("from %s: answer %+v, error %v, want one of pod-0", from.Name, answer, err)
				}
			}
		})
	}
}

// A virtual server is found by itself as in the list of all.
func TestGetServer(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 1)
	s := w.web(dataplane.TCP, 0)
	s.Affinity, s.Scheduler = time.Hour, "lc"
	w.replace(s, service(t, dataplane.NodePort, "web", "[::]:30080/UDP", dataplane.ServiceSpec{}))
	k, err := dialIPVS(w.Node.Fd())
	if err != nil {
		t.Fatal(err)
	}
	defer k.close() //nolint:errcheck // it was only read from
	all, err := k.dumpServers()
	if err != nil || len(all) != 2 {
		t.Fatalf("virtual servers %v, error %v, want two", all, err)
	}
	for sv, want := range all {
		if got, there, err := k.getServer(sv); err != nil || !there || got != want {
			t.Errorf("%s is %+v (%t, error %v), in the list %+v", sv, got, there, err, want)
		}
		sv.addr = netip.AddrPortFrom(sv.addr.Addr(), 1)
		if got, there, err := k.getServer(sv); err != nil || there {
			t.Errorf("%s is %+v (%t, error %v), and is not there", sv, got, there, err)
		}
	}
}

// What it does itself is no drift, and neither is what others do elsewhere.
func TestNoDrift(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 3)
	w.replace(w.web(dataplane.TCP, 0))
	theirs := &ipvs.Service{
		Address: net.IPv4(192, 0, 2, 50).To4(), Protocol: unix.IPPROTO_TCP, Port: 80,
		SchedName: "rr", AddressFamily: unix.AF_INET, Netmask: 0xffffffff,
	}
	if err := w.moby.NewService(theirs); err != nil {
		t.Fatal(err)
	}
	for end, i := time.Now().Add(resyncPeriod*5/2), 0; time.Now().Before(end); i++ {
		w.apply(w.web(dataplane.TCP, i%3, (i+1)%3))
		time.Sleep(50 * time.Millisecond)
		select {
		case <-w.dp.Drift():
			t.Fatal("drift")
		default:
		}
	}
}

// An endpoint of TCP that leaves keeps its connections, also across a restart, takes
// no others, and goes when they have ended.
func TestTCPDrain(t *testing.T) {
	t.Parallel()
	// How long a closed connection is remembered, which counts as well, is the
	// kernel's affair, but for one that only the client has closed.
	w := newTopology(t, Options{}, 2)
	w.replace(w.web(dataplane.TCP, 0))
	old, err := w.Outside.Open(t.Context(), nettest.TCP, clusterIP)
	if err != nil {
		t.Fatal(err)
	}
	answer := func(want string) {
		t.Helper()
		if answer, err := old.Ask(t.Context()); err != nil || answer.Host != want {
			t.Errorf("the old connection: answer %+v, error %v, want one of %s", answer, err, want)
		}
	}
	answer("pod-0")
	a, b := w.pods[0].IPv4, w.pods[1].IPv4
	draining := fmt.Sprintf("TCP rr %s:8080=0 %s:8080=1", a, b)
	w.apply(w.web(dataplane.TCP, 1))
	check := func(after string) {
		t.Helper()
		answer("pod-0")
		for range 5 {
			if answer, err := w.Outside.Connect(t.Context(), nettest.TCP, clusterIP); err != nil || answer.Host != "pod-1" {
				t.Errorf("after %s a new connection has the answer %+v (error %v), want one of pod-1", after, answer, err)
			}
		}
		w.expectDump("10.96.0.1:80", draining)
	}
	check("it has left")
	time.Sleep(resyncPeriod * 3 / 2)
	check("a look at it")
	w.restart()
	check("a restart")
	time.Sleep(resyncPeriod * 3 / 2)
	check("a look at it after a restart")

	w.apply(w.web(dataplane.TCP, 0, 1))
	w.expectDump("10.96.0.1:80", fmt.Sprintf("TCP rr %s:8080=1 %s:8080=1", a, b))
	answer("pod-0")
	if err := old.Close(); err != nil {
		t.Error(err)
	}
}

// An endpoint that has no connections goes soon.
func TestIdleEndpointRemoved(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 2)
	w.replace(w.web(dataplane.TCP, 0, 1))
	w.apply(w.web(dataplane.TCP, 1))
	gone := fmt.Sprintf("TCP rr %s:8080=1", w.pods[1].IPv4)
	eventually(t, 3*resyncPeriod, "the endpoint is gone", func() bool { return w.dump("10.96.0.1:80") == gone })
}

// There is a limit for connections that do not end.
func TestDrainLimit(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{DrainLimit: 2 * time.Second}, 2)
	w.replace(w.web(dataplane.TCP, 0))
	old, err := w.Outside.Open(t.Context(), nettest.TCP, clusterIP)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if _, err := old.Ask(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.apply(w.web(dataplane.TCP, 1))
	gone := fmt.Sprintf("TCP rr %s:8080=1", w.pods[1].IPv4)
	eventually(t, 3*resyncPeriod, "the endpoint is gone", func() bool { return w.dump("10.96.0.1:80") == gone })
}

// isBound reports whether an address is bound to the node.
func (w *topology) isBound(addr string) bool {
	w.t.Helper()
	h, err := openHost(w.Node.Fd())
	if err != nil {
		w.t.Fatal(err)
	}
	defer h.close() //nolint:errcheck // it was only read from
	link, err := h.handle.LinkByName(LinkName)
	if err != nil {
		w.t.Fatal(err)
	}
	h.link = link.Attrs().Index
	all, err := h.boundAddrs()
	if err != nil {
		w.t.Fatal(err)
	}
	return all[netip.MustParseAddr(addr)]
}

// A Service that is deleted, also while nobody is there, keeps its connections and
// takes no others, and programs of the node are not reached at its address. A Service
// at the same frontend takes its connections over. The node's own connections to itself
// are among those that last.
func TestDeletedServiceDrains(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 3)
	wild, err := w.Node.Listen(t.Context(), "tcp", netip.MustParseAddrPort("0.0.0.0:80"))
	if err != nil {
		t.Fatal(err)
	}
	defer wild.Close()
	w.Node.ServeT(t, nettest.TCP, podPort)
	to := func(host *nettest.Host) dataplane.ServiceSpec {
		return dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(host.IPv4, podPort), Local: true}}}
	}
	nodePort := netip.AddrPortFrom(w.Node.IPv4, 30080)
	services := []*dataplane.Service{
		w.web(dataplane.TCP, 0),
		service(t, dataplane.ClusterIP, "host", "10.96.0.2:80/TCP", to(w.Node)),
		service(t, dataplane.NodePort, "web", "0.0.0.0:30080/TCP", w.spec(0)),
	}
	addrs := []netip.AddrPort{clusterIP, netip.MustParseAddrPort("10.96.0.2:80"), nodePort}
	w.replace(services...)
	clients := []*nettest.Host{w.pods[2], w.Node, w.Outside}
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
					t.Errorf("after %s: a new connection from %s to %s: %v, error %v, want none", after, from.Name, addr, conn, err)
				}
				cancel()
			}
		}
		w.expectDump("10.96.0.1:80", fmt.Sprintf("TCP rr %s:8080=0", w.pods[0].IPv4))
		w.expectDump("250.29.0.1:30080", fmt.Sprintf("TCP rr %s:8080=0", w.pods[0].IPv4))
	}
	for _, s := range services {
		w.remove(s)
	}
	check("the deletion")
	time.Sleep(resyncPeriod * 3 / 2)
	check("a look at it")
	w.restart()
	check("a restart")
	time.Sleep(resyncPeriod * 3 / 2)
	check("a look at it after a restart")
	w.replace(services...)
	if err := w.dp.Close(); err != nil {
		t.Fatal(err)
	}
	w.openDataplane()
	w.replace()
	check("a deletion while nobody is there")

	w.apply(w.web(dataplane.TCP, 1))
	w.expectDump("10.96.0.1:80", fmt.Sprintf("TCP rr %s:8080=0 %s:8080=1", w.pods[0].IPv4, w.pods[1].IPv4))
	for _, from := range clients {
		if answer, err := from.Connect(t.Context(), nettest.TCP, clusterIP); err != nil || answer.Host != "pod-1" {
			t.Errorf("from %s: answer %+v, error %v, want one of pod-1", from.Name, answer, err)
		}
	}
	for _, conn := range open {
		if _, err := conn.Ask(t.Context()); err != nil {
			t.Errorf("after the creation of another: %v", err)
		}
	}
}

// A Service that is deleted goes when its connections have ended, or after a limit, with
// its address and the rules for it.
func TestDeletedServiceRemoved(t *testing.T) {
	t.Parallel()
	for _, connected := range []bool{false, true} {
		t.Run(fmt.Sprintf("connected=%t", connected), func(t *testing.T) {
			t.Parallel()
			w := newTopology(t, Options{DrainLimit: 7 * time.Second}, 1)
			nodePort := service(t, dataplane.NodePort, "web", "0.0.0.0:30080/UDP", w.spec(0))
			w.replace(w.web(dataplane.TCP, 0), nodePort)
			if connected {
				conn, err := w.Outside.Open(t.Context(), nettest.TCP, clusterIP)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := conn.Ask(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			w.remove(w.web(dataplane.TCP, 0))
			w.remove(nodePort)
			if !w.isBound("10.96.0.1") {
				t.Error("the address went before the virtual server")
			}
			eventually(t, 3*time.Second, "the virtual server of UDP is gone", func() bool { return w.dump("250.29.0.3:30080") == "" })
			eventually(t, 5*resyncPeriod, "the virtual server is gone", func() bool { return w.dump("10.96.0.1:80") == "" })
			eventually(t, 3*time.Second, "the address is gone", func() bool { return !w.isBound("10.96.0.1") })
			if err := w.Outside.AddAddr(clusterIP.Addr()); err != nil {
				t.Fatal(err)
			}
			w.Outside.ServeT(t, nettest.TCP, 80)
			eventually(t, 3*time.Second, "the address is nobody's any more", func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
				defer cancel()
				_, err := w.Node.Connect(ctx, nettest.TCP, clusterIP)
				return err == nil
			})
			select {
			case <-w.dp.Drift():
				t.Error("drift")
			case <-time.After(resyncPeriod * 3 / 2):
			}
		})
	}
}

// A flow of UDP moves to another endpoint when its own leaves.
func TestUDPFlowMoves(t *testing.T) {
	t.Parallel()
	for _, from := range []string{"outside", "node", "pod"} {
		t.Run("from "+from, func(t *testing.T) {
			t.Parallel()
			w := newTopology(t, Options{}, 2)
			w.replace(w.web(dataplane.UDP, 0))
			client := map[string]*nettest.Host{"outside": w.Outside, "node": w.Node, "pod": w.PodT(t, "client")}[from]
			flow, err := client.Open(t.Context(), nettest.UDP, clusterIP)
			if err != nil {
				t.Fatal(err)
			}
			defer flow.Close()
			if answer, err := flow.Ask(t.Context()); err != nil || answer.Host != "pod-0" {
				t.Fatalf("answer %+v, error %v, want one of pod-0", answer, err)
			}
			w.apply(w.web(dataplane.UDP, 1))
			eventually(t, 5*time.Second, "the flow moves", func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
				defer cancel()
				answer, err := flow.Ask(ctx)
				return err == nil && answer.Host == "pod-1"
			})
			w.expectDump("10.96.0.1:80", fmt.Sprintf("UDP rr %s:8080=1", w.pods[1].IPv4))
		})
	}
}

// An endpoint of UDP that terminates and still serves keeps its flows until then.
func TestUDPFlowStaysWhileServing(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 2)
	w.replace(w.web(dataplane.UDP, 0))
	flow, err := w.Outside.Open(t.Context(), nettest.UDP, clusterIP)
	if err != nil {
		t.Fatal(err)
	}
	defer flow.Close()
	stays := func(after string) {
		t.Helper()
		if answer, err := flow.Ask(t.Context()); err != nil || answer.Host != "pod-0" {
			t.Errorf("%s: answer %+v, error %v, want one of pod-0", after, answer, err)
		}
	}
	stays("at first")
	terminating, err := w.web(dataplane.UDP, 1).WithServing([]netip.AddrPort{netip.AddrPortFrom(w.pods[0].IPv4, podPort)})
	if err != nil {
		t.Fatal(err)
	}
	w.apply(terminating)
	for range 3 {
		time.Sleep(2 * udpDrainGrace)
		stays("while it serves")
		if answer, err := w.Outside.Connect(t.Context(), nettest.UDP, clusterIP); err != nil || answer.Host != "pod-1" {
			t.Errorf("another flow: answer %+v, error %v, want one of pod-1", answer, err)
		}
	}
	w.restart()
	stays("after a restart")
	time.Sleep(resyncPeriod * 3 / 2)
	stays("after a look at it")
	w.apply(w.web(dataplane.UDP, 1))
	eventually(t, 5*time.Second, "the flow moves", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		answer, err := flow.Ask(ctx)
		return err == nil && answer.Host == "pod-1"
	})
}

// Services may have any scheduler that the kernel has, and change it.
func TestSchedulers(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 2)
	w.replace()
	for _, name := range Schedulers() {
		s := w.web(dataplane.TCP, 0, 1)
		if name != DefaultScheduler {
			s.Scheduler = name
		}
		if name == "twos" { // which Debian has built since 6.12
			err := w.dp.Apply(t.Context(), []dataplane.Change{{Old: w.services[s.Key], New: s}})
			if err != nil && !strings.Contains(err.Error(), "ip_vs_twos") {
				t.Errorf("%s: %v", name, err)
			}
			w.replace(w.services[s.Key])
			if err != nil {
				continue
			}
		}
		w.apply(s)
		w.expectDump("10.96.0.1:80", fmt.Sprintf("TCP %s %s:8080=1 %s:8080=1", name, w.pods[0].IPv4, w.pods[1].IPv4))
		for range 3 {
			if _, err := w.Outside.Connect(t.Context(), nettest.TCP, clusterIP); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// A scheduler that the kernel does not have stops its own Service only.
func TestUnknownScheduler(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 1)
	w.replace()
	bad := service(t, dataplane.ClusterIP, "bad", "10.96.0.2:80/TCP", w.spec(0))
	bad.Scheduler = "nosuch"
	good := w.web(dataplane.TCP, 0)
	check := func(err error) {
		t.Helper()
		var keyed *dataplane.Error
		if !errors.As(err, &keyed) || len(keyed.Failed) != 1 || keyed.Failed[bad.Key] == nil {
			t.Fatalf("error %v, want one for %s alone", err, bad.Key)
		}
		if text := keyed.Failed[bad.Key].Error(); !strings.Contains(text, "scheduler nosuch") || !strings.Contains(text, "ip_vs_nosuch") {
			t.Errorf("error %q, want it to name the scheduler and its module", text)
		}
		if _, err := w.Outside.Connect(t.Context(), nettest.TCP, clusterIP); err != nil {
			t.Error(err)
		}
		if _, err := w.Outside.Connect(t.Context(), nettest.TCP, netip.MustParseAddrPort("10.96.0.2:80")); err == nil {
			t.Error("the Service with the unknown scheduler answers")
		}
	}
	check(w.dp.Apply(t.Context(), []dataplane.Change{{New: bad}, {New: good}}))
	check(w.dp.Replace(t.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{bad, good}), nil))
	if _, err := Open(Options{NetNS: w.Node.Fd(), Scheduler: "nosuch"}); err == nil || !strings.Contains(err.Error(), `"nosuch": want one of [`) {
		t.Errorf("error %v, want one that says which schedulers there are", err)
	}
}

// While Services come and go, what the node and pods send to them is answered by an
// endpoint, or by nobody: never by the virtual server itself, for want of
// destinations, nor by a program of the node.
func TestChurnOrdering(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 2)
	client := w.PodT(t, "client")
	wild, err := w.Node.Listen(t.Context(), "tcp", netip.MustParseAddrPort("0.0.0.0:80"))
	if err != nil {
		t.Fatal(err)
	}
	defer wild.Close()
	w.replace()
	stop, done := make(chan struct{}), make(chan int)
	for _, from := range []*nettest.Host{w.Node, client} {
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
					t.Errorf("from %s: answer %+v, error %v, want one of a pod, or none", from.Name, answer, err)
				}
			}
		}()
	}
	changes := 0
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); changes++ {
		s := w.web(dataplane.TCP, 0, 1)
		w.apply(s)
		if changes%2 == 0 {
			time.Sleep(20 * time.Millisecond)
		}
		w.remove(s)
	}
	close(stop)
	reached := []int{<-done, <-done}
	t.Logf("%d times, %v connections", changes, reached)
	if slices.Min(reached) == 0 {
		t.Errorf("%v connections of the node and a pod reached an endpoint", reached)
	}
}

func TestTimeouts(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{TCPTimeout: 600 * time.Second, UDPTimeout: 20 * time.Second}, 0)
	before, err := w.moby.GetConfig()
	if err != nil {
		t.Fatal(err)
	}
	w.replace()
	got, err := w.moby.GetConfig()
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
		w := newTopology(t, Options{StrictARP: strict}, 0)
		want := requiredSysctls(strict)
		arp := map[bool]string{false: "0", true: "1"}[strict]
		want["net/ipv4/conf/all/arp_ignore"] = arp
		check := func() {
			t.Helper()
			if err := w.Node.Do(func() error {
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
		w.replace()
		check()
	}
}

// An interface of the name that is another's is left alone.
func TestPreservesUnmanagedInterface(t *testing.T) {
	t.Parallel()
	w := newTopology(t, Options{}, 0)
	if err := w.Node.Do(func() error {
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
	err := w.dp.Replace(t.Context(), dataplane.Node{}, slices.Values[[]*dataplane.Service](nil), nil)
	if err == nil || !strings.Contains(err.Error(), "fairlead0 is of type bridge") {
		t.Errorf("error %v, want one that says what the interface is", err)
	}
	if err := Cleanup(w.opts); err != nil {
		t.Error(err)
	}
	if err := w.Node.Do(func() error {
		_, err := netlink.LinkByName(LinkName)
		return err
	}); err != nil {
		t.Errorf("the interface is gone: %v", err)
	}
}
