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

// Options configures a [Relay]. The zero value is ready to use.
type Options struct {
	// MaxConnections limits the number of simultaneous connections, MaxListeners the number
	// of listening sockets. Zero means 4096 of each.
	MaxConnections, MaxListeners int
	// HalfClosedTimeout bounds how long a connection that one side has closed may go without
	// moving data towards that side. Zero means one minute.
	HalfClosedTimeout time.Duration
	// KeepAlive configures the probes that detect that the host of an idle client or endpoint
	// is gone. Zero means four probes, 15 s apart, after 15 s without data.
	KeepAlive net.KeepAliveConfig
	// Listen opens the sockets of node ports, and Dial connects to endpoints. The network is
	// "tcp4" or "tcp6". Connections must have the type *[net.TCPConn]. Nil uses this
	// process's network namespace.
	Listen func(ctx context.Context, network string, addr netip.AddrPort) (net.Listener, error)
	Dial   func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)
	// Logger receives a Warn when the Relay cannot listen on a port or rejects its clients,
	// an Info when it can listen again, and a Debug for each client without a reachable
	// endpoint. Nil disables logging.
	Logger *slog.Logger
}

// Stats describes the connections and listeners of a Relay in one family.
type Stats struct {
	// Listeners is the number of open node ports, Failing the number of node ports that could
	// not be opened.
	Listeners, Failing int
	// ListenFailures counts failed attempts to listen.
	ListenFailures uint64
	// Open is the current number of connections, Limit the maximum for both families
	// together.
	Open, Limit int
	// Connected counts clients that got an endpoint, and Unreachable clients for which no
	// endpoint answered. RejectedByLimit counts clients that were reset because all
	// connections were in use, and RejectedByPortLimit clients whose node port already held
	// its share.
	Connected, Unreachable, RejectedByLimit, RejectedByPortLimit uint64
	// HalfClosed counts connections that Options.HalfClosedTimeout ended.
	HalfClosed uint64
}

// Bounds of the delay between attempts to listen on one port.
const (
	retryMin = time.Second
	retryMax = 30 * time.Second
)

// Defaults of Options.
const (
	defaultMaxConnections    = 4096
	defaultMaxListeners      = 4096
	defaultHalfClosedTimeout = time.Minute
	keepAliveInterval        = 15 * time.Second
	keepAliveCount           = 4
)

// Relay listens on node ports at loopback addresses. Create one with [New].
type Relay struct {
	opts Options
	log  *slog.Logger
	wake chan struct{} // capacity 1: new changes or families

	mu              stdsync.Mutex
	changed         map[dataplane.Key]*dataplane.Service // nil value: removed
	families        []dataplane.Family
	familiesChanged bool // since the last applyPending

	// Only Run uses these fields.
	services       map[dataplane.Key]*dataplane.Service
	ports          map[dataplane.Frontend]*port
	activeFamilies []dataplane.Family
	failing        map[*port]struct{}
	retry          *time.Timer
	retryAt        time.Time // when retry fires; zero if it is stopped
	serving        stdsync.WaitGroup

	slots    *slots
	counters map[dataplane.Family]*counters // the map is read-only
}

// counters holds the Stats of one family.
type counters struct {
	listeners, failing, open                         atomic.Int64
	listenFailures, connected, unreachable           atomic.Uint64
	rejectedByLimit, rejectedByPortLimit, halfClosed atomic.Uint64
}

// New returns a Relay that listens on no port yet. Call [Relay.Run] to start it.
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
	config.SetMultipathTCP(false) // the kernel splices plain TCP only
	return config.Listen(ctx, network, addr.String())
}

func dial(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	var dialer net.Dialer
	return dialer.DialContext(ctx, network, addr.String())
}

// SetFamilies sets the families in which node ports are open. Connections in other families
// stay. It does not block. Any goroutine may call it, before and during Run.
func (r *Relay) SetFamilies(families ...dataplane.Family) {
	r.mu.Lock()
	r.families, r.familiesChanged = slices.Clone(families), true
	r.mu.Unlock()
	r.signal()
}

// OnCommit receives a commit of the dataplane, see sync.Options. It does not block. It may be
// called before and during Run, but not concurrently with itself.
func (r *Relay) OnCommit(commit sync.Commit) {
	var notify bool
	r.mu.Lock()
	for _, change := range commit.Changes {
		if isTCPNodePort(change.Old) || isTCPNodePort(change.New) {
			r.changed[change.Key()] = change.New
			notify = true
		}
	}
	r.mu.Unlock()
	if notify {
		r.signal()
	}
}

