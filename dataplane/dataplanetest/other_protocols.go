package dataplanetest

import (
	"context"
	"net/netip"
	"sync"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// testOtherProtocols sends pings, ESP packets and connections to undeclared ports to cluster
// IPs and external IPs, from all hosts. The outside host has the external IPs.
func (s suite) testOtherProtocols(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 1)
	const used, empty, external, unused = 1, 2, 3, 200
	var services []*dataplane.Service
	for _, family := range families() {
		if err := topo.net.Outside.AddAddr(vip(family, external, 0).Addr()); err != nil {
			t.Fatal(err)
		}
		addr := vip(family, 128, 0).Addr()
		topo.node.ServiceCIDRs = append(topo.node.ServiceCIDRs, netip.PrefixFrom(addr, addr.BitLen()-7)) // contains unused
		services = append(services,
			topo.service("used", dataplane.TCP, []netip.AddrPort{vip(family, used, 80)}, topo.endpoints(family, 0)),
			topo.service("empty", dataplane.TCP, []netip.AddrPort{vip(family, empty, 80)}, nil))
		for n, endpoints := range [][]netip.AddrPort{topo.endpoints(family, 0), nil} {
			key := []string{"external", "nothing"}[n]
			frontend := vip(family, external, uint16(80+n)) //nolint:gosec // fits
			services = append(services, topo.serviceOfKind(dataplane.ExternalIP, key, dataplane.TCP, frontend, topo.specOf(endpoints)))
		}
	}
	check := func(t *testing.T) {
		t.Helper()
		var checks sync.WaitGroup
		for _, family := range families() {
			for _, from := range []*nettest.Host{topo.client, topo.pods[0], topo.net.Node, topo.net.Outside} {
				for n, want := range map[byte]probeResult{used: refused, empty: refused, unused: unanswered} {
					addr := vip(family, n, 0).Addr()
					checks.Go(func() { expectPing(t, from, addr, want) })
					checks.Go(func() {
						got, err := probe(t, want, func(ctx context.Context) error { return from.ProbeProtocol(ctx, nettest.ESP, addr) })
						if got != want {
							t.Errorf("ESP from %s to %s is %q (error %v), want %s", from.Name, addr, got, err, want)
						}
					})
					for _, p := range protocols() {
						checks.Go(func() {
							if want == refused {
								expectRefused(t, from, p, netip.AddrPortFrom(addr, 81))
							} else {
								expectDropped(t, from, p, netip.AddrPortFrom(addr, 81))
							}
						})
					}
				}
				checks.Go(func() { expectPing(t, from, vip(family, external, 0).Addr(), answered) })
			}
		}
		checks.Wait()
	}
	topo.replace(services...)
	t.Run("after Replace", check)
	topo.warmRestart()
	t.Run("warm restart", check)
}
