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
	w := newTopology(t, s, 1)
	node, outside := w.net.Node, w.net.Outside
	w.node.PrimaryAddrs, w.node.NodePortAddrs = node.Addrs(), node.Addrs()
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
			treatment := w.specOf(w.endpoints(family, pods...))
			treatment.SourceRanges = ofFamily(ranges, family)
			return w.serviceOfKind(dataplane.LoadBalancer, "ranged", p, vip(family, 1, 80), treatment)
		})
	}
	pod := w.pods[0]
	check := func(t *testing.T, allowed map[*nettest.Host]bool) {
		t.Helper()
		forEachClient(t, slices.Collect(maps.Keys(allowed)), func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			if allowed[from] {
				expectHost(t, from, p, vip(family, 1, 80), pod)
			} else {
				expectDropped(t, from, p, vip(family, 1, 80))
			}
			// Others are none of these ranges' business, nor these of theirs.
			expectHost(t, from, p, vip(family, 2, 80), pod)
			expectHost(t, from, p, vip(family, 1, 81), pod)
		})
	}
	w.replace()
	for n, port := range map[byte]uint16{2: 80, 1: 81} {
		w.createOrUpdate(buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
			return w.serviceOfKind(dataplane.ExternalIP, "open-"+vip(family, n, port).String(), p, vip(family, n, port), w.specOf(w.endpoints(family, 0)))
		})...)
	}
	w.createOrUpdate(buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
		treatment := w.specOf(w.endpoints(family, 0))
		treatment.SourceRanges = ofFamily(prefixes("203.0.113.0/24", "2001:db8:113::/48"), family)
		return w.serviceOfKind(dataplane.LoadBalancer, "for-others", p, vip(family, 3, 80), treatment)
	})...)
	// The tests follow each other.
	for _, tt := range []struct {
		name               string
		ranges             []netip.Prefix
		pod, node, outside bool
	}{
		{"no ranges", nil, true, true, true},
		{"one address", prefixes("192.0.2.2/32", "2001:db8::2/128"), false, false, true},
		{"a network", prefixes("192.0.2.0/24", "2001:db8::/64"), false, true, true},
		{"an odd length", prefixes("192.0.2.2/31", "2001:db8::2/127"), false, false, true},
		{"networks that overlap", prefixes("192.0.0.0/16", "192.0.2.0/24", "192.0.2.1/32", "2001:db8::/32", "2001:db8::/64", "2001:db8::1/128"), false, true, true},
		{"a pod's network", prefixes("10.0.0.0/8", "fd00::/8"), true, false, false},
		{"another network", prefixes("203.0.113.0/24", "2001:db8:113::/48"), false, false, false},
		{"several networks", prefixes("203.0.113.0/24", "192.0.2.2/32", "10.244.0.0/16", "2001:db8:113::/48", "2001:db8::2/128", "fd00:10:244::/64"), true, false, true},
		{"everything", prefixes("0.0.0.0/0", "::/0"), true, true, true},
		{"everything and more", prefixes("0.0.0.0/0", "192.0.2.2/32", "::/0", "2001:db8::2/128"), true, true, true},
		{"a network again", prefixes("192.0.2.0/24", "2001:db8::/64"), false, true, true},
	} {
		w.createOrUpdate(build(tt.ranges, 0)...)
		t.Run(tt.name, func(t *testing.T) {
			check(t, map[*nettest.Host]bool{w.client: tt.pod, node: tt.node, outside: tt.outside})
		})
	}
	w.warmRestart()
	t.Run("after a restart", func(t *testing.T) {
		check(t, map[*nettest.Host]bool{w.client: false, node: true, outside: true})
	})
	t.Run("without endpoints", func(t *testing.T) {
		w.createOrUpdate(build(prefixes("192.0.2.2/32", "2001:db8::2/128"))...)
		forEachClient(t, []*nettest.Host{w.client, node}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			expectDropped(t, from, p, vip(family, 1, 80))
			expectDropped(t, outside, p, vip(family, 3, 80))
			expectRefused(t, outside, p, vip(family, 1, 80))
		})
	})
	t.Run("with local endpoints, and on a node port", func(t *testing.T) {
		build := func(kind dataplane.Kind, addr func(dataplane.Family) netip.AddrPort) []*dataplane.Service {
			return buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				treatment := w.specOf(w.endpoints(family, 0))
				treatment.SourceRanges = ofFamily(prefixes("192.0.2.2/32", "2001:db8::2/128"), family)
				treatment.ExternalTrafficPolicyLocal, treatment.LocalEndpoints = true, treatment.Endpoints
				treatment.Masquerade = dataplane.MasqueradeFromNode
				return w.serviceOfKind(kind, "local", p, addr(family), treatment)
			})
		}
		balancer := func(family dataplane.Family) netip.AddrPort { return vip(family, 4, 80) }
		nodePort := func(family dataplane.Family) netip.AddrPort { return nodePortFrontend(family, 30080) }
		w.createOrUpdate(build(dataplane.LoadBalancer, balancer)...)
		w.createOrUpdate(build(dataplane.NodePort, nodePort)...)
		forEachClient(t, []*nettest.Host{w.client, node, outside}, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for _, addr := range []netip.AddrPort{balancer(family), addrPortOf(node, family, 30080)} {
				if from == outside {
					expectSource(t, from, p, addr, addrOf(from, family))
				} else {
					expectDropped(t, from, p, addr)
				}
			}
		})
	})
	t.Run("from the frontend's own address", func(t *testing.T) {
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
			w.createOrUpdate(build(tt.ranges, 0)...)
			check(t, map[*nettest.Host]bool{node: tt.allowed})
		}
		w.warmRestart()
		check(t, map[*nettest.Host]bool{node: true})
		// Where node ports are served has nothing to do with it.
		w.node.NodePortAddrs = nil
		w.warmRestart()
		check(t, map[*nettest.Host]bool{node: true})
		w.node.PrimaryAddrs, w.node.NodePortAddrs = nil, node.Addrs()
		w.warmRestart()
		check(t, map[*nettest.Host]bool{node: false})
	})
}
