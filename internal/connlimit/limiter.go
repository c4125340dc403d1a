// Package connlimit bounds the connections of a server that listens on addresses
// which anyone on the network may reach, so that no client can keep others from
// being answered.
//
// A [Limiter] never refuses a client. Over a limit it closes the connection that
// the server answered least recently: of the same client if that client is at its
// limit, otherwise of the client with the most connections. So a new client that
// sends its request at once is answered, however many half-sent requests others
// hold, also if these come from its own address.
//
// When the process has no file descriptors left (EMFILE), Accept neither spins nor
// fails: it frees a descriptor for each client that waits, one that it holds in
// reserve or that of a displaced connection.
package connlimit

import (
	"container/list"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"fairlead.io/fairlead/internal/logrepeat"
)

// Options configure a [Limiter].
type Options struct {
	// Server names the server in the log.
	Server string
	// Max limits the connections at a time. Zero means 256.
	Max int
	// MaxPerClient limits the connections at a time of one client address, and of
	// one /64 network in IPv6. Zero means a quarter of Max.
	MaxPerClient int
	// Reserve is the number of file descriptors that each listener holds open, to
	// accept clients when the process has no others left.
	Reserve int
	// WriteTimeout limits each Write. Zero means no limit.
	WriteTimeout time.Duration
	// Logger gets a Warn when connections are displaced and when none can be
	// accepted, each limited by package logrepeat. Nil means no logging.
	Logger *slog.Logger
}

const (
	defaultMax = 256
	minClients = 4 // clients at their limit fill a server
)

// Stats are the connections of a [Limiter].
type Stats struct {
	// Open is the number of connections now, and Limit the maximum.
	Open, Limit int
	// DisplacedByClient, DisplacedByLimit and DisplacedByDescriptors count the
	// connections that were closed because one client had its maximum, because the
	// server had, and because the process had no file descriptors left.
	DisplacedByClient, DisplacedByLimit, DisplacedByDescriptors uint64
}

// Limiter bounds the connections of one or more listeners together, see
// [Limiter.Listener]. Its methods may be called from any goroutine.
type Limiter struct {
	options Options
	log     *slog.Logger

	displacements, acceptErrors                                 logrepeat.Limiter
	displacedByClient, displacedByLimit, displacedByDescriptors atomic.Uint64

	mu   sync.Mutex
	open int
	// clients has no empty lists. A list holds *conn, the least recently answered
	// one first.
	clients   map[netip.Prefix]*list.List
	nextOrder uint64 // of the next conn
}

// New returns a Limiter without connections.
func New(options Options) *Limiter {
	if options.Max <= 0 {
		options.Max = defaultMax
	}
	if options.MaxPerClient <= 0 {
		options.MaxPerClient = max(1, options.Max/minClients)
	}
	log := options.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Limiter{options: options, log: log.With("server", options.Server), clients: map[netip.Prefix]*list.List{}}
}

// Stats returns the current numbers.
func (l *Limiter) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{
		Open: l.open, Limit: l.options.Max, DisplacedByClient: l.displacedByClient.Load(),
		DisplacedByLimit: l.displacedByLimit.Load(), DisplacedByDescriptors: l.displacedByDescriptors.Load(),
	}
}

// clientKey returns what counts as one client: an IPv4 address, or an IPv6 /64
// network, of which a host may use any address.
func clientKey(addr net.Addr) netip.Prefix {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	const network = 64
	bits := ip.BitLen()
	if ip.Is6() {
		bits = network
	}
	prefix, err := ip.Prefix(bits)
	if err != nil { // not valid
		return netip.Prefix{}
	}
	return prefix
}

