package kube

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// conversionTest specifies the Services and problems for objects on the node "here".
type conversionTest struct {
	name     string
	node     *corev1.Node
	services []*corev1.Service
	slices   []*discoveryv1.EndpointSlice
	want     want
	problems []string
}

func testConversion(t *testing.T, rules []conversionTest) {
	t.Helper()
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			tracker := NewTracker(Options{NodeName: "here"})
			got := tracker.Apply(Delta{Node: r.node, Services: r.services, EndpointSlices: r.slices})
			checkExplanations(t, tracker, got.Changes)
			if diff := cmp.Diff(r.want, serviceTexts(got.Changes)); diff != "" {
				t.Errorf("Services (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(r.problems, problemTexts(got.Problems)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func one(svc *corev1.Service) []*corev1.Service { return []*corev1.Service{svc} }

func slice(endpoints ...string) []*discoveryv1.EndpointSlice {
	return []*discoveryv1.EndpointSlice{newSlice("web-1", "web", eps(endpoints...))}
}
