package nettest_test

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

// TestProbes pings and probes one address that the node rejects, one that it drops, and one
// that it forwards to.
func TestProbes(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	a, b := n.PodT(t, "a"), n.PodT(t, "b")
	run(t, n.Node, `table inet test {
		chain forward {
			type filter hook forward priority filter
			ip daddr 198.51.100.1 reject
			ip6 daddr 2001:db8:51::1 reject
			ip daddr 198.51.100.2 drop
			ip6 daddr 2001:db8:51::2 drop
		}
	}
	`, "nft", "-f", "-")
	within := func(d time.Duration, probe func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		defer cancel()
		return probe(ctx)
	}
	for i, addrs := range [][2]string{{"198.51.100.1", "198.51.100.2"}, {"2001:db8:51::1", "2001:db8:51::2"}} {
		refused, dropped := netip.MustParseAddr(addrs[0]), netip.MustParseAddr(addrs[1])
		for _, probe := range []struct {
			name string
			send func(ctx context.Context, to netip.Addr) error
		}{
			{"ping", a.Ping},
			{"ESP", func(ctx context.Context, to netip.Addr) error { return a.ProbeProtocol(ctx, nettest.ESP, to) }},
		} {
			if err := within(5*time.Second, func(ctx context.Context) error { return probe.send(ctx, refused) }); !errors.Is(err, nettest.ErrRefused) {
				t.Errorf("%s %s: error %v, want refused", probe.name, refused, err)
			}
			if err := within(200*time.Millisecond, func(ctx context.Context) error { return probe.send(ctx, dropped) }); !errors.Is(err, nettest.ErrTimeout) {
				t.Errorf("%s %s: error %v, want a timeout", probe.name, dropped, err)
			}
		}
		p, err := a.OpenPinger(b.Addrs()[i])
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := p.Ask(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestSegmentConn sends a segment without a connection and expects a reset, which the peer
// sends only if the segment is valid.
func TestSegmentConn(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	a, b := n.PodT(t, "a"), n.PodT(t, "b")
	for i := range a.Addrs() {
		from, to := netip.AddrPortFrom(a.Addrs()[i], 1000), netip.AddrPortFrom(b.Addrs()[i], 2000)
		conn := a.SegmentConnT(t, from.Addr())
		sent := nettest.Segment{Source: from, Destination: to, Seq: 7, Ack: 1 << 31, Flags: nettest.ACK | nettest.PSH, Len: 3}
		if err := conn.Send(sent); err != nil {
			t.Fatal(err)
		}
		want := nettest.Segment{Source: to, Destination: from, Seq: 1 << 31, Flags: nettest.RST}
		for len(conn.Received()) == 0 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		if got := conn.Received()[0]; got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

// TestBypass checks that the node sees only the answers.
func TestBypass(t *testing.T) {
	t.Parallel()
	n := nettest.NewT(t, nettest.Options{})
	pod := n.PodT(t, "pod")
	pod.ServeT(t, nettest.TCP, 80)
	if err := n.Bypass(n.Outside, pod); err != nil {
		t.Fatal(err)
	}
	run(t, n.Node, `table inet test {
		counter requests { }
		counter answers { }
		chain forward {
			type filter hook forward priority filter
			tcp dport 80 counter name requests
			tcp sport 80 counter name answers
		}
	}
	`, "nft", "-f", "-")
	for _, addr := range pod.Addrs() {
		if _, err := n.Outside.Connect(t.Context(), nettest.TCP, netip.AddrPortFrom(addr, 80)); err != nil {
			t.Error(err)
		}
	}
	if got := run(t, n.Node, "list counter inet test requests", "nft", "-f", "-"); !strings.Contains(got, "packets 0 ") {
		t.Errorf("the node forwarded requests:\n%s", got)
	}
	if got := run(t, n.Node, "list counter inet test answers", "nft", "-f", "-"); strings.Contains(got, "packets 0 ") {
		t.Errorf("the node forwarded no answers:\n%s", got)
	}
}

// TestAttach checks that a standalone host keeps its servers while networks are created and
// closed, and that each node can reach it.
func TestAttach(t *testing.T) {
	t.Parallel()
	host, err := nettest.NewStandaloneHost("standalone", netip.MustParseAddr("198.51.100.1"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close() })
	host.ServeT(t, nettest.TCP, 80)
	for range 2 {
		n, err := nettest.New(nettest.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Attach(host); err != nil {
			t.Error(err)
		} else if a, err := n.Node.Connect(t.Context(), nettest.TCP, netip.AddrPortFrom(host.IPv4, 80)); err != nil {
			t.Error(err)
		} else if a.Host != host.Name || a.Source.Addr() != n.Node.IPv4 {
			t.Errorf("answer %+v, want an answer from %s to source %s", a, host.Name, n.Node.IPv4)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}
