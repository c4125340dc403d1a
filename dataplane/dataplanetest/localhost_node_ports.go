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

// testLocalhostNodePorts has the node itself serve all the ports at loopback addresses.
func (s suite) testLocalhostNodePorts(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 2)
	node := w.net.Node
	const served, empty, dropping, other = 30080, 30081, 30082, 30083
	w.node.NodePortAddrs = node.Addrs()
	for _, family := range families() {
		w.node.NodePortAddrs = append(w.node.NodePortAddrs, loopbackAddrs(family)...) // is of no effect
		for _, p := range protocols() {
			node.ServeAtT(t, networkName(p), loopbackAddrs(family), served, empty, dropping, other)
		}
	}
	var services []*dataplane.Service
	for port, treatment := range map[uint16]dataplane.ServiceSpec{served: {}, empty: {}, dropping: {NoEndpointsVerdict: dataplane.Drop}} {
		services = append(services, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			treatment := treatment
			if port == served {
				treatment.Endpoints = localEndpoints(w.endpoints(family, 0, 1))
			}
			treatment.Masquerade = dataplane.MasqueradeAlways
			return w.serviceOfKind(dataplane.NodePort, []string{"served", "empty", "dropping"}[port-served], p, nodePortFrontend(family, port), treatment)
		})...)
	}
	check := func(t *testing.T, rejected bool) {
		t.Helper()
		forEachClient(t, []*nettest.Host{node}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, _ *nettest.Host) {
			for _, addr := range loopbackAddrs(family) {
				for _, port := range []uint16{served, empty, dropping} {
					to := netip.AddrPortFrom(addr, port)
					if rejected && (p != dataplane.TCP || !w.node.LocalhostNodePorts) {
						expectRefused(t, node, p, to)
					} else {
						expectHost(t, node, p, to, node)
					}
				}
				expectHost(t, node, p, netip.AddrPortFrom(addr, other), node)
			}
			if rejected {
				expectSampledEndpoints(t, node, p, addrPortOf(node, family, served), w.endpoints(family, 0, 1))
				expectRefused(t, node, p, addrPortOf(node, family, empty))
			}
		})
	}
	w.replace()
	t.Run("without node ports", func(t *testing.T) { check(t, false) })
	w.createOrUpdate(services...)
	t.Run("with node ports", func(t *testing.T) { check(t, true) })
	w.warmRestart()
	t.Run("after a restart", func(t *testing.T) { check(t, true) })
	w.node.LocalhostNodePorts = true
	w.replace(services...)
	t.Run("with a listener for TCP", func(t *testing.T) { check(t, true) })
	w.remove(services...)
	t.Run("when the node ports are gone", func(t *testing.T) { check(t, false) })
	w.node.LocalhostNodePorts = false
	w.replace(services...)
	t.Run("without the listener again", func(t *testing.T) { check(t, true) })
}
