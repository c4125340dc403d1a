package dataplanetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// nodeEndpointPort is the port on which the node itself serves all protocols, like the API
// server and pods in the host network.
const nodeEndpointPort = 6443

// testNodeEndpoints connects to Services whose endpoint has the node's address. These
// connections never leave the node and take another path through the kernel than connections
// to pods.
func (s suite) testNodeEndpoints(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	node := topo.net.Node
	second := map[dataplane.Family]netip.Addr{
		dataplane.IPv4: netip.MustParseAddr("198.51.100.1"), dataplane.IPv6: netip.MustParseAddr("2001:db8:51::1"),
	}
	for _, p := range protocols() {
		node.ServeT(t, networkName(p), nodeEndpointPort)
	}
	own := map[netip.Addr]bool{}
	for _, addr := range node.Addrs() {
		own[addr] = true
	}
	for _, family := range families() {
		if err := node.AddAddr(second[family]); err != nil {
			t.Fatal(err)
		}
		own[second[family]] = true
	}

	frontends := func(family dataplane.Family) []nodeFrontend {
		host := []netip.AddrPort{addrPortOf(node, family, nodeEndpointPort)}
		pod := topo.endpoints(family, 0)
		clusterIP, external := dataplane.ServiceSpec{}, dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeAlways}
		sticky := dataplane.ServiceSpec{Affinity: time.Hour}
		local := dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeFromNode, ExternalTrafficPolicyLocal: true}
		return []nodeFrontend{
			{"cluster IP", dataplane.ClusterIP, vip(family, 1, 443), clusterIP, host},
			{"cluster IP with the endpoint port", dataplane.ClusterIP, vip(family, 2, nodeEndpointPort), clusterIP, host},
			{"cluster IP with affinity", dataplane.ClusterIP, vip(family, 3, 443), sticky, host},
			{"cluster IP with a pod", dataplane.ClusterIP, vip(family, 4, 443), clusterIP, append(pod, host...)},
			{"node port", dataplane.NodePort, nodePortFrontend(family, 30443), external, host},
			{"node port with policy Local", dataplane.NodePort, nodePortFrontend(family, 30444), local, host},
			{
				"node port with affinity", dataplane.NodePort, nodePortFrontend(family, 30445),
				dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeAlways, Affinity: time.Hour},
				host,
			},
			{"external IP", dataplane.ExternalIP, vip(family, 5, 443), external, host},
			{"external IP with a pod", dataplane.ExternalIP, vip(family, 6, 443), external, append(pod, host...)},
			{"external IP of the node", dataplane.ExternalIP, addrPortOf(node, family, 443), external, host},
			{"load-balancer IP", dataplane.LoadBalancer, vip(family, 7, 443), external, host},
			{"load-balancer IP with policy Local", dataplane.LoadBalancer, vip(family, 8, 443), local, host},
		}
	}
	var services []*dataplane.Service
	for _, family := range families() {
		for i, f := range frontends(family) {
			f.spec.Endpoints = localEndpoints(f.endpoints)
			if f.spec.ExternalTrafficPolicyLocal {
				f.spec.LocalEndpoints = f.spec.Endpoints
			}
			for _, p := range protocols() {
				services = append(services, topo.serviceOfKind(f.kind, fmt.Sprintf("host-%d", i), p, f.addr, f.spec))
			}
		}
	}

	clients := []*nettest.Host{topo.client, topo.pods[0], node, topo.net.Outside}
	for _, tt := range []struct {
		name string
		node dataplane.Node
	}{
		{"masquerade by pod CIDR", dataplane.Node{PodCIDRs: topo.net.PodCIDRs}},
		{"masquerade by interface", dataplane.Node{PodInterfacePrefix: "veth"}},
		{"masquerade no client", dataplane.Node{}},
		{"masquerade all clients", dataplane.Node{PodCIDRs: topo.net.PodCIDRs, MasqueradeAll: true}},
	} {
		topo.node = tt.node
		topo.node.NodePortAddrs, topo.node.PrimaryAddrs = node.Addrs(), node.Addrs()
		topo.replace(services...)
		t.Run(tt.name, func(t *testing.T) {
			forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
				for _, f := range frontends(family) {
					if p == dataplane.SCTP && f.kind != dataplane.ClusterIP {
						continue // TCP and UDP cover behavior common to all protocols
					}
					f.expectConnections(t, from, p, f.clientAddr(node, family), own)
				}
			})
			for _, family := range families() {
				for _, f := range frontends(family) {
					f.expectFromNodeAddrs(t, node, f.clientAddr(node, family), second[family])
				}
				expectUnconnectedUDP(t, node, vip(family, 1, 443), addrPortOf(node, family, nodeEndpointPort))
			}
		})
	}
}

