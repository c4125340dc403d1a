package cluster_test

import (
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/kube"
)

// TestObjects checks that the tracker builds the expected Services from the objects.
func TestObjects(t *testing.T) {
	s := cluster.NewService(70_000, 10)
	addr := cluster.WatchedAddr(5)
	for name, tc := range map[string]struct {
		service *cluster.Service
		want    []netip.Addr
	}{
		"new":                   {s, s.Endpoints},
		"one added":             {s.WithEndpoint(addr), append(slices.Clone(s.Endpoints), addr)},
		"one replaced":          {s.WithReplacedEndpoint(addr), append(slices.Clone(s.Endpoints[:9]), addr)},
		"one removed":           {s.WithoutEndpoint(s.Endpoints[0]), s.Endpoints[1:]},
		"one added and removed": {s.WithEndpoint(addr).WithoutEndpoint(addr), s.Endpoints},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := kube.NewTracker(kube.Options{NodeName: cluster.NodeName})
			d := kube.Delta{Node: cluster.Node(netip.MustParseAddr("192.0.2.1"))}
			d.Services, d.EndpointSlices = append(d.Services, tc.service.Object()), append(d.EndpointSlices, tc.service.Slice())
			d.ServiceCIDRs = append(d.ServiceCIDRs, cluster.ServiceCIDR())
			result := tracker.Apply(d)
			if len(result.Problems) > 0 || len(result.Changes) != 1 || result.Node == nil || !slices.Equal(result.Node.ServiceCIDRs, []netip.Prefix{testbed.ServiceCIDR}) {
				t.Fatalf("got %+v", result)
			}
			for _, got := range result.Changes {
				if got.Frontends[0].Addr != s.Addr() || !testbed.ServiceCIDR.Contains(s.Addr().Addr()) {
					t.Errorf("frontend %v, want %s, in %s", got.Frontends, s.Addr(), testbed.ServiceCIDR)
				}
				var addrs []netip.Addr
				local := 0
				for _, e := range got.Endpoints {
					addrs = append(addrs, e.Addr.Addr())
					if e.Local {
						local++
					}
				}
				slices.SortFunc(addrs, netip.Addr.Compare)
				if !slices.Equal(addrs, tc.want) || local < 1 || local > 2 {
					t.Errorf("endpoints %v, %d of them on this node, want %v and one in ten", addrs, local, tc.want)
				}
			}
		})
	}
}

// TestAddresses checks that all endpoints have different addresses in the networks that the
// testbed expects.
func TestAddresses(t *testing.T) {
	const services, endpoints = 2000, 10
	seen := map[netip.Addr]bool{}
	for i := range services {
		for _, addr := range cluster.NewService(i, endpoints).Endpoints {
			if seen[addr] || !testbed.BackgroundCIDR.Contains(addr) || testbed.WatchedCIDR.Contains(addr) {
				t.Fatalf("Service %d has an unexpected or duplicate endpoint address %s", i, addr)
			}
			seen[addr] = true
		}
	}
	if last := cluster.NewService(800_000-1, endpoints).Endpoints[endpoints-1]; !testbed.BackgroundCIDR.Contains(last) {
		t.Errorf("the last endpoint address is %s, want an address in %s", last, testbed.BackgroundCIDR)
	}
	if first := cluster.NewService(0, endpoints).Addr().Addr(); first == testbed.ServiceCIDR.Addr().Next() || !testbed.ServiceCIDR.Contains(first) {
		t.Errorf("the first Service has the address %s, want an address in %s other than that of default/kubernetes", first, testbed.ServiceCIDR)
	}
	if first, later := cluster.WatchedAddr(0), cluster.WatchedAddr(4_000_000); !testbed.WatchedCIDR.Contains(first) || !testbed.WatchedCIDR.Contains(later) {
		t.Errorf("watched endpoint addresses are %s and %s, want addresses in %s", first, later, testbed.WatchedCIDR)
	}
}
