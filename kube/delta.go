package kube

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Delta is what a source delivers: objects that are new or have changed, and
// objects that are gone. The objects are shared and must not be changed. The
// first Delta of a source holds everything there is.
type Delta struct {
	Services              []*corev1.Service
	DeletedServices       []types.NamespacedName
	EndpointSlices        []*discoveryv1.EndpointSlice
	DeletedEndpointSlices []types.NamespacedName
}
