package apiserver

import (
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"unsafe"
	"weak"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"fairlead.io/fairlead/kube"
)

// decodedSlice returns a slice as the decoder returns it: without shared memory, and with
// spare capacity after the last endpoint.
func decodedSlice(endpoints int) *discoveryv1.EndpointSlice {
	text := func(s string) *string { s = string([]byte(s)); return &s }
	flag := func(b bool) *bool { return &b }
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: "web-1", Namespace: *text("shop"), UID: "u", ResourceVersion: "7",
			Labels:        map[string]string{discoveryv1.LabelServiceName: "web", "endpointslice.kubernetes.io/managed-by": "x"},
			Annotations:   map[string]string{corev1.EndpointsLastChangeTriggerTime: "2999-01-01T00:00:00Z", "x": "y"},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "x"}}, OwnerReferences: []metav1.OwnerReference{{Name: "web"}},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: text("http"), Port: new(int32), AppProtocol: text("http")}},
	}
	*slice.Ports[0].Port = 8080
	for i := range endpoints {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{fmt.Sprintf("10.0.0.%d", i+1)}, NodeName: text(fmt.Sprintf("node-%d", i%2)), Zone: text("z"),
			Conditions: discoveryv1.EndpointConditions{Ready: flag(i%3 > 0), Serving: flag(true), Terminating: flag(i%3 == 0)},
			Hostname:   text("web-0"), TargetRef: &corev1.ObjectReference{Kind: "Pod"},
			Hints: &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: *text("z")}}, ForNodes: []discoveryv1.ForNode{{Name: *text("node-0")}}},
		})
	}
	return slice
}

func decodedService() *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Name: "web", Namespace: "shop", UID: "u", ResourceVersion: "6", Labels: map[string]string{"app": "web"},
			Annotations: map[string]string{kube.AnnotationBalancing: "source-hash", kube.AnnotationIPVSScheduler: "lc", corev1.AnnotationTopologyMode: "Auto", "x": "y"}, Finalizers: []string{"x"}, Generation: 3,
		},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Selector: map[string]string{"app": "web"}, ExternalIPs: []string{"192.0.2.1"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080), NodePort: 30080}},
		},
		Status: corev1.ServiceStatus{
			LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: "192.0.2.2"}}},
			Conditions:   []metav1.Condition{{Type: "x"}},
		},
	}
}

func decodedNode() *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "node-0", UID: "n", Labels: map[string]string{corev1.LabelTopologyZone: "z", "x": "y"}},
		Spec:       corev1.NodeSpec{PodCIDR: "10.244.0.0/24", PodCIDRs: []string{"10.244.0.0/24"}, Taints: []corev1.Taint{{Key: "x"}}},
		Status: corev1.NodeStatus{
			Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.9"}},
			Images:    []corev1.ContainerImage{{Names: []string{"x"}}},
		},
	}
}

// TestTrimPreservesConversion checks that package kube converts trimmed objects to the same
// result as untrimmed ones, also in converted form, for each annotation that selects a scheduler.
func TestTrimPreservesConversion(t *testing.T) {
	t.Parallel()
	for name, options := range map[string]kube.Options{
		kube.AnnotationIPVSScheduler: {Schedulers: []string{"lc"}},
		kube.AnnotationBalancing:     {Balancing: kube.Balancing{Schedulers: map[string]string{kube.BalanceSourceHash: "sh"}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testTrimPreservesConversion(t, options)
		})
	}
}

