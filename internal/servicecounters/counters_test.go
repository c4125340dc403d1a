package servicecounters

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/dataplanetest"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// testNode is a node with three pods, which serve TCP and UDP.
type testNode struct {
	*nettest.Network
	nft  *nft.Dataplane
	dp   *Dataplane
	pods []*nettest.Host
	node dataplane.Node
}

func newTestNode(t *testing.T) *testNode {
	t.Helper()
	n := &testNode{Network: nettest.NewT(t, nettest.Options{UniquePorts: true})}
	for i := range 3 {
		pod := n.PodT(t, fmt.Sprintf("pod%d", i+1))
		pod.ServeT(t, nettest.TCP, 8080)
		pod.ServeT(t, nettest.UDP, 8080)
		n.pods = append(n.pods, pod)
	}
	n.Node.ServeT(t, nettest.TCP, 8080)
	n.node = dataplane.Node{NodePortAddrs: n.Node.Addrs()}
	var err error
	if n.nft, err = nft.Open(nft.Options{NetNS: n.Node.Fd()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.nft.Close() })
	n.wrap(t, "default/*")
	return n
}

// wrap wraps the Dataplane with a selection, as after a restart of the agent.
func (n *testNode) wrap(t *testing.T, selection ...string) {
	t.Helper()
	o := Options{NetNS: n.Node.Fd(), TranslatedOnly: true}
	for _, text := range selection {
		s, err := ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		o.Services = append(o.Services, s)
	}
	if n.dp != nil {
		_ = n.dp.Close()
	}
	var err error
	if n.dp, err = New(n.nft, o); err != nil {
		t.Fatal(err)
	}
}

func (n *testNode) replace(t *testing.T, services ...*dataplane.Service) {
	t.Helper()
	if err := n.dp.Replace(t.Context(), n.node, slices.Values(services), nil); err != nil {
		t.Fatal(err)
	}
}

func (n *testNode) apply(t *testing.T, changes ...dataplane.Change) {
	t.Helper()
	if err := n.dp.Apply(t.Context(), changes); err != nil {
		t.Fatal(err)
	}
}

// endpoints returns the pods with these indices as endpoints of a family.
func (n *testNode) endpoints(f dataplane.Family, pods ...int) (all []dataplane.Endpoint) {
	for _, i := range pods {
		addr := n.pods[i].IPv4
		if f == dataplane.IPv6 {
			addr = n.pods[i].IPv6
		}
		all = append(all, dataplane.Endpoint{Addr: netip.AddrPortFrom(addr, 8080), Local: true})
	}
	return all
}

// connect opens connections, written as frontends, and counts them by the endpoint that answered.
func (n *testNode) connect(t *testing.T, counts map[string]uint64, name string, kind dataplane.Kind, times int, to string) {
	t.Helper()
	network, addr, _ := strings.Cut(to, " ")
	protocol := strings.ToUpper(network)
	for range times {
		answer, err := n.Outside.Connect(t.Context(), network, netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatalf("connect to %s: %v", to, err)
		}
		counts[fmt.Sprintf("%s %s %s", name, protocol, kind)]++
		counts[fmt.Sprintf("%s %s %s", name, protocol, answer.Endpoint)]++
	}
}

// counts returns the counters that are not 0.
func (n *testNode) counts(t *testing.T) map[string]uint64 {
	t.Helper()
	counts, err := n.dp.Counts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]uint64{}
	for s, c := range counts.Connections {
		label := s.Kind.String()
		if s.Endpoint.IsValid() {
			label = s.Endpoint.String()
		}
		if c > 0 {
			all[fmt.Sprintf("%s %s %s", s.Name, s.Protocol, label)] = c
		}
	}
	return all
}

func (n *testNode) check(t *testing.T, step string, want map[string]uint64) {
	t.Helper()
	if diff := cmp.Diff(want, n.counts(t)); diff != "" {
		t.Errorf("%s: counts differ (-want +got):\n%s", step, diff)
	}
}

