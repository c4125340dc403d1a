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
	// dialTimeout is how long a client waits for an endpoint at most, and
	// maxDialAttempts how many endpoints it waits for.
	dialTimeout     = 5 * time.Second
	maxDialAttempts = 3
)

// handleClient serves a client: it finds an endpoint and copies until both sides have
// said all.
func (r *Relay) handleClient(ctx context.Context, p *port, client *net.TCPConn) {
	c := r.counters[p.family()]
	endpoint, err := r.dialEndpoint(ctx, p)
	if err != nil {
		if ctx.Err() == nil {
			c.unreachable.Add(1)
			r.log.DebugContext(ctx, "no endpoint for a client of a node port", "frontend", p.frontend.String(), "error", err)
		}
		reset(client)
		return
	}
	c.connected.Add(1)
	// Without the probes a peer whose host is gone would hold a slot for ever.
	for _, conn := range []*net.TCPConn{client, endpoint} {
		_ = conn.SetKeepAliveConfig(r.opts.KeepAlive) // fails if the connection has ended
	}
	if halfClosed := r.copyStreams(ctx, client, endpoint); halfClosed {
		c.halfClosed.Add(1)
		r.log.DebugContext(ctx, "a connection to a node port was half closed for too long", "frontend", p.frontend.String())
	}
}

// dialEndpoint connects to an endpoint.
func (r *Relay) dialEndpoint(ctx context.Context, p *port) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	deadline := time.Now().Add(dialTimeout)
	all, _ := p.endpointCount()
	var tried []netip.AddrPort
	var errs []error
	for n := range maxDialAttempts {
		addr, ok := p.pickEndpoint(time.Now(), tried)
		if !ok {
			break
		}
		tried = append(tried, addr)
		// One that does not answer at all leaves the others their share of the time.
		share := time.Until(deadline) / time.Duration(max(1, min(all, maxDialAttempts)-n))
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
		return nil, fmt.Errorf("connect to endpoint %s: no TCP connection: this is a bug", addr)
	}
	if len(errs) == 0 {
		return nil, errors.New("the endpoints have left")
	}
	return nil, errors.Join(errs...)
}

// dialWithTimeout connects to an endpoint, and gives up after a time.
func (r *Relay) dialWithTimeout(ctx context.Context, timeout time.Duration, family dataplane.Family, addr netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return r.opts.Dial(ctx, tcpNetwork(family), addr)
}

// copyStreams copies between two connections until both have ended, and closes them. The
// end of one direction is passed on; an error, or the end of ctx, ends both with
// a reset, so that neither takes what it has got for all. So does a half-closed
// connection without progress, see Options.HalfClosedTimeout; halfClosed reports it.
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
		_ = client.Close() // both sides have said all
		_ = endpoint.Close()
	}()
	var stalled atomic.Bool
	pass := func(to, from *net.TCPConn, done chan<- struct{}, otherDone <-chan struct{}) {
		_, err := io.Copy(to, from) // which splices
		if err == nil {
			_ = to.CloseWrite() // if that fails the other direction meets the reason
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
	both.Go(func() { pass(endpoint, client, toEndpoint, toClient) })
	pass(client, endpoint, toClient, toEndpoint)
	both.Wait()
	return stalled.Load()
}

// awaitProgress blocks while bytes move between two connections in the direction
// that is left, and reports whether done was closed in the end. It is false if
// nothing moved for Options.HalfClosedTimeout.
func (r *Relay) awaitProgress(done <-chan struct{}, from, to *net.TCPConn) bool {
	const checks = 8 // in a timeout: so much later than that the connection ends at most
	ticker := time.NewTicker(max(r.opts.HalfClosedTimeout/checks, time.Millisecond))
	defer ticker.Stop()
	moved, since := progress(from, to), time.Now()
	for {
		select {
		case <-done:
			return true
		case <-ticker.C:
		}
		if total := progress(from, to); total != moved {
			moved, since = total, time.Now()
		} else if time.Since(since) >= r.opts.HalfClosedTimeout {
			return false
		}
	}
}

// progress returns a number that grows while from receives bytes or the peer of to
// acknowledges some. io.Copy splices, and reports nothing until it ends.
func progress(from, to *net.TCPConn) uint64 {
	return tcpInfo(from).Bytes_received + tcpInfo(to).Bytes_acked
}

// tcpInfo returns the kernel's TCP_INFO, zero for a closed connection.
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

// reset closes a connection so that its peer gets an error, and not the end of
// the stream. It may be called more than once.
func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0)
	_ = conn.Close()
}