func testTrimPreservesConversion(t *testing.T, options kube.Options) {
	t.Helper()
	objects := func() kube.Delta {
		return kube.Delta{Services: []*corev1.Service{decodedService()}, EndpointSlices: []*discoveryv1.EndpointSlice{decodedSlice(5)}, Node: decodedNode()}
	}
	options.NodeName = "node-0"
	want := kube.NewTracker(options).Apply(objects())
	trimmed, trim := objects(), newTrimmer()
	trim.trimService(trimmed.Services[0])
	trim.trimEndpointSlice(trimmed.EndpointSlices[0])
	trim.trimNode(trimmed.Node)
	converted := kube.Delta{Node: trimmed.Node}
	converted.ConvertedServices = append(converted.ConvertedServices, newServiceConverter()(trimmed.Services[0]).converted)
	converted.ConvertedSlices = append(converted.ConvertedSlices, newSliceConverter(options.NodeName)(trimmed.EndpointSlices[0]).converted)
	got := kube.NewTracker(options).Apply(trimmed)
	if len(want.Changes) == 0 {
		t.Fatal("no changes to compare")
	}
	triggers := slices.Collect(want.Triggers())
	if len(triggers) == 0 {
		t.Error("no triggers to compare")
	}
	if diff := cmp.Diff(triggers, slices.Collect(got.Triggers())); diff != "" {
		t.Errorf("triggers (-whole +trimmed):\n%s", diff)
	}
	isSource := func(p cmp.Path) bool { return p.Last().String() == ".triggers" }
	for name, got := range map[string]kube.Result{"trimmed": got, "converted": kube.NewTracker(options).Apply(converted)} {
		if diff := cmp.Diff(want, got, cmp.Exporter(func(reflect.Type) bool { return true }), cmp.FilterPath(isSource, cmp.Ignore())); diff != "" {
			t.Errorf("(-whole +%s):\n%s", name, diff)
		}
	}
}

// TestTrim checks which fields are removed.
func TestTrim(t *testing.T) {
	t.Parallel()
	trim := newTrimmer()
	slice := decodedSlice(3)
	trim.trimEndpointSlice(slice)
	want := decodedSlice(3)
	want.Labels = map[string]string{discoveryv1.LabelServiceName: "web"}
	want.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: "2999-01-01T00:00:00Z"}
	want.ManagedFields, want.OwnerReferences, want.Ports[0].AppProtocol = nil, nil, nil
	for i := range want.Endpoints {
		want.Endpoints[i].Hostname, want.Endpoints[i].TargetRef = nil, nil
	}
	if diff := cmp.Diff(want, slice); diff != "" {
		t.Errorf("EndpointSlice (-want +got):\n%s", diff)
	}
	old := decodedSlice(1)
	old.Annotations[corev1.EndpointsLastChangeTriggerTime] = "2001-01-01T00:00:00Z"
	if trim.trimEndpointSlice(old); old.Annotations != nil {
		t.Errorf("a trigger time before the start of the program is kept: %v", old.Annotations)
	}
	svc, wantService := decodedService(), decodedService()
	trim.trimService(svc)
	wantService.Labels, wantService.Finalizers, wantService.Generation, wantService.Spec.Selector, wantService.Status.Conditions = nil, nil, 0, nil, nil
	wantService.Annotations = map[string]string{kube.AnnotationBalancing: "source-hash", kube.AnnotationIPVSScheduler: "lc"}
	if diff := cmp.Diff(wantService, svc); diff != "" {
		t.Errorf("Service (-want +got):\n%s", diff)
	}
	node, wantNode := decodedNode(), decodedNode()
	trim.trimNode(node)
	delete(wantNode.Labels, "x")
	wantNode.Status.Images = nil
	if diff := cmp.Diff(wantNode, node); diff != "" {
		t.Errorf("Node (-want +got):\n%s", diff)
	}
}

// TestTrimInterns checks that equal strings, flags and hints are shared between objects,
// and that endpoints have no spare capacity.
func TestTrimInterns(t *testing.T) {
	t.Parallel()
	trim := newTrimmer()
	a, b := decodedSlice(9), decodedSlice(9)
	trim.trimEndpointSlice(a)
	trim.trimEndpointSlice(b)
	nodes, hints, flags := map[*string]bool{}, map[*discoveryv1.EndpointHints]bool{}, map[*bool]bool{}
	for _, slice := range []*discoveryv1.EndpointSlice{a, b} {
		if spare := cap(slice.Endpoints) - len(slice.Endpoints); spare > 0 {
			t.Errorf("spare capacity for %d endpoints", spare)
		}
		for _, ep := range slice.Endpoints {
			nodes[ep.NodeName], hints[ep.Hints] = true, true
			flags[ep.Conditions.Ready], flags[ep.Conditions.Serving], flags[ep.Conditions.Terminating] = true, true, true
		}
	}
	if len(nodes) != 2 || len(hints) != 1 || len(flags) != 2 {
		t.Errorf("%d node names, %d hints, %d flags in memory, want 2, 1 and 2", len(nodes), len(hints), len(flags))
	}
	if unsafe.StringData(a.Namespace) != unsafe.StringData(b.Namespace) || a.Ports[0].Name != b.Ports[0].Name {
		t.Error("namespaces or port names are not shared")
	}
}

