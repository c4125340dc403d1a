package kube

import (
	"fmt"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead/dataplane"
)

func addrPort(addr netip.Addr, port int32) netip.AddrPort {
	return netip.AddrPortFrom(addr, uint16(port))
}

// many returns n Services, each with a slice of 10 endpoints.
func many(n int) Delta {
	var d Delta
	for i := range n {
		name := fmt.Sprintf("service-%d", i)
		d.Services = append(d.Services, newService(name, fmt.Sprintf("10.%d.%d.%d", 96+i>>16, i>>8&0xff, i&0xff)))
		d.EndpointSlices = append(d.EndpointSlices, tenEndpoints(name, 1+i%200))
	}
	return d
}

func tenEndpoints(service string, pod int) *discoveryv1.EndpointSlice {
	var addrs []string
	for i := range 10 {
		addrs = append(addrs, fmt.Sprintf("10.%d.0.%d @there", i, pod))
	}
	return newSlice(service+"-x7k2p", service, eps(addrs...))
}

// BenchmarkTrackerApply measures one changed EndpointSlice of 10 endpoints, one
// of which is another. It must not depend on the number of Services.
func BenchmarkTrackerApply(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			tracker := NewTracker(Options{NodeName: "here"})
			tracker.Apply(many(n))
			// Two variants of the slices of up to 512 Services: each lap over
			// the deltas undoes what the one before did.
			services := min(n, 512)
			deltas := make([]Delta, 2*services)
			for i := range deltas {
				name := fmt.Sprintf("service-%d", i%services*(n/services))
				slice := tenEndpoints(name, 1)
				slice.Endpoints[9].Addresses = []string{fmt.Sprintf("10.200.0.%d", i/services)}
				deltas[i] = Delta{EndpointSlices: []*discoveryv1.EndpointSlice{slice}}
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if got := len(tracker.Apply(deltas[i%len(deltas)]).Changes); got != 1 {
					b.Fatalf("%d changes, want 1", got)
				}
				i++
			}
		})
	}
}

// BenchmarkTrackerLoad measures the first Delta, with everything.
func BenchmarkTrackerLoad(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			d := many(n)
			b.ReportAllocs()
			for b.Loop() {
				if got := len(NewTracker(Options{}).Apply(d).Changes); got != n {
					b.Fatalf("%d changes, want %d", got, n)
				}
			}
		})
	}
}

// TestApplyTouchesOnlyItsService shows that a changed slice leaves everything
// else alone: all other Services are replaced by ones that must not be read.
func TestApplyTouchesOnlyItsService(t *testing.T) {
	t.Parallel()
	tracker := NewTracker(Options{})
	tracker.Apply(many(100))
	untouched := tracker.services[named("service-7")]
	for name := range tracker.services {
		if name != named("service-7") {
			tracker.services[name] = nil
		}
	}
	result := tracker.Apply(Delta{EndpointSlices: []*discoveryv1.EndpointSlice{newSlice("service-7-x7k2p", "service-7", eps("10.0.0.1"))}})
	key := dataplane.Key{Namespace: "default", Name: "service-7", Port: "http", Family: dataplane.IPv4}
	if len(result.Changes) != 1 || result.Changes[key] == nil {
		t.Errorf("changes %v, want only %s", texts(result.Changes), key)
	}
	if untouched != tracker.services[named("service-7")] || untouched.object.Spec.Ports[0].Protocol != corev1.ProtocolTCP {
		t.Error("the Service itself was replaced")
	}
}
