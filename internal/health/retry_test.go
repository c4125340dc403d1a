package health_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"fairlead.io/fairlead/internal/health"
)

// idleListener is a listener that never accepts a connection.
type idleListener struct {
	net.Listener

	closed chan struct{}
	close  func()
}

func newIdleListener() idleListener {
	closed := make(chan struct{})
	return idleListener{closed: closed, close: sync.OnceFunc(func() { close(closed) })}
}

func (l idleListener) Accept() (net.Conn, error) {
	<-l.closed
	return nil, net.ErrClosed
}

func (l idleListener) Close() error {
	l.close()
	return nil
}

// TestPortsRetryWhileOthersChange checks that a port in use is retried once per period,
// however often other Services change.
func TestPortsRetryWhileOthersChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var taken atomic.Bool
		taken.Store(true)
		var attempts atomic.Int64
		ports := health.NewPorts(health.PortsOptions{
			Healthy: func() bool { return true },
			Listen: func(_ context.Context, _, address string) (net.Listener, error) {
				if address == "192.0.2.1:30100" {
					attempts.Add(1)
					if taken.Load() {
						return nil, errors.New("in use")
					}
				}
				return newIdleListener(), nil
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- ports.Run(ctx) }()
		ports.SetAddrs([]netip.Addr{netip.MustParseAddr("192.0.2.1")})
		a, b := health.Service{Namespace: "shop", Name: "a"}, health.Service{Namespace: "shop", Name: "b"}
		ports.Set(map[health.Service]*health.Check{a: {Port: 30100}, b: {Port: 30101}})
		changeOtherService := func(periods int) {
			const often = 10
			for i := range often * periods {
				time.Sleep(health.RetryPeriod / often)
				ports.Set(map[health.Service]*health.Check{b: {Port: 30101, LocalEndpoints: i}})
			}
			synctest.Wait()
		}
		changeOtherService(10)
		if got := attempts.Load(); got < 9 || got > 11 {
			t.Errorf("%d attempts in 10 periods, want one per period", got)
		}
		taken.Store(false)
		attempts.Store(0)
		changeOtherService(10)
		if got := attempts.Load(); got != 1 {
			t.Errorf("%d attempts after the port was free, want 1", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}
