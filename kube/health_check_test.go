package kube

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestHealthChecks checks which Services have a health-check node port, and the number that it
// reports on the node "here".
func TestHealthChecks(t *testing.T) {
	t.Parallel()
	const local = corev1.ServiceExternalTrafficPolicyLocal
	web := func(changes ...func(*corev1.Service)) *corev1.Service {
		return newService("web", "10.96.0.1", append([]func(*corev1.Service){
			ingress("192.0.2.1"), externalPolicy(local), healthCheckNodePort(32000),
		}, changes...)...)
	}
	dual := func() *corev1.Service {
		return newService("web", "10.96.0.1 fd00::1", ingress(), externalPolicy(local), healthCheckNodePort(32000))
	}
	twoPorts := ports(port("http", corev1.ProtocolTCP, 80), port("https", corev1.ProtocolTCP, 443))
	tests := []struct {
		name   string
		svc    *corev1.Service
		slices []*discoveryv1.EndpointSlice
		want   string
	}{
		{"a Service without endpoints", web(), nil, "32000: 0"},
		{"ready endpoints on this node", web(), slice("10.0.0.1 @here", "10.0.0.2 @there", "10.0.0.3 @here", "10.0.0.4"), "32000: 2"},
		{
			"endpoints that are not ready, or serving terminating, do not count", web(),
			slice("10.0.0.1 @here !ready", "10.0.0.2 @here !ready +serving +terminating"), "32000: 0",
		},
		{
			"serving terminating endpoints do not count in addition to ready ones", web(),
			slice("10.0.0.1 @here", "10.0.0.2 @here !ready +serving +terminating"), "32000: 1",
		},
		{"hints are ignored", web(), slice("10.0.0.1 @here node=there", "10.0.0.2 @there node=here"), "32000: 1"},
		{
			"a pod with several ports counts once", web(twoPorts),
			[]*discoveryv1.EndpointSlice{
				newSlice("web-1", "web", eps("10.0.0.1 @here"), slicePorts(slicePort("http", corev1.ProtocolTCP, 80), slicePort("https", corev1.ProtocolTCP, 443))),
				newSlice("web-2", "web", eps("10.0.0.1 @here", "10.0.0.2 @here"), slicePorts(slicePort("https", corev1.ProtocolTCP, 8443))),
			},
			"32000: 2",
		},
		{
			"a dual-stack pod counts once", dual(),
			[]*discoveryv1.EndpointSlice{
				newSlice("web-4", "web", eps("10.0.0.1 @here", "10.0.0.2 @here")), newSlice("web-6", "web", eps("fd01::1 @here", "fd01::2 @here", "fd01::3 @here")),
			},
			"32000: 3",
		},
		{"no load balancer IP yet", web(func(svc *corev1.Service) { svc.Status = corev1.ServiceStatus{} }), slice("10.0.0.1 @here"), "32000: 1"},
		{"no health-check node port", web(healthCheckNodePort(0)), nil, "none"},
		{"the policy Cluster", web(externalPolicy(corev1.ServiceExternalTrafficPolicyCluster)), nil, "none"},
		{"another type", web(ofType(corev1.ServiceTypeNodePort)), nil, "none"},
		{"no cluster IP yet", web(func(svc *corev1.Service) { svc.Spec.ClusterIP, svc.Spec.ClusterIPs = "", nil }), nil, "none"},
		{"another proxy's", web(func(svc *corev1.Service) { svc.Labels = map[string]string{LabelServiceProxyName: "x"} }), nil, "none"},
		{"an invalid port", web(healthCheckNodePort(70000)), nil, "none"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := NewTracker(Options{NodeName: "here"}).Apply(Delta{Services: one(tt.svc), EndpointSlices: tt.slices})
			if got := checkText(got.HealthChecks); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func checkText(checks map[types.NamespacedName]*HealthCheck) string {
	check, ok := checks[named("web")]
	switch {
	case !ok:
		return "none"
	case check == nil:
		return "gone"
	}
	return fmt.Sprintf("%d: %d", check.Port, check.LocalEndpoints)
}

// TestHealthCheckHistory checks that a Result contains only changes.
func TestHealthCheckHistory(t *testing.T) {
	t.Parallel()
	web := func(port int32) Delta {
		return Delta{Services: one(newService("web", "10.96.0.1", ingress("192.0.2.1"),
			externalPolicy(corev1.ServiceExternalTrafficPolicyLocal), healthCheckNodePort(port)))}
	}
	pods := func(pods ...string) Delta { return Delta{EndpointSlices: slice(pods...)} }
	tracker := NewTracker(Options{NodeName: "here"})
	for _, step := range []struct {
		name  string
		delta Delta
		want  string
	}{
		{"new", web(32000), "32000: 0"},
		{"the same", web(32000), "none"},
		{"a pod on this node", pods("10.0.0.1 @here"), "32000: 1"},
		{"another pod on another node", pods("10.0.0.1 @here", "10.0.0.2 @there"), "none"},
		{"another port", web(32001), "32001: 1"},
		{"the pod terminates", pods("10.0.0.1 @here !ready +serving +terminating"), "32001: 0"},
		{"the Service is deleted", Delta{DeletedServices: []types.NamespacedName{named("web")}}, "gone"},
		{"the Service is deleted again", Delta{DeletedServices: []types.NamespacedName{named("web")}}, "none"},
	} {
		if got := checkText(tracker.Apply(step.delta).HealthChecks); got != step.want {
			t.Errorf("%s: got %s, want %s", step.name, got, step.want)
		}
	}
	if got := tracker.Apply(web(70000)).Problems; len(got) != 1 || got[0].String() != "default/web: spec.healthCheckNodePort: 70000 is not a port: use 1 to 65535" {
		t.Errorf("problems of an invalid port: %v", got)
	}
}
