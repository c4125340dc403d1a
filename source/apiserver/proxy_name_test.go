package apiserver_test

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/apiserver"
)

// responseRecorder records the bodies of all responses.
type responseRecorder struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *responseRecorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *responseRecorder) contains(text string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Contains(r.text.Bytes(), []byte(text))
}

// wrap returns a transport that records the responses of another one.
func (r *responseRecorder) wrap(transport http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		response, err := transport.RoundTrip(request)
		if err == nil {
			response.Body = struct {
				io.Reader
				io.Closer
			}{io.TeeReader(response.Body, r), response.Body}
		}
		return response, err
	})
}

// TestServiceProxyName checks that the API server sends a named proxy nothing about the Services of
// other proxies, in the initial lists and on changes.
func TestServiceProxyName(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns, ctx := createNamespace(t, client), t.Context()
	svcs, eps := client.CoreV1().Services(ns), client.DiscoveryV1().EndpointSlices(ns)
	create := func(name string, labels map[string]string) {
		t.Helper()
		svc, slice := newService(name), newSlice(name, name, "10.0.0.1")
		svc.Labels = labels
		maps.Copy(slice.Labels, labels) // as the EndpointSlice controller does
		must[*corev1.Service](t)(svcs.Create(ctx, svc, metav1.CreateOptions{}))
		must[*discoveryv1.EndpointSlice](t)(eps.Create(ctx, slice, metav1.CreateOptions{}))
	}
	own, other := map[string]string{kube.LabelServiceProxyName: "try"}, map[string]string{kube.LabelServiceProxyName: "other"}
	create("own-1", own)
	create("foreign-1", nil)
	create("foreign-2", other)

	var responses responseRecorder
	config := rest.CopyConfig(cluster.Config())
	config.DisableCompression = true // makes the responses readable
	config.Wrap(responses.wrap)
	r := startSource(t, ns, apiserver.Options{Config: config, ServiceProxyName: "try"})
	r.waitFor(t, "the first Service", func(r *receiver) bool { return r.services["own-1"] != nil && r.slices["own-1"] != nil })

	for i, labels := range []map[string]string{nil, other} {
		name := fmt.Sprintf("foreign-%d", i+1)
		svc := must[*corev1.Service](t)(svcs.Get(ctx, name, metav1.GetOptions{}))
		svc.Spec.Ports[0].Port = 81
		must[*corev1.Service](t)(svcs.Update(ctx, svc, metav1.UpdateOptions{}))
		slice := must[*discoveryv1.EndpointSlice](t)(eps.Get(ctx, name, metav1.GetOptions{}))
		slice.Endpoints = nil
		must[*discoveryv1.EndpointSlice](t)(eps.Update(ctx, slice, metav1.UpdateOptions{}))
		create(fmt.Sprintf("foreign-%d", i+3), labels)
	}
	// A watch has the events in the order of the changes.
	create("own-2", own)
	r.waitFor(t, "the last Service", func(r *receiver) bool { return r.services["own-2"] != nil && r.slices["own-2"] != nil })
	if !responses.contains("own-2") || responses.contains("foreign") {
		t.Errorf("responses contain own objects: %t, objects of other proxies: %t", responses.contains("own-2"), responses.contains("foreign"))
	}
}
