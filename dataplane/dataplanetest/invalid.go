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

// testInvalidPackets has the endpoints of lasting connections send segments that connection
// tracking finds no place for, as these are far beyond the window. A client who
// sees one with the endpoint's address answers with a reset, of which the
// endpoint sees that it is in order, and gives the connection up.
func (s suite) testInvalidPackets(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 2)
	node, outside := w.net.Node, w.net.Outside
	w.node.NodePortAddrs = node.Addrs()
	node.ServeT(t, nettest.TCP, 8443)
	outside.ServeT(t, nettest.TCP, endpointPort)
	wires := map[netip.Addr]*nettest.SegmentConn{}
	for _, host := range []*nettest.Host{w.client, w.pods[0], w.pods[1], node, outside} {
		for _, addr := range host.Addrs() {
			wires[addr] = host.SegmentConnT(t, addr)
		}
	}
	var services []*dataplane.Service
	for _, family := range families() {
		cluster, local, masqueraded := w.specOf(w.endpoints(family, 0, 1)), w.specOf(w.endpoints(family, 0)), w.specOf(w.endpoints(family, 1))
		local.ExternalTrafficPolicyLocal, local.LocalEndpoints, local.Masquerade = true, local.Endpoints, dataplane.MasqueradeFromNode
		masqueraded.Masquerade = dataplane.MasqueradeAlways
		services = append(services,
			w.serviceOfKind(dataplane.ClusterIP, "cluster", dataplane.TCP, vip(family, 1, 80), cluster),
			w.serviceOfKind(dataplane.LoadBalancer, "local", dataplane.TCP, vip(family, 2, 80), local),
			w.serviceOfKind(dataplane.NodePort, "port", dataplane.TCP, nodePortFrontend(family, 30080), masqueraded),
			w.serviceOfKind(dataplane.ClusterIP, "host", dataplane.TCP, vip(family, 3, 80), w.specOf([]netip.AddrPort{addrPortOf(node, family, 8443)})))
		elsewhere := w.specOf([]netip.AddrPort{addrPortOf(outside, family, endpointPort)})
		elsewhere.Masquerade = dataplane.MasqueradeAlways
		services = append(services,
			w.serviceOfKind(dataplane.ClusterIP, "elsewhere", dataplane.TCP, vip(family, 4, 80), elsewhere),
			w.serviceOfKind(dataplane.NodePort, "elsewhere", dataplane.TCP, nodePortFrontend(family, 30081), elsewhere))
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
		{"from a pod", w.client, vipOf(1)},
		{"from a pod, with the policy", w.client, vipOf(2)},
		{"from outside, with the policy", outside, vipOf(2)},
		{"from a pod to an endpoint that is this node", w.client, vipOf(3)},
		// These are masqueraded.
		{"from a pod to a node port", w.client, nodePort(30080)},
		{"from outside to a node port", outside, nodePort(30080)},
		{"from the node", node, vipOf(1)},
		// An endpoint that is no pod of this node, as those of other nodes are.
		{"from a pod to an endpoint elsewhere", w.client, vipOf(4)},
		{"from a pod to a node port with an endpoint elsewhere", w.client, nodePort(30081)},
		{"from the node to an endpoint elsewhere", node, vipOf(4)},
	}
	w.replace()
	for _, tt := range []struct {
		name string
		node dataplane.Node
	}{
		{"pods told by their address", dataplane.Node{PodCIDRs: w.net.PodCIDRs}},
		{"pods told by their interface", dataplane.Node{PodInterfacePrefix: "veth"}},
		{"pods told by nothing", dataplane.Node{}},
	} {
		w.node = tt.node
		w.node.NodePortAddrs = node.Addrs()
		w.replace(services...)
		for _, c := range connections {
			for _, family := range families() {
				t.Run(fmt.Sprintf("%s/%s/%s", tt.name, c.name, family), func(t *testing.T) {
					w.injectInvalidSegments(t, wires, c.from, c.to(family))
				})
			}
		}
	}
}

