// Package connlimit limits the connections of servers that listen on addresses which anyone
// on the network may reach, so that no client can prevent others from getting an answer.
//
// A [Limiter] never refuses a client. Over a limit it displaces another connection: it closes
// the connection that the server answered least recently. If the new client is at its limit,
// the displaced connection belongs to the same client, otherwise to the client with the most
// connections. So a new client that sends its request at once gets an answer, however many
// half-sent requests other clients hold, even from the same address.
//
// When the process runs out of file descriptors (EMFILE), Accept neither spins nor fails. For
// each waiting client it frees a descriptor, either from its reserve or by displacing a
// connection.
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

// Options configures a [Limiter].
type Options struct {
	// Server identifies the server in log messages.
	Server string
	// Max limits the number of simultaneous connections. Zero means 256.
	Max int
	// MaxPerClient limits the simultaneous connections of one IPv4 address or one IPv6 /64
	// network. Zero means a quarter of Max.
	MaxPerClient int
	// Reserve is the number of file descriptors that each listener keeps open, to accept
	// clients when the process has no others left.
	Reserve int
	// WriteTimeout limits the duration of each Write. Zero means no limit.
	WriteTimeout time.Duration
	// Logger receives a Warn when connections are displaced and when accepting fails. Package
	// logrepeat limits both. Nil disables logging.
	Logger *slog.Logger
}

const (
	defaultMax = 256
	minClients = 4 // number of clients at their limit that fill a server
)

// Stats describes the connections of a [Limiter].
type Stats struct {
	// Open is the current number of connections, Limit the maximum.
	Open, Limit int
	// These count displaced connections: DisplacedByClient if one client was at its limit,
	// DisplacedByLimit if the server was at its limit, and DisplacedByDescriptors if the
	// process had no file descriptors left.
	DisplacedByClient, DisplacedByLimit, DisplacedByDescriptors uint64
}

// Limiter limits the connections of one or more listeners together, see [Limiter.Listener].
// Its methods may be called concurrently.
type Limiter struct {
	options Options
	log     *slog.Logger

	displacements, acceptErrors                                 logrepeat.Limiter
	displacedByClient, displacedByLimit, displacedByDescriptors atomic.Uint64

	mu   sync.Mutex
	open int
	// clients has no empty lists. A list contains *conn values, the least recently answered
	// first.
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

// clientKey returns the prefix that identifies a client: an IPv4 address, or an IPv6 /64
// network, because a host may use any address of its network.
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
	if err != nil { // invalid address
		return netip.Prefix{}
	}
	return prefix
}

// admit counts a new connection and returns it wrapped. Over a limit it displaces another
// one.
func (l *Limiter) admit(inner net.Conn, closed func()) net.Conn {
	c := &conn{Conn: inner, limiter: l, client: clientKey(inner.RemoteAddr()), onClose: closed}
	var victim *conn
	var reason string
	l.mu.Lock()
	switch own := l.clients[c.client]; {
	case own != nil && own.Len() >= l.options.MaxPerClient:
		victim, reason = own.Front().Value.(*conn), "client has too many connections"
		l.displacedByClient.Add(1)
	case l.open >= l.options.Max:
		victim, reason = l.leastRecentlyAnswered(), "server has too many connections"
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

// leastRecentlyAnswered returns the least recently answered connection of the client with the
// most connections, or nil. The caller holds l.mu.
func (l *Limiter) leastRecentlyAnswered() *conn {
	var oldest *conn
	most := 0
	for _, own := range l.clients {
		first := own.Front().Value.(*conn)
		if own.Len() > most || own.Len() == most && first.order < oldest.order {
			oldest, most = first, own.Len()
		}
	}
	return oldest
}

// displaceForDescriptor displaces a connection to free its file descriptor, and reports
// whether it found one.
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
	l.closeDisplaced(victim, "process has too many open files")
	return true
}

// closeDisplaced closes a displaced connection. The caller has removed it from the lists.
func (l *Limiter) closeDisplaced(victim *conn, reason string) {
	if !victim.answered.Load() {
		// Reset a client that has sent half a request, so that the kernel does not keep a
		// socket that waits for the other half.
		if tcp, ok := victim.Conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
	}
	_ = victim.Close()
	if displaced, ok := l.displacements.Allow(time.Now()); ok {
		l.log.Warn("closing connections to make room for others", "reason", reason, "client", victim.client.String(),
			"closed", displaced, "limit", l.options.Max, "limit_per_client", l.options.MaxPerClient)
	}
}

// remove removes a connection from the lists, if it is there. The caller holds l.mu.
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

// conn is a connection that counts towards the limits.
type conn struct {
	net.Conn

	limiter  *Limiter
	client   netip.Prefix
	onClose  func()
	answered atomic.Bool
	closing  sync.Once
	err      error

	// limiter.mu protects element and order. element is nil after the connection was removed
	// from the lists.
	element *list.Element
	order   uint64
}

// Write implements [net.Conn]. It makes the connection the most recently answered one.
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

// CloseWrite closes the sending direction. net/http calls it before it closes a connection
// whose request it rejected.
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
