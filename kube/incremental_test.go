package kube

import (
	"maps"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/dataplane"
)

// everyKind gives the i-th of many Services every kind of frontend.
func everyKind(i int) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		nodePorts(int32(1 + i%65535))(svc)
		ingress(addrOf(172, i))(svc)
		externalIPs(addrOf(192, i))(svc)
		if i >= 65535 {
			svc.Spec.Ports[0].Protocol = corev1.ProtocolUDP
		}
	}
}

// TestIrrelevantChanges checks that an update of an object without an effect on this node results
// in no change.
func TestIrrelevantChanges(t *testing.T) {
	t.Parallel()
	full := func(changes ...func(*corev1.Service)) *corev1.Service {
		return newService("web", "10.96.0.1", append([]func(*corev1.Service){
			everyKind(1), timeout(60), sourceRangesOf("10.0.0.0/8", "192.0.2.0/24"), externalPolicy(corev1.ServiceExternalTrafficPolicyLocal),
			healthCheckNodePort(32000), age(time.Hour),
		}, changes...)...)
	}
	tracker := NewTracker(Options{NodeName: "here"})
	tracker.Apply(Delta{
		Node: newNode("198.51.100.1", inZone("a")), Services: one(full()),
		EndpointSlices: slice("10.0.0.1 @here zone=a", "10.0.0.2 @there zone=b"),
	})
	for _, step := range []struct {
		name  string
		delta Delta
	}{
		{"metadata of the Service", Delta{Services: one(full(func(svc *corev1.Service) {
			svc.ResourceVersion, svc.Generation, svc.UID = "2", 2, "other"
			svc.Labels = map[string]string{"a": "b"}
			svc.Annotations = map[string]string{corev1.AnnotationLoadBalancerSourceRangesKey: "10.0.0.0/8"}
		}))}},
		{"selector and conditions of the Service", Delta{Services: one(full(func(svc *corev1.Service) {
			svc.Spec.Selector = map[string]string{"a": "b"}
			svc.Status.Conditions = []metav1.Condition{{Type: "x"}}
		}))}},
		{"order and spelling of source ranges", Delta{Services: one(full(sourceRangesOf("192.0.2.7/24", " 10.0.0.0/8")))}},
		{"trafficDistribution, which only the EndpointSlice controller reads", Delta{Services: one(full(func(svc *corev1.Service) {
			svc.Spec.TrafficDistribution = new(corev1.ServiceTrafficDistributionPreferSameZone)
		}))}},
		{"order and targetRef of endpoints", Delta{EndpointSlices: []*discoveryv1.EndpointSlice{
			newSlice("web-1", "web", eps("10.0.0.2 @there zone=b", "10.0.0.1 @here zone=a"), func(s *discoveryv1.EndpointSlice) {
				s.ResourceVersion = "3"
				s.Endpoints[0].TargetRef = &corev1.ObjectReference{Name: "pod"}
			}),
		}}},
		{"an endpoint that is not usable", Delta{EndpointSlices: slice("10.0.0.1 @here zone=a", "10.0.0.2 @there zone=b", "10.0.0.3 @here !ready")}},
		{"a heartbeat of the Node", Delta{Node: newNode("198.51.100.1", inZone("a"), func(n *corev1.Node) {
			n.ResourceVersion = "4"
			n.Status.Images = []corev1.ContainerImage{{Names: []string{"x"}}}
			n.Labels["other"] = "label"
		})}},
		{"slices without a Service", Delta{EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("x", "nobody", eps("10.0.0.1"))}}},
	} {
		got := tracker.Apply(step.delta)
		if len(got.Changes)+len(got.Problems)+len(got.HealthChecks) != 0 || got.Node != nil || got.NodeHealth != nil {
			t.Errorf("%s: %s %+v", step.name, serviceTexts(got.Changes), got)
		}
	}
}

// TestListsAreShared checks that all kinds of frontends of a port share one list of endpoints,
// also after changes.
func TestListsAreShared(t *testing.T) {
	t.Parallel()
	full := func() *corev1.Service { return newService("web", "10.96.0.1", everyKind(1)) }
	got := map[dataplane.Key]*dataplane.Service{}
	tracker := NewTracker(Options{NodeName: "here"})
	for _, step := range []struct {
		name  string
		delta Delta
		kinds int
	}{
		{"the cluster IP alone", Delta{Services: one(newService("web", "10.96.0.1")), EndpointSlices: slice("10.0.0.1", "10.0.0.2")}, 1},
		{"more kinds", Delta{Services: one(full())}, 4},
		{"different endpoints", Delta{EndpointSlices: slice("10.0.0.1", "10.0.0.3")}, 4},
		{"fewer kinds", Delta{Services: one(newService("web", "10.96.0.1", nodePorts(30080)))}, 2},
		{"another kind", Delta{Services: one(newService("web", "10.96.0.1", nodePorts(30080), externalIPs("192.0.2.7")))}, 3},
	} {
		for key, svc := range tracker.Apply(step.delta).Changes {
			got[key] = svc
			if svc == nil {
				delete(got, key)
			}
		}
		copies := map[*dataplane.Endpoint]bool{}
		for _, svc := range got {
			if len(svc.Endpoints) != 2 {
				t.Fatalf("%s: %s", step.name, serviceText(svc))
			}
			copies[&svc.Endpoints[0]] = true
		}
		if len(got) != step.kinds || len(copies) != 1 {
			t.Errorf("%s: %d kinds with %d lists of endpoints, want %d with one", step.name, len(got), len(copies), step.kinds)
		}
	}
}

