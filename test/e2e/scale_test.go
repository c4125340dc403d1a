//go:build e2e

package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/watch"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/test/controlplane"
)

// commitsMetric counts writes to the kernel, both by Fairlead and by kube-proxy.
const commitsMetric = "kubeproxy_sync_proxy_rules_duration_seconds_count"

// forEachParallel calls fn for each number below n, with limited concurrency.
func forEachParallel(ctx context.Context, n int, fn func(ctx context.Context, i int) error) error {
	const workers = 16
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(workers)
	for i := range n {
		group.Go(func() error { return fn(ctx, i) })
	}
	return group.Wait()
}

// addrPlus returns the nth address after first.
func addrPlus(first netip.Addr, n int) netip.Addr {
	bytes := first.AsSlice()
	for i := len(bytes) - 1; n > 0; i-- {
		n += int(bytes[i])
		bytes[i], n = byte(n), n>>8
	}
	addr, _ := netip.AddrFromSlice(bytes)
	return addr
}

// TestBurst creates and deletes a thousand pods of one Service. Fairlead must commit at most
// once per changed EndpointSlice, and another Service must work meanwhile.
func TestBurst(t *testing.T) {
	const pods = 1000
	s := newScenario(t, sharedCluster)
	// The pods of this Service are only API objects; no client connects to it.
	crowd := s.createService("crowd")
	web := s.createService("web")
	client, only := s.addClient(), s.createPod("web")
	s.waitReaches(client, tcpTo(web.addrPort(80)), only)
	commits := func() int {
		n, err := s.fairlead.metric(s.ctx, commitsMetric, `ip_family="IPv4"`)
		s.must(err)
		return int(n)
	}
	waitProgrammed := func(want int) {
		t.Helper()
		s.eventually(func(ctx context.Context) error { return s.checkReadyEndpoints(ctx, crowd.Name, want) })
		if want == 0 {
			s.waitRefused(client, tcpTo(crowd.addrPort(80)))
		}
		s.waitReaches(client, tcpTo(web.addrPort(80)), only)
	}
	load := s.startLoad(client, tcpTo(web.addrPort(80)))
	changes := s.countSliceChanges()

	start, before := time.Now(), commits()
	s.must(forEachParallel(s.ctx, pods, func(ctx context.Context, i int) error {
		name := fmt.Sprintf("crowd-%d", i)
		_, err := s.api.CoreV1().Pods(s.namespace).Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: s.namespace, Labels: map[string]string{"app": "crowd"}},
			Spec:       corev1.PodSpec{NodeName: otherNode, Containers: []corev1.Container{{Name: "web", Image: "test"}}},
		}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		return s.setStatus(ctx, name, true,
			addrPlus(netip.MustParseAddr("198.18.0.1"), i), addrPlus(netip.MustParseAddr("2001:db8:18::1"), i))
	}))
	waitProgrammed(pods)
	up, upChanges := commits()-before, int(changes.Swap(0))
	t.Logf("created %d pods within %s: %d changes of EndpointSlices, %d commits", pods, time.Since(start).Round(time.Millisecond), upChanges, up)

	start, before = time.Now(), commits()
	s.must(s.api.CoreV1().Pods(s.namespace).DeleteCollection(s.ctx,
		metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}, metav1.ListOptions{LabelSelector: "app=crowd"}))
	waitProgrammed(0)
	down, downChanges := commits()-before, int(changes.Swap(0))
	t.Logf("deleted %d pods within %s: %d changes of EndpointSlices, %d commits", pods, time.Since(start).Round(time.Millisecond), downChanges, down)
	s.stopLoad(load)

	// The controller decides how many changes of EndpointSlices it makes. Fairlead may commit
	// each of them at once, but not endpoint by endpoint.
	if up > upChanges || down > downChanges {
		t.Errorf("%d commits for %d changes, then %d for %d: want at most one per change", up, upChanges, down, downChanges)
	}
}

// countSliceChanges starts to count changes of the scenario's EndpointSlices.
func (s *scenario) countSliceChanges() *atomic.Int64 {
	s.Helper()
	changes := new(atomic.Int64)
	slices, err := s.api.DiscoveryV1().EndpointSlices(s.namespace).Watch(s.ctx, metav1.ListOptions{})
	s.must(err)
	var wg sync.WaitGroup
	s.Cleanup(wg.Wait)
	s.Cleanup(slices.Stop)
	wg.Go(func() {
		for event := range slices.ResultChan() {
			if event.Type != watch.Bookmark {
				changes.Add(1)
			}
		}
	})
	return changes
}

