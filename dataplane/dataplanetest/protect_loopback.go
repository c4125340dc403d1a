package dataplanetest

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// testProtectLoopback has another host connect to what the node serves at loopback addresses.
func (s suite) testProtectLoopback(t *testing.T) {
	t.Parallel()
	w := newTopology(t, s, 0)
	node, outside := w.net.Node, w.net.Outside
	if err := w.net.ExposeLoopback(); err != nil {
		t.Fatal(err)
	}
	for _, family := range families() {
		for _, p := range protocols() {
			node.ServeAtT(t, networkName(p), loopbackAddrs(family), endpointPort)
		}
	}
	// The kernel itself drops packets to ::1 from other hosts.
	check := func(t *testing.T, exposed bool) {
		t.Helper()
		for _, family := range families() {
			for _, p := range protocols() {
				to := netip.AddrPortFrom(loopbackAddrs(family)[0], endpointPort)
				expectHost(t, node, p, to, node)
				switch {
				case !exposed:
					expectDropped(t, outside, p, to)
				case family == dataplane.IPv4:
					expectHost(t, outside, p, to, node)
				}
			}
		}
	}
	w.replace()
	t.Run("without protection", func(t *testing.T) { check(t, true) })
	w.node.ProtectLoopback = true
	w.replace()
	t.Run("with protection", func(t *testing.T) { check(t, false) })
	w.node.ProtectLoopback = false
	w.replace()
	t.Run("without protection again", func(t *testing.T) { check(t, true) })
}
