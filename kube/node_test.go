package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/dataplane"
)

// nodeText returns the non-empty fields of a dataplane.Node as text.
func nodeText(n *dataplane.Node) string {
	if n == nil {
		return "unchanged"
	}
	var parts []string
	add := func(name string, empty bool, value any) {
		if !empty {
			parts = append(parts, fmt.Sprintf("%s=%v", name, value))
		}
	}
	add("pods", len(n.PodCIDRs) == 0, n.PodCIDRs)
	add("interface", n.PodInterface == "", n.PodInterface)
	add("prefix", n.PodInterfacePrefix == "", n.PodInterfacePrefix)
	add("local-pods", len(n.LocalPodCIDRs) == 0, n.LocalPodCIDRs)
	add("masquerade-all", !n.MasqueradeAll, n.MasqueradeAll)
	add("node", len(n.PrimaryAddrs) == 0, n.PrimaryAddrs)
	add("node-ports", len(n.NodePortAddrs) == 0, n.NodePortAddrs)
	add("localhost", !n.LocalhostNodePorts, n.LocalhostNodePorts)
	add("ping", !n.PingServiceIPs, n.PingServiceIPs)
	add("services", len(n.ServiceCIDRs) == 0, n.ServiceCIDRs)
	return strings.Join(parts, " ")
}

