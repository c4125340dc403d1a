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

// stickyServices returns UDP Services with affinity and these endpoints, by name.
func stickyServices(t *testing.T, endpoints []netip.AddrPort, names ...string) map[string]*dataplane.Service {
	t.Helper()
	services := map[string]*dataplane.Service{}
	for i, name := range names {
		last := []byte{1, 0x11, 2}[i] // the low nibble selects the shard
		addr := netip.AddrFrom4([4]byte{10, 96, 0, last})
		if endpoints[0].Addr().Is6() {
			addr = netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x96, 15: last})
		}
		f := dataplane.Frontend{Protocol: dataplane.UDP, Addr: netip.AddrPortFrom(addr, 80)}
		list := make([]dataplane.Endpoint, len(endpoints))
		for j, e := range endpoints {
			list[j].Addr = e
		}
		services[name] = service(t, name, []dataplane.Frontend{f}, list)
		services[name].Affinity = 3 * time.Hour
	}
	return services
}

// flood sends a UDP packet from each of n spoofed source addresses. It sends small batches
// and waits after each until the endpoints have read the packets. Otherwise a full socket
// buffer would drop packets of the clients that connect afterwards.
func flood(t *testing.T, h *nettest.Host, to netip.AddrPort, endpoints []netip.AddrPort, n int, source func(i int) netip.Addr) {
	t.Helper()
	const batch = 64
	for first := 0; first < n; first += batch {
		err := h.SpoofUDP(to, func(yield func(netip.Addr) bool) {
			for i := first; i < min(first+batch, n) && yield(source(i)); i++ {
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range endpoints { // an endpoint answers in order of arrival
			if _, err := h.Connect(t.Context(), nettest.UDP, e); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// reachesOneEndpoint reports whether all of several connections of a client reach the same
// endpoint.
func reachesOneEndpoint(t *testing.T, client *nettest.Host, to netip.AddrPort) bool {
	t.Helper()
	reached := map[netip.AddrPort]bool{}
	for range 12 {
		answer, err := client.Connect(t.Context(), nettest.UDP, to)
		if err != nil {
			t.Fatal(err)
		}
		reached[answer.Endpoint] = true
	}
	return len(reached) == 1
}

// TestAffinityUnderFlood floods a Service with packets from spoofed addresses, and checks
// which clients have affinity during and after the flood.
func TestAffinityUnderFlood(t *testing.T) {
	t.Parallel()
	const limit = 96
	network := nettest.NewT(t, nettest.Options{})
	client := network.PodT(t, "client")
	var v4, v6 []netip.AddrPort
	for i := range 4 {
		pod := network.PodT(t, fmt.Sprintf("pod%d", i))
		pod.ServeT(t, nettest.UDP, 8080)
		v4, v6 = append(v4, netip.AddrPortFrom(pod.IPv4, 8080)), append(v6, netip.AddrPortFrom(pod.IPv6, 8080))
	}
	opts := Options{affinityMapSize: limit, NetNS: network.Node.Fd(), OwnTables: true}
	d := openWithOptions(t, network.Node.Namespace, opts)
	limiter := NewAffinityLimiter(d, opts)
	t.Cleanup(func() {
		if err := limiter.Close(); err != nil {
			t.Error(err)
		}
	})
	const flooded, neighbour, other = "flooded", "neighbour", "other"
	s4, s6 := stickyServices(t, v4, flooded, neighbour, other), stickyServices(t, v6, flooded, neighbour, other)
	var all []*dataplane.Service
	for _, s := range []map[string]*dataplane.Service{s4, s6} {
		for _, name := range []string{flooded, neighbour, other} {
			all = append(all, s[name])
		}
	}
	mustReplace(t, d, nodeWithPodCIDRs(), all...)
	limitNow := func() []AffinityStats {
		t.Helper()
		if err := limiter.Limit(t.Context()); err != nil {
			t.Fatal(err)
		}
		return limiter.Stats()
	}
	at := func(s *dataplane.Service) netip.AddrPort { return s.Frontends[0].Addr }

	flood(t, network.Outside, at(s4[flooded]), v4, 10*limit, func(i int) netip.Addr {
		return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}) //nolint:gosec // low bits
	})
	if reachesOneEndpoint(t, client, at(s4[flooded])) {
		t.Error("a new client of the flooded Service has affinity: the flood did not fill the map")
	}
	if !reachesOneEndpoint(t, client, at(s4[other])) {
		t.Error("a new client of a Service with another map has no affinity")
	}
	stats := limitNow()
	if got := stats[0]; got.Evicted != limit/evictionDivisor || got.Full == 0 || got.FullestMap != limit-limit/evictionDivisor || got.Clients != got.FullestMap+1 {
		t.Errorf("after an eviction: %+v", got)
	}
	for _, name := range []string{flooded, neighbour} {
		if !reachesOneEndpoint(t, client, at(s4[name])) {
			t.Errorf("a new client of Service %s has no affinity after an eviction", name)
		}
	}

	flood(t, network.Outside, at(s6[flooded]), v6, 10*limit, func(i int) netip.Addr {
		return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0xba, 0xd0, 8: 1, 14: byte(i >> 8), 15: byte(i)}) //nolint:gosec // low bits
	})
	for _, name := range []string{flooded, neighbour, other} {
		if !reachesOneEndpoint(t, client, at(s6[name])) {
			t.Errorf("a client of Service %s has no affinity after a flood from another IPv6 network", name)
		}
	}
	limiter.measured = time.Time{}
	stats = limitNow()
	if got := stats[1]; got.Full != 0 || got.NetworkLimit == 0 || got.Clients > limit/networkDivisor+4 {
		t.Errorf("after a flood from one IPv6 network: %+v", got)
	}
	select {
	case <-d.Drift():
		t.Error("an eviction was reported as drift")
	case <-time.After(100 * time.Millisecond):
	}
}

// TestClientsToEvict checks how evictions are distributed over frontends.
func TestClientsToEvict(t *testing.T) {
	t.Parallel()
	client := func(frontend byte, expires int) rememberedClient {
		return rememberedClient{key: []byte{10, 0, 0, byte(expires), frontend}, expires: time.Duration(expires)} //nolint:gosec // small
	}
	var clients []rememberedClient
	for frontend, n := range []int{10, 6, 1} {
		for i := range n {
			clients = append(clients, client(byte(frontend), i+1)) //nolint:gosec // small
		}
	}
	for _, tt := range []struct {
		n    int
		want [3]int // from each frontend
	}{{0, [3]int{}}, {1, [3]int{1}}, {4, [3]int{4}}, {6, [3]int{5, 1}}, {14, [3]int{9, 5}}, {17, [3]int{10, 6, 1}}, {20, [3]int{10, 6, 1}}} {
		var got [3]int
		for _, v := range clientsToEvict(slices.Clone(clients), 4, tt.n) {
			got[v.key[4]]++
			if int(v.expires) > tt.want[v.key[4]] {
				t.Errorf("%d evictions include a recent client", tt.n)
			}
		}
		if got != tt.want {
			t.Errorf("%d evictions: %v from each frontend, want %v", tt.n, got, tt.want)
		}
	}
}
