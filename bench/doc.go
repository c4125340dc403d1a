// Package bench measures how long Fairlead takes to program a change of a Service into the kernel,
// and how that time depends on the number of Services.
//
// [Run] implements `fairlead-bench`. It creates the namespaces of package testbed, runs the
// pipeline of `fairlead run` in this process without a source, and passes Kubernetes objects to
// the pipeline. It measures:
//
//   - [Update]: one change at a time on an otherwise idle node. The changes replace, add and
//     remove an endpoint, and create and delete a Service; they alternate, on Services spread over
//     the whole table. Each change is measured twice: until the kernel acknowledges it, without
//     any traffic, and until packets show it, while the probe sends continuously. An added
//     endpoint shows when the first packet arrives at it. A removed endpoint or Service shows at
//     the first packet sent after the last packet that still arrived. Only one packet in n reaches
//     one of n endpoints, so the measured time of an addition is too long by n packets on average,
//     a few microseconds each, and the measured time of a removal may even be too short.
//   - [Start]: a cold start with all objects available, until the kernel has acknowledged
//     everything, and in separate runs until the last Service answers. Each run uses a new node.
//   - [Restart]: a warm restart, until the agent knows that nothing needs to change. The
//     benchmark fails if a warm restart writes anything.
//   - [Churn]: endpoints replaced at a fixed rate, whether or not earlier changes are
//     programmed. The latency of a change is the time from when the change is due until the kernel
//     acknowledges the commit that contains it or a later change of the same Service. Changes that
//     are due at the same time are passed on together, as a source does.
//   - [DataPath]: connect(2) to a Service and directly to its endpoint, alternating, from a pod
//     through the node; the rate of sequential connections; and the throughput of one connection.
//   - [Fairness]: the distribution of connections over the endpoints of one Service.
//   - [Memory]: the additional memory that the process and the kernel hold when all Services are
//     programmed.
//
// The test files contain benchmarks of the syncer and the backends without Kubernetes objects,
// which `make gobench` runs. They program the real kernel in separate network namespaces. They
// report latencies as percentiles in microseconds, beside the usual mean.
//
// Tests check the cost of one change in messages, elements and allocations, and that this cost
// does not depend on the number of Services.
package bench

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/dataplane"
)

// Service returns the i-th Service of a generated set: one TCP port on a distinct address and the
// given number of endpoints, one in ten of which is on this node. The same arguments return equal
// Services. The address ranges suffice for a million Services with ten endpoints each.
func Service(i, endpoints int) *dataplane.Service {
	frontend := dataplane.Frontend{
		Protocol: dataplane.TCP,
		Addr:     netip.AddrPortFrom(testbed.AddrPlus(netip.AddrFrom4([4]byte{172, 16, 0, 1}), i), 80),
	}
	list := make([]dataplane.Endpoint, endpoints)
	for e := range list {
		list[e] = dataplane.Endpoint{
			Addr:  netip.AddrPortFrom(testbed.AddrPlus(netip.AddrFrom4([4]byte{10, 0, 0, 1}), i*endpoints+e), 8000),
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

// WithEndpoints returns a copy of s with the given endpoints.
func WithEndpoints(s *dataplane.Service, endpoints []dataplane.Endpoint) *dataplane.Service {
	changed, err := dataplane.NewService(s.Key, slices.Clone(s.Frontends), dataplane.ServiceSpec{Endpoints: endpoints})
	if err != nil {
		panic(err)
	}
	return changed
}

// Percentile returns the p-th percentile (0 to 100) of durations. It sorts durations in place.
func Percentile(durations []time.Duration, p int) time.Duration {
	if len(durations) == 0 {
		return 0
	}
	slices.Sort(durations)
	return durations[min(len(durations)*p/100, len(durations)-1)]
}
