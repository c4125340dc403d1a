package bench_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/bench"
)

// BenchmarkUpdate measures the time from a change at the syncer's input until the kernel
// acknowledges it, one change at a time.
func BenchmarkUpdate(b *testing.B) {
	for _, backend := range backends() {
		for _, n := range serviceCounts() {
			b.Run(fmt.Sprintf("backend=%s/services=%d", backend.name, n), func(b *testing.B) {
				s := start(b, backend.open, newServices(n, endpointsPerService))
				b.Run("replace-endpoint", func(b *testing.B) { s.replaceEndpoint(b) })
				b.Run("add-service", func(b *testing.B) { s.addService(b) })
				b.Run("remove-endpoint", func(b *testing.B) { s.removeEndpoint(b) })
			})
		}
	}
}

// BenchmarkUpdateLargest runs BenchmarkUpdate on one Service with 5,000 endpoints, alone and
// beside other Services.
func BenchmarkUpdateLargest(b *testing.B) {
	endpoints, otherServices := 5000, []int{0, 10_000}
	if testing.Short() {
		endpoints, otherServices = 50, []int{0, 10}
	}
	for _, backend := range backends() {
		for _, n := range otherServices {
			b.Run(fmt.Sprintf("backend=%s/endpoints=%d/others=%d", backend.name, endpoints, n), func(b *testing.B) {
				services := newServices(n+1, endpointsPerService)
				services[0] = bench.Service(0, endpoints)
				s := start(b, backend.open, services)
				s.services = s.services[:1] // only the first Service changes
				b.Run("replace-endpoint", func(b *testing.B) { s.replaceEndpoint(b) })
				b.Run("add-endpoint", func(b *testing.B) { s.addEndpoint(b) })
				b.Run("remove-endpoint", func(b *testing.B) { s.removeEndpoint(b) })
			})
		}
	}
}

func (s *fixture) replaceEndpoint(b *testing.B) {
	b.Helper()
	i, generation := 0, 1
	measure(b, func() time.Duration {
		if i++; i >= len(s.services) {
			i = 0
			generation++
		}
		old := s.services[i]
		endpoints := slices.Clone(old.Endpoints)
		last := &endpoints[len(endpoints)-1]
		last.Addr = netip.AddrPortFrom(last.Addr.Addr(), last.Addr.Port()+uint16(generation))
		s.services[i] = bench.WithEndpoints(old, endpoints)
		return s.update(b, old.Key, s.services[i])
	})
}

func (s *fixture) addService(b *testing.B) {
	b.Helper()
	i := len(s.services)
	measure(b, func() time.Duration {
		svc := bench.Service(i, endpointsPerService)
		took := s.update(b, svc.Key, svc)
		b.StopTimer()
		s.update(b, svc.Key, nil)
		b.StartTimer()
		return took
	})
}

func (s *fixture) removeEndpoint(b *testing.B) {
	b.Helper()
	i := 0
	measure(b, func() time.Duration {
		if i++; i >= len(s.services) {
			i = 0
		}
		full := s.services[i]
		took := s.update(b, full.Key, bench.WithEndpoints(full, slices.Clone(full.Endpoints[1:])))
		b.StopTimer()
		s.update(b, full.Key, full)
		b.StartTimer()
		return took
	})
}

func (s *fixture) addEndpoint(b *testing.B) {
	b.Helper()
	i := 0
	measure(b, func() time.Duration {
		if i++; i >= len(s.services) {
			i = 0
		}
		full := s.services[i]
		less := bench.WithEndpoints(full, slices.Clone(full.Endpoints[1:]))
		b.StopTimer()
		s.update(b, full.Key, less)
		b.StartTimer()
		return s.update(b, full.Key, full)
	})
}
