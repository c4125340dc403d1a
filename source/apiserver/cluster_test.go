package apiserver_test

import (
	"context"
	"fmt"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/apiserver"
)

// TestFirstDelta checks that the first Delta has all objects that Fairlead needs and no
// others.
func TestFirstDelta(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	node := must[*corev1.Node](t)(client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: map[string]string{corev1.LabelTopologyZone: "a", "color": "red"}},
		Spec:       corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24"}},
	}, metav1.CreateOptions{}))

	web, headless, otherProxy := newService("web"), newService("headless"), newService("foreign")
	web.Annotations = map[string]string{"big": "note", corev1.AnnotationTopologyMode: "Auto"}
	web.Labels = map[string]string{"app": "web"}
	policy := corev1.IPFamilyPolicyRequireDualStack
	web.Spec.IPFamilyPolicy = &policy
	headless.Spec.ClusterIP = corev1.ClusterIPNone
	otherProxy.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "other"}
	for _, svc := range []*corev1.Service{web, headless, otherProxy} {
		must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), svc, metav1.CreateOptions{}))
	}
	slice, ofHeadless := newSlice("web-1", "web", "10.0.0.1", "10.0.0.2"), newSlice("headless-1", "headless", "10.0.0.3")
	slice.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: "2999-01-01T00:00:00Z", "big": "note"}
	slice.Endpoints[0].TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: "web-0"}
	ofHeadless.Labels[corev1.IsHeadlessService] = ""
	for _, slice := range []*discoveryv1.EndpointSlice{slice, ofHeadless} {
		must[*discoveryv1.EndpointSlice](t)(client.DiscoveryV1().EndpointSlices(ns).Create(t.Context(), slice, metav1.CreateOptions{}))
	}

	r := startSource(t, ns, apiserver.Options{NodeName: ns})
	r.waitFor(t, "first Delta", hasFirstDelta)
	r.mu.Lock()
	first := r.deltas[0]
	r.mu.Unlock()

	got := first.Services
	if len(got) != 1 || got[0].Name != "web" || len(got[0].Spec.ClusterIPs) != 2 {
		t.Fatalf("Services %v, want only web with two cluster IPs", got)
	}
	want := must[*corev1.Service](t)(client.CoreV1().Services(ns).Get(t.Context(), "web", metav1.GetOptions{}))
	want.Labels, want.ManagedFields, want.Spec.Selector = nil, nil, nil
	want.Annotations = nil
	if diff := cmp.Diff(want, got[0]); diff != "" {
		t.Errorf("Service (-want +got):\n%s", diff)
	}
	if len(first.EndpointSlices) != 1 {
		t.Fatalf("EndpointSlices %v, want only web-1", first.EndpointSlices)
	}
	wantSlice := must[*discoveryv1.EndpointSlice](t)(client.DiscoveryV1().EndpointSlices(ns).Get(t.Context(), "web-1", metav1.GetOptions{}))
	wantSlice.ManagedFields, wantSlice.Generation, wantSlice.Endpoints[0].TargetRef = nil, 0, nil
	delete(wantSlice.Annotations, "big")
	if diff := cmp.Diff(wantSlice, first.EndpointSlices[0]); diff != "" {
		t.Errorf("EndpointSlice (-want +got):\n%s", diff)
	}
	node.Labels, node.ManagedFields = map[string]string{corev1.LabelTopologyZone: "a"}, nil
	if diff := cmp.Diff(node, first.Node, cmpopts.IgnoreFields(corev1.Node{}, "ResourceVersion", "Status")); diff != "" {
		t.Errorf("Node (-want +got):\n%s", diff)
	}
	if len(first.ServiceCIDRs) == 0 || first.ServiceCIDRs[0].Name != "kubernetes" {
		t.Errorf("ServiceCIDRs %v, want the cluster's", first.ServiceCIDRs)
	}
}

