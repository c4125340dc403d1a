package relay

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// TestUnresponsiveEndpoints checks that endpoints that do not answer, such as those on a node
// that is down, leave time to try others. A single endpoint may use all of the time.
func TestUnresponsiveEndpoints(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, tt := range []struct {
		name string
		// after is how long each endpoint takes to answer; zero means never.
		after  []time.Duration
		wantOK bool
	}{
		{"one slow endpoint", []time.Duration{4 * time.Second}, true},
		{"one unresponsive endpoint", []time.Duration{0}, false},
		{"one of two unresponsive", []time.Duration{0, time.Millisecond}, true},
		{"second of two slow", []time.Duration{0, time.Second + time.Millisecond}, true},
		{"two of three unresponsive", []time.Duration{0, 0, time.Second + time.Millisecond}, true},
		{"all unresponsive", []time.Duration{0, 0, 0, 0}, false},
	} {
		for _, affinity := range []time.Duration{0, time.Hour} {
			t.Run(fmt.Sprintf("%s/affinity %s", tt.name, affinity), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					svc := &dataplane.Service{}
					svc.Affinity = affinity
					after := map[netip.AddrPort]time.Duration{}
					for i, d := range tt.after {
						addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 80) //nolint:gosec // few
						svc.Endpoints = append(svc.Endpoints, dataplane.Endpoint{Addr: addr})
						after[addr] = d
					}
					r := New(Options{Dial: func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
						var answer <-chan time.Time
						if d := after[addr]; d > 0 {
							answer = time.After(d)
						}
						select {
						case <-ctx.Done():
							return nil, ctx.Err()
						case <-answer:
							return (&net.Dialer{}).DialContext(ctx, network, l.Addr().String())
						}
					}})
					p := &port{frontend: dataplane.Frontend{Addr: netip.AddrPortFrom(netip.IPv4Unspecified(), 30080)}}
					p.setService(svc)
					for range 20 { // the first endpoint is chosen at random
						start := time.Now()
						conn, err := r.dialEndpoint(t.Context(), p)
						if (err == nil) != tt.wantOK {
							t.Fatalf("error %v after %s, want success: %t", err, time.Since(start), tt.wantOK)
						}
						if took := time.Since(start); took > dialTimeout {
							t.Errorf("took %s, want at most %s", took, dialTimeout)
						}
						if conn != nil {
							_ = conn.Close()
						}
					}
				})
			})
		}
	}
}
