package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	stdsync "sync"
	"time"

	"fairlead/dataplane"
)

const (
	// dialTimeout is how long a client waits for an endpoint at most, and
	// maxTried how many endpoints it waits for.
	dialTimeout = 5 * time.Second
	maxTried    = 3
)

// connect serves a client: it finds an endpoint and copies until both sides have
// said all.
func (r *Relay) connect(ctx context.Context, p *port, client *net.TCPConn) {
	c := r.counters[p.family()]
	endpoint, err := r.reach(ctx, p)
	if err != nil {
		if ctx.Err() == nil {
			c.unreachable.Add(1)
			r.log.DebugContext(ctx, "no endpoint for a client of a node port", "frontend", p.frontend.String(), "error", err)
		}
		reset(client)
		return
	}
	c.connected.Add(1)
	join(ctx, client, endpoint)
}

// reach connects to an endpoint.
func (r *Relay) reach(ctx context.Context, p *port) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	deadline := time.Now().Add(dialTimeout)
	all, _ := p.endpoints()
	var tried []netip.AddrPort
	var errs []error
	for n := range maxTried {
		addr, ok := p.pick(time.Now(), tried)
		if !ok {
			break
		}
		tried = append(tried, addr)
		// One that does not answer at all leaves the others their share of the time.
		share := time.Until(deadline) / time.Duration(max(1, min(all, maxTried)-n))
		conn, err := r.dialWithin(ctx, share, p.family(), addr)
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

// dialWithin connects to an endpoint, and gives up after a time.
func (r *Relay) dialWithin(ctx context.Context, timeout time.Duration, family dataplane.Family, addr netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return r.opts.Dial(ctx, networkOf(family), addr)
}

// join copies between two connections until both have ended, and closes them. The
// end of one direction is passed on; an error, or the end of ctx, ends both with
// a reset, so that neither takes what it has got for all.
func join(ctx context.Context, client, endpoint *net.TCPConn) {
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
	pass := func(to, from *net.TCPConn) {
		if _, err := io.Copy(to, from); err != nil { // which splices
			abort()
			return
		}
		_ = to.CloseWrite() // if that fails the other direction meets the reason
	}
	var both stdsync.WaitGroup
	both.Go(func() { pass(endpoint, client) })
	pass(client, endpoint)
	both.Wait()
}

// reset closes a connection so that its peer gets an error, and not the end of
// the stream. It may be called more than once.
func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0)
	_ = conn.Close()
}
