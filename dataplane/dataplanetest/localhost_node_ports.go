package dataplanetest

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// loopbackAddrs returns loopback addresses of a family.
func loopbackAddrs(family dataplane.Family) []netip.Addr {
	if family == dataplane.IPv6 {
		return []netip.Addr{netip.IPv6Loopback()}
	}
	return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.1.2.3")}
}

// testLocalhostNodePorts makes the node itself serve all the ports on loopback addresses.
func (s suite) testLocalhostNodePorts(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 2)
	node := topo.net.Node
	const served, empty, dropping, other = 30080, 30081, 30082, 30083
	topo.node.NodePortAddrs = node.Addrs()
	for _, family := range families() {
		topo.node.NodePortAddrs = append(topo.node.NodePortAddrs, loopbackAddrs(family)...) // has no effect
		for _, p := range protocols() {
			node.ServeAtT(t, networkName(p), loopbackAddrs(family), served, empty, dropping, other)
		}
	}
	var services []*dataplane.Service
	for port, spec := range map[uint16]dataplane.ServiceSpec{served: {}, empty: {}, dropping: {NoEndpointsVerdict: dataplane.Drop}} {
		services = append(services, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			spec := spec
			if port == served {
				spec.Endpoints = localEndpoints(topo.endpoints(family, 0, 1))
			}
			spec.Masquerade = dataplane.MasqueradeAlways
			return topo.serviceOfKind(dataplane.NodePort, []string{"served", "empty", "dropping"}[port-served], p, nodePortFrontend(family, port), spec)
		})...)
	}
	check := func(t *testing.T, rejected bool) {
		t.Helper()
		forEachClient(t, []*nettest.Host{node}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, _ *nettest.Host) {
			for _, addr := range loopbackAddrs(family) {
				for _, port := range []uint16{served, empty, dropping} {
					to := netip.AddrPortFrom(addr, port)
					if rejected && (p != dataplane.TCP || !topo.node.LocalhostNodePorts) {
						expectRefused(t, node, p, to)
					} else {
						expectHost(t, node, p, to, node)
					}
				}
				expectHost(t, node, p, netip.AddrPortFrom(addr, other), node)
			}
			if rejected {
				expectSampledEndpoints(t, node, p, addrPortOf(node, family, served), topo.endpoints(family, 0, 1))
				expectRefused(t, node, p, addrPortOf(node, family, empty))
			}
		})
	}
	topo.replace()
	t.Run("no node ports", func(t *testing.T) { check(t, false) })
	topo.createOrUpdate(services...)
	t.Run("node ports", func(t *testing.T) { check(t, true) })
	topo.warmRestart()
	t.Run("warm restart", func(t *testing.T) { check(t, true) })
	topo.node.LocalhostNodePorts = true
	topo.replace(services...)
	t.Run("TCP listener", func(t *testing.T) { check(t, true) })
	topo.remove(services...)
	t.Run("node ports deleted", func(t *testing.T) { check(t, false) })
	topo.node.LocalhostNodePorts = false
	topo.replace(services...)
	t.Run("no listener", func(t *testing.T) { check(t, true) })
}
