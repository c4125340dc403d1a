package dataplanetest

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// testManyFrontends has Services with as many frontends as a backend may treat as a
// group: 40 addresses with three endpoints.
func (s suite) testManyFrontends(t *testing.T) {
	t.Parallel()
	const many = 40
	w := newTopology(t, s, 3)
	node, outside := w.net.Node, w.net.Outside
	frontends := func(family dataplane.Family, first, n int) []netip.AddrPort {
		var addrs []netip.AddrPort
		for i := range n {
			addrs = append(addrs, vip(family, byte(first+i), 80))
		}
		return addrs
	}
	build := func(kind dataplane.Kind, name string, first, n int, treat func(dataplane.Family) dataplane.ServiceSpec) []*dataplane.Service {
		return buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			key := dataplane.Key{Namespace: "default", Name: name, Port: networkName(p), Kind: kind}
			return w.newService(key, p, frontends(family, first, n), treat(family))
		})
	}
	always := func(pods ...int) func(dataplane.Family) dataplane.ServiceSpec {
		return func(family dataplane.Family) dataplane.ServiceSpec {
			treatment := w.specOf(w.endpoints(family, pods...))
			treatment.Masquerade = dataplane.MasqueradeAlways
			return treatment
		}
	}
	// check looks at the first, the last and one in the middle of the frontends.
	check := func(t *testing.T, first, n int, pods ...int) {
		t.Helper()
		forEachClient(t, []*nettest.Host{w.client, w.pods[0], node, outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, i := range []int{first, first + n/2, first + n - 1} {
				addr := vip(family, byte(i), 80)
				if len(pods) == 0 {
					expectRefused(t, from, p, addr)
					continue
				}
				for _, answer := range expectSampledEndpoints(t, from, p, addr, w.endpoints(family, pods...)) {
					if got := answer.Source.Addr(); got != addrOf(node, family) && (from != w.pods[0] || answer.Host != from.Name) {
						t.Errorf("%s from %s to %s: the endpoint sees source %s, want the node's", p, from.Name, addr, got)
					}
				}
			}
		})
	}

	w.replace()
	// The tests follow each other.
	for _, tt := range []struct {
		name string
		n    int
		pods []int
	}{
		{"created", many, []int{0, 1, 2}},
		{"an endpoint leaves", many, []int{0, 2}},
		{"the last endpoint leaves", many, nil},
		{"an endpoint comes", many, []int{1}},
		{"most frontends leave", 2, []int{1, 2}},
		{"they come again", many, []int{0, 1}},
	} {
		w.createOrUpdate(build(dataplane.ExternalIP, "many", 1, tt.n, always(tt.pods...))...)
		t.Run(tt.name, func(t *testing.T) { check(t, 1, tt.n, tt.pods...) })
	}
	t.Run("after a restart", func(t *testing.T) {
		w.warmRestart()
		check(t, 1, many, 0, 1)
	})
	t.Run("frontends move to another Service", func(t *testing.T) {
		w.createOrUpdate(append(build(dataplane.ExternalIP, "many", 1, many/2, always(0, 1)),
			build(dataplane.ExternalIP, "more", 1+many/2, many/2, always(2))...)...)
		check(t, 1, many/2, 0, 1)
		check(t, 1+many/2, many/2, 2)
	})
	t.Run("all frontends move to a new Service", func(t *testing.T) {
		var changes []dataplane.Change
		for _, s := range build(dataplane.ExternalIP, "new", 1, many, always(1, 2)) {
			changes = append(changes, dataplane.Change{New: s})
		}
		for _, old := range w.programmed {
			changes = append(changes, dataplane.Change{Old: old})
		}
		w.applyChanges(changes)
		check(t, 1, many, 1, 2)
	})

	t.Run("pods reach themselves, and others keep their address", func(t *testing.T) {
		w.createOrUpdate(build(dataplane.ExternalIP, "plain", 101, many, func(family dataplane.Family) dataplane.ServiceSpec {
			return w.specOf(w.endpoints(family, 0, 1))
		})...)
		forEachClient(t, []*nettest.Host{w.client, w.pods[0], outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, answer := range expectSampledEndpoints(t, from, p, vip(family, 101+many/2, 80), w.endpoints(family, 0, 1)) {
				masqueraded := answer.Source.Addr() != addrOf(from, family)
				if want := answer.Host == from.Name || from == outside; masqueraded != want {
					t.Errorf("%s from %s: %s sees source %s", p, from.Name, answer.Host, answer.Source.Addr())
				}
			}
		})
	})

	ranged := func(family dataplane.Family) dataplane.ServiceSpec {
		treatment := w.specOf(w.endpoints(family, 0, 1, 2))
		treatment.Masquerade, treatment.ExternalTrafficPolicyLocal = dataplane.MasqueradeFromNode, true
		treatment.LocalEndpoints = localEndpoints(w.endpoints(family, 1))
		treatment.SourceRanges = []netip.Prefix{netip.MustParsePrefix("192.0.2.2/32"), netip.MustParsePrefix("10.0.0.0/8")}
		if family == dataplane.IPv6 {
			treatment.SourceRanges = []netip.Prefix{netip.MustParsePrefix("2001:db8::2/128"), netip.MustParsePrefix("fd00::/8")}
		}
		return treatment
	}
	t.Run("source ranges and local endpoints", func(t *testing.T) {
		w.createOrUpdate(build(dataplane.LoadBalancer, "ranged", 151, many, ranged)...)
		for _, again := range []bool{false, true} {
			if again {
				w.warmRestart()
			}
			forEachClient(t, []*nettest.Host{w.client, node, outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
				addr := vip(family, 151+many/2, 80)
				switch from {
				case node:
					expectDropped(t, from, p, addr)
				case outside:
					expectHost(t, from, p, addr, w.pods[1])
					expectSource(t, from, p, addr, addrOf(from, family))
				default:
					expectSampledEndpoints(t, from, p, addr, w.endpoints(family, 0, 1, 2))
				}
			})
		}
	})
	t.Run("from the frontends' own addresses", func(t *testing.T) {
		w.node.PrimaryAddrs = []netip.Addr{w.net.Outside.IPv4, w.net.Outside.IPv6} // in the ranges
		w.warmRestart()
		for _, family := range families() {
			if err := node.AddAddr(vip(family, 151+many/2, 0).Addr()); err != nil {
				t.Fatal(err)
			}
		}
		forEachClient(t, []*nettest.Host{node}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectSampledEndpoints(t, from, p, vip(family, 151+many/2, 80), w.endpoints(family, 0, 1, 2))
		})
	})
	w.replace()
}
