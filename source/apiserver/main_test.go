package apiserver_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"

	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/apiserver"
	"fairlead.io/fairlead/test/controlplane"
)

// cluster is the control plane that all tests share. Each test has its own namespace or
// Nodes; tests that disturb others do not run in parallel.
var cluster *controlplane.ControlPlane

func TestMain(m *testing.M) {
	if os.Getenv(memoryProcessEnv) != "" {
		runMemoryProcess()
		return
	}
	os.Exit(func() int {
		var err error
		if cluster, err = controlplane.New(context.Background(), controlplane.Options{}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = cluster.Close() }()
		return m.Run()
	}())
}

// adminClient returns a client with all rights.
func adminClient(t testing.TB) *kubernetes.Clientset {
	t.Helper()
	client, err := kubernetes.NewForConfig(cluster.Config())
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// createNamespace creates a namespace and returns its name.
func createNamespace(t testing.TB, client kubernetes.Interface) string {
	t.Helper()
	made, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return made.Name
}

// must returns a function that returns a value or fails the test.
func must[T any](t testing.TB) func(T, error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func newService(name string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": name},
			Ports:    []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}
}

func newSlice(name, service string, addrs ...string) *discoveryv1.EndpointSlice {
	yes, port, portName := true, int32(8080), "http"
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
	}
	for _, addr := range addrs {
		node := "node-1"
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{addr}, NodeName: &node, Conditions: discoveryv1.EndpointConditions{Ready: &yes},
		})
	}
	return slice
}

// receiver records the Deltas of a Source.
type receiver struct {
	namespace string // objects of other namespaces are ignored

	mu      sync.Mutex
	changed chan struct{}
	hold    chan struct{} // if not nil, receive waits for it
	// deltas has all Deltas, without objects of other namespaces.
	deltas   []kube.Delta
	first    bool
	services map[string]*corev1.Service
	slices   map[string]*discoveryv1.EndpointSlice
	node     *corev1.Node
	cidrs    map[string]bool
}

func (r *receiver) receive(d kube.Delta) {
	r.mu.Lock()
	hold := r.hold
	r.mu.Unlock()
	if hold != nil {
		<-hold
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.first = true
	mine := kube.Delta{Node: d.Node, NodeDeleted: d.NodeDeleted, ServiceCIDRs: d.ServiceCIDRs, DeletedServiceCIDRs: d.DeletedServiceCIDRs}
	for _, name := range d.DeletedServices {
		if name.Namespace == r.namespace {
			mine.DeletedServices = append(mine.DeletedServices, name)
			delete(r.services, name.Name)
		}
	}
	for _, svc := range d.Services {
		if svc.Namespace == r.namespace {
			mine.Services = append(mine.Services, svc)
			r.services[svc.Name] = svc
		}
	}
	for _, name := range d.DeletedEndpointSlices {
		if name.Namespace == r.namespace {
			mine.DeletedEndpointSlices = append(mine.DeletedEndpointSlices, name)
			delete(r.slices, name.Name)
		}
	}
	for _, slice := range d.EndpointSlices {
		if slice.Namespace == r.namespace {
			mine.EndpointSlices = append(mine.EndpointSlices, slice)
			r.slices[slice.Name] = slice
		}
	}
	for _, name := range d.DeletedServiceCIDRs {
		delete(r.cidrs, name)
	}
	for _, cidr := range d.ServiceCIDRs {
		r.cidrs[cidr.Name] = true
	}
	if d.Node != nil {
		r.node = d.Node
	}
	if d.NodeDeleted {
		r.node = nil
	}
	r.deltas = append(r.deltas, mine)
	close(r.changed)
	r.changed = make(chan struct{})
}

// waitFor waits until the condition is true.
func (r *receiver) waitFor(t testing.TB, what string, condition func(*receiver) bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		r.mu.Lock()
		ok, changed := condition(r), r.changed
		r.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			r.mu.Lock()
			defer r.mu.Unlock()
			t.Fatalf("not delivered: %s; Services %v, EndpointSlices %v, Node %v, ServiceCIDRs %v",
				what, joinKeys(r.services), joinKeys(r.slices), r.node != nil, joinKeys(r.cidrs))
		}
	}
}

func joinKeys[V any](m map[string]V) string {
	var b strings.Builder
	for key := range m {
		b.WriteString(key + " ")
	}
	return b.String()
}

// hasFirstDelta is the condition that the first Delta was delivered.
func hasFirstDelta(r *receiver) bool { return r.first }

// count returns the number of Deltas.
func (r *receiver) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.deltas)
}

// pause blocks deliver until resume is called.
func (r *receiver) pause() (resume func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	hold := make(chan struct{})
	r.hold = hold
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.hold = nil
		close(hold)
	}
}

// startSource runs a Source until the test ends.
func startSource(t testing.TB, ns string, opts apiserver.Options) *receiver {
	t.Helper()
	r := &receiver{
		namespace: ns, changed: make(chan struct{}),
		services: map[string]*corev1.Service{}, slices: map[string]*discoveryv1.EndpointSlice{}, cidrs: map[string]bool{},
	}
	if opts.Config == nil {
		opts.Config = cluster.Config()
	}
	if opts.NodeName == "" {
		opts.NodeName = "none"
	}
	source, err := apiserver.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- source.Run(ctx, r.receive) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run returned %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run did not return")
		}
	})
	return r
}

func serviceNameIn(ns, name string) types.NamespacedName {
	return types.NamespacedName{Namespace: ns, Name: name}
}
