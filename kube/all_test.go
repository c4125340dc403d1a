package kube_test

import (
	"net/netip"
	"testing"

	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/kube/kubetest"
)

// TestAll checks that All yields the persisting problems, and no Service that is gone.
func TestAll(t *testing.T) {
	t.Parallel()
	tracker := kube.NewTracker(kube.Options{NodeName: "node"})
	web := kubetest.Service("default", "web", netip.MustParseAddr("10.96.0.10"))
	web.Spec.ExternalIPs = []string{"192.0.2.300"}
	gone := kubetest.Service("default", "gone", netip.MustParseAddr("10.96.0.11"))
	var delta kube.Delta
	delta.Services = append(delta.Services, web, gone)
	tracker.Apply(delta)
	var removal kube.Delta
	removal.DeletedServices = append(removal.DeletedServices, types.NamespacedName{Namespace: "default", Name: "gone"})
	removal.Services = append(removal.Services, web) // delivered again, so that its problem is not new
	if result := tracker.Apply(removal); len(result.Problems) > 0 {
		t.Errorf("new problems %v, want none", result.Problems)
	}
	var states []kube.ServiceState
	for s := range tracker.All() {
		states = append(states, s)
	}
	if len(states) != 1 || states[0].Name.String() != "default/web" || len(states[0].Ports) != 1 || len(states[0].Problems) != 1 ||
		states[0].Problems[0].Field != "spec.externalIPs[0]" {
		t.Errorf("states %+v, want the Service web with one port and the problem of its external IP", states)
	}
}