// TestCounts compares the counters with the answers of real endpoints, while endpoints change and the
// agent restarts.
func TestCounts(t *testing.T) {
	t.Parallel()
	const v4, v6 = dataplane.IPv4, dataplane.IPv6
	n := newTestNode(t)
	cluster := func(pods ...int) *dataplane.Service {
		return dataplanetest.NewService(t, "web", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, pods...)}, "tcp 10.96.0.10:80")
	}
	nodePort := func(pods ...int) *dataplane.Service {
		return dataplanetest.NewService(t, "web", dataplane.NodePort,
			dataplane.ServiceSpec{Endpoints: n.endpoints(v4, pods...), Masquerade: dataplane.MasqueradeAlways}, "tcp 0.0.0.0:30080")
	}
	var external []string // enough frontends for a shared list
	for i := range 10 {
		external = append(external, fmt.Sprintf("tcp 198.51.100.%d:80", i+1))
	}
	others := []*dataplane.Service{
		dataplanetest.NewService(t, "web6", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v6, 0, 1)}, "tcp [fd00:96::10]:80"),
		dataplanetest.NewService(t, "dns", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, 0, 1)}, "udp 10.96.0.53:53"),
		dataplanetest.NewService(t, "dns6", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v6, 2)}, "udp [fd00:96::53]:53"),
		dataplanetest.NewService(t, "sticky", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, 0, 1, 2), Affinity: 3 * 3600e9}, "tcp 10.96.0.11:80"),
		dataplanetest.NewService(t, "shared", dataplane.ExternalIP, dataplane.ServiceSpec{Endpoints: n.endpoints(v4, 0, 1, 2)}, external...),
		dataplanetest.NewService(t, "local", dataplane.LoadBalancer, dataplane.ServiceSpec{
			Endpoints: n.endpoints(v4, 0), LocalEndpoints: n.endpoints(v4, 1), ExternalTrafficPolicyLocal: true,
		}, "tcp 203.0.113.1:80"),
		dataplanetest.NewService(t, "node", dataplane.ClusterIP, dataplane.ServiceSpec{
			Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(n.Node.IPv4, 8080)}},
		}, "tcp 10.96.0.12:80"),
		dataplanetest.NewService(t, "empty", dataplane.ClusterIP, dataplane.ServiceSpec{}, "tcp 10.96.0.13:80"),
	}
	all := func(services ...*dataplane.Service) []*dataplane.Service { return append(services, others...) }
	n.replace(t, all(cluster(0, 1), nodePort(0, 1))...)
	want := map[string]uint64{}
	n.connect(t, want, "web", dataplane.ClusterIP, 9, "tcp 10.96.0.10:80")
	n.connect(t, want, "web", dataplane.NodePort, 4, "tcp 192.0.2.1:30080")
	n.connect(t, want, "web6", dataplane.ClusterIP, 5, "tcp [fd00:96::10]:80")
	n.connect(t, want, "dns", dataplane.ClusterIP, 6, "udp 10.96.0.53:53")
	n.connect(t, want, "dns6", dataplane.ClusterIP, 3, "udp [fd00:96::53]:53")
	n.connect(t, want, "sticky", dataplane.ClusterIP, 4, "tcp 10.96.0.11:80")
	n.connect(t, want, "shared", dataplane.ExternalIP, 5, "tcp 198.51.100.3:80")
	n.connect(t, want, "shared", dataplane.ExternalIP, 5, "tcp 198.51.100.10:80")
	n.connect(t, want, "local", dataplane.LoadBalancer, 3, "tcp 203.0.113.1:80")
	n.connect(t, want, "node", dataplane.ClusterIP, 2, "tcp 10.96.0.12:80")
	if _, err := n.Outside.Connect(t.Context(), nettest.TCP, netip.MustParseAddrPort("10.96.0.13:80")); err == nil {
		t.Error("a Service without endpoints accepts a connection")
	}
	n.check(t, "start", want)

	// The first endpoint goes, so that the others change slots; another one comes.
	n.apply(t, dataplane.Change{Old: cluster(0, 1), New: cluster(1, 2)}, dataplane.Change{Old: nodePort(0, 1), New: nodePort(1, 2)})
	delete(want, fmt.Sprintf("web TCP %s", n.endpoints(v4, 0)[0].Addr))
	n.check(t, "after a change of endpoints", want)
	n.connect(t, want, "web", dataplane.ClusterIP, 9, "tcp 10.96.0.10:80")
	n.check(t, "after connections to the new endpoints", want)

	// The agent restarts, and the node port goes meanwhile.
	n.wrap(t, "default/*")
	n.replace(t, all(cluster(1, 2), nodePort(1, 2))...)
	n.connect(t, want, "web", dataplane.ClusterIP, 2, "tcp 10.96.0.10:80")
	n.check(t, "after a restart", want)
	n.apply(t, dataplane.Change{Old: nodePort(1, 2)})
	delete(want, "web TCP NodePort")
	n.check(t, "without the node port, the endpoints keep its connections", want)

	// Another program removes the tables.
	if err := Remove(n.Node.Fd()); err != nil {
		t.Fatal(err)
	}
	n.counts(t)
	clear(want)
	base := n.counts(t) // the removed counters of node ports remain
	n.connect(t, want, "web", dataplane.ClusterIP, 3, "tcp 10.96.0.10:80")
	for k, v := range base {
		want[k] += v
	}
	n.check(t, "after the repair", want)

	// Another selection after a restart.
	n.wrap(t, "default/dns")
	n.replace(t, all(cluster(1, 2))...)
	clear(want)
	n.connect(t, map[string]uint64{}, "web", dataplane.ClusterIP, 3, "tcp 10.96.0.10:80")
	n.connect(t, want, "dns", dataplane.ClusterIP, 2, "udp 10.96.0.53:53")
	n.check(t, "with another selection", want)
	n.replace(t)
	n.check(t, "without Services", map[string]uint64{})
	if counts, err := n.dp.Counts(t.Context()); err != nil || counts.Counters != 0 {
		t.Errorf("%d counters remain, error %v", counts.Counters, err)
	}
}

