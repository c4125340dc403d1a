package nft

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// BenchmarkFirstPacket alternates connections from a pod to two Services, one whose frontends
// share a list and one without. It reports the median time of connect(2) for each.
func BenchmarkFirstPacket(b *testing.B) {
	network := nettest.NewT(b, nettest.Options{})
	client, pod := network.PodT(b, "client"), network.PodT(b, "pod")
	pod.ServeT(b, "tcp", 8080)
	d, err := Open(Options{NetNS: network.Node.Fd()})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() })
	spec := dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.IPv4, 8080)}}}
	own := serviceWithFrontends(b, "own", dataplane.ExternalIP, netip.MustParseAddr("203.0.113.1"), 1, spec)
	shared := serviceWithFrontends(b, "shared", dataplane.ExternalIP, netip.MustParseAddr("203.0.113.16"), minSharedFrontends, spec)
	if err := d.Replace(b.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{own, shared}), nil); err != nil {
		b.Fatal(err)
	}
	took := map[string][]time.Duration{}
	err = client.Do(func() error {
		for b.Loop() {
			for name, s := range map[string]*dataplane.Service{"own": own, "shared": shared} {
				begin := time.Now()
				conn, err := net.DialTimeout("tcp", s.Frontends[0].Addr.String(), 5*time.Second)
				if err != nil {
					return err
				}
				took[name] = append(took[name], time.Since(begin))
				_ = conn.Close()
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	for name, times := range took {
		slices.Sort(times)
		b.ReportMetric(float64(times[len(times)/2].Nanoseconds())/1e3, name+"-p50-µs")
	}
}

// BenchmarkNewListSize adds a list of a new size next to lists with many endpoints: when the
// chain that selects from the new list is added, the kernel walks the whole map of its shard.
func BenchmarkNewListSize(b *testing.B) {
	for _, others := range []int{0, 50_000, 400_000} {
		b.Run(fmt.Sprintf("endpoints=%d", others), func(b *testing.B) {
			ns, err := nettest.NewNamespace("")
			if err != nil {
				b.Fatal(err)
			}
			d, err := Open(Options{NetNS: ns.Fd()})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = d.Close(); _ = ns.Close() })
			var list []dataplane.Endpoint
			for n := range 1000 {
				list = append(list, endpoint(n))
			}
			makeService := func(i, n int) *dataplane.Service {
				first := netip.AddrFrom4([4]byte{203, 0, byte(i >> 4), byte(i << 4)})
				return serviceWithFrontends(b, fmt.Sprint(i), dataplane.ExternalIP, first, minSharedFrontends, dataplane.ServiceSpec{Endpoints: slices.Clone(list[:n])})
			}
			var services []*dataplane.Service
			for i := range others / 1000 {
				services = append(services, makeService(i, 1000))
			}
			if err := d.Replace(b.Context(), dataplane.Node{}, slices.Values(services), nil); err != nil {
				b.Fatal(err)
			}
			size := 10
			for b.Loop() {
				s := makeService(1000, size)
				size++
				if err := d.Apply(b.Context(), []dataplane.Change{{New: s}}); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := d.Apply(b.Context(), []dataplane.Change{{Old: s}}); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
