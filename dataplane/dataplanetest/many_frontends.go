package dataplanetest

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// testManyFrontends programs Services with 40 frontends and three endpoints, enough for a
// backend to treat the frontends as a group.
func (s suite) testManyFrontends(t *testing.T) {
	t.Parallel()
	const many = 40
	topo := newTopology(t, s, 3)
	node, outside := topo.net.Node, topo.net.Outside
	frontends := func(family dataplane.Family, first, n int) []netip.AddrPort {
		var addrs []netip.AddrPort
		for i := range n {
			addrs = append(addrs, vip(family, byte(first+i), 80))
		}
		return addrs
	}
	build := func(kind dataplane.Kind, name string, first, n int, specFor func(dataplane.Family) dataplane.ServiceSpec) []*dataplane.Service {
		return buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			key := dataplane.Key{Namespace: "default", Name: name, Port: networkName(p), Kind: kind}
			return topo.newService(key, p, frontends(family, first, n), specFor(family))
		})
	}
	always := func(pods ...int) func(dataplane.Family) dataplane.ServiceSpec {
		return func(family dataplane.Family) dataplane.ServiceSpec {
			spec := topo.specOf(topo.endpoints(family, pods...))
			spec.Masquerade = dataplane.MasqueradeAlways
			return spec
		}
	}
	// check connects to the first, the middle and the last frontend.
	check := func(t *testing.T, first, n int, pods ...int) {
		t.Helper()
		forEachClient(t, []*nettest.Host{topo.client, topo.pods[0], node, outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, i := range []int{first, first + n/2, first + n - 1} {
				addr := vip(family, byte(i), 80)
				if len(pods) == 0 {
					expectRefused(t, from, p, addr)
					continue
				}
				for _, answer := range expectSampledEndpoints(t, from, p, addr, topo.endpoints(family, pods...)) {
					if got := answer.Source.Addr(); got != addrOf(node, family) && (from != topo.pods[0] || answer.Host != from.Name) {
						t.Errorf("%s from %s to %s: endpoint sees source %s, want the address of the node", p, from.Name, addr, got)
					}
				}
			}
		})
	}

	topo.replace()
	// Each subtest starts from the state of the previous one.
	for _, tt := range []struct {
		name string
		n    int
		pods []int
	}{
		{"created", many, []int{0, 1, 2}},
		{"endpoint removed", many, []int{0, 2}},
		{"last endpoint removed", many, nil},
		{"endpoint added", many, []int{1}},
		{"most frontends removed", 2, []int{1, 2}},
		{"frontends added again", many, []int{0, 1}},
	} {
		topo.createOrUpdate(build(dataplane.ExternalIP, "many", 1, tt.n, always(tt.pods...))...)
		t.Run(tt.name, func(t *testing.T) { check(t, 1, tt.n, tt.pods...) })
	}
	t.Run("warm restart", func(t *testing.T) {
		topo.warmRestart()
		check(t, 1, many, 0, 1)
	})
	t.Run("frontends move to another Service", func(t *testing.T) {
		topo.createOrUpdate(append(build(dataplane.ExternalIP, "many", 1, many/2, always(0, 1)),
			build(dataplane.ExternalIP, "more", 1+many/2, many/2, always(2))...)...)
		check(t, 1, many/2, 0, 1)
		check(t, 1+many/2, many/2, 2)
	})
	t.Run("all frontends move to a new Service", func(t *testing.T) {
		var changes []dataplane.Change
		for _, s := range build(dataplane.ExternalIP, "new", 1, many, always(1, 2)) {
			changes = append(changes, dataplane.Change{New: s})
		}
		for _, old := range topo.programmed {
			changes = append(changes, dataplane.Change{Old: old})
		}
		topo.applyChanges(changes)
		check(t, 1, many, 1, 2)
	})

	t.Run("hairpin is masqueraded and other pods keep their address", func(t *testing.T) {
		topo.createOrUpdate(build(dataplane.ExternalIP, "plain", 101, many, func(family dataplane.Family) dataplane.ServiceSpec {
			return topo.specOf(topo.endpoints(family, 0, 1))
		})...)
		forEachClient(t, []*nettest.Host{topo.client, topo.pods[0], outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, answer := range expectSampledEndpoints(t, from, p, vip(family, 101+many/2, 80), topo.endpoints(family, 0, 1)) {
				masqueraded := answer.Source.Addr() != addrOf(from, family)
				if want := answer.Host == from.Name || from == outside; masqueraded != want {
					t.Errorf("%s from %s: %s sees source %s", p, from.Name, answer.Host, answer.Source.Addr())
				}
			}
		})
	})

	ranged := func(family dataplane.Family) dataplane.ServiceSpec {
		spec := topo.specOf(topo.endpoints(family, 0, 1, 2))
		spec.Masquerade, spec.ExternalTrafficPolicyLocal = dataplane.MasqueradeFromNode, true
		spec.LocalEndpoints = localEndpoints(topo.endpoints(family, 1))
		spec.SourceRanges = []netip.Prefix{netip.MustParsePrefix("192.0.2.2/32"), netip.MustParsePrefix("10.0.0.0/8")}
		if family == dataplane.IPv6 {
			spec.SourceRanges = []netip.Prefix{netip.MustParsePrefix("2001:db8::2/128"), netip.MustParsePrefix("fd00::/8")}
		}
		return spec
	}
	t.Run("source ranges and local endpoints", func(t *testing.T) {
		topo.createOrUpdate(build(dataplane.LoadBalancer, "ranged", 151, many, ranged)...)
		for _, again := range []bool{false, true} {
			if again {
				topo.warmRestart()
			}
			forEachClient(t, []*nettest.Host{topo.client, node, outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
				addr := vip(family, 151+many/2, 80)
				switch from {
				case node:
					expectDropped(t, from, p, addr)
				case outside:
					expectHost(t, from, p, addr, topo.pods[1])
					expectSource(t, from, p, addr, addrOf(from, family))
				default:
					expectSampledEndpoints(t, from, p, addr, topo.endpoints(family, 0, 1, 2))
				}
			})
		}
	})
	t.Run("from a frontend address", func(t *testing.T) {
		topo.node.PrimaryAddrs = []netip.Addr{topo.net.Outside.IPv4, topo.net.Outside.IPv6} // in the source ranges
		topo.warmRestart()
		for _, family := range families() {
			if err := node.AddAddr(vip(family, 151+many/2, 0).Addr()); err != nil {
				t.Fatal(err)
			}
		}
		forEachClient(t, []*nettest.Host{node}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectSampledEndpoints(t, from, p, vip(family, 151+many/2, 80), topo.endpoints(family, 0, 1, 2))
		})
	})
	topo.replace()
}
