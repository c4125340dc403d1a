package kube

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func addrPort(addr netip.Addr, port int32) netip.AddrPort {
	return netip.AddrPortFrom(addr, uint16(port))
}

// addrOf returns the i-th address whose first octet is first.
func addrOf(first, i int) string {
	return fmt.Sprintf("%d.%d.%d.%d", first, 16+i>>16, i>>8&0xff, i&0xff)
}

// manyServices returns n Services, each with a slice of 10 endpoints. If change is not nil,
// change(i) modifies the i-th Service.
func manyServices(n int, change func(i int) func(*corev1.Service)) Delta {
	var d Delta
	for i := range n {
		name := fmt.Sprintf("service-%d", i)
		svc := newService(name, fmt.Sprintf("10.%d.%d.%d", 96+i>>16, i>>8&0xff, i&0xff))
		if change != nil {
			change(i)(svc)
		}
		d.Services = append(d.Services, svc)
		d.EndpointSlices = append(d.EndpointSlices, tenEndpoints(svc, 1+i%200))
	}
	return d
}

func tenEndpoints(svc *corev1.Service, pod int) *discoveryv1.EndpointSlice {
	var addrs []string
	for i := range 10 {
		addrs = append(addrs, fmt.Sprintf("10.%d.0.%d @there", i, pod))
	}
	return newSlice(svc.Name+"-x7k2p", svc.Name, eps(addrs...), slicePorts(slicePort("http", svc.Spec.Ports[0].Protocol, 8080)))
}

// hintedEndpoints returns a slice of 10 endpoints in two zones.
func hintedEndpoints(service string) *discoveryv1.EndpointSlice {
	var addrs []string
	for i := range 10 {
		addrs = append(addrs, fmt.Sprintf("10.%d.0.1 @there zone=%c", i, 'a'+i%2))
	}
	return newSlice(service+"-x7k2p", service, eps(addrs...))
}

// serviceCounts returns the numbers of Services in the benchmarks. The cost of an event must not
// depend on them.
func serviceCounts() []int { return []int{1_000, 10_000, 100_000} }

// BenchmarkTrackerApply measures a change of one endpoint in an EndpointSlice of 10, for Services
// with only a cluster IP and for Services with every kind of frontend.
func BenchmarkTrackerApply(b *testing.B) {
	for _, kinds := range []struct {
		name   string
		change func(int) func(*corev1.Service)
		keys   int
	}{{"cluster-ip", nil, 1}, {"every-kind", everyKind, 4}} {
		for _, n := range serviceCounts() {
			b.Run(fmt.Sprintf("kinds=%s/services=%d", kinds.name, n), func(b *testing.B) {
				d := manyServices(n, kinds.change)
				tracker := NewTracker(Options{NodeName: "here"})
				tracker.Apply(d)
				// There are two variants of the slices of up to 512 Services. Each pass over the
				// deltas reverts the previous pass.
				services := min(n, 512)
				deltas := make([]Delta, 2*services)
				for i := range deltas {
					slice := tenEndpoints(d.Services[i%services*(n/services)], 1)
					slice.Endpoints[9].Addresses = []string{fmt.Sprintf("10.200.0.%d", i/services)}
					deltas[i] = Delta{EndpointSlices: []*discoveryv1.EndpointSlice{slice}}
				}
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					if got := len(tracker.Apply(deltas[i%len(deltas)]).Changes); got != kinds.keys {
						b.Fatalf("%d changes, want %d", got, kinds.keys)
					}
					i++
				}
			})
		}
	}
}

// BenchmarkTrackerHeartbeat measures a Node update without relevant changes.
func BenchmarkTrackerHeartbeat(b *testing.B) {
	for _, n := range serviceCounts() {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			tracker := NewTracker(Options{NodeName: "here"})
			tracker.Apply(manyServices(n, nil))
			var deltas [2]Delta
			for i := range deltas {
				deltas[i].Node = newNode("198.51.100.1 2001:db8::1", inZone("a"), podCIDRs("10.1.0.0/24"))
				deltas[i].Node.Status.Conditions = []corev1.NodeCondition{{LastHeartbeatTime: metav1.Unix(int64(i), 0)}}
			}
			tracker.Apply(deltas[1])
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if got := tracker.Apply(deltas[i%2]); got.Node != nil || len(got.Changes) != 0 {
					b.Fatalf("a heartbeat resulted in %+v", got)
				}
				i++
			}
		})
	}
}

// BenchmarkTrackerZone measures a change of the node's zone, with 10 Services whose endpoints
// have hints.
func BenchmarkTrackerZone(b *testing.B) {
	for _, n := range serviceCounts() {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			d := manyServices(n, nil)
			for i := range 10 {
				d.EndpointSlices[i] = hintedEndpoints(d.Services[i].Name)
			}
			d.Node = newNode("", inZone("b"))
			tracker := NewTracker(Options{NodeName: "here"})
			tracker.Apply(d)
			deltas := [2]Delta{{Node: newNode("", inZone("a"))}, {Node: newNode("", inZone("b"))}}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if got := len(tracker.Apply(deltas[i%2]).Changes); got != 10 {
					b.Fatalf("%d changes, want 10", got)
				}
				i++
			}
		})
	}
}

// BenchmarkTrackerService measures a changed external IP of one Service, which changes its
// claims.
func BenchmarkTrackerService(b *testing.B) {
	for _, n := range serviceCounts() {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			d := manyServices(n, everyKind)
			tracker := NewTracker(Options{NodeName: "here"})
			tracker.Apply(d)
			var deltas [2]Delta
			for i := range deltas {
				svc := d.Services[n/2].DeepCopy()
				svc.Spec.ExternalIPs = []string{fmt.Sprintf("203.0.113.%d", i)}
				deltas[i].Services = one(svc)
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if got := len(tracker.Apply(deltas[i%2]).Changes); got != 1 {
					b.Fatalf("%d changes, want 1", got)
				}
				i++
			}
		})
	}
}

// BenchmarkTrackerLoad measures the first Delta with all objects, and the memory of the Tracker
// and its Services without the objects.
func BenchmarkTrackerLoad(b *testing.B) {
	for _, kinds := range []struct {
		name   string
		change func(int) func(*corev1.Service)
		keys   int
	}{{"cluster-ip", nil, 1}, {"every-kind", everyKind, 4}} {
		for _, n := range serviceCounts() {
			b.Run(fmt.Sprintf("kinds=%s/services=%d", kinds.name, n), func(b *testing.B) {
				d := manyServices(n, kinds.change)
				before := heap()
				var tracker *Tracker
				b.ReportAllocs()
				for b.Loop() {
					tracker = NewTracker(Options{})
					if got := len(tracker.Apply(d).Changes); got != kinds.keys*n {
						b.Fatalf("%d changes, want %d", got, kinds.keys*n)
					}
				}
				b.ReportMetric(float64(heap()-before)/float64(n), "heap-B/Service")
				runtime.KeepAlive(tracker)
				runtime.KeepAlive(d)
			})
		}
	}
}

// heap returns the number of bytes of live objects.
func heap() int64 {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc) //nolint:gosec // far from the limit
}
