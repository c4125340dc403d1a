package dataplanetest

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

func (s suite) testSourceRanges(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	node, outside := topo.net.Node, topo.net.Outside
	topo.node.PrimaryAddrs, topo.node.NodePortAddrs = node.Addrs(), node.Addrs()
	prefixes := func(texts ...string) []netip.Prefix {
		var all []netip.Prefix
		for _, text := range texts {
			all = append(all, netip.MustParsePrefix(text))
		}
		return all
	}
	ofFamily := func(all []netip.Prefix, family dataplane.Family) []netip.Prefix {
		return slices.DeleteFunc(slices.Clone(all), func(p netip.Prefix) bool { return dataplane.FamilyOf(p.Addr()) != family })
	}
	build := func(ranges []netip.Prefix, pods ...int) []*dataplane.Service {
		return buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			spec := topo.specOf(topo.endpoints(family, pods...))
			spec.SourceRanges = ofFamily(ranges, family)
			return topo.serviceOfKind(dataplane.LoadBalancer, "ranged", p, vip(family, 1, 80), spec)
		})
	}
	pod := topo.pods[0]
	check := func(t *testing.T, allowed map[*nettest.Host]bool) {
		t.Helper()
		forEachClient(t, slices.Collect(maps.Keys(allowed)), func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			if allowed[from] {
				expectHost(t, from, p, vip(family, 1, 80), pod)
			} else {
				expectDropped(t, from, p, vip(family, 1, 80))
			}
			// The ranges do not affect other Services.
			expectHost(t, from, p, vip(family, 2, 80), pod)
			expectHost(t, from, p, vip(family, 1, 81), pod)
		})
	}
	topo.replace()
	for n, port := range map[byte]uint16{2: 80, 1: 81} {
		topo.createOrUpdate(buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			return topo.serviceOfKind(dataplane.ExternalIP, "open-"+vip(family, n, port).String(), p, vip(family, n, port), topo.specOf(topo.endpoints(family, 0)))
		})...)
	}
	topo.createOrUpdate(buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
		spec := topo.specOf(topo.endpoints(family, 0))
		spec.SourceRanges = ofFamily(prefixes("203.0.113.0/24", "2001:db8:113::/48"), family)
		return topo.serviceOfKind(dataplane.LoadBalancer, "for-others", p, vip(family, 3, 80), spec)
	})...)
	// Each subtest starts from the state of the previous one.
	for _, tt := range []struct {
		name               string
		ranges             []netip.Prefix
		pod, node, outside bool
	}{
		{"no source ranges", nil, true, true, true},
		{"single address", prefixes("192.0.2.2/32", "2001:db8::2/128"), false, false, true},
		{"subnet", prefixes("192.0.2.0/24", "2001:db8::/64"), false, true, true},
		{"odd prefix length", prefixes("192.0.2.2/31", "2001:db8::2/127"), false, false, true},
		{"overlapping ranges", prefixes("192.0.0.0/16", "192.0.2.0/24", "192.0.2.1/32", "2001:db8::/32", "2001:db8::/64", "2001:db8::1/128"), false, true, true},
		{"pod network", prefixes("10.0.0.0/8", "fd00::/8"), true, false, false},
		{"other network", prefixes("203.0.113.0/24", "2001:db8:113::/48"), false, false, false},
		{"several ranges", prefixes("203.0.113.0/24", "192.0.2.2/32", "10.244.0.0/16", "2001:db8:113::/48", "2001:db8::2/128", "fd00:10:244::/64"), true, false, true},
		{"all addresses", prefixes("0.0.0.0/0", "::/0"), true, true, true},
		{"all addresses and one more", prefixes("0.0.0.0/0", "192.0.2.2/32", "::/0", "2001:db8::2/128"), true, true, true},
		{"subnet again", prefixes("192.0.2.0/24", "2001:db8::/64"), false, true, true},
	} {
		topo.createOrUpdate(build(tt.ranges, 0)...)
		t.Run(tt.name, func(t *testing.T) {
			check(t, map[*nettest.Host]bool{topo.client: tt.pod, node: tt.node, outside: tt.outside})
		})
	}
	topo.warmRestart()
	t.Run("warm restart", func(t *testing.T) {
		check(t, map[*nettest.Host]bool{topo.client: false, node: true, outside: true})
	})
	t.Run("no endpoints", func(t *testing.T) {
		topo.createOrUpdate(build(prefixes("192.0.2.2/32", "2001:db8::2/128"))...)
		forEachClient(t, []*nettest.Host{topo.client, node}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectDropped(t, from, p, vip(family, 1, 80))
			expectDropped(t, outside, p, vip(family, 3, 80))
			expectRefused(t, outside, p, vip(family, 1, 80))
		})
	})
	t.Run("local endpoints and node ports", func(t *testing.T) {
		build := func(kind dataplane.Kind, addr func(dataplane.Family) netip.AddrPort) []*dataplane.Service {
			return buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				spec := topo.specOf(topo.endpoints(family, 0))
				spec.SourceRanges = ofFamily(prefixes("192.0.2.2/32", "2001:db8::2/128"), family)
				spec.ExternalTrafficPolicyLocal, spec.LocalEndpoints = true, spec.Endpoints
				spec.Masquerade = dataplane.MasqueradeFromNode
				return topo.serviceOfKind(kind, "local", p, addr(family), spec)
			})
		}
		balancer := func(family dataplane.Family) netip.AddrPort { return vip(family, 4, 80) }
		nodePort := func(family dataplane.Family) netip.AddrPort { return nodePortFrontend(family, 30080) }
		topo.createOrUpdate(build(dataplane.LoadBalancer, balancer)...)
		topo.createOrUpdate(build(dataplane.NodePort, nodePort)...)
		forEachClient(t, []*nettest.Host{topo.client, node, outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, addr := range []netip.AddrPort{balancer(family), addrPortOf(node, family, 30080)} {
				if from == outside {
					expectSource(t, from, p, addr, addrOf(from, family))
				} else {
					expectDropped(t, from, p, addr)
				}
			}
		})
	})
	t.Run("from the frontend address", func(t *testing.T) {
		for _, family := range families() {
			if err := node.AddAddr(vip(family, 1, 0).Addr()); err != nil {
				t.Fatal(err)
			}
		}
		for _, tt := range []struct {
			ranges  []netip.Prefix
			allowed bool
		}{
			{prefixes("192.0.2.1/32", "2001:db8::1/128"), true},
			{prefixes("192.0.2.2/32", "2001:db8::2/128"), false},
			{prefixes("10.96.0.1/32", "fd00:10:96::1/128"), true},
			{prefixes("10.96.0.1/32", "fd00:10:96::1/128", "192.0.2.1/32", "2001:db8::1/128"), true},
			{prefixes("192.0.2.0/24", "2001:db8::/64"), true},
		} {
			topo.createOrUpdate(build(tt.ranges, 0)...)
			check(t, map[*nettest.Host]bool{node: tt.allowed})
		}
		topo.warmRestart()
		check(t, map[*nettest.Host]bool{node: true})
		// The node port addresses must not matter.
		topo.node.NodePortAddrs = nil
		topo.warmRestart()
		check(t, map[*nettest.Host]bool{node: true})
		topo.node.PrimaryAddrs, topo.node.NodePortAddrs = nil, node.Addrs()
		topo.warmRestart()
		check(t, map[*nettest.Host]bool{node: false})
	})
}
