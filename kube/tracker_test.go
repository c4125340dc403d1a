package kube

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// want maps keys to the expected text of their Services.
type want = map[string]string

// TestObjects checks the Services and problems of a single Delta on the node "here".
func TestObjects(t *testing.T) {
	t.Parallel()
	const web4, web6 = "default/web:http IPv4", "default/web:http IPv6"
	tests := []struct {
		name     string
		services []*corev1.Service
		slices   []*discoveryv1.EndpointSlice
		want     want
		problems []string
	}{
		{
			name:     "a Service and its endpoints",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices:   []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps("10.0.0.2 @there", "10.0.0.1 @there"))},
			want:     want{web4: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080"},
		},
		{
			name:     "a Service without slices has no endpoints",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			want:     want{web4: "10.96.0.1:80/TCP ->"},
		},
		{
			name:   "slices without a Service",
			slices: []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps("10.0.0.1"))},
			want:   want{},
		},
		{
			name:     "an endpoint on this node, or without nodeName, may be local",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices:   []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps("10.0.0.1 @here", "10.0.0.2", "10.0.0.3 @there"))},
			want:     want{web4: "10.96.0.1:80/TCP -> 10.0.0.1:8080(local) 10.0.0.2:8080(local) 10.0.0.3:8080"},
		},
		{
			name:     "dual stack: one Service for each family, with the slices of the family",
			services: []*corev1.Service{newService("web", "10.96.0.1 fd00::1")},
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-4", "web", eps("10.0.0.1 @there")),
				newSlice("web-6", "web", eps("fd01::1 @there")),
			},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.1:8080", web6: "[fd00::1]:80/TCP -> [fd01::1]:8080"},
		},
		{
			name: "clusterIP is used without ipFamilies and clusterIPs",
			services: []*corev1.Service{newService("web", "fd00::1", func(svc *corev1.Service) {
				svc.Spec.IPFamilies, svc.Spec.ClusterIPs = nil, nil
			})},
			want: want{web6: "[fd00::1]:80/TCP ->"},
		},
		{
			name: "each port has the endpoints with its name and protocol",
			services: []*corev1.Service{newService("dns", "10.96.0.10", ports(
				port("dns", corev1.ProtocolUDP, 53), port("dns-tcp", corev1.ProtocolTCP, 53), port("assoc", corev1.ProtocolSCTP, 54),
			))},
			slices: []*discoveryv1.EndpointSlice{newSlice("dns-1", "dns", eps("10.0.0.1 @there"), slicePorts(
				slicePort("dns", corev1.ProtocolUDP, 5353), slicePort("dns-tcp", corev1.ProtocolTCP, 5454),
				slicePort("assoc", corev1.ProtocolSCTP, 5555), slicePort("dns", corev1.ProtocolTCP, 1),
			))},
			want: want{
				"default/dns:dns IPv4":     "10.96.0.10:53/UDP -> 10.0.0.1:5353",
				"default/dns:dns-tcp IPv4": "10.96.0.10:53/TCP -> 10.0.0.1:5454",
				"default/dns:assoc IPv4":   "10.96.0.10:54/SCTP -> 10.0.0.1:5555",
			},
		},
		{
			name:     "a single port may have no name",
			services: []*corev1.Service{newService("web", "10.96.0.1", ports(port("", corev1.ProtocolTCP, 80)))},
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @there"), slicePorts(slicePort("", corev1.ProtocolTCP, 8080))),
			},
			want: want{"default/web IPv4": "10.96.0.1:80/TCP -> 10.0.0.1:8080"},
		},
		{
			name:     "the port number may differ between pods",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @there")),
				newSlice("web-2", "web", eps("10.0.0.1 @there", "10.0.0.2 @there"), slicePorts(slicePort("http", corev1.ProtocolTCP, 9090))),
			},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.1:9090 10.0.0.2:9090"},
		},
		{
			name: "no Service: headless, not allocated, ExternalName, another proxy's",
			services: []*corev1.Service{
				newService("a", "None"),
				newService("b", ""),
				newService("c", "10.96.0.1", func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeExternalName }),
				newService("d", "10.96.0.2", func(svc *corev1.Service) { svc.Labels = map[string]string{LabelServiceProxyName: "other"} }),
				newService("e", "None", func(svc *corev1.Service) { svc.Spec.ClusterIPs = nil }),
				newService("f", "None", func(svc *corev1.Service) { svc.Spec.ClusterIP = "" }),
			},
			want: want{},
		},
		{
			name:     "ignored slices: headless, without a Service, of another namespace, FQDN",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1"), func(s *discoveryv1.EndpointSlice) { s.Labels[corev1.IsHeadlessService] = "" }),
				newSlice("web-2", "", eps("10.0.0.2")),
				newSlice("web-3", "web", eps("10.0.0.3"), func(s *discoveryv1.EndpointSlice) { s.Namespace = "shop" }),
				newSlice("web-4", "web", eps("web.example.com"), func(s *discoveryv1.EndpointSlice) { s.AddressType = discoveryv1.AddressTypeFQDN }),
			},
			want: want{web4: "10.96.0.1:80/TCP ->"},
		},
		{
			name:     "only ready endpoints receive connections",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices: []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps(
				"10.0.0.1 @there !ready", "10.0.0.2 @there +ready", "10.0.0.3 @there !ready +serving +terminating", "10.0.0.4 @there",
			))},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.2:8080 10.0.0.4:8080"},
		},
		{
			name:     "without ready endpoints, serving terminating ones receive connections",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices: []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps(
				"10.0.0.1 @there !ready", "10.0.0.2 @there !ready +serving +terminating",
				"10.0.0.3 @there !ready !serving +terminating", "10.0.0.4 @there !ready +terminating",
			))},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.2:8080 10.0.0.4:8080"},
		},
		{
			name:     "of two pods with the same address, the one that is not terminating is used",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @here +ready +terminating", "10.0.0.2 @there")),
				newSlice("web-2", "web", eps("10.0.0.1 @there !ready")),
			},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.2:8080"},
		},
		{
			name:     "an endpoint in two slices is used once, with the better conditions",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @there !ready", "10.0.0.2 @there")),
				newSlice("web-2", "web", eps("10.0.0.1 @there", "10.0.0.2 @here")),
			},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080(local)"},
		},
		{
			name:     "the first address of an endpoint is used; leading zeros are decimal",
			services: []*corev1.Service{newService("web", "010.096.000.001")},
			slices: []*discoveryv1.EndpointSlice{newSlice("web-1", "web", []discoveryv1.Endpoint{
				{Addresses: []string{"10.0.0.010", "10.0.0.99"}, NodeName: new("there")},
			})},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.10:8080"},
		},
		{
			name: "IPv4-mapped IPv6 addresses are IPv4 addresses",
			services: []*corev1.Service{newService("web", "::ffff:10.96.0.1", ingress("::ffff:192.0.2.1"), externalIPs("::ffff:192.0.2.2", "192.0.2.1"), func(svc *corev1.Service) {
				svc.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol}
			})},
			slices: []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps("::ffff:10.0.0.1 @there"), func(s *discoveryv1.EndpointSlice) {
				s.AddressType = discoveryv1.AddressTypeIPv4
			})},
			want: want{
				web4:                   "10.96.0.1:80/TCP -> 10.0.0.1:8080",
				web4 + " ExternalIP":   "192.0.2.2:80/TCP -> 10.0.0.1:8080, masquerade always",
				web4 + " LoadBalancer": "192.0.2.1:80/TCP -> 10.0.0.1:8080, masquerade always",
			},
		},
		{
			name:     "invalid endpoint addresses are reported and skipped",
			services: []*corev1.Service{newService("web", "10.96.0.1 fd00::1")},
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-4", "web", eps("10.0.0.1 @there", "127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "pod", "fd01::1")),
				newSlice("web-6", "web", eps("fd01::1 @there", "::ffff:10.0.0.1", "fe80::1%eth0")), // the second one is an IPv4 address
			},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.1:8080", web6: "[fd00::1]:80/TCP -> [fd01::1]:8080"},
			problems: []string{
				`default/web: EndpointSlice web-4: endpoints[1].addresses[0]: "127.0.0.1" is a loopback address: use the address of a pod`,
				`default/web: EndpointSlice web-4: endpoints[2].addresses[0]: "169.254.1.1" is a link-local address: use the address of a pod`,
				`default/web: EndpointSlice web-4: endpoints[3].addresses[0]: "224.0.0.1" is a multicast address: use the address of a pod`,
				`default/web: EndpointSlice web-4: endpoints[4].addresses[0]: "0.0.0.0" is the unspecified address: use the address of a pod`,
				`default/web: EndpointSlice web-4: endpoints[5].addresses[0]: "pod" is not an IP address: use the address of a pod`,
				`default/web: EndpointSlice web-4: endpoints[6].addresses[0]: "fd01::1" is not of the slice's addressType IPv4: use the address of a pod`,
				`default/web: EndpointSlice web-6: endpoints[1].addresses[0]: "::ffff:10.0.0.1" is not of the slice's addressType IPv6: use the address of a pod`,
				`default/web: EndpointSlice web-6: endpoints[2].addresses[0]: "fe80::1%eth0" has a zone: use the address of a pod`,
			},
		},
		{
			name:     "invalid ports of a slice are reported and skipped",
			services: []*corev1.Service{newService("web", "10.96.0.1")},
			slices: []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps("10.0.0.1 @there"), slicePorts(
				slicePort("http", corev1.ProtocolTCP, 8080),
				discoveryv1.EndpointPort{Port: new(int32(1))},
				discoveryv1.EndpointPort{Name: new("http")},
				slicePort("http", corev1.ProtocolTCP, 0),
				slicePort("http", "tpc", 80),
			))},
			want: want{web4: "10.96.0.1:80/TCP -> 10.0.0.1:8080"},
			problems: []string{
				`default/web: EndpointSlice web-1: ports[1].name: missing: use the Service port's name, or "" for an unnamed port`,
				`default/web: EndpointSlice web-1: ports[2].port: missing or not a port: use 1 to 65535`,
				`default/web: EndpointSlice web-1: ports[3].port: missing or not a port: use 1 to 65535`,
				`default/web: EndpointSlice web-1: ports[4].protocol: "tpc" is not a protocol: use TCP, UDP or SCTP`,
			},
		},
		{
			name: "invalid cluster IPs are reported and skipped",
			services: []*corev1.Service{
				newService("a", "10.96.0.1 10.96.0.2"),
				newService("b", "ten ::ffff:0.0.0.0"),
				newService("c", "10.96.0.3", func(svc *corev1.Service) { svc.Spec.IPFamilies[0] = corev1.IPv6Protocol }),
				newService("d", "10.96.0.4 fd00::4", func(svc *corev1.Service) { svc.Spec.IPFamilies = svc.Spec.IPFamilies[:1] }),
			},
			want: want{
				"default/a:http IPv4": "10.96.0.1:80/TCP ->",
				"default/d:http IPv4": "10.96.0.4:80/TCP ->",
			},
			problems: []string{
				`default/a: spec.clusterIPs[1]: 10.96.0.2 is a second address of one family: a Service has one cluster IP per family`,
				`default/b: spec.clusterIPs[0]: "ten" is not an IP address: give the Service another cluster IP`,
				`default/b: spec.clusterIPs[1]: "::ffff:0.0.0.0" is the unspecified address: give the Service another cluster IP`,
				`default/c: spec.clusterIPs[0]: 10.96.0.3 is not of the family IPv6 that spec.ipFamilies[0] names: make them match`,
				`default/d: spec.clusterIPs[1]: fd00::4 has no family in spec.ipFamilies: name one family for each cluster IP`,
			},
		},
		{
			name: "invalid ports of a Service are reported and skipped",
			services: []*corev1.Service{newService("web", "10.96.0.1", ports(
				port("http", corev1.ProtocolTCP, 80), port("http", corev1.ProtocolTCP, 81), port("a", "tpc", 1), port("b", "TCP", 70000),
				port("c", corev1.ProtocolTCP, 80),
			))},
			want: want{web4: "10.96.0.1:80/TCP ->"},
			problems: []string{
				`default/web: spec.ports[1].name: "http" is the name of an earlier port: give each port a unique name`,
				`default/web: spec.ports[2].protocol: "tpc" is not a protocol: use TCP, UDP or SCTP`,
				`default/web: spec.ports[3].port: 70000 is not a port: use 1 to 65535`,
				`default/web: spec.ports[4].port: 10.96.0.1:80/TCP is already used by port "http" of this Service: use another port`,
			},
		},
		{
			name: "ports without a match in slices are reported",
			services: []*corev1.Service{
				newService("a", "10.96.0.1", func(svc *corev1.Service) { svc.Spec.Ports[0].TargetPort = intstr.FromString("web") }),
				newService("b", "10.96.0.2"),
				newService("c", "10.96.0.3"),
			},
			slices: []*discoveryv1.EndpointSlice{
				newSlice("a-1", "a", eps("10.0.0.1"), slicePorts()),
				newSlice("b-1", "b", eps("10.0.0.1"), slicePorts(slicePort("", corev1.ProtocolTCP, 80))),
				newSlice("c-1", "c", nil, slicePorts()),
			},
			want: want{
				"default/a:http IPv4": "10.96.0.1:80/TCP ->",
				"default/b:http IPv4": "10.96.0.2:80/TCP ->",
				"default/c:http IPv4": "10.96.0.3:80/TCP ->",
			},
			problems: []string{
				`default/a: spec.ports[0].targetPort: no endpoint of family IPv4 has a TCP port "web", so connections are rejected: give a container port of the pods this name`,
				`default/b: spec.ports[0].name: no EndpointSlice of family IPv4 has a TCP port with the name "http", so connections are rejected: use the same name in both`,
			},
		},
		{
			name: "a conflicting frontend belongs to the older Service, then to the first by name",
			services: []*corev1.Service{
				newService("a", "10.96.0.1", age(time.Hour)),
				newService("b", "10.96.0.1", age(2*time.Hour), ports(port("http", corev1.ProtocolTCP, 80), port("x", corev1.ProtocolTCP, 81))),
				newService("c", "10.96.0.1", age(2*time.Hour), ports(port("http", corev1.ProtocolUDP, 80), port("x", corev1.ProtocolTCP, 81))),
			},
			want: want{
				"default/b:http IPv4": "10.96.0.1:80/TCP ->",
				"default/b:x IPv4":    "10.96.0.1:81/TCP ->",
				"default/c:http IPv4": "10.96.0.1:80/UDP ->",
			},
			problems: []string{
				`default/a: spec.clusterIP: 10.96.0.1:80/TCP belongs to Service default/b: use another cluster IP or port for one of them`,
				`default/c: spec.clusterIP: 10.96.0.1:81/TCP belongs to Service default/b: use another cluster IP or port for one of them`,
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := NewTracker(Options{NodeName: "here"}).Apply(Delta{Services: tt.services, EndpointSlices: tt.slices})
			if diff := cmp.Diff(tt.want, serviceTexts(got.Changes)); diff != "" {
				t.Errorf("Services (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.problems, problemTexts(got.Problems)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// step is one Delta of a history with the expected changes and new problems.
type step struct {
	name     string
	delta    Delta
	want     want
	problems []string
}

func checkHistory(t *testing.T, opts Options, steps []step) {
	t.Helper()
	tracker := NewTracker(opts)
	for _, step := range steps {
		got := tracker.Apply(step.delta)
		if diff := cmp.Diff(step.want, serviceTexts(got.Changes)); diff != "" {
			t.Errorf("%s: Services (-want +got):\n%s", step.name, diff)
		}
		if diff := cmp.Diff(step.problems, problemTexts(got.Problems)); diff != "" {
			t.Errorf("%s: problems (-want +got):\n%s", step.name, diff)
		}
	}
}

// TestHistories checks the changes of each Delta of a history.
func TestHistories(t *testing.T) {
	t.Parallel()
	services := func(s ...*corev1.Service) Delta { return Delta{Services: s} }
	endpointSlices := func(s ...*discoveryv1.EndpointSlice) Delta { return Delta{EndpointSlices: s} }
	deleted := func(names ...string) Delta {
		var d Delta
		for _, name := range names {
			d.DeletedServices = append(d.DeletedServices, named(name))
		}
		return d
	}
	const web = "default/web:http IPv4"
	tests := []struct {
		name  string
		steps []step
	}{
		{"objects in any order", []step{
			{name: "slice first", delta: endpointSlices(newSlice("web-1", "web", eps("10.0.0.1 @a"))), want: want{}},
			{
				name: "Service", delta: services(newService("web", "10.96.0.1")),
				want: want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080"},
			},
			{name: "the same Service", delta: services(newService("web", "10.96.0.1")), want: want{}},
			{name: "the same slice", delta: endpointSlices(newSlice("web-1", "web", eps("10.0.0.1 @a"))), want: want{}},
			{name: "the Service is deleted", delta: deleted("web"), want: want{web: "gone"}},
			{name: "the Service is deleted again", delta: deleted("web"), want: want{}},
			{
				name: "the Service is recreated with its slice still there", delta: services(newService("web", "10.96.0.1")),
				want: want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080"},
			},
			{
				name:  "the slice is deleted",
				delta: Delta{DeletedEndpointSlices: []types.NamespacedName{named("web-1"), named("never-there")}},
				want:  want{web: "10.96.0.1:80/TCP ->"},
			},
		}},
		{"deletions are processed first", []step{{
			name:  "deleted and delivered",
			delta: Delta{Services: []*corev1.Service{newService("web", "10.96.0.1")}, DeletedServices: []types.NamespacedName{named("web")}},
			want:  want{web: "10.96.0.1:80/TCP ->"},
		}}},
		{"a slice moves from one Service to another", []step{
			{
				name: "first Service",
				delta: Delta{
					Services:       []*corev1.Service{newService("a", "10.96.0.1"), newService("b", "10.96.0.2")},
					EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("x", "a", eps("10.0.0.1 @n"))},
				},
				want: want{"default/a:http IPv4": "10.96.0.1:80/TCP -> 10.0.0.1:8080", "default/b:http IPv4": "10.96.0.2:80/TCP ->"},
			},
			{
				name: "second Service", delta: endpointSlices(newSlice("x", "b", eps("10.0.0.1 @n"))),
				want: want{"default/a:http IPv4": "10.96.0.1:80/TCP ->", "default/b:http IPv4": "10.96.0.2:80/TCP -> 10.0.0.1:8080"},
			},
			{
				name: "no Service", delta: endpointSlices(newSlice("x", "", eps("10.0.0.1 @n"))),
				want: want{"default/b:http IPv4": "10.96.0.2:80/TCP ->"},
			},
		}},
		{"an endpoint moves between slices and stays available", []step{
			{
				name: "two slices",
				delta: Delta{
					Services:       []*corev1.Service{newService("web", "10.96.0.1")},
					EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("x", "web", eps("10.0.0.1 @n")), newSlice("y", "web", eps("10.0.0.2 @n"))},
				},
				want: want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080"},
			},
			{name: "in both slices", delta: endpointSlices(newSlice("y", "web", eps("10.0.0.2 @n", "10.0.0.1 @n"))), want: want{}},
			{name: "in the second slice", delta: endpointSlices(newSlice("x", "web", nil)), want: want{}},
		}},
		{"a Service is given to another proxy, becomes headless, and changes its port", []step{
			{name: "ours", delta: services(newService("web", "10.96.0.1")), want: want{web: "10.96.0.1:80/TCP ->"}},
			{
				name: "another's",
				delta: services(newService("web", "10.96.0.1", func(svc *corev1.Service) {
					svc.Labels = map[string]string{LabelServiceProxyName: "other"}
				})),
				want: want{web: "gone"},
			},
			{name: "this proxy's again", delta: services(newService("web", "10.96.0.1")), want: want{web: "10.96.0.1:80/TCP ->"}},
			{name: "headless", delta: services(newService("web", "None")), want: want{web: "gone"}},
			{name: "with a cluster IP again", delta: services(newService("web", "10.96.0.1")), want: want{web: "10.96.0.1:80/TCP ->"}},
			{
				name: "the port is renamed", delta: services(newService("web", "10.96.0.1", ports(port("www", corev1.ProtocolTCP, 80)))),
				want: want{web: "gone", "default/web:www IPv4": "10.96.0.1:80/TCP ->"},
			},
			{
				name: "the port number changes", delta: services(newService("web", "10.96.0.1", ports(port("www", corev1.ProtocolTCP, 81)))),
				want: want{"default/web:www IPv4": "10.96.0.1:81/TCP ->"},
			},
		}},
		{"the owner of a frontend changes", []step{
			{
				name: "two Services claim it", delta: services(newService("a", "10.96.0.1", age(time.Minute)), newService("b", "10.96.0.1", age(time.Hour))),
				want: want{"default/b:http IPv4": "10.96.0.1:80/TCP ->"},
				problems: []string{
					`default/a: spec.clusterIP: 10.96.0.1:80/TCP belongs to Service default/b: use another cluster IP or port for one of them`,
				},
			},
			{name: "the Service without the frontend gets endpoints", delta: endpointSlices(newSlice("a-1", "a", eps("10.0.0.1 @n"))), want: want{}},
			{
				name: "the owner is deleted", delta: deleted("b"),
				want: want{"default/a:http IPv4": "10.96.0.1:80/TCP -> 10.0.0.1:8080", "default/b:http IPv4": "gone"},
			},
			{
				name: "an older Service is added", delta: services(newService("c", "10.96.0.1", age(time.Hour))),
				want: want{"default/a:http IPv4": "gone", "default/c:http IPv4": "10.96.0.1:80/TCP ->"},
				problems: []string{
					`default/a: spec.clusterIP: 10.96.0.1:80/TCP belongs to Service default/c: use another cluster IP or port for one of them`,
				},
			},
			{
				name: "the owner releases it in the Delta in which another Service claims it", delta: services(
					newService("c", "10.96.0.2", age(time.Hour)), newService("d", "10.96.0.1", age(time.Second)),
				),
				want: want{
					"default/a:http IPv4": "10.96.0.1:80/TCP -> 10.0.0.1:8080",
					"default/c:http IPv4": "10.96.0.2:80/TCP ->",
				},
				problems: []string{
					`default/d: spec.clusterIP: 10.96.0.1:80/TCP belongs to Service default/a: use another cluster IP or port for one of them`,
				},
			},
			{
				name: "the owner is recreated and is now the younger one", delta: services(newService("a", "10.96.0.1", age(0))),
				want: want{"default/a:http IPv4": "gone", "default/d:http IPv4": "10.96.0.1:80/TCP ->"},
				problems: []string{
					`default/a: spec.clusterIP: 10.96.0.1:80/TCP belongs to Service default/d: use another cluster IP or port for one of them`,
				},
			},
		}},
		{"an unmatched port is no problem until its slices can have arrived", []step{
			{
				name:  "one port",
				delta: Delta{Services: one(newService("web", "10.96.0.1")), EndpointSlices: slice("10.0.0.1 @n")},
				want:  want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080"},
			},
			{
				name: "the port is renamed before the slice", delta: services(newService("web", "10.96.0.1", ports(port("www", corev1.ProtocolTCP, 80)))),
				want: want{web: "gone", "default/web:www IPv4": "10.96.0.1:80/TCP ->"},
			},
			{
				name: "another field of the Service changes", delta: services(newService("web", "10.96.0.1", ports(port("www", corev1.ProtocolTCP, 81)))),
				want: want{"default/web:www IPv4": "10.96.0.1:81/TCP ->"},
			},
			{
				name: "the slice arrives", delta: endpointSlices(newSlice("web-1", "web", eps("10.0.0.1 @n"), slicePorts(slicePort("www", corev1.ProtocolTCP, 8080)))),
				want: want{"default/web:www IPv4": "10.96.0.1:81/TCP -> 10.0.0.1:8080"},
			},
			{
				name: "the port is renamed back", delta: services(newService("web", "10.96.0.1")),
				want: want{"default/web:www IPv4": "gone", web: "10.96.0.1:80/TCP ->"},
			},
			{
				name: "the slice still has the other name", delta: endpointSlices(newSlice("web-1", "web", eps("10.0.0.1 @n", "10.0.0.2 @n"), slicePorts(slicePort("www", corev1.ProtocolTCP, 8080)))),
				want:     want{},
				problems: []string{`default/web: spec.ports[0].name: no EndpointSlice of family IPv4 has a TCP port with the name "http", so connections are rejected: use the same name in both`},
			},
			{
				name: "a reported port stays reported when another port is added", delta: services(newService("web", "10.96.0.1", ports(port("http", corev1.ProtocolTCP, 80), port("x", corev1.ProtocolTCP, 81)))),
				want: want{"default/web:x IPv4": "10.96.0.1:81/TCP ->"},
			},
			{
				name: "it is not reported again with the slices", delta: endpointSlices(newSlice("web-1", "web", eps("10.0.0.1 @n"), slicePorts(slicePort("x", corev1.ProtocolTCP, 8080)))),
				want: want{"default/web:x IPv4": "10.96.0.1:81/TCP -> 10.0.0.1:8080"},
			},
		}},
		{"a problem is reported once, and again when it recurs", []step{
			{
				name: "bad", delta: services(newService("web", "10.96.0.1", ports(port("http", "tpc", 80)))),
				want: want{}, problems: []string{`default/web: spec.ports[0].protocol: "tpc" is not a protocol: use TCP, UDP or SCTP`},
			},
			{name: "still invalid", delta: services(newService("web", "10.96.0.1", ports(port("http", "tpc", 80)))), want: want{}},
			{name: "good", delta: services(newService("web", "10.96.0.1")), want: want{web: "10.96.0.1:80/TCP ->"}},
			{
				name: "invalid again", delta: services(newService("web", "10.96.0.1", ports(port("http", "tpc", 80)))),
				want: want{web: "gone"}, problems: []string{`default/web: spec.ports[0].protocol: "tpc" is not a protocol: use TCP, UDP or SCTP`},
			},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			checkHistory(t, Options{NodeName: "here"}, tt.steps)
		})
	}
}
