package dataplanetest

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// testReplaceProgress checks the numbers of complete Services that Replace reports. They
// never decrease and end with the total, whether or not the kernel already held the Services.
func (s suite) testReplaceProgress(t *testing.T) {
	t.Parallel()
	topo := newBareTopology(t, s)
	var services []*dataplane.Service
	for i := range 30 {
		for _, family := range families() {
			endpoints := make([]netip.AddrPort, i)
			for e := range endpoints {
				endpoints[e] = vip(family, byte(100+e), 8080) //nolint:gosec // fits
			}
			services = append(services, topo.service(fmt.Sprintf("s-%d", i), dataplane.TCP,
				[]netip.AddrPort{vip(family, byte(i), 80)}, endpoints)) //nolint:gosec // fits
		}
	}
	for _, step := range []struct {
		name     string
		services []*dataplane.Service
	}{
		{"empty kernel", services[:40]},
		{"same Services again", services[:40]},
		{"more Services", services},
		{"fewer Services", services[20:]},
		{"no Services", nil},
	} {
		var reported []int
		err := topo.dp.Replace(t.Context(), topo.node, slices.Values(step.services), func(complete int) { reported = append(reported, complete) })
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		last := 0
		if len(reported) > 0 {
			last = reported[len(reported)-1]
		}
		if want := len(step.services); last != want || !slices.IsSorted(reported) {
			t.Errorf("%s: reported %v, want a nondecreasing sequence that ends with %d", step.name, reported, want)
		}
	}
}
