package nft

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// BenchmarkRebuild measures an equal Replace, and a Replace that finds tables with another
// schema. The Services have 10 endpoints.
func BenchmarkRebuild(b *testing.B) {
	sizes := []int{1000, 10_000}
	if testing.Short() {
		sizes = []int{100}
	}
	for _, n := range sizes {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			ns, err := nettest.NewNamespace("")
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = ns.Close() }()
			d, err := Open(Options{NetNS: ns.Fd()})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = d.Close() }()
			services := make([]*dataplane.Service, n)
			for i := range services {
				key := dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s-%d", i), Family: dataplane.IPv4}
				spec := dataplane.ServiceSpec{Endpoints: endpoints(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)}
				if services[i], err = dataplane.NewService(key, []dataplane.Frontend{frontend(i)}, spec); err != nil {
					b.Fatal(err)
				}
			}
			run := func() time.Duration {
				begin := time.Now()
				if err := d.Replace(b.Context(), nodeWithPodCIDRs(), slices.Values(services), nil); err != nil {
					b.Fatal(err)
				}
				return time.Since(begin)
			}
			run()
			var same, rebuilt time.Duration
			count := 0
			for b.Loop() {
				same += run()
				d.schema++
				rebuilt += run()
				count++
			}
			b.ReportMetric(same.Seconds()*1000/float64(count), "same-ms")
			b.ReportMetric(rebuilt.Seconds()*1000/float64(count), "rebuilt-ms")
		})
	}
}
