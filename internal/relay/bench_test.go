package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/sync"
)

// BenchmarkCommit measures the time from a changed endpoint of one node port until clients
// get it. The time must not depend on the number of other node ports.
func BenchmarkCommit(b *testing.B) {
	for _, ports := range []int{10, 1000} {
		b.Run(fmt.Sprintf("ports=%d", ports), func(b *testing.B) {
			r := New(Options{Listen: func(context.Context, string, netip.AddrPort) (net.Listener, error) {
				return &idleListener{closed: make(chan struct{})}, nil
			}})
			r.SetFamilies(dataplane.IPv4)
			service := func(number int, endpoint string) *dataplane.Service {
				addr := netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(30000+number)) //nolint:gosec // fits
				return &dataplane.Service{
					Key:         dataplane.Key{Namespace: "default", Name: fmt.Sprint(number), Family: dataplane.IPv4, Kind: dataplane.NodePort},
					Frontends:   []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: addr}},
					ServiceSpec: dataplane.ServiceSpec{Endpoints: endpoints(endpoint)},
				}
			}
			var all sync.Commit
			for i := range ports {
				all.Changes = append(all.Changes, dataplane.Change{New: service(i, "10.0.0.1:80")})
			}
			r.OnCommit(all)
			r.applyPending(b.Context())
			defer func() {
				for _, p := range r.ports {
					r.close(p)
				}
				r.serving.Wait()
			}()
			if got := r.Stats(dataplane.IPv4).Listeners; got != ports {
				b.Fatalf("%d listeners, want %d", got, ports)
			}
			one, other := service(0, "10.0.0.1:80"), service(0, "10.0.0.2:80")
			b.ReportAllocs()
			for b.Loop() {
				r.OnCommit(sync.Commit{Changes: []dataplane.Change{{Old: one, New: other}}})
				r.applyPending(b.Context())
				one, other = other, one
			}
		})
	}
}

// idleListener is a listener that never accepts a connection.
type idleListener struct {
	net.Listener

	closed chan struct{}
}

// Accept implements [net.Listener].
func (l *idleListener) Accept() (net.Conn, error) {
	<-l.closed
	return nil, net.ErrClosed
}

// Close implements [net.Listener].
func (l *idleListener) Close() error {
	close(l.closed)
	return nil
}

// BenchmarkThroughput measures the throughput of a relayed connection and of a direct one.
func BenchmarkThroughput(b *testing.B) {
	const size = 1 << 20
	pair := func() (dialled, accepted *net.TCPConn) {
		l, err := listen(b.Context(), "tcp4", netip.MustParseAddrPort("127.0.0.1:0"))
		if err != nil {
			b.Fatal(err)
		}
		a, dialErr := dial(b.Context(), "tcp4", l.Addr().(*net.TCPAddr).AddrPort())
		c, acceptErr := l.Accept()
		if err := errors.Join(dialErr, acceptErr, l.Close()); err != nil {
			b.Fatal(err)
		}
		return a.(*net.TCPConn), c.(*net.TCPConn)
	}
	for _, relayed := range []bool{true, false} {
		b.Run(fmt.Sprintf("relayed=%t", relayed), func(b *testing.B) {
			from, to := pair()
			if relayed {
				endpoint, accepted := pair()
				go New(Options{}).copyStreams(b.Context(), to, endpoint)
				to = accepted
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = io.Copy(io.Discard, to)
				_ = to.Close()
			}()
			b.SetBytes(size)
			data := make([]byte, size)
			for b.Loop() {
				if _, err := from.Write(data); err != nil {
					b.Fatal(err)
				}
			}
			_ = from.Close()
			<-done
		})
	}
}
