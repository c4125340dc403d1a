package dataplanetest

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// forEachClient calls check concurrently for each family, protocol and client, because
// expecting a drop takes a timeout each. check must not call t.FailNow.
func forEachClient(t *testing.T, clients []*nettest.Host, check func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host)) {
	t.Helper()
	var checks sync.WaitGroup
	for _, family := range families() {
		for _, p := range protocols() {
			for _, from := range clients {
				checks.Go(func() { check(t, family, p, from) })
			}
		}
	}
	checks.Wait()
}

// expectSampledEndpoints is expectEndpoints for TCP. For UDP and SCTP it opens only a few
// connections and checks that they reach no other endpoint: TCP shows behavior that is common
// to all protocols.
func expectSampledEndpoints(
	t *testing.T, from *nettest.Host, p dataplane.Protocol, addr netip.AddrPort, endpoints []netip.AddrPort,
) []nettest.Answer {
	t.Helper()
	if p == dataplane.TCP || len(endpoints) < 2 {
		return expectEndpoints(t, from, p, addr, endpoints)
	}
	var answers []nettest.Answer
	for range 3 {
		answer, err := connect(t, from, p, addr)
		if err != nil || !slices.Contains(endpoints, answer.Endpoint) {
			t.Errorf("%s from %s to %s: answer %+v, error %v, want one of %v", p, from.Name, addr, answer, err, endpoints)
			break
		}
		answers = append(answers, answer)
	}
	return answers
}

// buildServices calls build for each family and protocol and returns the Services.
func buildServices(build func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service) []*dataplane.Service {
	var services []*dataplane.Service
	for _, family := range families() {
		for _, p := range protocols() {
			services = append(services, build(family, p))
		}
	}
	return services
}

func (s suite) testDropWithoutEndpoints(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	clients := []*nettest.Host{topo.client, topo.pods[0], topo.net.Node, topo.net.Outside}
	put := func(verdict dataplane.Verdict, pods ...int) {
		t.Helper()
		for _, kind := range []dataplane.Kind{dataplane.ClusterIP, dataplane.ExternalIP, dataplane.LoadBalancer} {
			topo.createOrUpdate(buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				spec := topo.specOf(topo.endpoints(family, pods...))
				spec.NoEndpointsVerdict = verdict
				return topo.serviceOfKind(kind, "web", p, vip(family, byte(kind), 80), spec)
			})...)
		}
	}
	topo.replace()
	// Each subtest starts from the state of the previous one.
	for _, tt := range []struct {
		name    string
		verdict dataplane.Verdict
		pods    []int
	}{
		{"no endpoint yet", dataplane.Drop, nil},
		{"first endpoint added", dataplane.Drop, []int{0}},
		{"last endpoint removed", dataplane.Drop, nil},
		{"verdict becomes Reject", dataplane.Reject, nil},
		{"verdict becomes Drop", dataplane.Drop, nil},
	} {
		put(tt.verdict, tt.pods...)
		t.Run(tt.name, func(t *testing.T) {
			forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
				for kind := range dataplane.LoadBalancer + 1 {
					if kind == dataplane.NodePort {
						continue
					}
					addr := vip(family, byte(kind), 80)
					if len(tt.pods) > 0 {
						expectEndpoints(t, from, p, addr, topo.endpoints(family, tt.pods...))
					} else {
						expectVerdict(t, from, p, addr, tt.verdict)
					}
				}
			})
		})
	}
}