// storedServices returns Services and their EndpointSlices in the form that the API server
// stores.
func storedServices(t *testing.T, services, endpoints int) map[string][]byte {
	t.Helper()
	const namespace = "default"
	stored := make(map[string][]byte, 2*services)
	store := func(key string, object any) {
		data, err := json.Marshal(object)
		if err != nil {
			t.Fatal(err)
		}
		stored[key] = data
	}
	meta := func(name, uid string, i int, labels map[string]string) metav1.ObjectMeta {
		return metav1.ObjectMeta{
			Name: name, Namespace: namespace, Labels: labels, CreationTimestamp: metav1.Now(),
			UID: types.UID(fmt.Sprintf("%s-4000-8000-%012d", uid, i)), Generation: 1,
		}
	}
	for i := range services {
		name := fmt.Sprintf("web-%d", i)
		addr := addrPlus(netip.MustParseAddr("10.96.1.0"), i).String()
		store("/registry/services/specs/"+namespace+"/"+name, &corev1.Service{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
			ObjectMeta: meta(name, "00000000-0000", i, map[string]string{"app.kubernetes.io/name": name}),
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeClusterIP, ClusterIP: addr, ClusterIPs: []string{addr},
				IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, IPFamilyPolicy: new(corev1.IPFamilyPolicySingleStack),
				SessionAffinity: corev1.ServiceAffinityNone, InternalTrafficPolicy: new(corev1.ServiceInternalTrafficPolicyCluster),
				Ports: []corev1.ServicePort{{Name: "tcp-80", Port: 80, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(8080)}},
			},
		})
		slice := &discoveryv1.EndpointSlice{
			TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
			// The labels are those of the EndpointSlice controller.
			ObjectMeta: meta(name+"-x7c9d", "00000000-0001", i, map[string]string{
				discoveryv1.LabelServiceName: name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
			}),
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: new("tcp-80"), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}},
		}
		for j := range endpoints {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses:  []string{addrPlus(netip.MustParseAddr("10.128.0.1"), i*endpoints+j).String()},
				Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)},
				NodeName:   new(otherNode), Zone: new(otherZone),
				TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: fmt.Sprintf("%s-%d", name, j)},
			})
		}
		store("/registry/endpointslices/"+namespace+"/"+slice.Name, slice)
	}
	return stored
}

// TestMemory measures the resident memory of the program with 10,000 Services of 10 endpoints
// each.
func TestMemory(t *testing.T) {
	const (
		services, endpoints = 10_000, 10
		goal                = 150e6
		tolerated           = 400e6 // fails on a defect, not on a busy machine
	)
	c, err := newCluster(t.Context(), controlplane.Options{})
	t.Cleanup(func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := c.cp.Store(t.Context(), storedServices(t, services, endpoints)); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d Services with %d endpoints each were created within %s", services, endpoints, time.Since(start).Round(time.Second))

	start = time.Now()
	if err := c.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("programmed %s after starting", time.Since(start).Round(10*time.Millisecond))
	s := newScenario(t, c)
	web := s.createService("web", func(v *corev1.Service) {
		v.Spec.Selector = nil
		// The API server's allocator does not know the addresses of the stored Services.
		v.Spec.ClusterIP = "10.96.200.1"
		v.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack)
	})
	only := s.createPod("web")
	s.createSlice("web", sliceEndpoint{only, thisZone})
	start = time.Now()
	s.waitReaches(s.addClient(), tcpTo(web.addrPort(80)), only)
	t.Logf("another Service works %s after it was created", time.Since(start).Round(time.Millisecond))

	peak, now, err := c.fairlead.residentMemory()
	if err != nil {
		t.Fatal(err)
	}
	const mega = 1e6
	t.Logf("resident memory with %d Services of %d endpoints: now %.0f MB, peak %.0f MB, goal %.0f MB",
		services, endpoints, float64(now)/mega, float64(peak)/mega, goal/mega)
	if peak > tolerated {
		t.Errorf("peak resident memory is %d bytes, want at most %.0f", peak, tolerated)
	}
}
