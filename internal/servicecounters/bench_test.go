package servicecounters

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// BenchmarkFirstPacket opens UDP flows through Services that are counted, and through
// the same Services without counters, in turns. It reports the fastest of all rounds, because other work on
// the machine only adds time.
func BenchmarkFirstPacket(b *testing.B) {
	const flows = 100
	setups := []string{"off", "other", "on"}
	type setup struct {
		network *nettest.Network
		fastest time.Duration
		sent    int
	}
	all := map[string]*setup{}
	addr := netip.MustParseAddrPort("10.96.0.10:80")
	for _, name := range setups {
		network := nettest.NewT(b, nettest.Options{})
		pod := network.PodT(b, "pod")
		inner, err := nft.Open(nft.Options{NetNS: network.Node.Fd()})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = inner.Close() })
		selection := map[string][]Selector{"other": {{Namespace: "other"}}, "on": {{Namespace: "default"}}}[name]
		d, err := New(inner, Options{NetNS: network.Node.Fd(), Services: selection, TranslatedOnly: true})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = d.Close() })
		service := func(namespace string, f netip.AddrPort) *dataplane.Service {
			s, err := dataplane.NewService(dataplane.Key{Namespace: namespace, Name: "web", Family: dataplane.IPv4},
				[]dataplane.Frontend{{Protocol: dataplane.UDP, Addr: f}},
				dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: netip.AddrPortFrom(pod.IPv4, 80)}}})
			if err != nil {
				b.Fatal(err)
			}
			return s
		}
		var replace dataplane.Dataplane = d
		if name == "off" {
			replace = inner
		}
		if err := replace.Replace(b.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{
			service("default", addr), service("other", netip.MustParseAddrPort("10.96.0.11:80")),
		}), nil); err != nil {
			b.Fatal(err)
		}
		all[name] = &setup{network: network, fastest: time.Hour}
	}
	for b.Loop() {
		for _, name := range setups {
			s := all[name]
			start := time.Now()
			if err := s.network.Outside.SpoofUDP(addr, func(yield func(netip.Addr) bool) {
				for range flows {
					n := s.sent
					s.sent++
					if !yield(netip.AddrFrom4([4]byte{172, 16 + byte(n>>16), byte(n >> 8), byte(n)})) {
						return
					}
				}
			}); err != nil {
				b.Fatal(err)
			}
			s.fastest = min(s.fastest, time.Since(start))
		}
	}
	for _, name := range setups {
		b.ReportMetric(float64(all[name].fastest.Nanoseconds())/flows, name+"-ns/flow")
	}
}