// TestWatchEvents checks how changes in the cluster are delivered.
func TestWatchEvents(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	svcs, eps := client.CoreV1().Services(ns), client.DiscoveryV1().EndpointSlices(ns)
	r := startSource(t, ns, apiserver.Options{})
	r.waitFor(t, "first Delta", hasFirstDelta)
	ctx := t.Context()

	web := must[*corev1.Service](t)(svcs.Create(ctx, newService("web"), metav1.CreateOptions{}))
	r.waitFor(t, "a new Service", func(r *receiver) bool { return r.services["web"] != nil })
	slice := must[*discoveryv1.EndpointSlice](t)(eps.Create(ctx, newSlice("web-1", "web", "10.0.0.1"), metav1.CreateOptions{}))
	r.waitFor(t, "a new EndpointSlice", func(r *receiver) bool { return r.slices["web-1"] != nil })

	slice.Endpoints = nil
	must[*discoveryv1.EndpointSlice](t)(eps.Update(ctx, slice, metav1.UpdateOptions{}))
	r.waitFor(t, "an EndpointSlice without endpoints", func(r *receiver) bool { return len(r.slices["web-1"].Endpoints) == 0 })

	label := func(object string, value any) []byte {
		return fmt.Appendf(nil, `{"metadata":{"labels":{%q:%s}}}`, object, value)
	}
	const proxyNameLabel = "service.kubernetes.io/service-proxy-name"
	must[*corev1.Service](t)(svcs.Patch(ctx, "web", types.MergePatchType, label(proxyNameLabel, `"other"`), metav1.PatchOptions{}))
	r.waitFor(t, "removal of a Service of another proxy", func(r *receiver) bool { return r.services["web"] == nil })
	must[*corev1.Service](t)(svcs.Patch(ctx, "web", types.MergePatchType, label(proxyNameLabel, "null"), metav1.PatchOptions{}))
	r.waitFor(t, "a Service without another proxy's label", func(r *receiver) bool { return r.services["web"] != nil })
	must[*discoveryv1.EndpointSlice](t)(eps.Patch(ctx, "web-1", types.MergePatchType, label(corev1.IsHeadlessService, `""`), metav1.PatchOptions{}))
	r.waitFor(t, "removal of a headless EndpointSlice", func(r *receiver) bool { return r.slices["web-1"] == nil })

	// While deliver is busy, changes are coalesced.
	resume := r.pause()
	must[*corev1.Service](t)(svcs.Create(ctx, newService("first"), metav1.CreateOptions{}))
	if err := svcs.Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	again := must[*corev1.Service](t)(svcs.Create(ctx, newService("web"), metav1.CreateOptions{}))
	if again.UID == web.UID {
		t.Fatal("the recreated Service has the same UID")
	}
	for i := range 50 {
		must[*corev1.Service](t)(svcs.Create(ctx, newService(fmt.Sprintf("burst-%d", i)), metav1.CreateOptions{}))
	}
	if err := svcs.Delete(ctx, "first", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	must[*discoveryv1.EndpointSlice](t)(eps.Create(ctx, newSlice("last", "web", "10.0.0.1"), metav1.CreateOptions{}))
	before := r.count()
	resume()
	r.waitFor(t, "all changes of the burst", func(r *receiver) bool {
		return r.slices["last"] != nil && r.services["burst-49"] != nil && r.services["first"] == nil && r.services["web"].UID == again.UID
	})
	// One Delta, possibly without objects of this test, was being delivered. The other
	// changes arrive in one Delta per watch at most.
	if n := r.count() - before; n > 6 {
		t.Errorf("a burst of 54 changes was delivered in %d Deltas, want at most 6", n)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range r.deltas[before:] {
		for _, name := range d.DeletedServices {
			if name.Name == "web" {
				t.Errorf("the recreated Service is also deleted in %v", d)
			}
		}
	}
}

// TestChangeIsNotHandedOver checks that the goroutine that decodes a single change delivers it.
func TestChangeIsNotHandedOver(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	source := must[*apiserver.Source](t)(apiserver.New(apiserver.Options{Config: cluster.Config(), NodeName: "none", BatchPeriod: 8 * time.Millisecond}))
	stacks := make(chan string, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- source.Run(ctx, func(d kube.Delta) {
			if slices.ContainsFunc(d.Services, func(svc *corev1.Service) bool { return svc.Namespace == ns }) {
				stacks <- string(debug.Stack())
			}
		})
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	svc := must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), newService("web"), metav1.CreateOptions{}))
	<-stacks // probably in the first list
	// Changes of other tests can arrive at the same time. They are then delivered together by Run.
	const attempts = 20
	for range attempts {
		svc.Spec.Ports[0].Port++
		svc = must[*corev1.Service](t)(client.CoreV1().Services(ns).Update(t.Context(), svc, metav1.UpdateOptions{}))
		if strings.Contains(<-stacks, "(*watchStream).ResultChan") {
			return
		}
	}
	t.Errorf("none of %d changes was delivered while ResultChan waited for the next one", attempts)
}

