package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	stdsync "sync"
	"sync/atomic"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/sync"
)

// Options adjust a [Relay]. The zero value is ready to use.
type Options struct {
	// MaxConnections limits the connections at a time, and MaxListeners the node
	// ports that are listened on. Zero means 4096 of either.
	MaxConnections, MaxListeners int
	// HalfClosedTimeout ends a connection that one side has closed and in which
	// nothing moves towards that side any more. Zero means a minute.
	HalfClosedTimeout time.Duration
	// KeepAlive configures the probes that find out that the host of a silent
	// client or endpoint is gone. Zero means four probes, 15 s apart, after 15 s
	// of silence.
	KeepAlive net.KeepAliveConfig
	// Listen makes the sockets of node ports, and Dial connects to endpoints; the
	// network is "tcp4" or "tcp6". Connections must be of type *[net.TCPConn]. Nil
	// means in this process's network namespace.
	Listen func(ctx context.Context, network string, addr netip.AddrPort) (net.Listener, error)
	Dial   func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)
	// Logger gets a Warn when a port can't be listened on and when its clients are
	// refused, an Info when it can be listened on again, and a Debug for each client
	// that no endpoint was found for. Nil means no logging.
	Logger *slog.Logger
}

// Stats are what a Relay has done for one family, and does.
type Stats struct {
	// Listeners is the number of node ports that are listened on, and Failing of
	// those that can't be.
	Listeners, Failing int
	// ListenFailures counts the attempts to listen that failed.
	ListenFailures uint64
	// Open is the number of connections that clients have now, and Limit the
	// maximum of both families together.
	Open, Limit int
	// Connected counts the clients that got an endpoint, and Unreachable those for
	// which none answered. Refused counts the clients that were reset because all
	// connections were in use, and RejectedByPortLimit those whose node port had its share.
	Connected, Unreachable, RejectedByLimit, RejectedByPortLimit uint64
	// HalfClosed counts the connections that Options.HalfClosedTimeout ended.
	HalfClosed uint64
}

// The delays between attempts to listen on one port.
const (
	retryMin = time.Second
	retryMax = 30 * time.Second
)

// The defaults of Options.
const (
	defaultMaxConnections    = 4096
	defaultMaxListeners      = 4096
	defaultHalfClosedTimeout = time.Minute
	keepAliveInterval        = 15 * time.Second
	keepAliveCount           = 4
)

// Relay listens on node ports at loopback addresses. Make one with [New].
type Relay struct {
	opts Options
	log  *slog.Logger
	wake chan struct{} // one slot: the mailbox has something

	mu              stdsync.Mutex
	changed         map[dataplane.Key]*dataplane.Service // nil for those that are gone
	families        []dataplane.Family
	familiesChanged bool // families has changed

	// The rest is Run's.
	services       map[dataplane.Key]*dataplane.Service
	ports          map[dataplane.Frontend]*port
	activeFamilies []dataplane.Family
	failing        map[*port]struct{}
	retry          *time.Timer
	retryAt        time.Time // when retry fires; zero for never
	serving        stdsync.WaitGroup

	slots    *slots
	counters map[dataplane.Family]*counters // not written to
}

// counters are the Stats of a family.
type counters struct {
	listeners, failing, open                         atomic.Int64
	listenFailures, connected, unreachable           atomic.Uint64
	rejectedByLimit, rejectedByPortLimit, halfClosed atomic.Uint64
}

// New returns a Relay that listens nowhere. It starts nothing: call [Relay.Run].
func New(opts Options) *Relay {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.MaxConnections <= 0 {
		opts.MaxConnections = defaultMaxConnections
	}
	if opts.MaxListeners <= 0 {
		opts.MaxListeners = defaultMaxListeners
	}
	if opts.HalfClosedTimeout <= 0 {
		opts.HalfClosedTimeout = defaultHalfClosedTimeout
	}
	if opts.KeepAlive == (net.KeepAliveConfig{}) {
		opts.KeepAlive = net.KeepAliveConfig{Enable: true, Idle: keepAliveInterval, Interval: keepAliveInterval, Count: keepAliveCount}
	}
	if opts.Listen == nil {
		opts.Listen = listen
	}
	if opts.Dial == nil {
		opts.Dial = dial
	}
	return &Relay{
		opts: opts, log: opts.Logger, wake: make(chan struct{}, 1),
		changed:  map[dataplane.Key]*dataplane.Service{},
		services: map[dataplane.Key]*dataplane.Service{},
		ports:    map[dataplane.Frontend]*port{},
		failing:  map[*port]struct{}{},
		slots:    &slots{max: opts.MaxConnections, byPort: map[dataplane.Frontend]int{}},
		counters: map[dataplane.Family]*counters{dataplane.IPv4: {}, dataplane.IPv6: {}},
	}
}

func listen(ctx context.Context, network string, addr netip.AddrPort) (net.Listener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false) // the kernel splices TCP only
	return config.Listen(ctx, network, addr.String())
}

func dial(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	var dialer net.Dialer
	return dialer.DialContext(ctx, network, addr.String())
}