// isTCPNodePort reports whether svc, which may be nil, has a TCP node port.
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

// Stats returns the current numbers of a family. It does not block. Any goroutine may call
// it.
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

// Run listens and serves until ctx is done. Then it closes the listeners, resets the
// connections and returns nil. Run must be called only once.
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

// applyPending applies the changes and families received since the last call.
func (r *Relay) applyPending(ctx context.Context) {
	r.mu.Lock()
	changed, families, switched := r.changed, r.families, r.familiesChanged
	r.changed, r.familiesChanged = map[dataplane.Key]*dataplane.Service{}, false
	r.mu.Unlock()

	// A node port can move from one Service to another. Removals come first, but take effect
	// together with the additions, so that clients never find the port without a Service in
	// between.
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

// tcpFrontends returns the TCP frontends of svc, which may be nil.
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

// updateListener opens or closes a port according to its current Service.
func (r *Relay) updateListener(ctx context.Context, p *port, now time.Time) {
	endpoints, ok := p.endpointCount()
	if !ok {
		delete(r.ports, p.frontend)
	}
	switch desired := endpoints > 0 && slices.Contains(r.activeFamilies, p.family()); {
	case !desired:
		r.close(p)
	case p.listener == nil && p.attempts == 0:
		r.listen(ctx, p, now)
	}
}

// close closes a port. The kernel refuses further clients, and resets clients that were not
// accepted yet.
func (r *Relay) close(p *port) {
	if p.listener != nil {
		_ = p.listener.Close() // no data to lose
		p.listener = nil
		r.counters[p.family()].listeners.Add(-1)
	}
	if p.attempts > 0 {
		r.counters[p.family()].failing.Add(-1)
		delete(r.failing, p)
		p.attempts, p.lastError = 0, ""
	}
}

// listen opens a port, or schedules another attempt.
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
			r.log.WarnContext(ctx, "cannot listen on node port, will retry",
				"address", addr.String(), "service", p.owner.Service(), "error", err)
		}
		return
	}
	if p.attempts > 0 {
		r.log.InfoContext(ctx, "listening on node port again", "address", addr.String(), "service", p.owner.Service(), "attempts", p.attempts)
		c.failing.Add(-1)
		delete(r.failing, p)
		p.attempts, p.lastError = 0, ""
	}
	c.listeners.Add(1)
	p.listener = l
	r.serving.Go(func() { r.acceptClients(ctx, p, l) })
}

// listenBelowLimit opens a socket unless Options.MaxListeners are open already.
func (r *Relay) listenBelowLimit(ctx context.Context, network string, addr netip.AddrPort) (net.Listener, error) {
	var listeners int64
	for _, c := range r.counters {
		listeners += c.listeners.Load()
	}
	if listeners >= int64(r.opts.MaxListeners) {
		return nil, fmt.Errorf("the limit of %d listeners for node ports at loopback addresses is reached: "+
			"raise the limit of open files (RLIMIT_NOFILE)", listeners)
	}
	return r.opts.Listen(ctx, network, addr)
}

// scheduleRetry makes sure that Run retries failed ports at the given time or earlier.
func (r *Relay) scheduleRetry(at time.Time) {
	if r.retryAt.IsZero() || at.Before(r.retryAt) {
		r.retryAt = at
		r.retry.Reset(time.Until(at))
	}
}

// retryFailed retries the ports that are due.
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

// acceptMin and acceptMax bound the delay after a failed accept, for example while the
// process has too many open files.
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
				r.log.WarnContext(ctx, "cannot accept clients of node port, will retry", "address", l.Addr().String(), "error", err)
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
			r.log.ErrorContext(ctx, "client of node port does not use TCP: this is a bug", "address", l.Addr().String())
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

// recordRejection counts and logs a client that was reset because it got no slot.
func (r *Relay) recordRejection(ctx context.Context, p *port, reason admission) {
	c, text := r.counters[p.family()], "connection limit reached"
	if reason == rejectedPortShare {
		c.rejectedByPortLimit.Add(1)
		text = "node port holds its share of the connections"
	} else {
		c.rejectedByLimit.Add(1)
	}
	if rejected, ok := p.rejectionLog.Allow(time.Now()); ok {
		_, addr := p.listenAddr()
		r.log.WarnContext(ctx, "rejecting clients of node port at loopback address", "reason", text,
			"address", addr.String(), "service", p.serviceName(), "rejected", rejected, "connections", c.open.Load(), "limit", r.opts.MaxConnections)
	}
}
