package bench_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/bench"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/sync"
)

// hugeService returns a Service with many external IPs and ports, and an EndpointSlice that has
// all the ports.
func hugeService(ports, addresses, endpoints int) kube.Delta {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "huge"}}
	svc.Spec.ClusterIP, svc.Spec.ClusterIPs = "10.97.0.1", []string{"10.97.0.1"}
	tcp := corev1.ProtocolTCP
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Namespace: "default", Name: "huge-1", Labels: map[string]string{discoveryv1.LabelServiceName: "huge"},
	}}
	slice.AddressType = discoveryv1.AddressTypeIPv4
	for i := range ports {
		name, number := fmt.Sprint("p", i), int32(1000+i) //nolint:gosec // small numbers
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: name, Protocol: tcp, Port: number})
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &name, Protocol: &tcp, Port: &number})
	}
	for i := range addresses {
		svc.Spec.ExternalIPs = append(svc.Spec.ExternalIPs, fmt.Sprintf("203.0.%d.%d", i/250, 1+i%250))
	}
	node := "another"
	for i := range endpoints {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{fmt.Sprintf("10.200.%d.%d", i/250, 1+i%250)}, NodeName: &node,
		})
	}
	return kube.Delta{Services: []*corev1.Service{svc}, EndpointSlices: []*discoveryv1.EndpointSlice{slice}}
}

// BenchmarkHugeService creates, changes and deletes a Service with 200 external IPs, 100 endpoints
// and many ports beside 1,000 other Services. It measures the time from the objects to the
// kernel's acknowledgement, and the longest time that an update of another Service takes
// meanwhile.
func BenchmarkHugeService(b *testing.B) {
	ports, addresses, endpoints, others := []int{100, 500}, 200, 100, 1000
	if testing.Short() {
		ports, addresses, endpoints, others = []int{5}, 20, 10, 10
	}
	for _, backend := range backends() {
		for _, n := range ports {
			b.Run(fmt.Sprintf("backend=%s/ports=%d", backend.name, n), func(b *testing.B) {
				for b.Loop() {
					measureHugeService(b, backend.open, n, addresses, endpoints, others)
				}
			})
		}
	}
}

func measureHugeService(b *testing.B, open func(*testing.B, int) dataplane.Dataplane, ports, addresses, endpoints, others int) {
	b.Helper()
	ns := newNamespace(b)
	d := open(b, ns.Fd())
	committed := make(chan sync.Commit, 1<<16)
	s := sync.New(d, sync.Options{OnCommit: func(c sync.Commit) { committed <- c }})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			b.Error(err)
		}
	}()
	defer func() {
		cancel()
		<-done
		if err := d.Close(); err != nil {
			b.Error(err)
		}
	}()
	ordinary := map[dataplane.Key]*dataplane.Service{}
	for _, svc := range newServices(others, endpointsPerService) {
		ordinary[svc.Key] = svc
	}
	s.SetNode(node())
	s.Update(ordinary)
	s.FinishInitialList()
	<-committed
	other := bench.Service(0, endpointsPerService)
	tracker := kube.NewTracker(kube.Options{NodeName: "this"})
	tracker.Apply(kube.Delta{})

	turn := 0
	// program applies a Delta, and updates another Service repeatedly until the Delta is
	// programmed. It returns the time of the Delta and the longest time of one update.
	program := func(delta kube.Delta) (all, longest time.Duration) {
		begin := time.Now()
		changes := tracker.Apply(delta).Changes
		waiting := map[dataplane.Key]bool{}
		for k := range changes {
			waiting[k] = true
		}
		s.Update(changes)
		for ; len(waiting) > 0; turn++ {
			list := slices.Clone(other.Endpoints)
			list[0].Addr = bench.Service(1+turn%2, 1).Endpoints[0].Addr
			other = bench.WithEndpoints(other, list)
			updated := time.Now()
			s.Update(map[dataplane.Key]*dataplane.Service{other.Key: other})
			for programmed := false; !programmed; {
				c := <-committed
				if c.Err != nil || len(c.Failed) > 0 {
					b.Fatal(c.Err, c.Failed)
				}
				for _, change := range c.Changes {
					delete(waiting, change.Key())
					programmed = programmed || change.New == other
				}
				if len(waiting) == 0 && all == 0 {
					all = c.End.Sub(begin)
				}
			}
			longest = max(longest, time.Since(updated))
		}
		return all, longest
	}
	report := func(name string, delta kube.Delta) {
		all, longest := program(delta)
		b.ReportMetric(float64(all.Microseconds())/1e3, name+"-ms")
		b.ReportMetric(float64(longest.Microseconds())/1e3, name+"-other-ms")
	}
	delta := hugeService(ports, addresses, endpoints)
	report("create", delta)
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	b.ReportMetric(float64(m.HeapAlloc>>20), "heap-MiB")
	b.ReportMetric(float64(m.Sys>>20), "sys-MiB")
	slice := delta.EndpointSlices[0].DeepCopy()
	slice.Endpoints = slice.Endpoints[1:]
	report("endpoint", kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{slice}})
	restart := time.Now()
	s.SetNode(dataplane.Node{})
	c := <-committed
	b.ReportMetric(float64(c.End.Sub(restart).Microseconds())/1e3, "replace-ms")
	report("delete", kube.Delta{DeletedServices: objectNames(delta.Services), DeletedEndpointSlices: objectNames(delta.EndpointSlices)})
}

func objectNames[O metav1.Object](objects []O) []types.NamespacedName {
	var all []types.NamespacedName
	for _, o := range objects {
		all = append(all, types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()})
	}
	return all
}
