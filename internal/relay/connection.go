package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	stdsync "sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
)

const (
	// dialTimeout bounds the time to connect to an endpoint, over all attempts;
	// maxDialAttempts bounds the number of endpoints to try.
	dialTimeout     = 5 * time.Second
	maxDialAttempts = 3
)

// handleClient connects a client to an endpoint and copies data until both sides have closed.
func (r *Relay) handleClient(ctx context.Context, p *port, client *net.TCPConn) {
	c := r.counters[p.family()]
	endpoint, err := r.dialEndpoint(ctx, p)
	if err != nil {
		if ctx.Err() == nil {
			c.unreachable.Add(1)
			r.log.DebugContext(ctx, "no endpoint of the node port accepted a connection", "frontend", p.frontend.String(), "error", err)
		}
		reset(client)
		return
	}
	c.connected.Add(1)
	// Without keepalive probes, a peer whose host is gone would hold a slot forever.
	for _, conn := range []*net.TCPConn{client, endpoint} {
		_ = conn.SetKeepAliveConfig(r.opts.KeepAlive) // fails if the connection has ended
	}
	if halfClosed := r.copyStreams(ctx, client, endpoint); halfClosed {
		c.halfClosed.Add(1)
		r.log.DebugContext(ctx, "closed a half-closed connection to a node port after a timeout without progress", "frontend", p.frontend.String())
	}
}

// dialEndpoint connects to an endpoint of p. It tries up to maxDialAttempts endpoints within
// dialTimeout.
func (r *Relay) dialEndpoint(ctx context.Context, p *port) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	deadline := time.Now().Add(dialTimeout)
	count, _ := p.endpointCount()
	var tried []netip.AddrPort
	var errs []error
	for n := range maxDialAttempts {
		addr, ok := p.pickEndpoint(time.Now(), tried)
		if !ok {
			break
		}
		tried = append(tried, addr)
		// An endpoint that does not answer leaves the others their share of the time.
		share := time.Until(deadline) / time.Duration(max(1, min(count, maxDialAttempts)-n))
		conn, err := r.dialWithTimeout(ctx, share, p.family(), addr)
		if err != nil {
			errs = append(errs, fmt.Errorf("connect to endpoint %s: %w", addr, err))
			if ctx.Err() != nil {
				break
			}
			continue
		}
		if endpoint, ok := conn.(*net.TCPConn); ok {
			return endpoint, nil
		}
		_ = conn.Close()
		return nil, fmt.Errorf("connect to endpoint %s: not a TCP connection: this is a bug", addr)
	}
	if len(errs) == 0 {
		return nil, errors.New("all endpoints were removed")
	}
	return nil, errors.Join(errs...)
}

// dialWithTimeout connects to an endpoint within a timeout.
func (r *Relay) dialWithTimeout(ctx context.Context, timeout time.Duration, family dataplane.Family, addr netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return r.opts.Dial(ctx, tcpNetwork(family), addr)
}

// copyStreams copies data between two connections until both have ended, and closes them. It
// forwards the end of one direction. After an error, or when ctx is done, it resets both
// connections, so that neither peer mistakes partial data for a complete stream. It also
// resets a half-closed connection that makes no progress for Options.HalfClosedTimeout and
// then returns halfClosed.
func (r *Relay) copyStreams(ctx context.Context, client, endpoint *net.TCPConn) (halfClosed bool) {
	abort := func() {
		reset(client)
		reset(endpoint)
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		abort()
	})
	defer func() {
		if !stop() {
			<-ended
		}
		_ = client.Close() // both streams have ended
		_ = endpoint.Close()
	}()
	var stalled atomic.Bool
	forward := func(to, from *net.TCPConn, done chan<- struct{}, otherDone <-chan struct{}) {
		_, err := io.Copy(to, from) // splice(2) on Linux
		if err == nil {
			_ = to.CloseWrite() // the other direction reports the reason for a failure
		}
		close(done)
		if err != nil {
			abort()
			return
		}
		if !r.awaitProgress(otherDone, to, from) {
			stalled.Store(true)
			abort()
		}
	}
	toEndpoint, toClient := make(chan struct{}), make(chan struct{})
	var both stdsync.WaitGroup
	both.Go(func() { forward(endpoint, client, toEndpoint, toClient) })
	forward(client, endpoint, toClient, toEndpoint)
	both.Wait()
	return stalled.Load()
}

// awaitProgress blocks while data moves in the remaining direction. It returns true when done
// is closed, and false if no data moved for Options.HalfClosedTimeout.
func (r *Relay) awaitProgress(done <-chan struct{}, from, to *net.TCPConn) bool {
	const checks = 8 // per timeout; the connection ends at most this fraction of the timeout late
	ticker := time.NewTicker(max(r.opts.HalfClosedTimeout/checks, time.Millisecond))
	defer ticker.Stop()
	last, since := progress(from, to), time.Now()
	for {
		select {
		case <-done:
			return true
		case <-ticker.C:
		}
		if total := progress(from, to); total != last {
			last, since = total, time.Now()
		} else if time.Since(since) >= r.opts.HalfClosedTimeout {
			return false
		}
	}
}

// progress returns a number that grows while from receives bytes or the peer of to
// acknowledges bytes. io.Copy cannot report this: it splices, and returns only at the end.
func progress(from, to *net.TCPConn) uint64 {
	return tcpInfo(from).Bytes_received + tcpInfo(to).Bytes_acked
}

// tcpInfo returns the kernel's TCP_INFO, or zero for a closed connection.
func tcpInfo(conn *net.TCPConn) unix.TCPInfo {
	var info unix.TCPInfo
	raw, err := conn.SyscallConn()
	if err != nil {
		return info
	}
	_ = raw.Control(func(fd uintptr) {
		if got, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			info = *got
		}
	})
	return info
}

// reset closes a connection so that its peer gets an error instead of the end of the stream.
// Calling it more than once is safe.
func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0)
	_ = conn.Close()
}