// injectInvalidSegments connects, and sends the segments in the name of the endpoint.
func (w *topology) injectInvalidSegments(t *testing.T, wires map[netip.Addr]*nettest.SegmentConn, from *nettest.Host, to netip.AddrPort) {
	t.Helper()
	conn, err := from.Open(t.Context(), nettest.TCP, to)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // is not what is tested
	answer, err := conn.Ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	endpoint := wires[answer.Endpoint.Addr()]
	ofClient := func(s nettest.Segment) bool { return s.Source == answer.Source && s.Destination == answer.Endpoint }
	var last nettest.Segment // that the client has sent
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
			t.Errorf("the connection is broken: %v", err)
			break
		}
	}
	client := wires[addrOf(from, dataplane.FamilyOf(to.Addr()))]
	for _, s := range client.Received() {
		if s.Source == answer.Endpoint && s.Destination == conn.Source() && from != w.net.Node {
			t.Errorf("the client has seen %+v, want nothing with the endpoint's address", s)
		}
	}
	for _, s := range endpoint.Received() {
		if ofClient(s) && s.Flags&nettest.RST != 0 {
			t.Errorf("the endpoint has got %+v, want no reset", s)
		}
	}
}

// testHalfOpenConnections has a server go on with connections that its clients know nothing
// of any more, as after a restart. Its port is one that endpoints have.
func (s suite) testHalfOpenConnections(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 1)
	node, outside := w.net.Node, w.net.Outside
	w.node.PodCIDRs = w.net.PodCIDRs
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services, w.service("web", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, 0)))
	}
	w.replace(services...)
	for _, family := range families() {
		for _, tt := range []struct{ server, client *nettest.Host }{
			{outside, node}, {outside, w.client}, {w.pods[0], node}, {w.pods[0], w.client}, {node, w.client},
		} {
			t.Run(fmt.Sprintf("%s with %s/%s", tt.server.Name, tt.client.Name, family), func(t *testing.T) {
				t.Parallel()
				wire := tt.server.SegmentConnT(t, addrOf(tt.server, family))
				line := nettest.Segment{
					Source: addrPortOf(tt.server, family, endpointPort), Destination: addrPortOf(tt.client, family, 40000),
					Seq: 1000, Ack: 2000, Flags: nettest.ACK | nettest.PSH, Len: 10,
				}
				if err := wire.Send(line); err != nil {
					t.Fatal(err)
				}
				for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
					if slices.ContainsFunc(wire.Received(), func(s nettest.Segment) bool {
						return s.Source == line.Destination && s.Destination == line.Source && s.Flags&nettest.RST != 0
					}) {
						return
					}
					if time.Now().After(end) {
						t.Fatal("the server is not told that there is no connection")
					}
				}
			})
		}
	}
}

// testAsymmetricRoutes has connections of which the node sees what one side sends. All
// ports are ones that endpoints have.
func (s suite) testAsymmetricRoutes(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 3)
	outside := w.net.Outside
	outside.ServeT(t, nettest.TCP, endpointPort)
	server, other := w.pods[0], w.pods[1]
	for _, past := range [][2]*nettest.Host{{outside, server}, {outside, w.client}, {other, server}} {
		if err := w.net.Bypass(past[0], past[1]); err != nil {
			t.Fatal(err)
		}
	}
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services,
			w.service("web", dataplane.TCP, []netip.AddrPort{vip(family, 1, 80)}, w.endpoints(family, 0, 1, 2)))
	}
	for name, node := range map[string]dataplane.Node{
		"pods told by their address": {PodCIDRs: w.net.PodCIDRs}, "pods told by their interface": {PodInterfacePrefix: "veth"},
		"pods told by nothing": {},
	} {
		w.node = node
		w.replace(services...)
		for _, tt := range []struct {
			name     string
			from, to *nettest.Host
		}{
			{"what a pod answers to outside", outside, server},
			{"what a pod answers to a pod", other, server},
			{"what a pod sends to outside", w.client, outside},
			{"what a pod sends to a pod", server, other},
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
							t.Errorf("%s is seen as %s", conn.Source(), answer.Source)
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
