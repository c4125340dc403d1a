//go:build ipvs

package bench_test

import (
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/ipvs"
)

// ipvsBackends returns the ipvs backend, which needs a kernel with IPVS.
func ipvsBackends() []backend {
	return []backend{{"ipvs", func(b *testing.B, netns int) dataplane.Dataplane {
		b.Helper()
		d, err := ipvs.Open(ipvs.Options{NetNS: netns})
		if err != nil {
			b.Fatal(err)
		}
		return d
	}}}
}