// testMasqueradePolicies gives the node the addresses of the Services, so that its own
// unmasqueraded connections come from those addresses. With the node's primary address as
// source, masquerading would be invisible.
func (s suite) testMasqueradePolicies(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	kinds := []dataplane.Masquerade{dataplane.MasqueradeOffCluster, dataplane.MasqueradeAlways, dataplane.MasqueradeFromNode}
	for _, family := range families() {
		for _, m := range kinds {
			if err := topo.net.Node.AddAddr(vip(family, byte(m), 0).Addr()); err != nil {
				t.Fatal(err)
			}
		}
	}
	var services []*dataplane.Service
	for _, m := range kinds {
		services = append(services, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			spec := topo.specOf(topo.endpoints(family, 0))
			spec.Masquerade = m
			return topo.serviceOfKind(dataplane.ExternalIP, m.String(), p, vip(family, byte(m), 80), spec)
		})...)
	}
	type clients struct{ pod, node, outside bool }
	none, all, offCluster := clients{}, clients{true, true, true}, clients{false, true, true}
	otherCIDRs := []netip.Prefix{netip.MustParsePrefix("10.200.0.0/16"), netip.MustParsePrefix("fd00:200::/64")}
	// The subtests share one node, so they do not run in parallel.
	for _, tt := range []struct {
		name        string
		node        dataplane.Node
		masqueraded clients // by MasqueradeOffCluster
	}{
		{"no local traffic detection", dataplane.Node{}, none},
		{"pod CIDRs", dataplane.Node{PodCIDRs: topo.net.PodCIDRs}, offCluster},
		{"other pod CIDRs", dataplane.Node{PodCIDRs: otherCIDRs}, all},
		{"bridge interface", dataplane.Node{PodInterface: "veth1"}, offCluster},
		{"other bridge interface", dataplane.Node{PodInterface: "veth"}, all},
		{"interface name prefix", dataplane.Node{PodInterfacePrefix: "veth"}, offCluster},
		{"other interface name prefix", dataplane.Node{PodInterfacePrefix: "eth"}, clients{true, true, false}},
		{"all clients", dataplane.Node{MasqueradeAll: true}, all},
		{"all clients, with pod CIDRs", dataplane.Node{PodCIDRs: topo.net.PodCIDRs, MasqueradeAll: true}, all},
		{"all clients, with interface name prefix", dataplane.Node{PodInterfacePrefix: "veth", MasqueradeAll: true}, all},
	} {
		topo.node = tt.node
		topo.replace(services...)
		for _, m := range kinds {
			masqueraded := map[dataplane.Masquerade]clients{
				dataplane.MasqueradeOffCluster: tt.masqueraded, dataplane.MasqueradeAlways: all, dataplane.MasqueradeFromNode: {node: true},
			}[m]
			t.Run(fmt.Sprintf("%s/%s", m, tt.name), func(t *testing.T) {
				for _, client := range []struct {
					*nettest.Host
					masqueraded bool
				}{{topo.client, masqueraded.pod}, {topo.net.Node, masqueraded.node}, {topo.net.Outside, masqueraded.outside}} {
					forEachClient(t, []*nettest.Host{client.Host}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
						frontend := vip(family, byte(m), 80)
						source := addrOf(from, family)
						switch {
						case client.masqueraded:
							source = addrOf(topo.net.Node, family)
						case from == topo.net.Node:
							source = frontend.Addr()
						}
						expectSource(t, from, p, frontend, source)
					})
				}
			})
		}
	}
}

// testUndeclaredPorts gives the outside host all addresses of the Service network.
// Connections that the node lets pass end there.
func (s suite) testUndeclaredPorts(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	const unused, used, empty, shared = 10, 1, 2, 3
	for _, family := range families() {
		for _, n := range []byte{used, empty, shared, unused} {
			if err := topo.net.Outside.AddAddr(vip(family, n, 0).Addr()); err != nil {
				t.Fatal(err)
			}
		}
		topo.node.ServiceCIDRs = append(topo.node.ServiceCIDRs, netip.PrefixFrom(vip(family, 0, 0).Addr(), vip(family, 0, 0).Addr().BitLen()-8))
	}
	for _, p := range protocols() {
		topo.net.Outside.ServeT(t, networkName(p), 80, 81, endpointPort)
	}
	for _, p := range protocols() {
		topo.pods[0].ServeT(t, networkName(p), 80)
	}
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services,
			topo.service("used", dataplane.TCP, []netip.AddrPort{vip(family, used, 80)}, topo.endpoints(family, 0)),
			topo.service("empty", dataplane.TCP, []netip.AddrPort{vip(family, empty, 80)}, nil),
			topo.service("first", dataplane.TCP, []netip.AddrPort{vip(family, shared, 80)}, topo.endpoints(family, 0)),
			topo.service("second", dataplane.UDP, []netip.AddrPort{vip(family, shared, 80)}, topo.endpoints(family, 0)))
	}
	clients := []*nettest.Host{topo.client, topo.net.Node}
	topo.replace(services...)
	t.Run("Services created", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectRefused(t, from, p, vip(family, used, 81))
			expectRefused(t, from, p, vip(family, used, endpointPort))
			expectRefused(t, from, p, vip(family, empty, 81))
			expectRefused(t, from, p, vip(family, shared, 81))
			expectDropped(t, from, p, vip(family, unused, 80))
			if p != dataplane.TCP {
				expectRefused(t, from, p, vip(family, used, 80))
			}
			// Connections to other hosts are unaffected.
			for _, host := range []*nettest.Host{topo.pods[0], topo.net.Outside} {
				expectSource(t, from, p, netip.AddrPortFrom(addrOf(host, family), 80), addrOf(from, family))
			}
		})
	})
	for _, family := range families() {
		key := dataplane.Key{Namespace: "default", Port: "tcp", Family: family}
		used, first := key, key
		used.Name, first.Name = "used", "first"
		topo.remove(topo.programmed[used], topo.programmed[first])
	}
	after := func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectDropped(t, from, p, vip(family, used, 80)) // no longer a cluster IP
			expectRefused(t, from, p, vip(family, shared, 81))
			if p != dataplane.UDP {
				expectRefused(t, from, p, vip(family, shared, 80))
			}
		})
	}
	t.Run("Services deleted", after)
	topo.warmRestart()
	t.Run("warm restart", after)
	topo.node.ServiceCIDRs = nil
	topo.warmRestart()
	t.Run("no Service CIDRs", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectSource(t, from, p, vip(family, unused, 80), addrOf(from, family))
			expectRefused(t, from, p, vip(family, shared, 81))
		})
	})
}