// SetFamilies says in which families node ports are listened on; connections in
// others stay. It does not block and may be called from any goroutine, before
// and during Run.
func (r *Relay) SetFamilies(families ...dataplane.Family) {
	r.mu.Lock()
	r.families, r.familiesChanged = slices.Clone(families), true
	r.mu.Unlock()
	r.signal()
}

// OnCommit tells of a call to the dataplane that has ended, as sync.Options has
// it. It does not block, and may be called before and during Run, but not twice
// at a time.
func (r *Relay) OnCommit(commit sync.Commit) {
	var found bool
	r.mu.Lock()
	for _, change := range commit.Changes {
		if isTCPNodePort(change.Old) || isTCPNodePort(change.New) {
			r.changed[change.Key()] = change.New
			found = true
		}
	}
	r.mu.Unlock()
	if found {
		r.signal()
	}
}

// isTCPNodePort reports whether svc, which may be nil, has a node port of TCP.
func isTCPNodePort(svc *dataplane.Service) bool {
	return svc != nil && svc.Key.Kind == dataplane.NodePort &&
		slices.ContainsFunc(svc.Frontends, func(f dataplane.Frontend) bool { return f.Protocol == dataplane.TCP })
}

func (r *Relay) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Stats returns what was done for a family, and is now. It does not block and
// may be called from any goroutine.
func (r *Relay) Stats(family dataplane.Family) Stats {
	c := r.counters[family]
	if c == nil {
		return Stats{}
	}
	return Stats{
		Listeners: int(c.listeners.Load()), Failing: int(c.failing.Load()), ListenFailures: c.listenFailures.Load(),
		Open: int(c.open.Load()), Limit: r.opts.MaxConnections,
		Connected: c.connected.Load(), Unreachable: c.unreachable.Load(), HalfClosed: c.halfClosed.Load(),
		RejectedByLimit: c.rejectedByLimit.Load(), RejectedByPortLimit: c.rejectedByPortLimit.Load(),
	}
}

// Run listens and serves until ctx is done; then it closes the listeners, resets
// the connections, and returns nil. It is called once.
func (r *Relay) Run(ctx context.Context) error {
	defer r.serving.Wait()
	defer func() {
		for _, p := range r.ports {
			r.close(p)
		}
	}()
	r.retry = time.NewTimer(0)
	defer r.retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
			r.applyPending(ctx)
		case <-r.retry.C:
			r.retryFailed(ctx, time.Now())
		}
	}
}

// applyPending takes over what was told.
func (r *Relay) applyPending(ctx context.Context) {
	r.mu.Lock()
	changed, families, switched := r.changed, r.families, r.familiesChanged
	r.changed, r.familiesChanged = map[dataplane.Key]*dataplane.Service{}, false
	r.mu.Unlock()

	// A node port may go from one Service to another: what leaves comes first. Its
	// clients must not find it without a Service in between.
	next := map[*port]*dataplane.Service{}
	for key := range changed {
		for f := range tcpFrontends(r.services[key]) {
			if p := r.ports[f]; p != nil && p.owner == key {
				next[p] = nil
			}
		}
		delete(r.services, key)
	}
	for key, svc := range changed {
		if !isTCPNodePort(svc) {
			continue
		}
		r.services[key] = svc
		for f := range tcpFrontends(svc) {
			p := r.ports[f]
			if p == nil {
				p = &port{frontend: f}
				r.ports[f] = p
			}
			p.owner = key
			next[p] = svc
		}
	}
	now := time.Now()
	if switched {
		r.activeFamilies = families
		for _, p := range r.ports {
			if _, ok := next[p]; !ok {
				r.updateListener(ctx, p, now)
			}
		}
	}
	for p, svc := range next {
		p.setService(svc)
		r.updateListener(ctx, p, now)
	}
}

// tcpFrontends returns the frontends of TCP of svc, which may be nil.
func tcpFrontends(svc *dataplane.Service) func(yield func(dataplane.Frontend) bool) {
	return func(yield func(dataplane.Frontend) bool) {
		if svc == nil {
			return
		}
		for _, f := range svc.Frontends {
			if f.Protocol == dataplane.TCP && !yield(f) {
				return
			}
		}
	}
}

// updateListener listens on a port, or no longer, as its Service has it now.
func (r *Relay) updateListener(ctx context.Context, p *port, now time.Time) {
	endpoints, there := p.endpointCount()
	if !there {
		delete(r.ports, p.frontend)
	}
	switch wanted := endpoints > 0 && slices.Contains(r.activeFamilies, p.family()); {
	case !wanted:
		r.close(p)
	case p.listener == nil && p.attempts == 0:
		r.listen(ctx, p, now)
	}
}

// close frees a port: clients are refused, and those that wait to be accepted
// reset.
func (r *Relay) close(p *port) {
	if p.listener != nil {
		_ = p.listener.Close() // nothing was written
		p.listener = nil
		r.counters[p.family()].listeners.Add(-1)
	}
	if p.attempts > 0 {
		r.counters[p.family()].failing.Add(-1)
		delete(r.failing, p)
		p.attempts, p.lastError = 0, ""
	}
}

