package apiserver_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"fairlead.io/fairlead/bench/apiserver"
)

const timeout = 20 * time.Second

// contentConfigs returns the content types that client-go can use.
func contentConfigs() map[string]rest.ContentConfig {
	return map[string]rest.ContentConfig{
		"JSON":     {ContentType: "application/json"},
		"protobuf": {ContentType: "application/vnd.kubernetes.protobuf", AcceptContentTypes: "application/vnd.kubernetes.protobuf,application/json"},
	}
}

func serve(t testing.TB, content rest.ContentConfig) (*apiserver.Server, kubernetes.Interface) {
	t.Helper()
	server := apiserver.New()
	at := httptest.NewServer(server)
	t.Cleanup(func() {
		at.CloseClientConnections()
		at.Close()
	})
	client, err := kubernetes.NewForConfig(&rest.Config{Host: at.URL, ContentConfig: content})
	if err != nil {
		t.Fatal(err)
	}
	return server, client
}

type versioner struct {
	testing.TB
	sequence apiserver.VersionSequence
}

func (m *versioner) stamp(o apiserver.Object) *apiserver.Version {
	m.Helper()
	v, err := m.sequence.Stamp(o)
	if err != nil {
		m.Fatal(err)
	}
	return v
}

func service(name, clusterIP string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec:       corev1.ServiceSpec{ClusterIP: clusterIP, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}
}

func slice(name string, endpoints int) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}},
	}
	for i := range endpoints {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{fmt.Sprintf("10.0.0.%d", i+1)}, NodeName: new("node"),
			Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)},
		})
	}
	return s
}

// TestInformers checks that informers receive all objects, changes and deletions.
func TestInformers(t *testing.T) {
	for name, content := range contentConfigs() {
		t.Run(name, func(t *testing.T) {
			m := &versioner{TB: t}
			server, client := serve(t, content)
			server.Put(m.stamp(service("a", "10.96.0.1")), m.stamp(service("b", "10.96.0.2")), m.stamp(slice("a", 2)),
				m.stamp(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}}),
				m.stamp(&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12"}}}))
			factory := informers.NewSharedInformerFactory(client, 0)
			seen := make(chan string, 100)
			for kind, informer := range map[string]cache.SharedIndexInformer{
				"Service":       factory.Core().V1().Services().Informer(),
				"Node":          factory.Core().V1().Nodes().Informer(),
				"EndpointSlice": factory.Discovery().V1().EndpointSlices().Informer(),
				"ServiceCIDR":   factory.Networking().V1().ServiceCIDRs().Informer(),
			} {
				record := func(event string, o any) {
					if deleted, ok := o.(cache.DeletedFinalStateUnknown); ok {
						o = deleted.Obj
					}
					object := o.(metav1.Object)
					seen <- strings.Join([]string{event, kind, object.GetName(), object.GetResourceVersion()}, " ")
				}
				if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
					AddFunc:    func(o any) { record("added", o) },
					UpdateFunc: func(_, o any) { record("changed", o) },
					DeleteFunc: func(o any) { record("deleted", o) },
				}); err != nil {
					t.Fatal(err)
				}
			}
			stop := make(chan struct{})
			factory.Start(stop)
			t.Cleanup(factory.Shutdown)
			t.Cleanup(func() { close(stop) })
			expect := func(want ...string) {
				t.Helper()
				missing := map[string]bool{}
				for _, w := range want {
					missing[w] = true
				}
				for len(missing) > 0 {
					select {
					case got := <-seen:
						if !missing[got] {
							t.Errorf("got %q, want one of %v", got, missing)
						}
						delete(missing, got)
					case <-time.After(timeout):
						t.Fatalf("missing events: %v", missing)
					}
				}
			}
			expect("added Service a 1", "added Service b 2", "added EndpointSlice a 3", "added Node node 4", "added ServiceCIDR kubernetes 5")
			changed, before := m.stamp(slice("a", 3)), time.Now()
			if at, ok := changed.SentAt(); ok {
				t.Errorf("a version was sent at %s, before it was put", at)
			}
			server.Put(changed)
			expect("changed EndpointSlice a 6")
			if at, ok := changed.SentAt(); !ok || at.Before(before) || at.After(time.Now()) {
				t.Errorf("a version that a watch has received was sent at %s, %t", at, ok)
			}
			server.Put(m.stamp(service("c", "10.96.0.3")), m.stamp(slice("c", 1)))
			expect("added Service c 7", "added EndpointSlice c 8")
			server.Delete(m.stamp(service("b", "10.96.0.2")))
			expect("deleted Service b 9")
			got, err := factory.Discovery().V1().EndpointSlices().Lister().EndpointSlices("default").Get("a")
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Endpoints) != 3 || got.Endpoints[2].Addresses[0] != "10.0.0.3" || *got.Ports[0].Port != 8080 {
				t.Errorf("got EndpointSlice %+v", got)
			}
		})
	}
}

