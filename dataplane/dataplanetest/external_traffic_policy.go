package dataplanetest

import (
	"fmt"
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

func (s suite) testExternalTrafficPolicyLocal(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 3)
	node, outside := w.net.Node, w.net.Outside
	w.node.NodePortAddrs = node.Addrs()
	frontends := func(family dataplane.Family) map[dataplane.Kind]netip.AddrPort {
		return map[dataplane.Kind]netip.AddrPort{
			dataplane.NodePort: nodePortFrontend(family, 30080), dataplane.ExternalIP: vip(family, 1, 80), dataplane.LoadBalancer: vip(family, 2, 80),
		}
	}
	build := func(policy bool, verdict dataplane.Verdict, all, local []int) []*dataplane.Service {
		var services []*dataplane.Service
		for kind := range frontends(dataplane.IPv4) {
			services = append(services, buildServices(func(family dataplane.Family, p dataplane.Protocol) *dataplane.Service {
				treatment := w.specOf(w.endpoints(family, all...))
				treatment.Masquerade, treatment.NoEndpointsVerdict = dataplane.MasqueradeAlways, verdict
				if policy {
					treatment.Masquerade, treatment.ExternalTrafficPolicyLocal = dataplane.MasqueradeFromNode, true
					treatment.LocalEndpoints = localEndpoints(w.endpoints(family, local...))
				}
				return w.serviceOfKind(kind, "web", p, frontends(family)[kind], treatment)
			})...)
		}
		return services
	}
	// check checks where connections of clients end, and whose address the
	// endpoint sees.
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
				for _, answer := range expectSampledEndpoints(t, from, p, addr, w.endpoints(family, pods...)) {
					want := source(from)
					if answer.Host == from.Name {
						want = node // A pod that reaches itself.
					}
					if got := answer.Source.Addr(); want != node && got != addrOf(want, family) || want == node && got == addrOf(from, family) && from != node {
						t.Errorf("%s from %s to %s: the endpoint sees %s, want the address of %s", p, from.Name, addr, got, want.Name)
					}
				}
			}
		})
	}
	itself := func(from *nettest.Host) *nettest.Host { return from }
	masqueraded := func(*nettest.Host) *nettest.Host { return node }
	pods := []*nettest.Host{w.client, w.pods[0], w.pods[1]}

	w.replace()
	// The tests follow each other.
	for _, tt := range []struct {
		name       string
		policy     bool
		verdict    dataplane.Verdict
		all, local []int
	}{
		{"without local endpoints", true, dataplane.Drop, []int{0, 1}, nil},
		{"with one", true, dataplane.Drop, []int{0, 1, 2}, []int{1}},
		{"with two", true, dataplane.Drop, []int{0, 1, 2}, []int{1, 2}},
		{"with another two", true, dataplane.Drop, []int{0, 1}, []int{0, 1}},
		{"with none left", true, dataplane.Drop, []int{0, 2}, nil},
		{"to be rejected", true, dataplane.Reject, []int{0, 2}, nil},
		{"without endpoints anywhere", true, dataplane.Reject, nil, nil},
		{"with local endpoints only", true, dataplane.Drop, nil, []int{2}},
		{"without the policy", false, dataplane.Drop, []int{0, 1, 2}, nil},
		{"with it again", true, dataplane.Drop, []int{0, 1, 2}, []int{0}},
	} {
		w.createOrUpdate(build(tt.policy, tt.verdict, tt.all, tt.local)...)
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

	// The node's own connections from another address than it is masqueraded
	// with.
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
		local bool // whether pods count as this node's
	}{
		{"pods told by nothing", dataplane.Node{}, false},
		{"pods told by their address", dataplane.Node{PodCIDRs: w.net.PodCIDRs}, true},
		{"pods told by the node's networks", dataplane.Node{LocalPodCIDRs: w.net.PodCIDRs}, true},
		{"pods told by the beginning of their interface's name", dataplane.Node{PodInterfacePrefix: "veth"}, true},
		{"pods told by other interfaces", dataplane.Node{PodInterface: "cbr0"}, false},
		{"pods told by other interfaces or the node's networks", dataplane.Node{PodInterface: "cbr0", LocalPodCIDRs: w.net.PodCIDRs}, true},
	} {
		w.node = tt.node
		w.node.NodePortAddrs = node.Addrs()
		w.warmRestart()
		t.Run(fmt.Sprintf("with %s", tt.name), func(t *testing.T) {
			want := []int{0}
			if tt.local {
				want = []int{0, 1, 2}
			}
			check(t, []*nettest.Host{w.client}, itself, dataplane.Drop, want...)
			check(t, []*nettest.Host{outside}, itself, dataplane.Drop, 0)
			check(t, []*nettest.Host{node}, masqueraded, dataplane.Drop, 0, 1, 2)
		})
	}
}
