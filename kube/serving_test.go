package kube

import (
	"maps"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead.io/fairlead/dataplane"
)

// overUDP sets the protocol of all ports to UDP.
func overUDP(svc *corev1.Service) {
	for i := range svc.Spec.Ports {
		svc.Spec.Ports[i].Protocol = corev1.ProtocolUDP
	}
}

func udpSlice(endpoints ...string) []*discoveryv1.EndpointSlice {
	return []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps(endpoints...), slicePorts(slicePort("http", corev1.ProtocolUDP, 8080)))}
}

// TestServing checks which endpoints keep their existing flows without receiving new ones.
func TestServing(t *testing.T) {
	t.Parallel()
	const (
		cluster = "default/web:http IPv4"
		node    = "default/web:http IPv4 NodePort"
		local   = corev1.ServiceExternalTrafficPolicyLocal
	)
	web := func(changes ...func(*corev1.Service)) []*corev1.Service {
		return one(newService("web", "10.96.0.1", append(changes, overUDP)...))
	}
	draining := []string{"10.0.0.1 @there", "10.0.0.2 @there !ready +serving +terminating"}
	testConversion(t, []conversionTest{
		{
			name:     "a serving terminating endpoint",
			services: web(),
			slices:   udpSlice(draining...),
			want:     want{cluster: "10.96.0.1:80/UDP -> 10.0.0.1:8080, still serving [10.0.0.2:8080]"},
		},
		{
			name:     "not for TCP",
			services: one(newService("web", "10.96.0.1")),
			slices:   slice(draining...),
			want:     want{cluster: "10.96.0.1:80/TCP -> 10.0.0.1:8080"},
		},
		{
			name:     "endpoints that receive new flows are not listed",
			services: web(),
			slices:   udpSlice("10.0.0.1 @there !ready +serving +terminating"),
			want:     want{cluster: "10.96.0.1:80/UDP -> 10.0.0.1:8080"},
		},
		{
			name:     "an endpoint that is not serving",
			services: web(),
			slices:   udpSlice("10.0.0.1 @there", "10.0.0.2 @there !ready !serving +terminating", "10.0.0.3 @there !ready !serving"),
			want:     want{cluster: "10.96.0.1:80/UDP -> 10.0.0.1:8080"},
		},
		{
			name:     "an endpoint that is serving and not ready",
			services: web(),
			slices:   udpSlice("10.0.0.1 @there", "10.0.0.2 @there !ready +serving"),
			want:     want{cluster: "10.96.0.1:80/UDP -> 10.0.0.1:8080, still serving [10.0.0.2:8080]"},
		},
		{
			name:     "SCTP associations stay with an endpoint that is not ready, unless it is terminating and not serving",
			services: one(newService("web", "10.96.0.1", ports(port("http", corev1.ProtocolSCTP, 80)))),
			slices: []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps("10.0.0.1 @there", "10.0.0.2 @there !ready !serving",
				"10.0.0.3 @there !ready !serving +terminating", "10.0.0.4 @there !ready +serving +terminating"),
				slicePorts(slicePort("http", corev1.ProtocolSCTP, 8080)))},
			want: want{cluster: "10.96.0.1:80/SCTP -> 10.0.0.1:8080, still serving [10.0.0.2:8080 10.0.0.4:8080]"},
		},
		{
			name:     "of several entries for an address, the one for new flows is used",
			services: web(),
			slices: append(udpSlice("10.0.0.1 @there", "10.0.0.2 @there !ready !serving"),
				newSlice("web-2", "web", eps("10.0.0.2 @there !ready +serving +terminating"), slicePorts(slicePort("http", corev1.ProtocolUDP, 8080)))),
			want: want{cluster: "10.96.0.1:80/UDP -> 10.0.0.1:8080"},
		},
		{
			name:     "policies exclude endpoints from new flows, separately for each kind",
			services: web(nodePorts(30080), internalPolicy(corev1.ServiceInternalTrafficPolicyLocal), externalPolicy(local)),
			slices:   udpSlice("10.0.0.1 @here", "10.0.0.2 @there", "10.0.0.3 @here !ready +serving +terminating"),
			want: want{
				cluster: "10.96.0.1:80/UDP -> 10.0.0.1:8080(local), still serving [10.0.0.2:8080 10.0.0.3:8080]",
				node: "0.0.0.0:30080/UDP -> 10.0.0.1:8080(local) 10.0.0.2:8080, others -> 10.0.0.1:8080(local), " +
					"masquerade from-node, still serving [10.0.0.3:8080]",
			},
		},
		{
			name:     "hints exclude endpoints from new flows, even ready ones that are not serving (publishNotReadyAddresses)",
			services: web(),
			slices:   udpSlice("10.0.0.1 @there node=here", "10.0.0.2 @here +ready !serving node=there"),
			want:     want{cluster: "10.96.0.1:80/UDP -> 10.0.0.1:8080, still serving [10.0.0.2:8080]"},
		},
	})
}

// TestServingIsShared checks that all kinds of a port share one list, even after one kind has
// changed.
func TestServingIsShared(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{NodeName: "here"})
	got := map[dataplane.Key]*dataplane.Service{}
	full := newService("web", "10.96.0.1", everyKind(1), overUDP)
	another := newService("web", "10.96.0.1", everyKind(1), nodePorts(30081), overUDP)
	endpoints := udpSlice("10.0.0.1", "10.0.0.2 !ready +serving +terminating")
	var first *netip.AddrPort
	for _, step := range []struct {
		name    string
		delta   Delta
		changes int
	}{
		{"new", Delta{Services: one(full), EndpointSlices: endpoints}, 4},
		{"the same", Delta{EndpointSlices: endpoints}, 0},
		{"another node port", Delta{Services: one(another)}, 1},
	} {
		changes := tracker.Apply(step.delta).Changes
		if len(changes) != step.changes {
			t.Errorf("%s: %d changes, want %d", step.name, len(changes), step.changes)
		}
		maps.Copy(got, changes)
		for key, svc := range got {
			if len(svc.Serving) != 1 {
				t.Fatalf("%s: %s: %s", step.name, key, serviceText(svc))
			}
			if first == nil {
				first = &svc.Serving[0]
			}
			if first != &svc.Serving[0] {
				t.Errorf("%s: %s has a separate list", step.name, key)
			}
		}
	}
}
