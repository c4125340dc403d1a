package nettest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Networks for [Host.Serve] and [Host.Open].
const (
	TCP  = "tcp"
	UDP  = "udp"
	SCTP = "sctp"
)

// Answer is the answer of a server to a request.
type Answer struct {
	// Host is the name of the host that answered.
	Host string
	// Endpoint is the server's own address, where the connection ended. It differs from the
	// address that the client connected to if the node translated the destination.
	Endpoint netip.AddrPort
	// Source is the client's address as the server sees it.
	Source netip.AddrPort
}

// encode returns the answer to a request. A request is a number on a line. The answer repeats
// the number, so that a client of a datagram protocol can discard a late answer.
func (a Answer) encode(request string) string {
	return fmt.Sprintf("%s %s %s %s\n", request, a.Host, a.Endpoint, a.Source)
}

func parseAnswer(line string) (request string, a Answer, err error) {
	fields := strings.Fields(line)
	if len(fields) != 4 {
		return "", Answer{}, fmt.Errorf("answer %q: want 4 fields", line)
	}
	a.Host = fields[1]
	if a.Endpoint, err = netip.ParseAddrPort(fields[2]); err != nil {
		return "", Answer{}, fmt.Errorf("answer %q: %w", line, err)
	}
	if a.Source, err = netip.ParseAddrPort(fields[3]); err != nil {
		return "", Answer{}, fmt.Errorf("answer %q: %w", line, err)
	}
	return fields[0], a, nil
}

// Server answers requests on ports of a host.
type Server struct {
	host *Host
	wg   sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	closers map[closer]struct{}
}

type closer interface{ Close() error }

// Serve answers requests (see [Host.Open]) on ports of all current addresses of the host,
// until the Server or the host is closed.
func (h *Host) Serve(network string, ports ...uint16) (*Server, error) {
	h.mu.Lock()
	addrs := append(h.Addrs(), h.extraAddrs...)
	h.mu.Unlock()
	return h.ServeAt(network, addrs, ports...)
}

// ServeAt is Serve for given addresses of the host, such as loopback addresses.
func (h *Host) ServeAt(network string, addrs []netip.Addr, ports ...uint16) (*Server, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, fmt.Errorf("serve %s on %s: %w", network, h.Name, net.ErrClosed)
	}
	s := &Server{host: h, closers: map[closer]struct{}{}}
	for _, addr := range addrs {
		for _, port := range ports {
			if err := s.listen(network, netip.AddrPortFrom(addr, port)); err != nil {
				return nil, errors.Join(fmt.Errorf("serve %s on %s: %w", network, h.Name, err), s.stop())
			}
		}
	}
	h.servers[s] = struct{}{}
	return s, nil
}

// listen starts serving on addr. The caller holds s.host.mu.
func (s *Server) listen(network string, addr netip.AddrPort) error {
	ctx := context.Background()
	switch network {
	case TCP:
		l, err := s.host.Listen(ctx, TCP, addr)
		if err != nil {
			return err
		}
		s.track(l, func() { s.serveTCP(l) })
	case UDP:
		c, err := s.host.ListenPacket(ctx, UDP, addr)
		if err != nil {
			return err
		}
		s.track(c, func() { s.serveUDP(c, addr) })
	case SCTP:
		l, err := s.host.listenSCTP(addr)
		if err != nil {
			return err
		}
		s.track(l, func() {})
	default:
		return fmt.Errorf("unknown network %q, want %s, %s or %s", network, TCP, UDP, SCTP)
	}
	return nil
}

// track runs serve in a goroutine. The Server closes c, which makes serve return, if untrack
// has not done so before.
func (s *Server) track(c closer, serve func()) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		_ = c.Close()
		return
	}
	s.closers[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.wg.Done()
		serve()
	}()
}

// untrack closes c and removes it from the Server.
func (s *Server) untrack(c closer) {
	_ = c.Close()
	s.mu.Lock()
	delete(s.closers, c)
	s.mu.Unlock()
}

