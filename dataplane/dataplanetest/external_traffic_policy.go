package dataplanetest

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

func (s suite) testExternalTrafficPolicyLocal(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 3)
	node, outside := topo.net.Node, topo.net.Outside
	topo.node.NodePortAddrs = node.Addrs()
	frontends := func(family dataplane.Family) map[dataplane.Kind]netip.AddrPort {
		return map[dataplane.Kind]netip.AddrPort{
			dataplane.NodePort: nodePortFrontend(family, 30080), dataplane.ExternalIP: vip(family, 1, 80), dataplane.LoadBalancer: vip(family, 2, 80),
		}
	}
	build := func(policy bool, verdict dataplane.Verdict, all, local []int) []*dataplane.Service {
		var services []*dataplane.Service
		for kind := range frontends(dataplane.IPv4) {
			services = append(services, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				spec := topo.specOf(topo.endpoints(family, all...))
				spec.Masquerade, spec.NoEndpointsVerdict = dataplane.MasqueradeAlways, verdict
				if policy {
					spec.Masquerade, spec.ExternalTrafficPolicyLocal = dataplane.MasqueradeFromNode, true
					spec.LocalEndpoints = localEndpoints(topo.endpoints(family, local...))
				}
				return topo.serviceOfKind(kind, "web", p, frontends(family)[kind], spec)
			})...)
		}
		return services
	}
	// check checks which pods the clients reach, and whose address the endpoint sees.
	check := func(t *testing.T, clients []*nettest.Host, source func(from *nettest.Host) *nettest.Host, verdict dataplane.Verdict, pods ...int) {
		t.Helper()
		forEachClient(t, clients, func(t *testing.T, family dataplane.Family, p dataplane.Protocol, from *nettest.Host) {
			for kind, addr := range frontends(family) {
				if kind == dataplane.NodePort {
					addr = addrPortOf(node, family, addr.Port())
				}
				if len(pods) == 0 {
					expectVerdict(t, from, p, addr, verdict)
					continue
				}
				for _, answer := range expectSampledEndpoints(t, from, p, addr, topo.endpoints(family, pods...)) {
					want := source(from)
					if answer.Host == from.Name {
						want = node // hairpin
					}
					if got := answer.Source.Addr(); want != node && got != addrOf(want, family) || want == node && got == addrOf(from, family) && from != node {
						t.Errorf("%s from %s to %s: endpoint sees source %s, want the address of %s", p, from.Name, addr, got, want.Name)
					}
				}
			}
		})
	}
	itself := func(from *nettest.Host) *nettest.Host { return from }
	masqueraded := func(*nettest.Host) *nettest.Host { return node }
	pods := []*nettest.Host{topo.client, topo.pods[0], topo.pods[1]}

	topo.replace()
	// Each subtest starts from the state of the previous one.
	for _, tt := range []struct {
		name       string
		policy     bool
		verdict    dataplane.Verdict
		all, local []int
	}{
		{"no local endpoints", true, dataplane.Drop, []int{0, 1}, nil},
		{"one local endpoint", true, dataplane.Drop, []int{0, 1, 2}, []int{1}},
		{"two local endpoints", true, dataplane.Drop, []int{0, 1, 2}, []int{1, 2}},
		{"two other local endpoints", true, dataplane.Drop, []int{0, 1}, []int{0, 1}},
		{"last local endpoint removed", true, dataplane.Drop, []int{0, 2}, nil},
		{"verdict Reject", true, dataplane.Reject, []int{0, 2}, nil},
		{"no endpoints", true, dataplane.Reject, nil, nil},
		{"local endpoints only", true, dataplane.Drop, nil, []int{2}},
		{"policy Cluster", false, dataplane.Drop, []int{0, 1, 2}, nil},
		{"policy Local again", true, dataplane.Drop, []int{0, 1, 2}, []int{0}},
	} {
		topo.createOrUpdate(build(tt.policy, tt.verdict, tt.all, tt.local)...)
		t.Run(tt.name, func(t *testing.T) {
			if !tt.policy {
				check(t, append(pods, node, outside), masqueraded, tt.verdict, tt.all...)
				return
			}
			check(t, []*nettest.Host{outside}, itself, tt.verdict, tt.local...)
			check(t, pods, itself, tt.verdict, tt.all...)
			check(t, []*nettest.Host{node}, masqueraded, tt.verdict, tt.all...)
		})
	}

	// The node connects from an address other than the one it masquerades with.
	t.Run("the node's own connections are masqueraded", func(t *testing.T) {
		for _, family := range families() {
			if err := node.AddAddr(vip(family, 1, 0).Addr()); err != nil {
				t.Fatal(err)
			}
			for _, p := range protocols() {
				expectSource(t, node, p, vip(family, 1, 80), addrOf(node, family))
			}
		}
	})

	for _, tt := range []struct {
		name  string
		node  dataplane.Node
		local bool // whether pods count as local clients
	}{
		{"no local traffic detection", dataplane.Node{}, false},
		{"pod CIDRs", dataplane.Node{PodCIDRs: topo.net.PodCIDRs}, true},
		{"local pod CIDRs", dataplane.Node{LocalPodCIDRs: topo.net.PodCIDRs}, true},
		{"interface name prefix", dataplane.Node{PodInterfacePrefix: "veth"}, true},
		{"other bridge interface", dataplane.Node{PodInterface: "cbr0"}, false},
		{"other bridge interface and local pod CIDRs", dataplane.Node{PodInterface: "cbr0", LocalPodCIDRs: topo.net.PodCIDRs}, true},
	} {
		topo.node = tt.node
		topo.node.NodePortAddrs = node.Addrs()
		topo.warmRestart()
		t.Run(tt.name, func(t *testing.T) {
			want := []int{0}
			if tt.local {
				want = []int{0, 1, 2}
			}
			check(t, []*nettest.Host{topo.client}, itself, dataplane.Drop, want...)
			check(t, []*nettest.Host{outside}, itself, dataplane.Drop, 0)
			check(t, []*nettest.Host{node}, masqueraded, dataplane.Drop, 0, 1, 2)
		})
	}
}
