package kube

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
)

// TestConvertedSlices checks that converted slices have the same result as the objects.
func TestConvertedSlices(t *testing.T) {
	t.Parallel()
	object := newSlice("web-1", "web", eps("10.0.0.1 @here", "10.0.0.2 @there"))
	services := []*corev1.Service{newService("web", "10.96.0.1")}
	whole := NewTracker(Options{NodeName: "here"}).Apply(Delta{Services: services, EndpointSlices: slice("10.0.0.1 @here", "10.0.0.2 @there")})
	converted := NewTracker(Options{NodeName: "here"}).Apply(Delta{Services: services, ConvertedSlices: []*ConvertedSlice{ConvertSlice(object, "here")}})
	if len(whole.Changes) == 0 {
		t.Fatal("no changes to compare")
	}
	for key, want := range whole.Changes {
		if got := converted.Changes[key]; !got.Equal(want) {
			t.Errorf("%s: %s", key, cmp.Diff(want.Endpoints, got.Endpoints))
		}
	}
}
