package kube

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// TestHints says which endpoints are left by hints, on the node "here" in zone a.
func TestHints(t *testing.T) {
	t.Parallel()
	const (
		cluster  = "default/web:http IPv4"
		external = "default/web:http IPv4 ExternalIP"
		draining = " !ready +serving +terminating"
	)
	web := one(newService("web", "10.96.0.1"))
	inA := newNode("198.51.100.1", inZone("a"))
	// to names endpoints by their last digits.
	to := func(pods ...int) want {
		text := "10.96.0.1:80/TCP ->"
		for _, pod := range pods {
			text += fmt.Sprintf(" 10.0.0.%d:8080", pod)
		}
		return want{cluster: text}
	}
	testConversion(t, []conversionTest{
		{
			name: "all have zones, some this one: only those", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b", "10.0.0.3 @x zone=b,a"),
			want:   to(1, 3),
		},
		{
			name: "one has no zone: all", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x", "10.0.0.3 @x zone=b"),
			want:   to(1, 2, 3),
		},
		{
			name: "none has this zone: all", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=c", "10.0.0.2 @x zone=b"),
			want:   to(1, 2),
		},
		{
			name: "the node has no zone: all", node: newNode(""), services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b"),
			want:   to(1, 2),
		},
		{
			name: "there is no Node: all", services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b"),
			want:   to(1, 2),
		},
		{
			name: "a hint for the zone without a name is none for a node without a zone", node: newNode(""), services: web,
			slices: slice("10.0.0.1 @x zone=", "10.0.0.2 @x zone=b"),
			want:   to(1, 2),
		},
		{
			name: "all have nodes, some this one: only those, whatever their zones", node: inA, services: web,
			slices: slice("10.0.0.1 @x node=here zone=b", "10.0.0.2 @x node=there zone=a", "10.0.0.3 @x node=there,here"),
			want:   to(1, 3),
		},
		{
			name: "all have nodes, none this one: by zone", node: inA, services: web,
			slices: slice("10.0.0.1 @x node=there zone=b", "10.0.0.2 @x node=there zone=a"),
			want:   to(2),
		},
		{
			name: "one has no node: by zone", node: inA, services: web,
			slices: slice("10.0.0.1 @x node=here zone=b", "10.0.0.2 @x zone=a"),
			want:   to(2),
		},
		{
			name: "all have nodes, none this one, and no zones: all", node: inA, services: web,
			slices: slice("10.0.0.1 @x node=there", "10.0.0.2 @x node=there"),
			want:   to(1, 2),
		},
		{
			name: "those that are not ready have no say", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b", "10.0.0.3 @x !ready", "10.0.0.4 @x"+draining),
			want:   to(1),
		},
		{
			name: "a zone whose only endpoint is not ready: all", node: inA, services: web,
			slices: slice("10.0.0.1 @x zone=a !ready", "10.0.0.2 @x zone=b"),
			want:   to(2),
		},
		{
			name: "without ready ones hints have no say", node: inA, services: web,
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
			name: "the policy Local has nothing to do with hints", node: inA,
			services: one(newService("web", "10.96.0.1", externalIPs("192.0.2.2"), externalPolicy(corev1.ServiceExternalTrafficPolicyLocal))),
			slices:   slice("10.0.0.1 @there zone=a", "10.0.0.2 @here zone=b"),
			want: want{
				cluster:  "10.96.0.1:80/TCP -> 10.0.0.1:8080",
				external: "192.0.2.2:80/TCP -> 10.0.0.1:8080, others -> 10.0.0.2:8080(local), masquerade node",
			},
		},
		{
			name: "what the Service itself says of it is for the controller of the slices", node: inA,
			services: one(newService("web", "10.96.0.1", func(svc *corev1.Service) {
				svc.Spec.TrafficDistribution = new(corev1.ServiceTrafficDistributionPreferSameNode)
				svc.Annotations = map[string]string{corev1.AnnotationTopologyMode: "Auto"}
			})),
			slices: slice("10.0.0.1 @x", "10.0.0.2 @x"),
			want:   to(1, 2),
		},
	})
}

// TestZoneChange says what the move of the node to another zone changes.
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
		{name: "in zone b, which is nothing to those that go by node", delta: in("b"), want: want{web: "10.96.0.1:80/TCP -> 10.0.0.2:8080"}},
		{name: "in a zone without endpoints", delta: in("c"), want: want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080"}},
		{
			name: "back in zone a, in the Delta that brings an endpoint",
			delta: Delta{
				Node: newNode("198.51.100.1", inZone("a")),
				EndpointSlices: []*discoveryv1.EndpointSlice{
					newSlice("web-1", "web", eps("10.0.0.1 @x zone=a", "10.0.0.2 @x zone=b", "10.0.0.5 @x zone=a")),
				},
			},
			want: want{web: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.5:8080"},
		},
		{name: "the Node is deleted, but the node stays where it is", delta: Delta{NodeDeleted: true}, want: want{}},
		{name: "the Node is back without a zone", delta: Delta{Node: newNode("")}, want: want{
			web: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080 10.0.0.5:8080",
		}},
	})
}
