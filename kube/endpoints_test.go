package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// TestEndpointSelection checks which endpoints receive connections.
func TestEndpointSelection(t *testing.T) {
	t.Parallel()
	const (
		cluster  = "default/web:http IPv4"
		external = "default/web:http IPv4 ExternalIP"
		draining = " !ready +serving +terminating"
	)
	// The cluster IP uses the endpoints of the policy Cluster, and the external IP those of
	// Local.
	web := one(newService("web", "10.96.0.1", externalIPs("192.0.2.2"), externalPolicy(corev1.ServiceExternalTrafficPolicyLocal)))
	lists := func(cl, local, verdict string) want {
		if verdict != "" {
			verdict = ", " + verdict
		}
		return want{
			cluster:  "10.96.0.1:80/TCP ->" + cl,
			external: "192.0.2.2:80/TCP ->" + cl + ", others -> " + local + ", masquerade from-node" + verdict,
		}
	}
	testConversion(t, []conversionTest{
		{
			name: "ready endpoints, without terminating ones", services: web,
			slices: slice("10.0.0.1 @here", "10.0.0.2 @here"+draining, "10.0.0.3 @there", "10.0.0.4 @there"+draining),
			want:   lists(" 10.0.0.1:8080(local) 10.0.0.3:8080", "10.0.0.1:8080(local)", ""),
		},
		{
			name: "missing conditions mean ready", services: web,
			slices: slice("10.0.0.1 @here", "10.0.0.2 @here !ready"),
			want:   lists(" 10.0.0.1:8080(local)", "10.0.0.1:8080(local)", ""),
		},
		{
			name: "without ready endpoints, serving terminating ones", services: web,
			slices: slice("10.0.0.1 @here"+draining, "10.0.0.2 @there"+draining, "10.0.0.3 @here !ready !serving +terminating", "10.0.0.4 @here !ready +serving"),
			want:   lists(" 10.0.0.1:8080(local) 10.0.0.2:8080", "10.0.0.1:8080(local)", ""),
		},
		{
			name: "each policy falls back separately: with a ready endpoint on another node, outside clients use a terminating one on this node", services: web,
			slices: slice("10.0.0.1 @here"+draining, "10.0.0.2 @there"),
			want:   lists(" 10.0.0.2:8080", "10.0.0.1:8080(local)", ""),
		},
		{
			name: "a terminating endpoint on another node is usable: dropped, not rejected", services: web,
			slices: slice("10.0.0.2 @there" + draining),
			want:   lists(" 10.0.0.2:8080", "none", "drop"),
		},
		{
			name: "no usable endpoint: rejected", services: web,
			slices: slice("10.0.0.1 @here !ready", "10.0.0.2 @there !ready !serving +terminating"),
			want:   lists("", "none", ""),
		},
		{
			name: "endpoints that are ready because of publishNotReadyAddresses are used, also while they terminate", services: web,
			slices: slice("10.0.0.1 @here +ready !serving +terminating", "10.0.0.2 @there +ready !serving"),
			want:   lists(" 10.0.0.1:8080(local) 10.0.0.2:8080", "10.0.0.1:8080(local)", ""),
		},
		{
			name: "an address that was reassigned to a new pod belongs to that pod", services: web,
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @there +ready +terminating")),
				newSlice("web-2", "web", eps("10.0.0.1 @here !ready")),
			},
			want: lists("", "none", ""),
		},
		{
			name: "of an endpoint that moves between slices, the ready entry is used", services: web,
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @here !ready")),
				newSlice("web-2", "web", eps("10.0.0.1 @here")),
			},
			want: lists(" 10.0.0.1:8080(local)", "10.0.0.1:8080(local)", ""),
		},
		{
			name: "only the first address of an endpoint is used", services: web,
			slices: []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps("10.0.0.1 @here"), func(s *discoveryv1.EndpointSlice) {
				s.Endpoints[0].Addresses = append(s.Endpoints[0].Addresses, "10.0.0.9")
			})},
			want: lists(" 10.0.0.1:8080(local)", "10.0.0.1:8080(local)", ""),
		},
		{
			name: "a pod that is local for one port is local for the other", services: web,
			slices: []*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @there")),
				newSlice("web-2", "web", eps("10.0.0.1"), slicePorts(slicePort("http", corev1.ProtocolTCP, 9090))),
			},
			want: lists(" 10.0.0.1:8080(local) 10.0.0.1:9090(local)", "none", "drop"),
		},
	})
}