// TestLimit checks that a Service that exceeds the limit is not counted, and is counted once there is
// room.
func TestLimit(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.dp.options.MaxCounters = 4
	a := dataplanetest.NewService(t, "a", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, 0, 1)}, "tcp 10.96.0.10:80")
	b := dataplanetest.NewService(t, "b", dataplane.ClusterIP, dataplane.ServiceSpec{Endpoints: n.endpoints(dataplane.IPv4, 0, 1)}, "tcp 10.96.0.11:80")
	n.replace(t, a, b)
	counts, err := n.dp.Counts(t.Context())
	if err != nil || counts.Counters != 3 || counts.Limited != 1 {
		t.Errorf("counts %+v, error %v; want 3 counters and one limited Service", counts, err)
	}
	n.connect(t, map[string]uint64{}, "b", dataplane.ClusterIP, 1, "tcp 10.96.0.11:80")
	n.check(t, "limited", map[string]uint64{})
	n.replace(t, b)
	want := map[string]uint64{}
	n.connect(t, want, "b", dataplane.ClusterIP, 2, "tcp 10.96.0.11:80")
	n.check(t, "with room", want)
}

func TestParseSelector(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Selector{
		"default/web": {"default", "web"}, "default/*": {"default", ""},
		"": {}, "default": {}, "*": {}, "*/*": {}, "default/": {}, "/web": {}, "default/we*": {}, "a/b/c": {},
	} {
		got, err := ParseSelector(text)
		if got != want || (err != nil) != (want == Selector{}) {
			t.Errorf("%q: %+v, error %v, want %+v", text, got, err, want)
		}
	}
}
