package kube

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead.io/fairlead/dataplane"
)

// hugeService returns a Service with portCount times addresses external frontends, and a slice of
// endpoints with all ports.
func hugeService(portCount, addresses, endpoints int, changes ...func(*corev1.Service)) Delta {
	var list []corev1.ServicePort
	var known []discoveryv1.EndpointPort
	for i := range portCount {
		name := fmt.Sprint("p", i)
		list = append(list, port(name, corev1.ProtocolTCP, int32(1000+i)))
		known = append(known, slicePort(name, corev1.ProtocolTCP, int32(1000+i)))
	}
	var ips []string
	for i := range addresses {
		ips = append(ips, fmt.Sprintf("203.%d.%d.%d", i>>16, i>>8&255, i&255))
	}
	slice := manyEndpoints("web", 0, endpoints)
	slice.Ports = known
	svc := newService("web", "10.96.0.1", ports(list...), externalIPs(ips...))
	for _, change := range changes {
		change(svc)
	}
	return Delta{Services: []*corev1.Service{svc}, EndpointSlices: []*discoveryv1.EndpointSlice{slice}}
}

// countElements counts the frontends and endpoints of the Services, and the frontends by kind.
func countElements(changes map[dataplane.Key]*dataplane.Service) (total int, frontends [dataplane.LoadBalancer + 1]int) {
	for key, s := range changes {
		if s != nil {
			frontends[key.Kind] += len(s.Frontends)
			total += len(s.Frontends) + len(s.Endpoints) + len(s.LocalEndpoints)
		}
	}
	return total, frontends
}

// TestLimit applies Services with more frontends and endpoints than the limit. The rest must be
// reported, and everything must be served after they shrink.
func TestLimit(t *testing.T) {
	t.Parallel()
	withAffinity := func(svc *corev1.Service) { svc.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }
	for _, tt := range []struct {
		name     string
		delta    Delta
		cluster  int // expected frontends
		external int
	}{
		{"200 external IPs with 100 ports and 100 endpoints", hugeService(100, 200, 100), 100, 20_000},
		{"500 ports", hugeService(500, 200, 100), 500, 100_000},
		{"2,000 ports", hugeService(2000, 200, 100), 2000, 200 * ((maxElements - 2000*101) / 300)},
		{"2,000 ports and external IPs", hugeService(2000, 2000, 10), 2000, 2000 * ((maxElements - 2000*11) / 2010)},
		{"too many endpoints", hugeService(3000, 1, 1000), maxElements / 1001, 0},
		{"affinity", hugeService(100, 200, 100, withAffinity), 100, 200 * ((maxElements - 100*201) / (200 + 2*200*100))},
		{"source hash", hugeService(300, 1, 10, balancing(BalanceSourceHash)), maxElements / (1 + dataplane.SourceHashSlots), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tracker := NewTracker(Options{Balancing: Balancing{Schedulers: map[string]string{BalanceSourceHash: dataplane.SourceHash}}})
			got := tracker.Apply(tt.delta)
			total, frontends := countElements(got.Changes)
			if frontends[dataplane.ClusterIP] != tt.cluster || frontends[dataplane.ExternalIP] != tt.external {
				t.Errorf("%d cluster IPs and %d external frontends, want %d and %d",
					frontends[dataplane.ClusterIP], frontends[dataplane.ExternalIP], tt.cluster, tt.external)
			}
			if total > maxElements {
				t.Errorf("%d frontends and endpoints, want at most %d", total, maxElements)
			}
			ports := len(tt.delta.Services[0].Spec.Ports)
			complete := tt.cluster == ports && tt.external == ports*len(tt.delta.Services[0].Spec.ExternalIPs)
			text := strings.Join(problemTexts(got.Problems), "\n")
			if reported := strings.Contains(text, "split it into several Services"); reported == complete || complete && text != "" {
				t.Errorf("problems: %s", text)
			}
			small := hugeService(3, 3, 3)
			got = tracker.Apply(small)
			_, frontends = countElements(got.Changes)
			if frontends[dataplane.ClusterIP] != 3 || frontends[dataplane.ExternalIP] != 9 || len(got.Problems) > 0 {
				t.Errorf("after it shrank: %v frontends, problems %v", frontends, problemTexts(got.Problems))
			}
		})
	}
}

// TestLimitBoundsAllocation applies a Service that requests a hundred million frontends. It is
// not parallel because it measures the allocations of the whole process.
func TestLimitBoundsAllocation(t *testing.T) { //nolint:paralleltest // see above
	d := hugeService(10_000, 10_000, 100)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	NewTracker(Options{}).Apply(d)
	runtime.ReadMemStats(&after)
	if mib := (after.TotalAlloc - before.TotalAlloc) >> 20; mib > 512 {
		t.Errorf("%d MiB allocated, want at most 512", mib)
	} else {
		t.Logf("%d MiB allocated", mib)
	}
}
