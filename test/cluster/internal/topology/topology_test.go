package topology_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/test/cluster/internal/topology"
)

func TestNodes(t *testing.T) {
	t.Parallel()
	c := &topology.Cluster{Nodes: topology.MaxNodes, Zones: 3}
	var got []string
	for _, number := range []int{1, 4, 200} {
		n := c.Node(number)
		got = append(got, strings.Join([]string{n.Name, n.Zone, topology.Join(n.Addresses()), topology.Join(n.PodCIDRs())}, " "))
	}
	want := []string{
		"node1 a 172.30.0.11,fd00:172:30::b 10.244.1.0/24,fd00:10:244:1::/64",
		"node4 a 172.30.0.14,fd00:172:30::e 10.244.4.0/24,fd00:10:244:4::/64",
		"node200 b 172.30.0.210,fd00:172:30::d2 10.244.200.0/24,fd00:10:244:c8::/64",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("nodes (-want +got):\n%s", diff)
	}
}

// TestNetworksDisjoint checks that no two networks overlap, and that the networks of the pods
// are in the network of all pods.
func TestNetworksDisjoint(t *testing.T) {
	t.Parallel()
	c := &topology.Cluster{Nodes: topology.MaxNodes, Zones: 1}
	all := topology.PodCIDRs()
	networks := append(topology.LoadBalancerCIDRs(), topology.ServiceCIDRs()...)
	for _, p := range topology.Host() {
		networks = append(networks, p.Masked())
	}
	for _, n := range c.AllNodes() {
		for i, p := range n.PodCIDRs() {
			if !all[i].Contains(p.Addr()) {
				t.Errorf("%s: network of pods %s, want in %s", n.Name, p, all[i])
			}
			networks = append(networks, p)
		}
	}
	for i, a := range networks {
		for _, b := range networks[:i] {
			if a.Overlaps(b) {
				t.Errorf("%s overlaps %s", a, b)
			}
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		change func(*topology.Cluster)
		want   string
	}{
		{func(*topology.Cluster) {}, ""},
		{func(c *topology.Cluster) { c.Nodes = 0 }, "nodes: 0: want 1 to 200"},
		{func(c *topology.Cluster) { c.Zones = 0 }, "zones: 0"},
		{func(c *topology.Cluster) { c.Proxy = "iptables" }, `proxy: "iptables"`},
		{func(c *topology.Cluster) { c.Mode = "nftables" }, `mode of fairlead: "nftables": want one of ["nft" "ipvs"]`},
		{func(c *topology.Cluster) { c.Proxy, c.Mode = topology.KubeProxy, "iptables" }, ""},
	} {
		c := &topology.Cluster{Nodes: 3, Zones: 3, Proxy: topology.Fairlead, Mode: topology.DefaultMode(topology.Fairlead)}
		tc.change(c)
		err := c.Validate()
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("error %v, want %q", err, tc.want)
		}
	}
}
