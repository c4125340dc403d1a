package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// BenchmarkApply measures Apply with one change, for Services with different specs, with
// other Services in the tables.
func BenchmarkApply(b *testing.B) {
	list := endpoints(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
	for _, spec := range []struct {
		name string
		dataplane.ServiceSpec
	}{
		{"plain", dataplane.ServiceSpec{}},
		{"affinity", dataplane.ServiceSpec{Affinity: 3 * time.Hour}},
		{"external-local", dataplane.ServiceSpec{ExternalTrafficPolicyLocal: true, LocalEndpoints: list[:3]}},
		{"source-ranges", dataplane.ServiceSpec{SourceRanges: []netip.Prefix{
			netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24"),
		}}},
	} {
		for _, n := range []int{1000, 10_000} {
			b.Run(fmt.Sprintf("%s/services=%d", spec.name, n), func(b *testing.B) {
				benchmarkApply(b, n, func(i int, endpoints []dataplane.Endpoint) *dataplane.Service {
					t := spec.ServiceSpec
					t.Endpoints, t.LocalEndpoints = endpoints, slices.Clone(t.LocalEndpoints)
					if len(t.SourceRanges) > 0 { // each Service has its own ranges
						own := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
						t.SourceRanges = append(slices.Clone(t.SourceRanges), netip.PrefixFrom(own, 32))
					}
					key := dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s-%d", i), Family: dataplane.IPv4, Kind: dataplane.LoadBalancer}
					s, err := dataplane.NewService(key, []dataplane.Frontend{frontend(i)}, t)
					if err != nil {
						b.Fatal(err)
					}
					return s
				}, list)
			})
		}
	}
}

func benchmarkApply(b *testing.B, n int, build func(int, []dataplane.Endpoint) *dataplane.Service, list []dataplane.Endpoint) {
	b.Helper()
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
		services[i] = build(i, slices.Clone(list))
	}
	if err := d.Replace(b.Context(), nodeWithPodCIDRs(), slices.Values(services), nil); err != nil {
		b.Fatal(err)
	}
	apply := func(b *testing.B, change func(i int) dataplane.Change) {
		b.Helper()
		i := 0
		for b.Loop() {
			if err := d.Apply(b.Context(), []dataplane.Change{change(i % n)}); err != nil {
				b.Fatal(err)
			}
			i++
		}
	}
	b.Run("replace-endpoint", func(b *testing.B) {
		spare := 0
		apply(b, func(i int) dataplane.Change {
			spare++
			old, changed := services[i], slices.Clone(list)
			changed[9] = endpoint(100 + spare%997)
			services[i] = build(i, changed)
			return dataplane.Change{Old: old, New: services[i]}
		})
	})
	b.Run("remove-and-add-service", func(b *testing.B) {
		gone := false
		apply(b, func(int) dataplane.Change {
			if gone = !gone; gone {
				return dataplane.Change{Old: services[0]}
			}
			return dataplane.Change{New: services[0]}
		})
	})
}
