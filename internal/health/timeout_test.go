package health_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"fairlead.io/fairlead/internal/health"
)

// pipeListener is an in-memory listener.
type pipeListener struct {
	idleListener

	conns chan net.Conn
}

func (p pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// TestServeTimeouts checks that Serve closes the connections of clients that send nothing, or
// only a part of a request.
func TestServeTimeouts(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, request string
		want          time.Duration
	}{
		{"nothing", "", 10 * time.Second},
		{"half a header", "GET / HTTP/1.1\r\nHost:", 10 * time.Second},
		{"half a body", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf", 30 * time.Second},
		{"one whole request", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", 2 * time.Minute},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				listener := pipeListener{newIdleListener(), make(chan net.Conn)}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() {
					done <- health.Serve(ctx, health.ServeOptions{
						Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }),
						Listen:  func(context.Context, string, string) (net.Listener, error) { return listener, nil },
					})
				}()
				client, server := net.Pipe()
				began := time.Now()
				listener.conns <- server
				go func() { _, _ = io.WriteString(client, test.request) }()
				_, _ = io.Copy(io.Discard, client)
				if took := time.Since(began); took != test.want {
					t.Errorf("closed after %s, want %s", took, test.want)
				}
				cancel()
				if err := <-done; err != nil {
					t.Errorf("Serve: %v", err)
				}
			})
		})
	}
}