// TestLocalListsAreShared checks the same for the endpoints on this node. They share the
// cluster's list if they are the same endpoints.
func TestLocalListsAreShared(t *testing.T) {
	t.Parallel()
	full := func(changes ...func(*corev1.Service)) *corev1.Service {
		return newService("web", "10.96.0.1", append([]func(*corev1.Service){
			everyKind(1), externalPolicy(corev1.ServiceExternalTrafficPolicyLocal), internalPolicy(corev1.ServiceInternalTrafficPolicyLocal),
		}, changes...)...)
	}
	got := map[dataplane.Key]*dataplane.Service{}
	tracker := NewTracker(Options{NodeName: "here"})
	for _, step := range []struct {
		name   string
		delta  Delta
		copies int
	}{
		{"all on this node", Delta{Services: one(full()), EndpointSlices: slice("10.0.0.1 @here", "10.0.0.2 @here")}, 1},
		{"one on another node", Delta{EndpointSlices: slice("10.0.0.1 @here", "10.0.0.2 @there")}, 2},
		{"the cluster IP uses all endpoints", Delta{Services: one(full(internalPolicy(corev1.ServiceInternalTrafficPolicyCluster)))}, 2},
		{"another node port", Delta{Services: one(full(nodePorts(30081)))}, 2},
		{"one more on this node", Delta{EndpointSlices: slice("10.0.0.1 @here", "10.0.0.2 @there", "10.0.0.3 @here")}, 2},
	} {
		maps.Copy(got, tracker.Apply(step.delta).Changes)
		copies := map[*dataplane.Endpoint]bool{}
		for _, svc := range got {
			copies[&svc.Endpoints[0]] = true
			if svc.ExternalTrafficPolicyLocal {
				copies[&svc.LocalEndpoints[0]] = true
			}
		}
		if len(got) != 4 || len(copies) != step.copies {
			t.Errorf("%s: %d kinds with %d lists, want 4 with %d", step.name, len(got), len(copies), step.copies)
		}
	}
}

// TestApplyResolvesOnlyItsService checks that a changed slice affects only its Service. It
// replaces all other Services with values that must not be read.
func TestApplyResolvesOnlyItsService(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{NodeName: "here"})
	tracker.Apply(manyServices(100, everyKind))
	untouched := tracker.services[named("service-7")]
	for name, s := range tracker.services {
		if s != untouched {
			*s = service{name: name} // keeps its claims
			tracker.services[name] = nil
		}
	}
	result := tracker.Apply(Delta{EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("service-7-x7k2p", "service-7", eps("10.0.0.1"))}})
	if len(result.Changes) != 4 {
		t.Errorf("changes %v, want those of service-7", serviceTexts(result.Changes))
	}
	for key := range result.Changes {
		if key.Name != "service-7" {
			t.Errorf("%s changed, want only service-7", key)
		}
	}
}

// TestZoneChangeResolvesOnlyHintedServices checks that a change of the zone affects only Services
// with hints, and a heartbeat none.
func TestZoneChangeResolvesOnlyHintedServices(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{NodeName: "here"})
	d := manyServices(100, nil)
	for i := range 10 {
		d.EndpointSlices[i] = hintedEndpoints(d.EndpointSlices[i].Labels[discoveryv1.LabelServiceName])
	}
	d.Node = newNode("198.51.100.1", inZone("a"))
	tracker.Apply(d)
	for _, zone := range []string{"a", "b"} {
		before := tracker.round
		got := tracker.Apply(Delta{Node: newNode("198.51.100.1", inZone(zone))})
		touched := 0
		for _, s := range tracker.services {
			if s.dirtyRound == before+1 {
				touched++
			}
		}
		want := map[string]int{"a": 0, "b": 10}[zone]
		if touched != want || len(got.Changes) != want {
			t.Errorf("zone %s: %d resolved, %d changed, want %d", zone, touched, len(got.Changes), want)
		}
	}
}