// TestNode checks the dataplane.Node.
func TestNode(t *testing.T) {
	t.Parallel()
	pods := newNode("", podCIDRs("10.1.0.0/24", "fd01::/64"))
	tests := []struct {
		name  string
		opts  Options
		delta Delta
		want  string
	}{
		{name: "no objects", want: ""},
		{
			name:  "LocalPodCIDRs is set in every mode, so that pods reach Services with externalTrafficPolicy Local",
			delta: Delta{Node: pods},
			want:  "local-pods=[10.1.0.0/24 fd01::/64]",
		},
		{
			name:  "podCIDR is used without podCIDRs",
			delta: Delta{Node: newNode("", func(n *corev1.Node) { n.Spec.PodCIDR = "10.1.0.0/24" })},
			want:  "local-pods=[10.1.0.0/24]",
		},
		{
			name:  "ClusterCIDR: all networks, sorted, without nested ones",
			opts:  Options{DetectLocal: DetectLocal{ClusterCIDRs: cidrs("fd00::/48 10.128.0.0/9 10.0.0.0/8 10.0.0.7/8")}},
			delta: Delta{Node: pods},
			want:  "pods=[10.0.0.0/8 fd00::/48] local-pods=[10.1.0.0/24 fd01::/64]",
		},
		{
			name:  "NodeCIDR: the node's networks",
			opts:  Options{DetectLocal: DetectLocal{Mode: DetectByNodeCIDR, ClusterCIDRs: cidrs("10.0.0.0/8")}},
			delta: Delta{Node: pods},
			want:  "pods=[10.1.0.0/24 fd01::/64] local-pods=[10.1.0.0/24 fd01::/64]",
		},
		{
			name:  "BridgeInterface: the bridge",
			opts:  Options{DetectLocal: DetectLocal{Mode: DetectByBridgeInterface, Interface: "cni0", InterfacePrefix: "veth", ClusterCIDRs: cidrs("10.0.0.0/8")}},
			delta: Delta{Node: pods},
			want:  "interface=cni0 local-pods=[10.1.0.0/24 fd01::/64]",
		},
		{
			name:  "InterfaceNamePrefix: the prefix",
			opts:  Options{DetectLocal: DetectLocal{Mode: DetectByInterfaceNamePrefix, Interface: "cni0", InterfacePrefix: "veth", ClusterCIDRs: cidrs("10.0.0.0/8")}},
			delta: Delta{Node: pods},
			want:  "prefix=veth local-pods=[10.1.0.0/24 fd01::/64]",
		},
		{
			name: "invalid pod networks are skipped",
			opts: Options{MasqueradeAll: true}, delta: Delta{Node: newNode("", podCIDRs("x", "10.1.0.0/24"))},
			want: "local-pods=[10.1.0.0/24] masquerade-all=true",
		},
		{
			name: "ServiceCIDRs of all objects, sorted, without nested ones",
			delta: Delta{ServiceCIDRs: []*networkingv1.ServiceCIDR{
				newServiceCIDR("kubernetes", "10.96.0.0/16", "fd00::/108"), newServiceCIDR("more", "10.96.3.0/24", "10.95.0.0/24"),
			}},
			want: "services=[10.95.0.0/24 10.96.0.0/16 fd00::/108]",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := NewTracker(tt.opts).Apply(tt.delta).Node
			if got == nil {
				t.Fatal("the first Result has no Node")
			}
			if diff := cmp.Diff(tt.want, nodeText(got)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestNodePortAddrs checks the addresses that serve node ports.
func TestNodePortAddrs(t *testing.T) {
	t.Parallel()
	const local = "127.0.0.1 127.0.0.53 ::1 198.51.100.1 203.0.113.1 10.96.0.10 169.254.7.7 2001:db8:1::1 fe80::1%eth0"
	address := func(kind corev1.NodeAddressType, text string) func(*corev1.Node) {
		return func(n *corev1.Node) {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: kind, Address: text})
		}
	}
	node := newNode("198.51.100.1 2001:db8:1::1")
	tests := []struct {
		name  string
		flag  string
		bind  string
		node  *corev1.Node
		local []netip.Addr
		want  string
	}{
		{name: "unset: the node's primary addresses", node: node, local: addrs(local), want: "198.51.100.1 2001:db8:1::1"},
		{name: "primary: the same addresses", flag: "primary", node: node, local: addrs(local), want: "198.51.100.1 2001:db8:1::1"},
		{name: "primary, unknown interface addresses: the Node's addresses", node: node, want: "198.51.100.1 2001:db8:1::1"},
		{name: "primary: an address that no interface has is not served", node: newNode("198.51.100.1 2001:db8:1::9"), local: addrs(local), want: "198.51.100.1"},
		{name: "primary, interfaces without addresses", node: node, local: []netip.Addr{}, want: ""},
		{
			name: "primary: InternalIP before ExternalIP, the first of each family", want: "203.0.113.1 2001:db8:1::1",
			node: newNode("", address(corev1.NodeHostName, "10.0.0.1"), address(corev1.NodeExternalIP, "198.51.100.1"),
				address(corev1.NodeExternalIP, "2001:db8:1::1"), address(corev1.NodeInternalIP, "203.0.113.1"),
				address(corev1.NodeInternalIP, "203.0.113.2"), address(corev1.NodeExternalIP, "2001:db8:1::2")),
		},
		{name: "primary: a family with a loopback address has none", node: newNode("127.0.0.1 2001:db8:1::1"), local: addrs(local), want: "2001:db8:1::1"},
		{name: "primary: --bind-address replaces the address of its family", bind: "203.0.113.1", node: node, local: addrs(local), want: "203.0.113.1 2001:db8:1::1"},
		{name: "primary: an unspecified --bind-address replaces nothing", bind: "0.0.0.0", node: node, local: addrs(local), want: "198.51.100.1 2001:db8:1::1"},
		{name: "primary without a Node: --bind-address", bind: "203.0.113.1", want: "203.0.113.1"},
		{name: "localhost: none, because the kernel cannot serve them", flag: "localhost", node: node, local: addrs(local), want: ""},
		{
			name: "all: every address except loopback, link-local and cluster IPs", flag: "all", node: node, local: addrs(local),
			want: "198.51.100.1 203.0.113.1 2001:db8:1::1",
		},
		{name: "networks: the addresses in them, and none of the other family", flag: "203.0.113.0/24,10.0.0.0/8", node: node, local: addrs(local), want: "203.0.113.1"},
		{name: "networks that contain all addresses are like all", flag: "0.0.0.0/0", node: node, local: addrs(local), want: "198.51.100.1 203.0.113.1"},
		{name: "link-local networks select link-local addresses, loopback networks select none", flag: "127.0.0.0/24,169.254.0.0/16,fe80::/10", node: node, local: addrs(local), want: "169.254.7.7 fe80::1"},
		{name: "several values are combined and deduplicated", flag: "localhost,primary,203.0.113.0/24,198.51.100.0/24", node: newNode("198.51.100.1"), local: addrs(local), want: "198.51.100.1 203.0.113.1"},
		{name: "unknown interface addresses: only primary selects any", flag: "primary,all,localhost,0.0.0.0/0", node: node, want: "198.51.100.1 2001:db8:1::1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			opts := Options{NodePortAddresses: parsedNodePortAddresses(t, tt.flag)}
			if tt.bind != "" {
				opts.BindAddress = netip.MustParseAddr(tt.bind)
			}
			got := NewTracker(opts).Apply(Delta{
				Node: tt.node, LocalAddrs: tt.local,
				ServiceCIDRs: []*networkingv1.ServiceCIDR{newServiceCIDR("kubernetes", "10.96.0.0/16")},
			})
			if diff := cmp.Diff("["+tt.want+"]", fmt.Sprint(got.Node.NodePortAddrs)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestLoopback checks which loopback addresses node ports are requested at, and that
// Node.LocalhostNodePorts is set if there are any.
func TestLoopback(t *testing.T) {
	t.Parallel()
	const local = "127.0.0.1 127.0.0.53 ::1 198.51.100.1 2001:db8:1::1"
	for _, tt := range []struct{ flag, local, want string }{
		{"", local, ""},
		{"primary", local, ""},
		{"all", local, ""},
		{"0.0.0.0/0,::/0", local, ""},
		{"126.0.0.0/7,::/127", local, ""},
		{"localhost", local, "127.0.0.1 127.0.0.53 ::1"},
		{"localhost", "127.0.0.1 198.51.100.1", "127.0.0.1"},
		{"localhost", "198.51.100.1", ""},
		{"all,localhost", local, "127.0.0.1 127.0.0.53 ::1"},
		{"primary,127.0.0.0/8", local, "127.0.0.1 127.0.0.53"},
		{"0.0.0.0/0,127.0.0.0/8", local, "127.0.0.1 127.0.0.53"},
		{"127.0.0.1/32", local, "127.0.0.1"},
		{"127.0.0.1/8", local, "127.0.0.1 127.0.0.53"},
		{"::1/128", local, "::1"},
		{"198.51.100.0/24", local, ""},
	} {
		opts := Options{NodePortAddresses: parsedNodePortAddresses(t, tt.flag)}
		got := NewTracker(opts).Apply(Delta{LocalAddrs: addrs(tt.local)})
		if diff := cmp.Diff("["+tt.want+"]", fmt.Sprint(got.LoopbackNodePortAddrs)); diff != "" {
			t.Errorf("%q, interfaces with %s: %s", tt.flag, tt.local, diff)
		}
		if got.Node.LocalhostNodePorts != (tt.want != "") {
			t.Errorf("%q, interfaces with %s: LocalhostNodePorts %t", tt.flag, tt.local, got.Node.LocalhostNodePorts)
		}
	}
}

// TestNodeAddrs checks Node.PrimaryAddrs.
func TestNodeAddrs(t *testing.T) {
	t.Parallel()
	node := newNode("2001:db8:1::1 198.51.100.1 198.51.100.2")
	for _, tt := range []struct {
		name  string
		bind  string
		node  *corev1.Node
		local []netip.Addr
		want  string
	}{
		{name: "the primary addresses, sorted, regardless of node port addresses", node: node, want: "198.51.100.1 2001:db8:1::1"},
		{name: "primary addresses that interfaces have", node: node, local: addrs("127.0.0.1 198.51.100.1 198.51.100.2"), want: "198.51.100.1"},
		{name: "interfaces without addresses", node: node, local: []netip.Addr{}, want: ""},
		{name: "--bind-address replaces the address of its family", bind: "203.0.113.1", node: node, want: "203.0.113.1 2001:db8:1::1"},
		{name: "loopback is not an address of a node", node: newNode("127.0.0.1"), local: addrs("127.0.0.1"), want: ""},
		{name: "no Node", local: addrs("198.51.100.1"), want: ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			opts := Options{NodePortAddresses: NodePortAddresses{Localhost: true}}
			if tt.bind != "" {
				opts.BindAddress = netip.MustParseAddr(tt.bind)
			}
			got := NewTracker(opts).Apply(Delta{Node: tt.node, LocalAddrs: tt.local})
			if diff := cmp.Diff("["+tt.want+"]", fmt.Sprint(got.Node.PrimaryAddrs)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func parsedNodePortAddresses(t *testing.T, flag string) NodePortAddresses {
	t.Helper()
	var values []string
	if flag != "" {
		values = strings.Split(flag, ",")
	}
	parsed, err := ParseNodePortAddresses(values)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// TestNodePortCIDRsNotModified checks that the given networks, which may be part of a longer list
// of the caller, are not modified.
func TestNodePortCIDRsNotModified(t *testing.T) {
	t.Parallel()
	list := cidrs("203.0.113.0/24 192.0.2.0/24 10.0.0.0/8")
	opts := Options{NodePortAddresses: NodePortAddresses{All: true, CIDRs: list[:1]}}
	NewTracker(opts).Apply(Delta{LocalAddrs: addrs("198.51.100.1")})
	if want := cidrs("203.0.113.0/24 192.0.2.0/24 10.0.0.0/8"); !slices.Equal(list, want) {
		t.Errorf("the caller's list became %v", list)
	}
}

// TestParseNodePortAddresses checks the values of --nodeport-addresses.
func TestParseNodePortAddresses(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		values []string
		want   NodePortAddresses
		err    string
	}{
		{name: "nothing"},
		{name: "an empty value", values: []string{""}},
		{
			name: "keywords and networks, with spaces and host bits", values: []string{"primary", " localhost", "all", "192.0.2.7/24 ", "2001:db8::/32", "010.0.0.0/8"},
			want: NodePortAddresses{Primary: true, Localhost: true, All: true, CIDRs: cidrs("192.0.2.0/24 2001:db8::/32 10.0.0.0/8")},
		},
		{name: "a keyword twice", values: []string{"all", "all"}, err: `"all" is given twice: remove one of them`},
		{name: "an address", values: []string{"192.0.2.7"}, err: `"192.0.2.7" is not a network: use networks such as 192.0.2.0/24 or 2001:db8::/32, or primary, localhost or all`},
		{name: "an unknown keyword", values: []string{"primary", "Everything"}, err: `"Everything" is not a network: use networks such as 192.0.2.0/24 or 2001:db8::/32, or primary, localhost or all`},
		{name: "an empty value among others", values: []string{"primary", ""}, err: `"" is not a network: use networks such as 192.0.2.0/24 or 2001:db8::/32, or primary, localhost or all`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := ParseNodePortAddresses(tt.values)
			if diff := cmp.Diff(fmt.Sprintf("%+v", tt.want), fmt.Sprintf("%+v", got)); diff != "" {
				t.Error(diff)
			}
			if message := fmt.Sprint(err); tt.err != "" && message != tt.err || tt.err == "" && err != nil {
				t.Errorf("error %q, want %q", message, tt.err)
			}
		})
	}
}

// TestNodeUpdates checks that a change of the node is in the Result of its Delta, and that an
// equivalent update is not a change.
func TestNodeUpdates(t *testing.T) {
	t.Parallel()
	opts := Options{NodeName: "here", DetectLocal: DetectLocal{Mode: DetectByNodeCIDR}}
	tracker := NewTracker(opts)
	apply := func(d Delta) func() Result { return func() Result { return tracker.Apply(d) } }
	configure := func(change func(*Options)) func() Result {
		return func() Result {
			change(&opts)
			return tracker.Configure(opts)
		}
	}
	const unchanged = "unchanged"
	const localhost = "pods=[10.0.0.0/8] local-pods=[10.2.0.0/24] masquerade-all=true node=[198.51.100.2] node-ports=[198.51.100.2] " +
		"localhost=true ping=true services=[10.96.1.0/24]"
	for _, step := range []struct {
		name string
		do   func() Result
		want string
	}{
		{"the first Result has a Node even without objects", apply(Delta{}), ""},
		{"nothing new", apply(Delta{}), unchanged},
		{
			"the Node object", apply(Delta{Node: newNode("198.51.100.1", podCIDRs("10.1.0.0/24"))}),
			"pods=[10.1.0.0/24] local-pods=[10.1.0.0/24] node=[198.51.100.1] node-ports=[198.51.100.1]",
		},
		{"a heartbeat", apply(Delta{Node: newNode("198.51.100.1", podCIDRs("10.1.0.0/24"), func(n *corev1.Node) {
			n.ResourceVersion = "2"
			n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, LastHeartbeatTime: metav1.Now()}}
		})}), unchanged},
		{"a ServiceCIDR is added", apply(Delta{ServiceCIDRs: []*networkingv1.ServiceCIDR{newServiceCIDR("a", "10.96.0.0/16")}}), "pods=[10.1.0.0/24] local-pods=[10.1.0.0/24] node=[198.51.100.1] node-ports=[198.51.100.1] services=[10.96.0.0/16]"},
		{"a nested ServiceCIDR is added", apply(Delta{ServiceCIDRs: []*networkingv1.ServiceCIDR{newServiceCIDR("b", "10.96.1.0/24")}}), unchanged},
		{"the outer ServiceCIDR is deleted", apply(Delta{DeletedServiceCIDRs: []string{"a", "never-there"}}), "pods=[10.1.0.0/24] local-pods=[10.1.0.0/24] node=[198.51.100.1] node-ports=[198.51.100.1] services=[10.96.1.0/24]"},
		{"other pod networks", apply(Delta{Node: newNode("198.51.100.1", podCIDRs("10.2.0.0/24"))}), "pods=[10.2.0.0/24] local-pods=[10.2.0.0/24] node=[198.51.100.1] node-ports=[198.51.100.1] services=[10.96.1.0/24]"},
		{"no interface has the address", apply(Delta{LocalAddrs: addrs("127.0.0.1")}), "pods=[10.2.0.0/24] local-pods=[10.2.0.0/24] services=[10.96.1.0/24]"},
		{"the node's address changes", apply(Delta{LocalAddrs: addrs("127.0.0.1 198.51.100.2"), Node: newNode("198.51.100.2", podCIDRs("10.2.0.0/24"))}), "pods=[10.2.0.0/24] local-pods=[10.2.0.0/24] node=[198.51.100.2] node-ports=[198.51.100.2] services=[10.96.1.0/24]"},
		{"the same addresses in another order", apply(Delta{LocalAddrs: addrs("198.51.100.2 127.0.0.1")}), unchanged},
		{"the Node object is deleted: no change", apply(Delta{NodeDeleted: true}), unchanged},
		{"node ports on all addresses", configure(func(o *Options) { o.NodePortAddresses.All = true }), unchanged},
		{"an additional address", apply(Delta{LocalAddrs: addrs("198.51.100.2 203.0.113.1")}), "pods=[10.2.0.0/24] local-pods=[10.2.0.0/24] node=[198.51.100.2] node-ports=[198.51.100.2 203.0.113.1] services=[10.96.1.0/24]"},
		{"other options", configure(func(o *Options) {
			o.MasqueradeAll = true
			o.NodePortAddresses = NodePortAddresses{}
			o.DetectLocal = DetectLocal{ClusterCIDRs: cidrs("10.0.0.0/8")}
		}), "pods=[10.0.0.0/8] local-pods=[10.2.0.0/24] masquerade-all=true node=[198.51.100.2] node-ports=[198.51.100.2] services=[10.96.1.0/24]"},
		{"the same options", configure(func(*Options) {}), unchanged},
		{"pings", configure(func(o *Options) { o.PingServiceIPs = true }), "pods=[10.0.0.0/8] local-pods=[10.2.0.0/24] masquerade-all=true node=[198.51.100.2] node-ports=[198.51.100.2] ping=true services=[10.96.1.0/24]"},
		{"localhost without a loopback address", configure(func(o *Options) { o.NodePortAddresses = NodePortAddresses{Primary: true, Localhost: true} }), unchanged},
		{"a loopback address is added", apply(Delta{LocalAddrs: addrs("127.0.0.1 198.51.100.2")}), localhost},
		{"a loopback address of the other family", apply(Delta{LocalAddrs: addrs("127.0.0.1 ::1 198.51.100.2")}), localhost},
		{"the same addresses", apply(Delta{LocalAddrs: addrs("127.0.0.1 ::1 198.51.100.2")}), unchanged},
	} {
		got := step.do()
		if diff := cmp.Diff(step.want, nodeText(got.Node)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
		if len(got.Changes)+len(got.Problems)+len(got.HealthChecks) != 0 {
			t.Errorf("%s: the Result changes Services: %+v", step.name, got)
		}
	}
}

// TestConfigureKeepsNodeName checks that Configure does not change the node name.
func TestConfigureKeepsNodeName(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{NodeName: "here"})
	tracker.Configure(Options{NodeName: "there"})
	got := tracker.Apply(Delta{Services: one(newService("web", "10.96.0.1")), EndpointSlices: slice("10.0.0.1 @here", "10.0.0.2 @there")})
	if want, got := "10.96.0.1:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080", serviceTexts(got.Changes)["default/web:http IPv4"]; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestNodeHealth checks when load balancers should send connections to this node.
func TestNodeHealth(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{NodeName: "here"})
	taint := func(key string) func(*corev1.Node) {
		return func(n *corev1.Node) {
			n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule})
		}
	}
	yes, no := true, false
	for _, step := range []struct {
		name     string
		delta    Delta
		eligible *bool
	}{
		{"the source has not reported the Node object", Delta{}, nil},
		{"no Node object", Delta{NodeDeleted: true}, &no},
		{"still no Node object", Delta{NodeDeleted: true}, nil},
		{"a Node object with irrelevant taints", Delta{Node: newNode("", taint("node.kubernetes.io/unreachable"))}, &yes},
		{"a heartbeat", Delta{Node: newNode("")}, nil},
		{"the cluster autoscaler is about to delete it", Delta{Node: newNode("", taint("x"), taint("ToBeDeletedByClusterAutoscaler"))}, &no},
		{"the taint is removed", Delta{Node: newNode("")}, &yes},
		{"it is being deleted", Delta{Node: newNode("", func(n *corev1.Node) { n.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} })}, &no},
		{"it is deleted", Delta{NodeDeleted: true}, &no},
		{"it is deleted and recreated", Delta{NodeDeleted: true, Node: newNode("")}, &yes},
	} {
		got := tracker.Apply(step.delta).NodeHealth
		switch {
		case got == nil && step.eligible != nil:
			t.Errorf("%s: NodeHealth is nil, want eligible %v", step.name, *step.eligible)
		case got != nil && step.eligible == nil:
			t.Errorf("%s: %+v is reported as changed", step.name, *got)
		case got != nil && got.Eligible() != *step.eligible:
			t.Errorf("%s: %+v, want eligible %v", step.name, *got, *step.eligible)
		}
	}
}
