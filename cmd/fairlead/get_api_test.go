package main

import (
	"net/netip"
	"testing"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/inspect"
	"fairlead.io/fairlead/kube"
)

// TestEndpointState checks the states of endpoints with and without an EndpointSlice.
func TestEndpointState(t *testing.T) {
	t.Parallel()
	yes, no, port, name := true, false, int32(8080), "http"
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		Ports:      []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		Endpoints: []discoveryv1.Endpoint{
			{Addresses: []string{"10.244.0.1"}, Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no}},
			{Addresses: []string{"10.244.0.2"}, Conditions: discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}},
		},
	}
	f := &inspect.Frontend{Binding: dataplane.Binding{Service: "default/web:http"}}
	objects := newServiceObjects(kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{slice}})
	for _, test := range []struct {
		addr    string
		accepts bool
		objects *serviceObjects
		want    string
	}{
		{"10.244.0.1:8080", true, objects, "Ready"},
		{"10.244.0.2:8080", true, objects, "ServingTerminating"},
		{"10.244.0.2:8080", true, nil, "Ready"},
		{"10.244.0.2:8080", false, objects, "Draining"},
		{"10.244.0.3:8080", true, objects, "Ready"},
	} {
		r := &getResult{objects: test.objects}
		e := inspect.Endpoint{Addr: netip.MustParseAddrPort(test.addr), ForCluster: test.accepts}
		if got := r.endpointState(f, e); got != test.want {
			t.Errorf("%s, accepts connections: %v, with objects: %v: state %s, want %s", test.addr, test.accepts, test.objects != nil, got, test.want)
		}
	}
}
