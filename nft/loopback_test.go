package nft

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

// TestProtectLoopbackWithOtherRules checks that packets which another program translates to a
// loopback address reach it, in both directions. Packets sent to a loopback address are
// dropped, even if they are untracked.
func TestProtectLoopbackWithOtherRules(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	node, outside := network.Node, network.Outside
	if err := network.ExposeLoopback(); err != nil {
		t.Fatal(err)
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	for _, p := range []string{nettest.TCP, nettest.UDP} {
		node.ServeAtT(t, p, []netip.Addr{loopback}, 8080)
	}
	outside.ServeT(t, nettest.TCP, 9090)
	binary := nftBinaries(t)["1.1.3"]
	runNFT(t, node.Namespace, binary, `table ip other {
		chain prerouting {
			type nat hook prerouting priority dstnat + 5
			ip daddr 192.0.2.1 meta l4proto { tcp, udp } th dport 7070 dnat to 127.0.0.1:8080
		}
		chain postrouting {
			type nat hook postrouting priority srcnat
			oifname "eth0" ip saddr 127.0.0.0/8 masquerade
		}
		chain raw {
			type filter hook prerouting priority raw
			ip daddr 127.0.0.2 notrack
		}
	}`)
	d := openInNamespace(t, node.Namespace)
	protected := nodeWithPodCIDRs()
	protected.ProtectLoopback = true
	mustReplace(t, d, protected)
	for _, p := range []string{nettest.TCP, nettest.UDP} {
		if _, err := outside.Connect(t.Context(), p, netip.AddrPortFrom(node.IPv4, 7070)); err != nil {
			t.Errorf("%s: connection translated to a loopback address by another program: %v", p, err)
		}
	}
	if _, err := node.ConnectFrom(t.Context(), loopback, netip.AddrPortFrom(outside.IPv4, 9090)); err != nil {
		t.Errorf("connection from a loopback address masqueraded by another program: %v", err)
	}
	if n := counterPackets(t, runNFT(t, node.Namespace, binary, "list counter ip fairlead dropped-loopback")); n != 0 {
		t.Errorf("%d packets were dropped, want none", n)
	}
	node.ServeAtT(t, nettest.UDP, []netip.Addr{netip.MustParseAddr("127.0.0.2")}, 8080)
	for _, to := range []string{"127.0.0.1:8080", "127.0.0.2:8080"} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if _, err := outside.Connect(ctx, nettest.UDP, netip.MustParseAddrPort(to)); !errors.Is(err, nettest.ErrTimeout) {
			t.Errorf("packet to %s from another host: error %v, want it dropped", to, err)
		}
		cancel()
	}
	if n := counterPackets(t, runNFT(t, node.Namespace, binary, "list counter ip fairlead dropped-loopback")); n != 2 {
		t.Errorf("%d packets were dropped and counted, want 2", n)
	}
}
