package flowoffload

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// The ports of the benchmarks' server: UDP packets are counted by the kernel only, TCP data are
// discarded.
const benchmarkPort = 9000

// benchmarkPath is a way from the client to the server.
type benchmarkPath struct {
	name string
	addr netip.AddrPort
	conn net.Conn
	// fastest is the duration of the fastest round.
	fastest time.Duration
}

// measured records a round that began at start.
func (p *benchmarkPath) measured(start time.Time) {
	if took := time.Since(start); p.fastest == 0 || took < p.fastest {
		p.fastest = took
	}
}

// openPaths returns established connections to a pod: direct, through a Service on the normal path, and
// through a Service whose connections are offloaded.
func openPaths(b *testing.B, network string) []*benchmarkPath {
	b.Helper()
	skipWithoutFlowtables(b)
	n := nettest.NewT(b, nettest.Options{})
	server := n.PodT(b, "server")
	client := n.PodT(b, "client")
	direct := netip.AddrPortFrom(server.IPv4, benchmarkPort)
	serve(b, server, network, direct)
	inner, err := nft.Open(nft.Options{NetNS: n.Node.Fd()})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = inner.Close() })
	d, err := New(inner, Options{NetNS: n.Node.Fd(), Threshold: 2})
	if err != nil {
		b.Fatal(err)
	}
	running := make(chan error, 1)
	go func() { running <- d.Run(b.Context()) }()
	b.Cleanup(func() {
		if err := errors.Join(<-running, d.Close()); err != nil {
			b.Error(err)
		}
	})
	protocol := dataplane.TCP
	if network == nettest.UDP {
		protocol = dataplane.UDP
	}
	var services []*dataplane.Service
	for i := range 2 {
		s, err := dataplane.NewService(
			dataplane.Key{Namespace: "default", Name: fmt.Sprintf("web%d", i), Family: dataplane.IPv4},
			[]dataplane.Frontend{{Protocol: protocol, Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(10 + i)}), 80)}},
			dataplane.ServiceSpec{Endpoints: []dataplane.Endpoint{{Addr: direct}}})
		if err != nil {
			b.Fatal(err)
		}
		services = append(services, s)
	}
	if err := d.Replace(b.Context(), dataplane.Node{}, slices.Values(services), nil); err != nil {
		b.Fatal(err)
	}
	for deadline := time.Now().Add(patience); d.stats().Devices < 3; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatalf("the flowtable has no devices: %+v", d.stats())
		}
	}
	// The table of the first Service's connections stays out of the flowtable.
	if err := d.conn.SetDeleteElements(d.table.frontends4, []nftables.SetElement{{Key: frontendKey(services[0].Frontends[0])}}); err != nil {
		b.Fatal(err)
	}
	if err := d.conn.Flush(); err != nil {
		b.Fatal(err)
	}
	paths := []*benchmarkPath{
		{name: "direct", addr: direct}, {name: "Service", addr: services[0].Frontends[0].Addr}, {name: "offloaded", addr: services[1].Frontends[0].Addr},
	}
	for _, p := range paths {
		if p.conn, err = client.Dial(b.Context(), network, p.addr); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = p.conn.Close() })
		warmUp(b, p.conn)
	}
	if s := d.stats(); s.Offloaded != 1 {
		b.Fatalf("%d connections are offloaded, want one", s.Offloaded)
	}
	return paths
}

// warmUp exchanges packets in both directions.
func warmUp(b *testing.B, c net.Conn) {
	b.Helper()
	buffer := make([]byte, 1)
	for range 10 {
		if _, err := c.Write([]byte{'?'}); err != nil {
			b.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buffer); err != nil {
			b.Fatal(err)
		}
	}
}

// received counts the bytes that the TCP server has received.
var received atomic.Int64

// serve answers messages of one byte and discards others.
func serve(b *testing.B, server *nettest.Host, network string, addr netip.AddrPort) {
	b.Helper()
	if network == nettest.UDP {
		c, err := server.ListenPacket(b.Context(), network, addr)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = c.Close() })
		go func() {
			buffer := make([]byte, 2048)
			for {
				n, from, err := c.ReadFrom(buffer)
				if err != nil {
					return
				}
				if n == 1 {
					_, _ = c.WriteTo(buffer[:1], from)
				}
			}
		}()
		return
	}
	l, err := server.Listen(b.Context(), network, addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				buffer := make([]byte, 256<<10)
				for {
					n, err := c.Read(buffer)
					if err != nil {
						return
					}
					if received.Add(int64(n)); n == 1 {
						_, _ = c.Write(buffer[:1])
					}
				}
			}()
		}
	}()
}

// BenchmarkPackets measures the time to send a UDP packet of 64 bytes. The kernel passes it from the
// client's socket through the node to the server's socket before the system call returns. An iteration
// is a round that sends the same number of packets on each path; the result is the fastest round.
func BenchmarkPackets(b *testing.B) {
	paths := openPaths(b, nettest.UDP)
	const packets = 1000
	payload := make([]byte, 64)
	for b.Loop() {
		for _, p := range paths {
			start := time.Now()
			for range packets {
				if _, err := p.conn.Write(payload); err != nil {
					b.Fatal(err)
				}
			}
			p.measured(start)
		}
	}
	for _, p := range paths {
		b.ReportMetric(float64(p.fastest.Nanoseconds())/packets, p.name+"-ns/packet")
		b.ReportMetric(float64(p.fastest)/float64(paths[0].fastest), p.name+"/direct")
	}
}

// BenchmarkThroughput measures the throughput of a TCP connection, on each path in turns. The result is
// the fastest round.
func BenchmarkThroughput(b *testing.B) {
	paths := openPaths(b, nettest.TCP)
	const size = 16 << 20
	payload := make([]byte, 256<<10)
	for b.Loop() {
		for _, p := range paths {
			start := time.Now()
			end := received.Load() + size
			for sent := 0; sent < size; sent += len(payload) {
				if _, err := p.conn.Write(payload); err != nil {
					b.Fatal(err)
				}
			}
			for received.Load() < end {
				time.Sleep(50 * time.Microsecond)
			}
			p.measured(start)
		}
	}
	for _, p := range paths {
		b.ReportMetric(size/(1<<20)/p.fastest.Seconds(), p.name+"-MiB/s")
		b.ReportMetric(float64(p.fastest)/float64(paths[0].fastest), p.name+"/direct")
	}
}
