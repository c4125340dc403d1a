package dataplanetest

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// nodePortFrontend returns the frontend address of a node port.
func nodePortFrontend(family dataplane.Family, port uint16) netip.AddrPort {
	if family == dataplane.IPv4 {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), port)
	}
	return netip.AddrPortFrom(netip.IPv6Unspecified(), port)
}

// addrPortOf returns the address of a host with a port.
func addrPortOf(h *nettest.Host, family dataplane.Family, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(addrOf(h, family), port)
}

// expectHost checks that a host answers a connection to addr.
func expectHost(t *testing.T, from *nettest.Host, protocol dataplane.Protocol, addr netip.AddrPort, host *nettest.Host) {
	t.Helper()
	if answer, err := connect(t, from, protocol, addr); err != nil || answer.Host != host.Name {
		t.Errorf("%s from %s to %s: answer %+v, error %v, want an answer from %s", protocol, from.Name, addr, answer, err, host.Name)
	}
}

// testNodePorts makes the node itself serve the node ports too, so that untranslated
// connections end there.
func (s suite) testNodePorts(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	node, clients := topo.net.Node, []*nettest.Host{topo.client, topo.pods[0], topo.net.Node, topo.net.Outside}
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
		add := func(name string, kind dataplane.Kind, addr func(dataplane.Family) netip.AddrPort, spec dataplane.ServiceSpec, pods ...int) {
			all = append(all, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				spec.Endpoints = localEndpoints(topo.endpoints(family, pods...))
				return topo.serviceOfKind(kind, name, p, addr(family), spec)
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
				for _, answer := range expectSampledEndpoints(t, from, p, addrPortOf(node, family, port), topo.endpoints(family, 0, 2)) {
					if answer.Source.Addr() != addrOf(node, family) {
						t.Errorf("endpoint of a connection from %s sees source %s, want the node", from.Name, answer.Source)
					}
				}
			}
			for _, answer := range expectSampledEndpoints(t, from, p, addrPortOf(node, family, kept), topo.endpoints(family, 0, 2)) {
				itself := answer.Host == from.Name // hairpin
				if (answer.Source.Addr() == addrOf(from, family)) == itself {
					t.Errorf("connection from %s to %s: endpoint sees source %s", from.Name, answer.Host, answer.Source)
				}
			}
		})
		notServed(t)
	}
	topo.node.NodePortAddrs = node.Addrs()
	topo.replace(build(0, 2)...)
	t.Run("endpoints", served)
	topo.warmRestart()
	t.Run("warm restart", served)

	topo.createOrUpdate(build()...)
	t.Run("no endpoints", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectRefused(t, from, p, addrPortOf(node, family, plain))
			expectRefused(t, from, p, addrPortOf(node, family, kept))
			expectRefused(t, from, p, addrPortOf(node, family, shared)) // although the node port with this number has endpoints
			expectDropped(t, from, p, addrPortOf(node, family, dropping))
		})
		notServed(t)
	})

	topo.createOrUpdate(build(0)...)
	for _, family := range families() {
		topo.node.NodePortAddrs = append(topo.node.NodePortAddrs, second[family])
	}
	topo.warmRestart()
	t.Run("additional address", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, port := range []uint16{plain, dropping, kept} {
				expectSampledEndpoints(t, from, p, addrPortOf(node, family, port), topo.endpoints(family, 0))
				expectSampledEndpoints(t, from, p, netip.AddrPortFrom(second[family], port), topo.endpoints(family, 0))
			}
			expectSampledEndpoints(t, from, p, addrPortOf(node, family, shared), topo.endpoints(family, 0))
			expectSampledEndpoints(t, from, p, netip.AddrPortFrom(second[family], shared), topo.endpoints(family, 1))
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
				return // SCTP aborts from an address without an interface are lost
			}
			expectRefused(t, from, p, inNetwork(family, plain))
		})
	}
	t.Run("before networks", notInNetworks)
	topo.node.NodePortNetworks = []netip.Prefix{networks[dataplane.IPv4], networks[dataplane.IPv6]}
	topo.warmRestart()
	t.Run("networks", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, answer := range expectSampledEndpoints(t, from, p, inNetwork(family, plain), topo.endpoints(family, 0)) {
				if answer.Source.Addr() != addrOf(node, family) {
					t.Errorf("endpoint of a connection from %s sees source %s, want the node", from.Name, answer.Source)
				}
			}
			for _, port := range []uint16{dropping, kept} {
				expectSampledEndpoints(t, from, p, inNetwork(family, port), topo.endpoints(family, 0))
			}
			expectSampledEndpoints(t, from, p, inNetwork(family, shared), topo.endpoints(family, 1))
			expectSampledEndpoints(t, from, p, addrPortOf(node, family, plain), topo.endpoints(family, 0))
		})
	})
	topo.node.NodePortNetworks = nil
	topo.warmRestart()
	t.Run("networks removed", notInNetworks)

	topo.node.NodePortAddrs = nil
	topo.warmRestart()
	t.Run("no addresses", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, port := range []uint16{plain, dropping, kept} {
				expectHost(t, from, p, addrPortOf(node, family, port), node)
			}
			expectSampledEndpoints(t, from, p, addrPortOf(node, family, shared), topo.endpoints(family, 0))
		})
		notServed(t)
	})
}
