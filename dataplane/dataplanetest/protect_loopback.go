package dataplanetest

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

// testProtectLoopback connects from another host to servers on the node's loopback addresses.
func (s suite) testProtectLoopback(t *testing.T) {
	t.Parallel()
	topo := newTopology(t, s, 0)
	node, outside := topo.net.Node, topo.net.Outside
	if err := topo.net.ExposeLoopback(); err != nil {
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
	topo.replace()
	t.Run("unprotected", func(t *testing.T) { check(t, true) })
	topo.node.ProtectLoopback = true
	topo.replace()
	t.Run("protected", func(t *testing.T) { check(t, false) })
	topo.node.ProtectLoopback = false
	topo.replace()
	t.Run("unprotected again", func(t *testing.T) { check(t, true) })
}
