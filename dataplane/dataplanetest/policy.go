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

// forEachClient calls check for each family, protocol and client, all at once: where
// packets are dropped, there is much waiting. So check must not call t.FailNow.
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

// expectSampledEndpoints is expect, but for UDP and SCTP it makes few connections, of which
// it checks only that none reaches anything else: what is the same for all
// protocols is seen with TCP.
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

// buildServices returns what build makes for each family and protocol.
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
	w := newTopology(t, s, 1)
	clients := []*nettest.Host{w.client, w.pods[0], w.net.Node, w.net.Outside}
	put := func(verdict dataplane.Verdict, pods ...int) {
		t.Helper()
		for _, kind := range []dataplane.Kind{dataplane.ClusterIP, dataplane.ExternalIP, dataplane.LoadBalancer} {
			w.createOrUpdate(buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				treatment := w.specOf(w.endpoints(family, pods...))
				treatment.NoEndpointsVerdict = verdict
				return w.serviceOfKind(kind, "web", p, vip(family, byte(kind), 80), treatment)
			})...)
		}
	}
	w.replace()
	// The tests follow each other.
	for _, tt := range []struct {
		name    string
		verdict dataplane.Verdict
		pods    []int
	}{
		{"never any", dataplane.Drop, nil},
		{"the first has come", dataplane.Drop, []int{0}},
		{"the last has gone", dataplane.Drop, nil},
		{"to be rejected from now on", dataplane.Reject, nil},
		{"and dropped again", dataplane.Drop, nil},
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
						expectEndpoints(t, from, p, addr, w.endpoints(family, tt.pods...))
					} else {
						expectVerdict(t, from, p, addr, tt.verdict)
					}
				}
			})
		})
	}
}

// The Services' addresses are the node's own, so that it connects from them where
// it is not masqueraded: its own address would not show whether it is.
func (s suite) testMasqueradePolicies(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 1)
	kinds := []dataplane.Masquerade{dataplane.MasqueradeOffCluster, dataplane.MasqueradeAlways, dataplane.MasqueradeFromNode}
	for _, family := range families() {
		for _, m := range kinds {
			if err := w.net.Node.AddAddr(vip(family, byte(m), 0).Addr()); err != nil {
				t.Fatal(err)
			}
		}
	}
	var services []*dataplane.Service
	for _, m := range kinds {
		services = append(services, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			treatment := w.specOf(w.endpoints(family, 0))
			treatment.Masquerade = m
			return w.serviceOfKind(dataplane.ExternalIP, m.String(), p, vip(family, byte(m), 80), treatment)
		})...)
	}
	type who struct{ pod, node, outside bool }
	none, all, others := who{}, who{true, true, true}, who{false, true, true}
	other := []netip.Prefix{netip.MustParsePrefix("10.200.0.0/16"), netip.MustParsePrefix("fd00:200::/64")}
	// The tests change one node, so they do not run in parallel.
	for _, tt := range []struct {
		name    string
		node    dataplane.Node
		foreign who
	}{
		{"pods told by nothing", dataplane.Node{}, none},
		{"pods told by their address", dataplane.Node{PodCIDRs: w.net.PodCIDRs}, others},
		{"pods told by another address", dataplane.Node{PodCIDRs: other}, all},
		{"pods told by their interface", dataplane.Node{PodInterface: "veth1"}, others},
		{"pods told by another interface", dataplane.Node{PodInterface: "veth"}, all},
		{"pods told by the beginning of their interface's name", dataplane.Node{PodInterfacePrefix: "veth"}, others},
		{"pods told by the beginning of another name", dataplane.Node{PodInterfacePrefix: "eth"}, who{true, true, false}},
		{"everybody", dataplane.Node{MasqueradeAll: true}, all},
		{"everybody, and pods told by their address", dataplane.Node{PodCIDRs: w.net.PodCIDRs, MasqueradeAll: true}, all},
		{"everybody, and pods told by their interface", dataplane.Node{PodInterfacePrefix: "veth", MasqueradeAll: true}, all},
	} {
		w.node = tt.node
		w.replace(services...)
		for _, m := range kinds {
			masqueraded := map[dataplane.Masquerade]who{
				dataplane.MasqueradeOffCluster: tt.foreign, dataplane.MasqueradeAlways: all, dataplane.MasqueradeFromNode: {node: true},
			}[m]
			t.Run(fmt.Sprintf("%s/%s", m, tt.name), func(t *testing.T) {
				for _, client := range []struct {
					*nettest.Host
					masqueraded bool
				}{{w.client, masqueraded.pod}, {w.net.Node, masqueraded.node}, {w.net.Outside, masqueraded.outside}} {
					forEachClient(t, []*nettest.Host{client.Host}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
						frontend := vip(family, byte(m), 80)
						source := addrOf(from, family)
						switch {
						case client.masqueraded:
							source = addrOf(w.net.Node, family)
						case from == w.net.Node:
							source = frontend.Addr()
						}
						expectSource(t, from, p, frontend, source)
					})
				}
			})
		}
	}
}

