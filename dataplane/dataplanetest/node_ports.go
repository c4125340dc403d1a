package dataplanetest

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// nodePortFrontend returns the frontend of a node port.
func nodePortFrontend(family dataplane.Family, port uint16) netip.AddrPort {
	if family == dataplane.IPv4 {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), port)
	}
	return netip.AddrPortFrom(netip.IPv6Unspecified(), port)
}

// addrPortOf returns a port of a host.
func addrPortOf(h *nettest.Host, family dataplane.Family, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(addrOf(h, family), port)
}

// expectHost checks that a connection to addr is answered by a host.
func expectHost(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort, host *nettest.Host) {
	t.Helper()
	if answer, err := connect(t, from, protocol, addr); err != nil || answer.Host != host.Name {
		t.Errorf("%s from %s to %s: answer %+v, error %v, want one of %s", protocol, from.Name, addr, answer, err, host.Name)
	}
}

// The node itself serves the node ports too, so that what is not taken for a node
// port's ends there.
func (s suite) testNodePorts(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 3)
	node, clients := w.net.Node, []*nettest.Host{w.client, w.pods[0], w.net.Node, w.net.Outside}
	second := map[dataplane.Family]netip.Addr{
		dataplane.IPv4: netip.MustParseAddr("198.51.100.1"), dataplane.IPv6: netip.MustParseAddr("2001:db8:51::1"),
	}
	const plain, dropping, kept, shared = 30080, 30081, 30082, 30083
	for _, family := range families() {
		if err := node.AddAddr(second[family]); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range protocols() {
		node.ServeT(t, networkName(p), plain, dropping, kept, shared)
	}
	build := func(pods ...int) []*dataplane.Service {
		var all []*dataplane.Service
		add := func(name string, kind dataplane.Kind, addr func(dataplane.Family) netip.AddrPort, treatment dataplane.ServiceSpec, pods ...int) {
			all = append(all, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				treatment.Endpoints = localEndpoints(w.endpoints(family, pods...))
				return w.serviceOfKind(kind, name, p, addr(family), treatment)
			})...)
		}
		portOf := func(port uint16) func(dataplane.Family) netip.AddrPort {
			return func(family dataplane.Family) netip.AddrPort { return nodePortFrontend(family, port) }
		}
		add("plain", dataplane.NodePort, portOf(plain), dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeAlways}, pods...)
		add("dropping", dataplane.NodePort, portOf(dropping),
			dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeAlways, NoEndpointsVerdict: dataplane.Drop}, pods...)
		add("kept", dataplane.NodePort, portOf(kept), dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeFromNode}, pods...)
		add("shared", dataplane.NodePort, portOf(shared), dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeAlways}, 1)
		add("concrete", dataplane.ExternalIP, func(family dataplane.Family) netip.AddrPort { return addrPortOf(node, family, shared) },
			dataplane.ServiceSpec{Masquerade: dataplane.MasqueradeAlways}, pods...)
		return all
	}
	notServed := func(t *testing.T) {
		t.Helper()
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, port := range []uint16{plain, dropping, kept, shared} {
				expectHost(t, from, p, netip.AddrPortFrom(second[family], port), node)
			}
		})
	}
	served := func(t *testing.T) {
		t.Helper()
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, port := range []uint16{plain, dropping, shared} {
				for _, answer := range expectSampledEndpoints(t, from, p, addrPortOf(node, family, port), w.endpoints(family, 0, 2)) {
					if answer.Source.Addr() != addrOf(node, family) {
						t.Errorf("the endpoint of a connection from %s sees %s, want the node", from.Name, answer.Source)
					}
				}
			}
			for _, answer := range expectSampledEndpoints(t, from, p, addrPortOf(node, family, kept), w.endpoints(family, 0, 2)) {
				itself := answer.Host == from.Name // a pod that reaches itself
				if (answer.Source.Addr() == addrOf(from, family)) == itself {
					t.Errorf("%s is answered by %s, which sees %s", from.Name, answer.Host, answer.Source)
				}
			}
		})
		notServed(t)
	}
	w.node.NodePortAddrs = node.Addrs()
	w.replace(build(0, 2)...)
	t.Run("with endpoints", served)
	w.warmRestart()
	t.Run("after a restart", served)

	w.createOrUpdate(build()...)
	t.Run("without endpoints", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectRefused(t, from, p, addrPortOf(node, family, plain))
			expectRefused(t, from, p, addrPortOf(node, family, kept))
			expectRefused(t, from, p, addrPortOf(node, family, shared)) // although the node port of this number has some
			expectDropped(t, from, p, addrPortOf(node, family, dropping))
		})
		notServed(t)
	})

	w.createOrUpdate(build(0)...)
	for _, family := range families() {
		w.node.NodePortAddrs = append(w.node.NodePortAddrs, second[family])
	}
	w.warmRestart()
	t.Run("on one more address", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, port := range []uint16{plain, dropping, kept} {
				expectSampledEndpoints(t, from, p, addrPortOf(node, family, port), w.endpoints(family, 0))
				expectSampledEndpoints(t, from, p, netip.AddrPortFrom(second[family], port), w.endpoints(family, 0))
			}
			expectSampledEndpoints(t, from, p, addrPortOf(node, family, shared), w.endpoints(family, 0))
			expectSampledEndpoints(t, from, p, netip.AddrPortFrom(second[family], shared), w.endpoints(family, 1))
		})
	})

	networks := map[dataplane.Family]netip.Prefix{
		dataplane.IPv4: netip.MustParsePrefix("198.51.100.128/25"), dataplane.IPv6: netip.MustParsePrefix("2001:db8:51:1::/64"),
	}
	inNetwork := func(family dataplane.Family, port uint16) netip.AddrPort {
		addr := networks[family].Addr()
		for range 9 {
			addr = addr.Next()
		}
		return netip.AddrPortFrom(addr, port)
	}
	for _, family := range families() {
		if err := node.AddNetwork(networks[family]); err != nil {
			t.Fatal(err)
		}
	}
	notInNetworks := func(t *testing.T) {
		t.Helper()
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			if from == node && p == dataplane.SCTP {
				return // an abort from an address that no interface has is lost
			}
			expectRefused(t, from, p, inNetwork(family, plain))
		})
	}
	t.Run("not yet in networks", notInNetworks)
	w.node.NodePortNetworks = []netip.Prefix{networks[dataplane.IPv4], networks[dataplane.IPv6]}
	w.warmRestart()
	t.Run("in networks", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, answer := range expectSampledEndpoints(t, from, p, inNetwork(family, plain), w.endpoints(family, 0)) {
				if answer.Source.Addr() != addrOf(node, family) {
					t.Errorf("the endpoint of a connection from %s sees %s, want the node", from.Name, answer.Source)
				}
			}
			for _, port := range []uint16{dropping, kept} {
				expectSampledEndpoints(t, from, p, inNetwork(family, port), w.endpoints(family, 0))
			}
			expectSampledEndpoints(t, from, p, inNetwork(family, shared), w.endpoints(family, 1))
			expectSampledEndpoints(t, from, p, addrPortOf(node, family, plain), w.endpoints(family, 0))
		})
	})
	w.node.NodePortNetworks = nil
	w.warmRestart()
	t.Run("in networks no more", notInNetworks)

	w.node.NodePortAddrs = nil
	w.warmRestart()
	t.Run("on no address", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, port := range []uint16{plain, dropping, kept} {
				expectHost(t, from, p, addrPortOf(node, family, port), node)
			}
			expectSampledEndpoints(t, from, p, addrPortOf(node, family, shared), w.endpoints(family, 0))
		})
		notServed(t)
	})
}
