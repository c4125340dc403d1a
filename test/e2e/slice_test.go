//go:build e2e

package e2e_test

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// sliceEndpoint is a pod in an EndpointSlice that the test writes, with the zone of its hint.
type sliceEndpoint struct {
	pod  *pod
	zone string
}

// createSlice creates an IPv4 EndpointSlice for a Service without a selector, for port 80 of
// [scenario.createService].
func (s *scenario) createSlice(service string, endpoints ...sliceEndpoint) {
	s.Helper()
	object := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			GenerateName: service + "-", Namespace: s.namespace,
			Labels: map[string]string{discoveryv1.LabelServiceName: service},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: new("tcp-80"), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}},
	}
	for _, e := range endpoints {
		object.Endpoints = append(object.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{e.pod.IPv4.String()},
			Conditions: discoveryv1.EndpointConditions{Ready: new(true)},
			Hints:      &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: e.zone}}},
		})
	}
	_, err := s.api.DiscoveryV1().EndpointSlices(s.namespace).Create(s.ctx, object, metav1.CreateOptions{})
	s.must(err)
}