// testUndeclaredPorts gives the outside host all addresses of the Service network: what
// the node lets pass ends there.
func (s suite) testUndeclaredPorts(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 1)
	const unused, used, empty, shared = 10, 1, 2, 3
	for _, family := range families() {
		for _, n := range []byte{used, empty, shared, unused} {
			if err := w.net.Outside.AddAddr(vip(family, n, 0).Addr()); err != nil {
				t.Fatal(err)
			}
		}
		w.node.ServiceCIDRs = append(w.node.ServiceCIDRs, netip.PrefixFrom(vip(family, 0, 0).Addr(), vip(family, 0, 0).Addr().BitLen()-8))
	}
	for _, p := range protocols() {
		w.net.Outside.ServeT(t, networkName(p), 80, 81, endpointPort)
	}
	for _, p := range protocols() {
		w.pods[0].ServeT(t, networkName(p), 80)
	}
	var services []*dataplane.Service
	for _, family := range families() {
		services = append(services,
			w.service("used", dataplane.TCP, []netip.AddrPort{vip(family, used, 80)}, w.endpoints(family, 0)),
			w.service("empty", dataplane.TCP, []netip.AddrPort{vip(family, empty, 80)}, nil),
			w.service("first", dataplane.TCP, []netip.AddrPort{vip(family, shared, 80)}, w.endpoints(family, 0)),
			w.service("second", dataplane.UDP, []netip.AddrPort{vip(family, shared, 80)}, w.endpoints(family, 0)))
	}
	clients := []*nettest.Host{w.client, w.net.Node}
	w.replace(services...)
	t.Run("before", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectRefused(t, from, p, vip(family, used, 81))
			expectRefused(t, from, p, vip(family, used, endpointPort))
			expectRefused(t, from, p, vip(family, empty, 81))
			expectRefused(t, from, p, vip(family, shared, 81))
			expectDropped(t, from, p, vip(family, unused, 80))
			if p != dataplane.TCP {
				expectRefused(t, from, p, vip(family, used, 80))
			}
			// Others are none of its business.
			for _, host := range []*nettest.Host{w.pods[0], w.net.Outside} {
				expectSource(t, from, p, netip.AddrPortFrom(addrOf(host, family), 80), addrOf(from, family))
			}
		})
	})
	for _, family := range families() {
		key := dataplane.Key{Namespace: "default", Port: "tcp", Family: family}
		used, first := key, key
		used.Name, first.Name = "used", "first"
		w.remove(w.programmed[used], w.programmed[first])
	}
	after := func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectDropped(t, from, p, vip(family, used, 80)) // is nobody's any more
			expectRefused(t, from, p, vip(family, shared, 81))
			if p != dataplane.UDP {
				expectRefused(t, from, p, vip(family, shared, 80))
			}
		})
	}
	t.Run("after the deletion of a Service", after)
	w.warmRestart()
	t.Run("after a restart", after)
	w.node.ServiceCIDRs = nil
	w.warmRestart()
	t.Run("without networks", func(t *testing.T) {
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectSource(t, from, p, vip(family, unused, 80), addrOf(from, family))
			expectRefused(t, from, p, vip(family, shared, 81))
		})
	})
}