// TestSelectors checks that clients receive only the objects they select, and that they receive an
// addition or a deletion when an object starts or stops matching.
func TestSelectors(t *testing.T) {
	const label = "service.kubernetes.io/service-proxy-name"
	labelled := func(name, clusterIP string) *corev1.Service {
		s := service(name, clusterIP)
		s.Labels = map[string]string{label: "other"}
		return s
	}
	for name, content := range contentConfigs() {
		t.Run(name, func(t *testing.T) {
			m := &versioner{TB: t}
			server, client := serve(t, content)
			server.Put(m.stamp(service("a", "10.96.0.1")), m.stamp(service("headless", "None")), m.stamp(labelled("other", "10.96.0.2")))
			options := metav1.ListOptions{LabelSelector: "!" + label, FieldSelector: "spec.clusterIP!=None"}
			list, err := client.CoreV1().Services("").List(t.Context(), options)
			if err != nil {
				t.Fatal(err)
			}
			if len(list.Items) != 1 || list.Items[0].Name != "a" || list.ResourceVersion != "3" {
				t.Errorf("got list %+v, want only a at version 3", list)
			}
			options.ResourceVersion = list.ResourceVersion
			server.Put(m.stamp(service("other", "10.96.0.2"))) // between the list and the watch
			w, err := client.CoreV1().Services("").Watch(t.Context(), options)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Stop()
			server.Put(m.stamp(labelled("a", "10.96.0.1")), m.stamp(labelled("headless", "None")))
			server.Delete(m.stamp(service("other", "10.96.0.2")))
			for _, want := range []string{"ADDED other 4", "DELETED a 5", "DELETED other 7"} {
				select {
				case e := <-w.ResultChan():
					object := e.Object.(metav1.Object)
					if got := fmt.Sprintf("%s %s %s", e.Type, object.GetName(), object.GetResourceVersion()); got != want {
						t.Errorf("got event %q, want %q", got, want)
					}
				case <-time.After(timeout):
					t.Fatalf("no event, want %q", want)
				}
			}
			_, err = client.CoreV1().Services("").List(t.Context(), metav1.ListOptions{FieldSelector: "status.phase=Running"})
			if !apierrors.IsBadRequest(err) {
				t.Errorf("unsupported selector: error %v, want BadRequest", err)
			}
		})
	}
}

// TestRequests checks requests for existing and missing objects, and that the server returns
// Events.
func TestRequests(t *testing.T) {
	for name, content := range contentConfigs() {
		t.Run(name, func(t *testing.T) {
			m := &versioner{TB: t}
			server, client := serve(t, content)
			server.Put(m.stamp(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}}))
			node, err := client.CoreV1().Nodes().Get(t.Context(), "node", metav1.GetOptions{})
			if err != nil || node.ResourceVersion != "1" {
				t.Errorf("got %v, error %v; want the node at version 1", node, err)
			}
			if _, err = client.CoreV1().Nodes().Get(t.Context(), "other", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
				t.Errorf("missing node: error %v, want NotFound", err)
			}
			if _, err = client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsNotFound(err) {
				t.Errorf("unsupported resource pods: error %v, want NotFound", err)
			}
			event, err := client.EventsV1().Events("default").Create(t.Context(), &eventsv1.Event{
				ObjectMeta: metav1.ObjectMeta{Name: "e", Namespace: "default"}, Reason: "Starting",
			}, metav1.CreateOptions{})
			if err != nil || event.Reason != "Starting" {
				t.Errorf("got event %v, error %v; want the created event", event, err)
			}
		})
	}
}

// TestErrorResponses checks the responses to a watch that is too far behind and to an unsupported
// media type.
func TestErrorResponses(t *testing.T) {
	m := &versioner{TB: t}
	server, client := serve(t, contentConfigs()["JSON"])
	for i := range 100_000 {
		server.Put(m.stamp(slice("a", i%2)))
	}
	w, err := client.DiscoveryV1().EndpointSlices("").Watch(t.Context(), metav1.ListOptions{ResourceVersion: "1"})
	if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Errorf("watch of an old version: got %v, error %v; want the error ResourceExpired or Gone", w, err)
	}
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/nodes", http.NoBody)
	r.Header.Set("Accept", "application/cbor")
	answer := httptest.NewRecorder()
	server.ServeHTTP(answer, r)
	if answer.Code != http.StatusNotAcceptable {
		t.Errorf("unsupported media type: status %d, want %d", answer.Code, http.StatusNotAcceptable)
	}
}

// BenchmarkList measures a list of 10,000 EndpointSlices, as at the start of a program, in server
// and client.
func BenchmarkList(b *testing.B) {
	m := &versioner{TB: b}
	server, client := serve(b, contentConfigs()["protobuf"])
	for i := range 10_000 {
		server.Put(m.stamp(slice(fmt.Sprintf("service-%d", i), 10)))
	}
	for b.Loop() {
		list, err := client.DiscoveryV1().EndpointSlices("").List(b.Context(), metav1.ListOptions{})
		if err != nil || len(list.Items) != 10_000 {
			b.Fatalf("%d slices, error %v", len(list.Items), err)
		}
	}
}

// BenchmarkWatch measures streaming of changes to three clients.
func BenchmarkWatch(b *testing.B) {
	const watchers = 3
	m := &versioner{TB: b}
	server, client := serve(b, contentConfigs()["protobuf"])
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	server.Put(m.stamp(slice("a", 1)))
	var streams []<-chan struct{}
	for range watchers {
		w, err := client.DiscoveryV1().EndpointSlices("").Watch(ctx, metav1.ListOptions{ResourceVersion: "1"})
		if err != nil {
			b.Fatal(err)
		}
		arrived := make(chan struct{}, 1024)
		go func() {
			for range w.ResultChan() {
				arrived <- struct{}{}
			}
		}()
		streams = append(streams, arrived)
	}
	n := 0
	for b.Loop() {
		server.Put(m.stamp(slice("a", 10)))
		if n++; n%100 == 0 {
			for _, s := range streams {
				for range 100 {
					<-s
				}
			}
		}
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "changes/s")
}