func (s *Server) serveTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				time.Sleep(time.Millisecond) // for example out of file descriptors
				continue
			}
			return
		}
		s.track(c, func() {
			defer s.untrack(c)
			answer := Answer{Host: s.host.Name, Endpoint: addrPortOf(c.LocalAddr()), Source: addrPortOf(c.RemoteAddr())}
			r := bufio.NewReader(c)
			for {
				request, err := r.ReadString('\n')
				if err != nil {
					return
				}
				if _, err := c.Write([]byte(answer.encode(strings.TrimSpace(request)))); err != nil {
					return
				}
			}
		})
	}
}

func (s *Server) serveUDP(c net.PacketConn, addr netip.AddrPort) {
	buf := make([]byte, 64)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		answer := Answer{Host: s.host.Name, Endpoint: addr, Source: addrPortOf(from)}
		// A failed send is equivalent to a lost datagram.
		_, _ = c.WriteTo([]byte(answer.encode(strings.TrimSpace(string(buf[:n])))), from)
	}
}

func addrPortOf(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Close stops listening and closes all connections. It may be called more than once.
func (s *Server) Close() error {
	err := s.stop()
	s.host.mu.Lock()
	delete(s.host.servers, s)
	s.host.mu.Unlock()
	return err
}

func (s *Server) stop() error {
	s.mu.Lock()
	closers := s.closers
	s.closers = nil
	s.closed = true
	s.mu.Unlock()
	var errs []error
	for c := range closers {
		if err := c.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	s.wg.Wait()
	return errors.Join(errs...)
}

// ErrRefused reports a refused connection: a TCP reset, an SCTP abort or an ICMP unreachable
// message. Errors wrap it.
var ErrRefused = errors.New("connection refused")

// ErrTimeout reports that a connection or a request got no answer in time. Errors wrap it.
var ErrTimeout = errors.New("no answer in time")

// DefaultTimeout is the timeout of [Host.Open] and [Conn.Ask] if their context has no
// deadline.
const DefaultTimeout = 10 * time.Second

// Conn is a client's connection to a [Server]. It must not be used concurrently.
type Conn struct {
	conn interface {
		Read(p []byte) (int, error)
		Write(p []byte) (int, error)
		SetReadDeadline(t time.Time) error
		Close() error
	}
	description string
	local       netip.AddrPort
	request     int
	buffered    string // received bytes after the last answer
}

// Open connects to a [Server]. The network is [TCP], [UDP] or [SCTP]; for UDP, Open sends no
// packet. UDP and SCTP connections do not reuse recent source ports. Otherwise the node's
// connection tracking could take a new connection for an earlier one and send it to the same
// endpoint. The error may wrap [ErrRefused] or [ErrTimeout].
func (h *Host) Open(ctx context.Context, network string, addr netip.AddrPort) (*Conn, error) {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	c := &Conn{description: fmt.Sprintf("%s from %s to %s", network, h.Name, addr)}
	switch network {
	case TCP, UDP:
		dial := h.Dial
		if network == UDP || h.network.uniquePorts {
			dial = h.dialUniquePort
		}
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, c.wrap("connect", err)
		}
		c.conn, c.local = conn, addrPortOf(conn.LocalAddr())
	case SCTP:
		conn, err := h.dialSCTP(ctx, addr)
		if err != nil {
			return nil, c.wrap("connect", err)
		}
		c.conn, c.local = conn, conn.local
	default:
		return nil, fmt.Errorf("connect %s: unknown network", c.description)
	}
	return c, nil
}

// nextSourcePort returns a port that was not used recently: connection tracking remembers UDP
// flows for 30 seconds.
func (h *Host) nextSourcePort() uint16 {
	const first, ports = 20_000, 40_000
	return uint16(first + h.lastPort.Add(1)%ports) //nolint:gosec // fits
}

// dialUniquePort connects from a source port that was not used recently.
func (h *Host) dialUniquePort(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	const tries = 100
	var c net.Conn
	err := h.Do(func() (err error) {
		for range tries {
			dialer := net.Dialer{LocalAddr: &net.UDPAddr{Port: int(h.nextSourcePort())}}
			if network == TCP {
				dialer.LocalAddr = &net.TCPAddr{Port: int(h.nextSourcePort())}
				dialer.SetMultipathTCP(false)
			}
			c, err = dialer.DialContext(ctx, network, addr.String())
			if !errors.Is(err, syscall.EADDRINUSE) {
				return err
			}
		}
		return err
	})
	return c, err
}

func withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, DefaultTimeout)
}

