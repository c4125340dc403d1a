package dataplanetest

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// A Replace tells how many Services are complete: never fewer than before, and all
// of them at the end, whether they were in the kernel already or not.
func (s suite) testReplaceProgress(t *testing.T) {
	t.Parallel()
	w := newBareTopology(t, s)
	var services []*dataplane.Service
	for i := range 30 {
		for _, family := range families() {
			endpoints := make([]netip.AddrPort, i)
			for e := range endpoints {
				endpoints[e] = vip(family, byte(100+e), 8080) //nolint:gosec // fits
			}
			services = append(services, w.service(fmt.Sprintf("s-%d", i), dataplane.TCP,
				[]netip.AddrPort{vip(family, byte(i), 80)}, endpoints)) //nolint:gosec // fits
		}
	}
	for _, step := range []struct {
		name     string
		services []*dataplane.Service
	}{
		{"into an empty kernel", services[:40]},
		{"the same again", services[:40]},
		{"some more", services},
		{"fewer", services[20:]},
		{"none", nil},
	} {
		var told []int
		err := w.dp.Replace(t.Context(), w.node, slices.Values(step.services), func(complete int) { told = append(told, complete) })
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		last := 0
		if len(told) > 0 {
			last = told[len(told)-1]
		}
		if want := len(step.services); last != want || !slices.IsSorted(told) {
			t.Errorf("%s: told %v, want %d at the end, and never fewer than before", step.name, told, want)
		}
	}
}
