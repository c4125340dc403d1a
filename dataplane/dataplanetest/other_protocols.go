package dataplanetest

import (
	"context"
	"net/netip"
	"sync"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// testOtherProtocols sends everything that is no Service's to cluster IPs, from all
// sides, and to other addresses of Services, which are the outside host's.
func (s suite) testOtherProtocols(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 1)
	const used, empty, external, unused = 1, 2, 3, 200
	var services []*dataplane.Service
	for _, family := range families() {
		if err := w.net.Outside.AddAddr(vip(family, external, 0).Addr()); err != nil {
			t.Fatal(err)
		}
		addr := vip(family, 128, 0).Addr()
		w.node.ServiceCIDRs = append(w.node.ServiceCIDRs, netip.PrefixFrom(addr, addr.BitLen()-7)) // has unused
		services = append(services,
			w.service("used", dataplane.TCP, []netip.AddrPort{vip(family, used, 80)}, w.endpoints(family, 0)),
			w.service("empty", dataplane.TCP, []netip.AddrPort{vip(family, empty, 80)}, nil))
		for n, endpoints := range [][]netip.AddrPort{w.endpoints(family, 0), nil} {
			key := []string{"external", "nothing"}[n]
			frontend := vip(family, external, uint16(80+n)) //nolint:gosec // fits
			services = append(services, w.serviceOfKind(dataplane.ExternalIP, key, dataplane.TCP, frontend, w.specOf(endpoints)))
		}
	}
	check := func(t *testing.T) {
		t.Helper()
		var checks sync.WaitGroup
		for _, family := range families() {
			for _, from := range []*nettest.Host{w.client, w.pods[0], w.net.Node, w.net.Outside} {
				for n, want := range map[byte]probeResult{used: refused, empty: refused, unused: unanswered} {
					addr := vip(family, n, 0).Addr()
					checks.Go(func() { expectPing(t, from, addr, want) })
					checks.Go(func() {
						got, err := probe(t, want, func(ctx context.Context) error { return from.ProbeProtocol(ctx, nettest.ESP, addr) })
						if got != want {
							t.Errorf("ESP from %s to %s is %q (error %v), want it %s", from.Name, addr, got, err, want)
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
	w.replace(services...)
	t.Run("at first", check)
	w.warmRestart()
	t.Run("after a restart", check)
}