// admit counts a new connection and returns it wrapped. It closes another one if
// there are too many.
func (l *Limiter) admit(inner net.Conn, closed func()) net.Conn {
	c := &conn{Conn: inner, limiter: l, client: clientKey(inner.RemoteAddr()), onClose: closed}
	var victim *conn
	var reason string
	l.mu.Lock()
	switch own := l.clients[c.client]; {
	case own != nil && own.Len() >= l.options.MaxPerClient:
		victim, reason = own.Front().Value.(*conn), "one client has too many connections"
		l.displacedByClient.Add(1)
	case l.open >= l.options.Max:
		victim, reason = l.leastRecentlyAnswered(), "the server has too many connections"
		l.displacedByLimit.Add(1)
	}
	if victim != nil {
		l.remove(victim)
	}
	if l.clients[c.client] == nil {
		l.clients[c.client] = list.New()
	}
	c.order = l.nextOrder
	l.nextOrder++
	c.element = l.clients[c.client].PushBack(c)
	l.open++
	l.mu.Unlock()
	if victim != nil {
		l.closeDisplaced(victim, reason)
	}
	return c
}

// leastRecentlyAnswered returns the connection that was answered least recently of the
// client with the most connections, nil if there are none. l.mu is held.
func (l *Limiter) leastRecentlyAnswered() *conn {
	var found *conn
	most := 0
	for _, own := range l.clients {
		first := own.Front().Value.(*conn)
		if own.Len() > most || own.Len() == most && first.order < found.order {
			found, most = first, own.Len()
		}
	}
	return found
}

// displaceForDescriptor closes a connection to free its descriptor, and reports whether
// there was one.
func (l *Limiter) displaceForDescriptor() bool {
	l.mu.Lock()
	victim := l.leastRecentlyAnswered()
	if victim != nil {
		l.remove(victim)
	}
	l.mu.Unlock()
	if victim == nil {
		return false
	}
	l.displacedByDescriptors.Add(1)
	l.closeDisplaced(victim, "the process has too many open files")
	return true
}

// closeDisplaced closes a connection that was removed.
func (l *Limiter) closeDisplaced(victim *conn, reason string) {
	if !victim.answered.Load() {
		// A client that has sent half a request is not left with a socket of the
		// kernel's that waits for the other half.
		if tcp, ok := victim.Conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
	}
	_ = victim.Close()
	if displaced, ok := l.displacements.Allow(time.Now()); ok {
		l.log.Warn("connections of a server are closed to make room for others", "reason", reason, "client", victim.client.String(),
			"closed", displaced, "limit", l.options.Max, "limit_per_client", l.options.MaxPerClient)
	}
}

// remove takes a connection off the lists, once. l.mu is held.
func (l *Limiter) remove(c *conn) {
	if c.element == nil {
		return
	}
	own := l.clients[c.client]
	own.Remove(c.element)
	c.element = nil
	l.open--
	if own.Len() == 0 {
		delete(l.clients, c.client)
	}
}

// conn is a connection of a Limiter.
type conn struct {
	net.Conn

	limiter  *Limiter
	client   netip.Prefix
	onClose  func()
	answered atomic.Bool
	closing  sync.Once
	err      error

	// element and order belong to limiter.mu. element is nil once the connection is
	// off the lists.
	element *list.Element
	order   uint64
}

// Write implements [net.Conn]. What the server answers is least likely to be
// displaced.
func (c *conn) Write(p []byte) (int, error) {
	c.answered.Store(true)
	l := c.limiter
	l.mu.Lock()
	if c.element != nil {
		c.order = l.nextOrder
		l.nextOrder++
		l.clients[c.client].MoveToBack(c.element)
	}
	l.mu.Unlock()
	if l.options.WriteTimeout > 0 {
		if err := c.SetWriteDeadline(time.Now().Add(l.options.WriteTimeout)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(p)
}

// CloseWrite closes the sending direction, which net/http does before it closes a
// connection that it has refused.
func (c *conn) CloseWrite() error {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		return tcp.CloseWrite()
	}
	return nil
}

// Close implements [net.Conn].
func (c *conn) Close() error {
	c.closing.Do(func() {
		c.limiter.mu.Lock()
		c.limiter.remove(c)
		c.limiter.mu.Unlock()
		c.err = c.Conn.Close()
		c.onClose()
	})
	return c.err
}
