package dataplanetest

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// testInvalidPackets makes the endpoints of established connections send segments far outside
// the window, which connection tracking considers invalid. A client that received such a
// segment with the endpoint's address would answer with a reset. The reset would be valid for
// the endpoint, which would close the connection.
func (s suite) testInvalidPackets(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 2)
	node, outside := topo.net.Node, topo.net.Outside
	topo.node.NodePortAddrs = node.Addrs()
	node.ServeT(t, nettest.TCP, 8443)
	outside.ServeT(t, nettest.TCP, endpointPort)
	segmentConns := map[netip.Addr]*nettest.SegmentConn{}
	for _, host := range []*nettest.Host{topo.client, topo.pods[0], topo.pods[1], node, outside} {
		for _, addr := range host.Addrs() {
			segmentConns[addr] = host.SegmentConnT(t, addr)
		}
	}
	var services []*dataplane.Service
	for _, family := range families() {
		cluster, local, masqueraded := topo.specOf(topo.endpoints(family, 0, 1)), topo.specOf(topo.endpoints(family, 0)), topo.specOf(topo.endpoints(family, 1))
		local.ExternalTrafficPolicyLocal, local.LocalEndpoints, local.Masquerade = true, local.Endpoints, dataplane.MasqueradeFromNode
		masqueraded.Masquerade = dataplane.MasqueradeAlways
		services = append(services,
			topo.serviceOfKind(dataplane.ClusterIP, "cluster", dataplane.TCP, vip(family, 1, 80), cluster),
			topo.serviceOfKind(dataplane.LoadBalancer, "local", dataplane.TCP, vip(family, 2, 80), local),
			topo.serviceOfKind(dataplane.NodePort, "port", dataplane.TCP, nodePortFrontend(family, 30080), masqueraded),
			topo.serviceOfKind(dataplane.ClusterIP, "host", dataplane.TCP, vip(family, 3, 80), topo.specOf([]netip.AddrPort{addrPortOf(node, family, 8443)})))
		elsewhere := topo.specOf([]netip.AddrPort{addrPortOf(outside, family, endpointPort)})
		elsewhere.Masquerade = dataplane.MasqueradeAlways
		services = append(services,
			topo.serviceOfKind(dataplane.ClusterIP, "elsewhere", dataplane.TCP, vip(family, 4, 80), elsewhere),
			topo.serviceOfKind(dataplane.NodePort, "elsewhere", dataplane.TCP, nodePortFrontend(family, 30081), elsewhere))
	}
	type connection struct {
		name string
		from *nettest.Host
		to   func(dataplane.Family) netip.AddrPort
	}
	vipOf := func(n byte) func(dataplane.Family) netip.AddrPort {
		return func(f dataplane.Family) netip.AddrPort { return vip(f, n, 80) }
	}
	nodePort := func(n uint16) func(dataplane.Family) netip.AddrPort {
		return func(f dataplane.Family) netip.AddrPort { return addrPortOf(node, f, n) }
	}
	connections := []connection{
		{"pod to cluster IP", topo.client, vipOf(1)},
		{"pod to load balancer with policy Local", topo.client, vipOf(2)},
		{"outside to load balancer with policy Local", outside, vipOf(2)},
		{"pod to an endpoint on this node", topo.client, vipOf(3)},
		// The following connections are masqueraded.
		{"pod to node port", topo.client, nodePort(30080)},
		{"outside to node port", outside, nodePort(30080)},
		{"node to cluster IP", node, vipOf(1)},
		// The endpoint is not on this node.
		{"pod to remote endpoint", topo.client, vipOf(4)},
		{"pod to node port with remote endpoint", topo.client, nodePort(30081)},
		{"node to remote endpoint", node, vipOf(4)},
	}
	topo.replace()
	for _, tt := range []struct {
		name string
		node dataplane.Node
	}{
		{"pod CIDRs", dataplane.Node{PodCIDRs: topo.net.PodCIDRs}},
		{"interface name prefix", dataplane.Node{PodInterfacePrefix: "veth"}},
		{"no local traffic detection", dataplane.Node{}},
	} {
		topo.node = tt.node
		topo.node.NodePortAddrs = node.Addrs()
		topo.replace(services...)
		for _, c := range connections {
			for _, family := range families() {
				t.Run(fmt.Sprintf("%s/%s/%s", tt.name, c.name, family), func(t *testing.T) {
					topo.injectInvalidSegments(t, segmentConns, c.from, c.to(family))
				})
			}
		}
	}
}

