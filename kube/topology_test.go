package kube

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// TestHints checks which endpoints hints select on the node "here" in zone a.
func TestHints(t *testing.T) {
	t.Parallel()
	const (
		cluster  = "default/web:http IPv4"
		external = "default/web:http IPv4 ExternalIP"
		draining = " !ready +serving +terminating"
	)
	web := one(newService("web", "10.96.0.1"))
	inA := newNode("198.51.100.1", inZone("a"))
	// to returns the expected Services with endpoints given by their last octets.
	to := func(pods ...int) want {
		text := "10.96.0.1:80/TCP ->"
		for _, pod := range pods {
			text += fmt.Sprintf(" 10.0.0.%d:8080", pod)
		}
		return want{cluster: text}
	}
	testConversion(t, []conversionTest{
		{
			name: "all have zones and some this zone: only those", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b", "10.0.0.3 @x zone=b,a"),
			want:   to(1, 3),
		},
		{
			name: "one has no zone: all endpoints", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x", "10.0.0.3 @x zone=b"),
			want:   to(1, 2, 3),
		},
		{
			name: "none has this zone: all endpoints", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=c", "10.0.0.2 @x zone=b"),
			want:   to(1, 2),
		},
		{
			name: "the node has no zone: all endpoints", node: newNode(""), services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b"),
			want:   to(1, 2),
		},
		{
			name: "no Node object: all endpoints", services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b"),
			want:   to(1, 2),
		},
		{
			name: "a zone without a name does not match a node without a zone", node: newNode(""), services: web,
			slices: slice("10.0.0.1 @x zone=", "10.0.0.2 @x zone=b"),
			want:   to(1, 2),
		},
		{
			name: "all have nodes and some this node: only those, regardless of zones", node: inA, services: web,
			slices: slice("10.0.0.1 @x node=here zone=b", "10.0.0.2 @x node=there zone=a", "10.0.0.3 @x node=there,here"),
			want:   to(1, 3),
		},
		{
			name: "all have nodes and none this node: by zone", node: inA, services: web,
			slices: slice("10.0.0.1 @x node=there zone=b", "10.0.0.2 @x node=there zone=a"),
			want:   to(2),
		},
		{
			name: "one has no node: by zone", node: inA, services: web,
			slices: slice("10.0.0.1 @x node=here zone=b", "10.0.0.2 @x zone=a"),
			want:   to(2),
		},
		{
			name: "all have nodes, none this node, and no zones: all endpoints", node: inA, services: web,
			slices: slice("10.0.0.1 @x node=there", "10.0.0.2 @x node=there"),
			want:   to(1, 2),
		},
		{
			name: "endpoints that are not ready are ignored", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b", "10.0.0.3 @x !ready", "10.0.0.4 @x"+draining),
			want:   to(1),
		},
		{
			name: "the only endpoint of this zone is not ready: all endpoints", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a !ready", "10.0.0.2 @x zone=b"),
			want:   to(2),
		},
		{
			name: "without ready endpoints hints are ignored", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a"+draining, "10.0.0.2 @x zone=b"+draining),
			want:   to(1, 2),
		},
		{
			name: "hints over several slices", node: inA, services: web,
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @x zone=a")), newSlice("web-2", "web", eps("10.0.0.2 @x zone=b")),
			},
			want: to(1),
		},
		{
			name: "the policy Local ignores hints", node: inA,
			services: one(newService("web", "10.96.0.1", externalIPs("192.0.2.2"), externalPolicy(corev1.ServiceExternalTrafficPolicyLocal))),
			slices:   slice("10.0.0.1 @there zone=a", "10.0.0.2 @here zone=b"),
			want: want{
				cluster:  "10.96.0.1:80/TCP -> 10.0.0.1:8080",
				external: "192.0.2.2:80/TCP -> 10.0.0.1:8080, others -> 10.0.0.2:8080(local), masquerade from-node",
			},
		},
		{
			name: "fields of the Service are ignored, because only the EndpointSlice controller reads them", node: inA,
			services: one(newService("web", "10.96.0.1", func(svc *corev1.Service) {
				svc.Spec.TrafficDistribution = new(corev1.ServiceTrafficDistributionPreferSameNode)
				svc.Annotations = map[string]string{corev1.AnnotationTopologyMode: "Auto"}
			})),
			slices: slice("10.0.0.1 @x", "10.0.0.2 @x"),
			want:   to(1, 2),
		},
	})
}

// TestZoneChange checks the changes when the node moves to another zone.
func TestZoneChange(t *testing.T) {
	t.Parallel()
	const web, near = "default/web:http IPv4", "default/near:http IPv4"
	in := func(zone string) Delta { return Delta{Node: newNode("198.51.100.1", inZone(zone))} }
	checkHistory(t, Options{NodeName: "here"}, []step{
		{
			name: "in zone a",
			delta: Delta{
				Node:     newNode("198.51.100.1", inZone("a")),
				Services: []*corev1.Service{newService("web", "10.96.0.1"), newService("near", "10.96.0.2")},
				EndpointSlices: []*discoveryv1.EndpointSlice{
					newSlice("web-1", "web", eps("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b")),
					newSlice("near-1", "near", eps("10.0.0.3 @x zone=a node=here", "10.0.0.4 @x zone=b node=there")),
				},
			},
			want: want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080", near: "10.96.0.2:80/TCP -> 10.0.0.3:8080"},
		},
		{name: "a heartbeat", delta: in("a"), want: want{}},
		{name: "in zone b, without effect on hints for nodes", delta: in("b"), want: want{web: "10.96.0.1:80/TCP -> 10.0.0.2:8080"}},
		{name: "in a zone without endpoints", delta: in("c"), want: want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080"}},
		{
			name: "back in zone a, with a new endpoint in the same Delta",
			delta: Delta{
				Node: newNode("198.51.100.1", inZone("a")),
				EndpointSlices: []*discoveryv1.EndpointSlice{
					newSlice("web-1", "web", eps("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b", "10.0.0.5 @x zone=a")),
				},
			},
			want: want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.5:8080"},
		},
		{name: "the Node object is deleted: no change", delta: Delta{NodeDeleted: true}, want: want{}},
		{name: "the Node object is created without a zone", delta: Delta{Node: newNode("")}, want: want{
			web: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080 10.0.0.5:8080",
		}},
	})
}