// TestInternedStringsAreBounded checks that strings that are no longer used do not
// accumulate.
func TestInternedStringsAreBounded(t *testing.T) {
	t.Parallel()
	trim := newTrimmer()
	for i := range 3 * maxInterned {
		name := fmt.Sprint(i)
		if got := *trim.internPointer(&name); got != fmt.Sprint(i) {
			t.Fatalf("%q became %q", fmt.Sprint(i), got)
		}
		trim.internHints(&discoveryv1.EndpointHints{ForNodes: []discoveryv1.ForNode{{Name: name}}})
	}
	if len(trim.strings) > maxInterned || len(trim.pointers) > maxInterned || len(trim.hints) > maxInterned {
		t.Errorf("holds %d strings, %d pointers and %d hints", len(trim.strings), len(trim.pointers), len(trim.hints))
	}
}

// TestTrimRetainsNoObject checks that interned values do not keep the object that they came
// from, nor its page, in memory.
func TestTrimRetainsNoObject(t *testing.T) {
	t.Parallel()
	trim := newTrimmer()
	// Each object is created in a separate stack frame, so that only the trimmer can hold it.
	var held []func() (string, bool)
	trackObject(&held, "Service", func() *corev1.Service {
		page := &corev1.ServiceList{Items: []corev1.Service{*decodedService()}}
		trim.trimPage(page)
		return &page.Items[0]
	})
	endpointSlices := func() *discoveryv1.EndpointSliceList {
		page := &discoveryv1.EndpointSliceList{Items: []discoveryv1.EndpointSlice{*decodedSlice(3)}}
		page.Items[0].Namespace = "of-a-slice"
		page.Items[0].Endpoints[0].NodeName = &page.Items[0].Name // as a decoder might
		trim.trimPage(page)
		return page
	}
	trackObject(&held, "EndpointSlice", func() *discoveryv1.EndpointSlice { return &endpointSlices().Items[0] })
	trackObject(&held, "endpoint", func() *discoveryv1.Endpoint { return &endpointSlices().Items[0].Endpoints[0] })
	trackObject(&held, "hints", func() *discoveryv1.EndpointHints {
		slice := decodedSlice(1)
		hints := slice.Endpoints[0].Hints
		hints.ForZones[0].Name = "of-hints"
		trim.trimEndpointSlice(slice)
		return hints
	})
	trackObject(&held, "Node", func() *corev1.Node {
		page := &corev1.NodeList{Items: []corev1.Node{*decodedNode()}}
		page.Items[0].Namespace = "of-a-node"
		trim.trimPage(page)
		return &page.Items[0]
	})
	trackObject(&held, "ServiceCIDR", func() *networkingv1.ServiceCIDR {
		page := &networkingv1.ServiceCIDRList{Items: []networkingv1.ServiceCIDR{{ObjectMeta: metav1.ObjectMeta{Namespace: "of-a-cidr"}}}}
		trim.trimPage(page)
		return &page.Items[0]
	})
	runtime.GC()
	for _, h := range held {
		if name, is := h(); is {
			t.Errorf("the %s is still in memory", name)
		}
	}
	if len(trim.strings) == 0 || len(trim.pointers) == 0 || len(trim.hints) == 0 {
		t.Error("the trimmer holds nothing, so that the test is void")
	}
}

// trackObject adds a function that reports whether the object from create is still in
// memory.
func trackObject[T any](held *[]func() (string, bool), name string, create func() *T) {
	p := weak.Make(create())
	*held = append(*held, func() (string, bool) { return name, p.Value() != nil })
}