// listen listens on a port, or sees to it that this is tried again.
func (r *Relay) listen(ctx context.Context, p *port, now time.Time) {
	network, addr := p.listenAddr()
	c := r.counters[p.family()]
	l, err := r.listenBelowLimit(ctx, network, addr)
	if err != nil {
		c.listenFailures.Add(1)
		if p.attempts == 0 {
			c.failing.Add(1)
			r.failing[p] = struct{}{}
		}
		delay := retryMax
		if p.attempts < 5 { // 32 s
			delay = min(retryMin<<p.attempts, retryMax)
		}
		p.attempts++
		p.retryAt = now.Add(delay)
		r.scheduleRetry(p.retryAt)
		if text := err.Error(); p.lastError != text {
			p.lastError = text
			r.log.WarnContext(ctx, "a node port can't be listened on; trying again until it succeeds",
				"address", addr.String(), "service", p.owner.Service(), "error", err)
		}
		return
	}
	if p.attempts > 0 {
		r.log.InfoContext(ctx, "a node port is listened on again", "address", addr.String(), "service", p.owner.Service(), "attempts", p.attempts)
		c.failing.Add(-1)
		delete(r.failing, p)
		p.attempts, p.lastError = 0, ""
	}
	c.listeners.Add(1)
	p.listener = l
	r.serving.Go(func() { r.acceptClients(ctx, p, l) })
}

// listenBelowLimit opens a socket unless there are Options.MaxListeners of them.
func (r *Relay) listenBelowLimit(ctx context.Context, network string, addr netip.AddrPort) (net.Listener, error) {
	var listeners int64
	for _, c := range r.counters {
		listeners += c.listeners.Load()
	}
	if listeners >= int64(r.opts.MaxListeners) {
		return nil, fmt.Errorf("%d node ports are listened on at loopback addresses, and no more are allowed: "+
			"raise the limit of open files (RLIMIT_NOFILE)", listeners)
	}
	return r.opts.Listen(ctx, network, addr)
}

// scheduleRetry sees to it that ports are tried again at a time, or before.
func (r *Relay) scheduleRetry(at time.Time) {
	if r.retryAt.IsZero() || at.Before(r.retryAt) {
		r.retryAt = at
		r.retry.Reset(time.Until(at))
	}
}

// retryFailed tries the ports whose time it is.
func (r *Relay) retryFailed(ctx context.Context, now time.Time) {
	r.retryAt = time.Time{}
	var later time.Time
	for p := range r.failing {
		if !p.retryAt.After(now) {
			r.listen(ctx, p, now)
		}
		if p.attempts > 0 && (later.IsZero() || p.retryAt.Before(later)) {
			later = p.retryAt
		}
	}
	if !later.IsZero() {
		r.scheduleRetry(later)
	}
}

// acceptMin and acceptMax are how long nothing is accepted after that has failed,
// as it does while the process has too many files open.
const (
	acceptMin = 5 * time.Millisecond
	acceptMax = time.Second
)

// acceptClients accepts clients until the listener is closed.
func (r *Relay) acceptClients(ctx context.Context, p *port, l net.Listener) {
	var delay time.Duration
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
		case errors.Is(err, net.ErrClosed), ctx.Err() != nil:
			return
		default:
			if delay == 0 {
				r.log.WarnContext(ctx, "clients of a node port have to wait", "address", l.Addr().String(), "error", err)
			}
			delay = min(max(2*delay, acceptMin), acceptMax)
			select {
			case <-ctx.Done():
				return
			case <-time.After(delay):
			}
			continue
		}
		delay = 0
		client, ok := conn.(*net.TCPConn)
		if !ok {
			r.log.ErrorContext(ctx, "a client of a node port has no TCP connection: this is a bug", "address", l.Addr().String())
			_ = conn.Close()
			return
		}
		if reason := r.slots.acquire(p.frontend); reason != admitted {
			reset(client)
			r.recordRejection(ctx, p, reason)
			continue
		}
		c := r.counters[p.family()]
		c.open.Add(1)
		r.serving.Go(func() {
			defer r.slots.release(p.frontend)
			defer c.open.Add(-1)
			r.handleClient(ctx, p, client)
		})
	}
}

// recordRejection records that a client of a node port was reset for want of a slot.
func (r *Relay) recordRejection(ctx context.Context, p *port, reason admission) {
	c, text := r.counters[p.family()], "all connections are in use"
	if reason == rejectedPortShare {
		c.rejectedByPortLimit.Add(1)
		text = "it has its share of the connections"
	} else {
		c.rejectedByLimit.Add(1)
	}
	if refused, ok := p.rejectionLog.Allow(time.Now()); ok {
		_, addr := p.listenAddr()
		r.log.WarnContext(ctx, "clients of a node port are refused at a loopback address", "reason", text,
			"address", addr.String(), "service", p.serviceName(), "refused", refused, "connections", c.open.Load(), "limit", r.opts.MaxConnections)
	}
}