func (c *Conn) wrap(op string, err error) error {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, ErrRefused):
		return fmt.Errorf("%s %s: %w: %w", op, c.description, ErrRefused, err)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%s %s: %w: %w", op, c.description, ErrTimeout, err)
	default:
		return fmt.Errorf("%s %s: %w", op, c.description, err)
	}
}

// Source returns the client's local address.
func (c *Conn) Source() netip.AddrPort { return c.local }

// Ask sends a request and returns the answer. It does not retransmit lost datagrams. For UDP,
// it is Ask that reports a refused connection.
func (c *Conn) Ask(ctx context.Context) (Answer, error) {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	deadline, _ := ctx.Deadline()
	if err := c.conn.SetReadDeadline(deadline); err != nil {
		return Answer{}, c.wrap("ask", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetReadDeadline(time.Now()) })
	defer stop()
	c.request++
	request := strconv.Itoa(c.request)
	// sendmsg(2) returns EPERM if this host's netfilter dropped the packet. If netfilter
	// rejected it, the next system call returns the error.
	if _, err := c.conn.Write([]byte(request + "\n")); err != nil && !errors.Is(err, syscall.EPERM) {
		return Answer{}, c.wrap("ask", err)
	}
	buf := make([]byte, 512)
	for {
		line, rest, whole := strings.Cut(c.buffered, "\n")
		if !whole {
			n, err := c.conn.Read(buf)
			if err != nil {
				return Answer{}, c.wrap("ask", err)
			}
			c.buffered += string(buf[:n])
			continue
		}
		c.buffered = rest
		got, answer, err := parseAnswer(line)
		if err != nil {
			return Answer{}, c.wrap("ask", err)
		}
		if got == request {
			return answer, nil
		}
	}
}

// ConnectFrom is [Host.Connect] for TCP from one of the host's addresses.
func (h *Host) ConnectFrom(ctx context.Context, source netip.Addr, addr netip.AddrPort) (answer Answer, err error) {
	defer func(done func(Answer, error)) { done(answer, err) }(h.observe(TCP, source, addr))
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	c := &Conn{description: fmt.Sprintf("%s from %s of %s to %s", TCP, source, h.Name, addr)}
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))}
	dialer.SetMultipathTCP(false)
	err = h.Do(func() error {
		conn, err := dialer.DialContext(ctx, TCP, addr.String())
		if err == nil {
			c.conn, c.local = conn, addrPortOf(conn.LocalAddr())
		}
		return err
	})
	if err != nil {
		return Answer{}, c.wrap("connect", err)
	}
	answer, err = c.Ask(ctx)
	return answer, errors.Join(err, c.Close())
}

// Close closes the connection.
func (c *Conn) Close() error { return c.conn.Close() }

// Connect opens a connection, sends one request, and closes the connection.
func (h *Host) Connect(ctx context.Context, network string, addr netip.AddrPort) (answer Answer, err error) {
	defer func(done func(Answer, error)) { done(answer, err) }(h.observe(network, netip.Addr{}, addr))
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	c, err := h.Open(ctx, network, addr)
	if err != nil {
		return Answer{}, err
	}
	answer, err = c.Ask(ctx)
	if closeErr := c.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("close %s: %w", c.description, closeErr)
	}
	return answer, err
}

// observe calls Options.OnConnect and returns the function to call with the result.
func (h *Host) observe(network string, source netip.Addr, addr netip.AddrPort) func(Answer, error) {
	if h.network.onConnect != nil {
		if done := h.network.onConnect(ConnectAttempt{From: h, Network: network, Source: source, To: addr}); done != nil {
			return done
		}
	}
	return func(Answer, error) {}
}