// injectInvalidSegments opens a connection and sends invalid segments from the endpoint's
// address.
func (topo *topology) injectInvalidSegments(t *testing.T, segmentConns map[netip.Addr]*nettest.SegmentConn, from *nettest.Host, to netip.AddrPort) {
	t.Helper()
	conn, err := from.Open(t.Context(), nettest.TCP, to)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // not under test
	answer, err := conn.Ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	endpoint := segmentConns[answer.Endpoint.Addr()]
	ofClient := func(s nettest.Segment) bool { return s.Source == answer.Source && s.Destination == answer.Endpoint }
	var last nettest.Segment // sent by the client
	for last.Len == 0 {
		for _, s := range endpoint.Received() {
			if ofClient(s) && s.Len > 0 {
				last = s
			}
		}
	}
	for n := range uint32(3) {
		err := endpoint.Send(nettest.Segment{
			Source: answer.Endpoint, Destination: answer.Source,
			Seq: last.Ack + (n+1)<<28, Ack: last.Seq + uint32(last.Len), //nolint:gosec // a short line
			Flags: nettest.ACK | nettest.PSH, Len: 10,
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Ask(t.Context()); err != nil {
			t.Errorf("connection broken: %v", err)
			break
		}
	}
	client := segmentConns[addrOf(from, dataplane.FamilyOf(to.Addr()))]
	for _, s := range client.Received() {
		if s.Source == answer.Endpoint && s.Destination == conn.Source() && from != topo.net.Node {
			t.Errorf("client received %+v, want nothing from the endpoint's address", s)
		}
	}
	for _, s := range endpoint.Received() {
		if ofClient(s) && s.Flags&nettest.RST != 0 {
			t.Errorf("endpoint received %+v, want no reset", s)
		}
	}
}

// testHalfOpenConnections makes a server continue connections that its clients no longer
// know, as after a restart of the client. The server's port is also an endpoint port.
func (s suite) testHalfOpenConnections(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	node, outside := topo.net.Node, topo.net.Outside
	topo.node.PodCIDRs = topo.net.PodCIDRs
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services, topo.service("web", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0)))
	}
	topo.replace(services...)
	for _, family := range families() {
		for _, tt := range []struct{ server, client *nettest.Host }{
			{outside, node}, {outside, topo.client}, {topo.pods[0], node}, {topo.pods[0], topo.client}, {node, topo.client},
		} {
			t.Run(fmt.Sprintf("%s with %s/%s", tt.server.Name, tt.client.Name, family), func(t *testing.T) {
				t.Parallel()
				conn := tt.server.SegmentConnT(t, addrOf(tt.server, family))
				line := nettest.Segment{
					Source: addrPortOf(tt.server, family, endpointPort), Destination: addrPortOf(tt.client, family, 40000),
					Seq: 1000, Ack: 2000, Flags: nettest.ACK | nettest.PSH, Len: 10,
				}
				if err := conn.Send(line); err != nil {
					t.Fatal(err)
				}
				for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
					if slices.ContainsFunc(conn.Received(), func(s nettest.Segment) bool {
						return s.Source == line.Destination && s.Destination == line.Source && s.Flags&nettest.RST != 0
					}) {
						return
					}
					if time.Now().After(end) {
						t.Fatal("server received no reset")
					}
				}
			})
		}
	}
}

// testAsymmetricRoutes opens connections of which the node sees only one direction. All
// server ports are also endpoint ports.
func (s suite) testAsymmetricRoutes(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	outside := topo.net.Outside
	outside.ServeT(t, nettest.TCP, endpointPort)
	server, other := topo.pods[0], topo.pods[1]
	for _, pair := range [][2]*nettest.Host{{outside, server}, {outside, topo.client}, {other, server}} {
		if err := topo.net.Bypass(pair[0], pair[1]); err != nil {
			t.Fatal(err)
		}
	}
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services,
			topo.service("web", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, topo.endpoints(family, 0, 1, 2)))
	}
	for name, node := range map[string]dataplane.Node{
		"pod CIDRs": {PodCIDRs: topo.net.PodCIDRs}, "interface name prefix": {PodInterfacePrefix: "veth"},
		"no local traffic detection": {},
	} {
		topo.node = node
		topo.replace(services...)
		for _, tt := range []struct {
			name     string
			from, to *nettest.Host
		}{
			{"requests from outside bypass the node", outside, server},
			{"requests from a pod bypass the node", other, server},
			{"answers from outside bypass the node", topo.client, outside},
			{"answers from a pod bypass the node", server, other},
		} {
			for _, family := range families() {
				t.Run(fmt.Sprintf("%s/%s/%s", name, tt.name, family), func(t *testing.T) {
					conn, err := tt.from.Open(t.Context(), nettest.TCP, addrPortOf(tt.to, family, endpointPort))
					if err != nil {
						t.Fatal(err)
					}
					for range 5 {
						answer, err := conn.Ask(t.Context())
						if err != nil {
							t.Fatal(err)
						}
						if answer.Source != conn.Source() {
							t.Errorf("server sees source %[2]s, want %[1]s", conn.Source(), answer.Source)
						}
					}
					if err := conn.Close(); err != nil {
						t.Error(err)
					}
					expectRefused(t, tt.from, dataplane.TCP, addrPortOf(tt.to, family, 9))
				})
			}
		}
	}
}
