// Package bench measures what Fairlead is for: how long it takes until a
// change of a Service is in the kernel, and how that depends on the number of
// Services.
//
// [Run] is `fairlead-bench`. It makes the namespaces of package testbed, joins Fairlead's
// parts in this process as `fairlead run` does, but for the source, and hands over
// Kubernetes objects. What it measures:
//
//   - [Update]: one change, and then rest. The changes are to an endpoint that is
//     replaced, comes or goes, and to a Service that comes or goes; they take turns, at
//     Services all over the table. Each is measured twice: until the kernel has
//     acknowledged it, with nothing else going on; and until packets show it, with the
//     probe sending all the time. What shows it is the first packet that arrives at the
//     new endpoint; or where something goes, the first that was sent after the last that has
//     arrived there. Since one packet in so many hits one endpoint of so many, the
//     former is late by that many packets on average, of some microseconds each, and the
//     latter may even be early.
//   - [Start]: with all objects at hand, from nothing until all is acknowledged, and, in
//     other starts, until the last Service answers; each on a new node.
//   - [Restart]: with all of that programmed, until it is known that nothing is to do.
//     That nothing is written is checked.
//   - [Churn]: endpoints replaced at a given rate, whether or not those before are
//     through. The time of each counts from when it is due to the acknowledgement of the commit
//     that has it or a later one of its Service in it. What is due at the same time is
//     handed over together, as a source does.
//   - [DataPath]: connect(2) to a Service and to its endpoint, in turns, from a pod
//     through the node; how many such connections a second are made one after
//     another; and how much one connection carries.
//   - [Fairness]: how connections spread over the endpoints of one Service.
//   - [Memory]: what is held more than before when all is programmed.
//
// The other benchmarks are in the test files and run with `make gobench`: they are of
// the syncer and the backend without Kubernetes' objects. They program
// the real kernel, in a network namespace of their own. Latencies are reported
// as percentiles, in microseconds, beside the usual mean.
//
// What one change costs in numbers, not in time, and that it does not depend on the number
// of Services, is tested too.
package bench

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// Service returns the i-th of a set of made-up Services: one TCP port on an
// address of its own, and the given number of endpoints, of which one in ten
// is on this node. The same arguments give an equal Service. There are addresses
// for a million Services with ten endpoints each.
func Service(i, endpoints int) *dataplane.Service {
	frontend := dataplane.Frontend{
		Protocol: dataplane.TCP,
		Addr:     netip.AddrPortFrom(addrPlus(netip.AddrFrom4([4]byte{172, 16, 0, 1}), i), 80),
	}
	list := make([]dataplane.Endpoint, endpoints)
	for e := range list {
		list[e] = dataplane.Endpoint{
			Addr:  netip.AddrPortFrom(addrPlus(netip.AddrFrom4([4]byte{10, 0, 0, 1}), i*endpoints+e), 8000),
			Local: e%10 == 0,
		}
	}
	key := dataplane.Key{Namespace: "bench", Name: fmt.Sprintf("service-%d", i), Port: "http", Family: dataplane.IPv4}
	s, err := dataplane.NewService(key, []dataplane.Frontend{frontend}, dataplane.ServiceSpec{Endpoints: list})
	if err != nil {
		panic(err)
	}
	return s
}

// WithEndpoints returns a copy of the Service with other endpoints.
func WithEndpoints(s *dataplane.Service, endpoints []dataplane.Endpoint) *dataplane.Service {
	changed, err := dataplane.NewService(s.Key, slices.Clone(s.Frontends), dataplane.ServiceSpec{Endpoints: endpoints})
	if err != nil {
		panic(err)
	}
	return changed
}

func addrPlus(first netip.Addr, n int) netip.Addr {
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