// TestNode checks that the Node is delivered only when a field that Fairlead reads changes.
func TestNode(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	r := startSource(t, ns, apiserver.Options{NodeName: ns})
	r.waitFor(t, "first Delta", hasFirstDelta)
	r.mu.Lock()
	d := r.deltas[0]
	r.mu.Unlock()
	if d.Node != nil || d.NodeDeleted {
		t.Errorf("first Delta has Node %v, deleted %v, want neither", d.Node, d.NodeDeleted)
	}
	nodes, ctx := client.CoreV1().Nodes(), t.Context()
	for _, name := range []string{ns + "-other", ns} {
		must[*corev1.Node](t)(nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))
	}
	r.waitFor(t, "the Node", func(r *receiver) bool { return r.node != nil && r.node.Name == ns })

	patch := func(data string, sub ...string) {
		t.Helper()
		must[*corev1.Node](t)(nodes.Patch(ctx, ns, types.MergePatchType, []byte(data), metav1.PatchOptions{}, sub...))
	}
	deltas := func() (n int) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, d := range r.deltas {
			if d.Node != nil {
				n++
			}
		}
		return n
	}
	before := deltas()
	patch(`{"status":{"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":"2026-01-01T00:00:00Z"}]}}`, "status")
	patch(`{"metadata":{"annotations":{"a":"b"}}}`)
	patch(`{"metadata":{"labels":{"topology.kubernetes.io/zone":"z1"}}}`)
	r.waitFor(t, "the zone", func(r *receiver) bool { return r.node.Labels[corev1.LabelTopologyZone] == "z1" })
	patch(`{"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.1"}]}}`, "status")
	r.waitFor(t, "the address", func(r *receiver) bool { return len(r.node.Status.Addresses) == 1 })
	const autoscaler = "ToBeDeletedByClusterAutoscaler"
	patch(`{"spec":{"taints":[{"key":"` + autoscaler + `","effect":"NoSchedule"}]}}`)
	r.waitFor(t, "the taint", func(r *receiver) bool {
		return slices.ContainsFunc(r.node.Spec.Taints, func(taint corev1.Taint) bool { return taint.Key == autoscaler })
	})
	if n := deltas() - before; n != 3 {
		t.Errorf("the Node was delivered %d times, want 3 for three relevant changes of five", n)
	}
	if err := nodes.Delete(ctx, ns, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.waitFor(t, "removal of the Node", func(r *receiver) bool { return r.node == nil })
}

func TestServiceCIDRs(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	cidrs, ctx := client.NetworkingV1().ServiceCIDRs(), t.Context()
	r := startSource(t, "none", apiserver.Options{})
	r.waitFor(t, "first Delta", hasFirstDelta)
	const name = "more"
	must[*networkingv1.ServiceCIDR](t)(cidrs.Create(ctx, &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.97.0.0/24"}},
	}, metav1.CreateOptions{}))
	r.waitFor(t, "a ServiceCIDR", func(r *receiver) bool { return r.cidrs[name] })
	if err := cidrs.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	// No controller manager runs that would remove the finalizer.
	if _, err := cidrs.Patch(ctx, name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}); err != nil {
		t.Log(err)
	}
	r.waitFor(t, "removal of a ServiceCIDR", func(r *receiver) bool { return !r.cidrs[name] })
}

// TestBatchedReads checks, over HTTP/2 and TLS, that no change is lost when reads are
// batched and that each object ends in its last state.
func TestBatchedReads(t *testing.T) {
	t.Parallel()
	client := adminClient(t)
	ns := createNamespace(t, client)
	svcs, eps := client.CoreV1().Services(ns), client.DiscoveryV1().EndpointSlices(ns)
	r := startSource(t, ns, apiserver.Options{BatchPeriod: 50 * time.Millisecond})
	r.waitFor(t, "first Delta", hasFirstDelta)
	ctx := t.Context()
	const names, rounds = 20, 20
	var begun []*discoveryv1.EndpointSlice
	for i := range names {
		name := fmt.Sprintf("web-%d", i)
		must[*corev1.Service](t)(svcs.Create(ctx, newService(name), metav1.CreateOptions{}))
		begun = append(begun, must[*discoveryv1.EndpointSlice](t)(eps.Create(ctx, newSlice(name, name, "10.0.0.0"), metav1.CreateOptions{})))
	}
	for round := 1; round <= rounds; round++ {
		for i, slice := range begun {
			slice.Endpoints[0].Addresses = []string{fmt.Sprintf("10.0.0.%d", round)}
			begun[i] = must[*discoveryv1.EndpointSlice](t)(eps.Update(ctx, slice, metav1.UpdateOptions{}))
		}
	}
	for i := range names / 2 {
		if err := svcs.Delete(ctx, fmt.Sprintf("web-%d", i), metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	r.waitFor(t, "the last state of all objects", func(r *receiver) bool {
		for i, slice := range begun {
			got := r.slices[slice.Name]
			if got == nil || got.ResourceVersion != slice.ResourceVersion || (r.services[slice.Name] == nil) != (i < names/2) {
				return false
			}
		}
		return true
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	last := map[string]byte{}
	for _, d := range r.deltas {
		for _, slice := range d.EndpointSlices {
			round := netip.MustParseAddr(slice.Endpoints[0].Addresses[0]).As4()[3]
			if round < last[slice.Name] {
				t.Errorf("%s: round %d was delivered after round %d", slice.Name, round, last[slice.Name])
			}
			last[slice.Name] = round
		}
	}
}
