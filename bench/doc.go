// Package bench measures what Fairlead is for: how long it takes until a
// change of a Service is in the kernel, and how that depends on the number of
// Services.
//
// The benchmarks are in the test files and run with `make bench`. They program
// the real kernel, in a network namespace of their own. Latencies are reported
// as percentiles, in microseconds, beside the usual mean.
package bench

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"fairlead/dataplane"
)

// Service returns the i-th of a set of made-up Services: one TCP port on an
// address of its own, and the given number of endpoints, of which one in ten
// is on this node. The same arguments give an equal Service. There are addresses
// for a million Services with ten endpoints each.
func Service(i, endpoints int) *dataplane.Service {
	frontend := dataplane.Frontend{
		Protocol: dataplane.TCP,
		Addr:     netip.AddrPortFrom(addr(netip.AddrFrom4([4]byte{172, 16, 0, 1}), i), 80),
	}
	list := make([]dataplane.Endpoint, endpoints)
	for e := range list {
		list[e] = dataplane.Endpoint{
			Addr:  netip.AddrPortFrom(addr(netip.AddrFrom4([4]byte{10, 0, 0, 1}), i*endpoints+e), 8000),
			Local: e%10 == 0,
		}
	}
	key := dataplane.Key{Namespace: "bench", Name: fmt.Sprintf("service-%d", i), Port: "http", Family: dataplane.IPv4}
	s, err := dataplane.NewService(key, []dataplane.Frontend{frontend}, dataplane.Treatment{Endpoints: list})
	if err != nil {
		panic(err)
	}
	return s
}

// WithEndpoints returns a copy of the Service with other endpoints.
func WithEndpoints(s *dataplane.Service, endpoints []dataplane.Endpoint) *dataplane.Service {
	changed, err := dataplane.NewService(s.Key, slices.Clone(s.Frontends), dataplane.Treatment{Endpoints: endpoints})
	if err != nil {
		panic(err)
	}
	return changed
}

func addr(first netip.Addr, n int) netip.Addr {
	b := first.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
	return netip.AddrFrom4(b)
}

// Percentile returns the p-th percentile (0 to 100) of durations, which it
// sorts.
func Percentile(durations []time.Duration, p int) time.Duration {
	if len(durations) == 0 {
		return 0
	}
	slices.Sort(durations)
	return durations[min(len(durations)*p/100, len(durations)-1)]
}