// nodeFrontend is a frontend whose endpoints include the node itself.
type nodeFrontend struct {
	name      string
	kind      dataplane.Kind
	addr      netip.AddrPort
	spec      dataplane.ServiceSpec
	endpoints []netip.AddrPort
}

// clientAddr returns the address that clients connect to.
func (f nodeFrontend) clientAddr(node *nettest.Host, family dataplane.Family) netip.AddrPort {
	if f.kind == dataplane.NodePort {
		return addrPortOf(node, family, f.addr.Port())
	}
	return f.addr
}

// expectConnections checks that connections reach all endpoints and stay with them. The node
// sees the original addresses of other clients, because it masquerades only packets that it
// sends.
func (f nodeFrontend) expectConnections(
	t *testing.T, from *nettest.Host, p dataplane.Protocol, to netip.AddrPort, own map[netip.Addr]bool,
) {
	t.Helper()
	missing := len(f.endpoints)
	reached := map[netip.AddrPort]bool{}
	for n := range 3 * enoughConnections(missing) {
		if missing == 0 {
			return
		}
		if n >= len(f.endpoints) {
			time.Sleep(rand.N(maxJitter)) //nolint:gosec // no secret
		}
		answers, err := askRepeatedly(t, from, p, to, 3)
		if err != nil {
			t.Errorf("%s: %v", f.name, err)
			return
		}
		answer := answers[0]
		if !slices.Contains(f.endpoints, answer.Endpoint) || slices.ContainsFunc(answers, func(a nettest.Answer) bool { return a != answer }) {
			t.Errorf("%s: %s from %s to %s: answers %+v, want equal answers from one of %v", f.name, p, from.Name, to, answers, f.endpoints)
			return
		}
		if host := answer.Endpoint.Port() == nodeEndpointPort; host {
			source := answer.Source.Addr()
			if expected := source == addrOf(from, dataplane.FamilyOf(source)) || own[addrOf(from, dataplane.FamilyOf(source))] && own[source]; !expected {
				t.Errorf("%s: %s from %s to %s: endpoint sees unexpected source %s", f.name, p, from.Name, to, source)
			}
		}
		if !reached[answer.Endpoint] {
			reached[answer.Endpoint] = true
			missing--
		}
	}
	t.Errorf("%s: %s connections from %s to %s reached %v, want all of %v", f.name, p, from.Name, to, reached, f.endpoints)
}

// askRepeatedly sends several requests on one connection and returns the answers.
func askRepeatedly(t *testing.T, from *nettest.Host, p dataplane.Protocol, to netip.AddrPort, requests int) ([]nettest.Answer, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	conn, err := from.Open(ctx, networkName(p), to)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // the answers matter
	var answers []nettest.Answer
	for range requests {
		answer, err := conn.Ask(ctx)
		if err != nil {
			return nil, err
		}
		answers = append(answers, answer)
	}
	return answers, nil
}

// expectFromNodeAddrs checks connections from addresses that programs on the node bind to,
// instead of the source address that the kernel chooses.
func (f nodeFrontend) expectFromNodeAddrs(t *testing.T, node *nettest.Host, to netip.AddrPort, second netip.Addr) {
	t.Helper()
	for _, source := range []netip.Addr{addrOf(node, dataplane.FamilyOf(second)), second} {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		if answer, err := node.ConnectFrom(ctx, source, to); err != nil || !slices.Contains(f.endpoints, answer.Endpoint) {
			t.Errorf("%s: from node address %s to %s: answer %+v, error %v, want an answer from one of %v", f.name, source, to, answer, err, f.endpoints)
		}
		cancel()
	}
}

// expectUnconnectedUDP checks that answers reach an unconnected socket of the node. The
// kernel looks up a route for each of its datagrams.
func expectUnconnectedUDP(t *testing.T, node *nettest.Host, to, endpoint netip.AddrPort) {
	t.Helper()
	c, err := node.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(nodePortFrontend(dataplane.FamilyOf(to.Addr()), 0).Addr(), 0))
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close() //nolint:errcheck // nothing is buffered
	if err := c.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		t.Error(err)
	}
	for i := range 3 {
		if _, err := c.WriteTo(fmt.Appendf(nil, "%d\n", i), net.UDPAddrFromAddrPort(to)); err != nil {
			t.Errorf("send a datagram to %s: %v", to, err)
			return
		}
		buf := make([]byte, 512)
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			t.Errorf("read answer from %s: %v", to, err)
			return
		}
		if got := string(buf[:n]); from.String() != to.String() || !strings.Contains(got, " "+endpoint.String()+" ") {
			t.Errorf("datagram to %s: answer from %s is %q, want the same address and endpoint %s", to, from, got, endpoint)
		}
	}
}
