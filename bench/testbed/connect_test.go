package testbed_test

import (
	"net/netip"
	"testing"

	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/internal/nettest"
)

// TestPortIsFreeAfterAcceptAndClose listens on the endpoints' port while the host has not yet
// received the end of a connection. Resets can arrive late on a busy machine.
func TestPortIsFreeAfterAcceptAndClose(t *testing.T) {
	const port = 8000
	host := nettest.NewT(t, nettest.Options{}).Node
	stop, err := testbed.AcceptAndClose(host, port)
	if err != nil {
		t.Fatal(err)
	}
	loopback := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	c, err := host.Dial(t.Context(), nettest.TCP, loopback)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatal("the host did not close the connection")
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	l, err := host.Listen(t.Context(), nettest.TCP, netip.AddrPortFrom(netip.IPv4Unspecified(), port))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
