package nettest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pion/logging"
	"github.com/pion/sctp"
	"golang.org/x/sys/unix"
)

// This file implements SCTP (RFC 9260) in user space. pion/sctp is made for WebRTC, where
// every association has its own tunnel and the ports are always 5000. The code here replaces
// the ports and the checksum of each packet between pion and a raw socket.

const (
	pionPort       = 5000
	sctpHeader     = 12 // source port, destination port, verification tag, checksum
	sctpChunk      = 4  // type, flags, length
	sctpChunkInit  = 1
	sctpChunkAbort = 6
	sctpStream     = 1
)

func sctpPorts(packet []byte) (source, destination uint16) {
	return binary.BigEndian.Uint16(packet), binary.BigEndian.Uint16(packet[2:])
}

func sctpChecksum(packet []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	crc := crc32.Update(0, table, packet[:8])
	crc = crc32.Update(crc, table, make([]byte, 4))
	return crc32.Update(crc, table, packet[sctpHeader:])
}

// sctpValid reports whether the packet has a header, a chunk and a correct checksum.
func sctpValid(packet []byte) bool {
	return len(packet) >= sctpHeader+sctpChunk && binary.LittleEndian.Uint32(packet[8:]) == sctpChecksum(packet)
}

// sctpSetPorts returns a copy of the packet with other ports.
func sctpSetPorts(packet []byte, source, destination uint16) []byte {
	b := append([]byte(nil), packet...)
	binary.BigEndian.PutUint16(b, source)
	binary.BigEndian.PutUint16(b[2:], destination)
	binary.LittleEndian.PutUint32(b[8:], sctpChecksum(b))
	return b
}

func sctpNetwork(addr netip.Addr) string {
	if addr.Is4() {
		return "ip4:132"
	}
	return "ip6:132"
}

// sctpDiscardLogs returns a logger factory that keeps pion from writing to standard error.
func sctpDiscardLogs() logging.LoggerFactory {
	return &logging.DefaultLoggerFactory{Writer: io.Discard, DefaultLogLevel: logging.LogLevelDisabled}
}

// sctpClient is a client connection: an association with one stream.
type sctpClient struct {
	*sctp.Stream
	association *sctp.Association
	local       netip.AddrPort
}

// Close aborts the association, so that the server and connection tracking forget it at once.
func (c *sctpClient) Close() error {
	c.association.Abort("done")
	if err := c.association.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func (h *Host) dialSCTP(ctx context.Context, addr netip.AddrPort) (*sctpClient, error) {
	conn := &sctpClientConn{remote: addr}
	err := h.Do(func() (err error) {
		conn.conn, err = net.DialIP(sctpNetwork(addr.Addr()), nil, &net.IPAddr{IP: addr.Addr().AsSlice()})
		return err
	})
	if err != nil {
		return nil, err
	}
	local, _ := netip.AddrFromSlice(conn.conn.LocalAddr().(*net.IPAddr).IP)
	conn.local = netip.AddrPortFrom(local.Unmap(), h.nextSourcePort())
	if err := conn.receiveErrors(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	association, err := sctp.ClientContext(ctx, sctp.WithNetConn(conn), sctp.WithLoggerFactory(sctpDiscardLogs()))
	if err != nil {
		if failure := conn.failure(); failure != nil {
			err = failure
		}
		return nil, errors.Join(err, conn.Close())
	}
	conn.established.Store(true)
	stream, err := association.OpenStream(sctpStream, sctp.PayloadTypeWebRTCBinary)
	if err != nil {
		return nil, errors.Join(err, association.Close())
	}
	return &sctpClient{Stream: stream, association: association, local: conn.local}, nil
}

// sctpClientConn is a net.Conn that carries the packets of one association over its own raw
// socket.
type sctpClientConn struct {
	conn          *net.IPConn // connected
	local, remote netip.AddrPort
	established   atomic.Bool
	failed        atomic.Pointer[error]
	closeOnce     sync.Once
	closeErr      error
}

// receiveErrors enables the socket's error queue, which returns ICMP errors together with the
// packet that caused them. The kernel ignores ports on raw sockets, so a socket also receives
// errors of other associations between the same addresses.
func (c *sctpClientConn) receiveErrors() error {
	level, option := unix.IPPROTO_IP, unix.IP_RECVERR
	if c.remote.Addr().Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) { optErr = unix.SetsockoptInt(int(fd), level, option, 1) })
	return errors.Join(err, optErr)
}

func (c *sctpClientConn) failure() error {
	if err := c.failed.Load(); err != nil {
		return *err
	}
	return nil
}

func (c *sctpClientConn) fail(err error) { c.failed.CompareAndSwap(nil, &err) }

// associationError is called after the socket returned err. It returns the error that
// concerns this association, or nil if the error concerns another one.
func (c *sctpClientConn) associationError(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	raw, rawErr := c.conn.SyscallConn()
	if rawErr != nil {
		return rawErr
	}
	rawErr = raw.Control(func(fd uintptr) {
		packet, oob := make([]byte, 256), make([]byte, 256)
		for {
			n, oobn, _, _, err := unix.Recvmsg(int(fd), packet, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			if n < 4 {
				continue
			}
			if source, destination := sctpPorts(packet); source != c.local.Port() || destination != c.remote.Port() {
				continue
			}
			c.fail(icmpError(oob[:oobn]))
		}
	})
	if rawErr != nil {
		return rawErr
	}
	return c.failure()
}

// isRefusal reports whether an ICMP error means that the peer refuses the packet: port
// unreachable, protocol unreachable (IPv4), or parameter problem with an unknown next header
// (IPv6).
func isRefusal(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOPROTOOPT) || errors.Is(err, unix.EPROTO)
}

// icmpError returns the error in a control message from the error queue (see ip(7)). It
// counts as refused if the peer does not support SCTP.
func icmpError(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	for _, m := range messages {
		if len(m.Data) < 4 {
			continue
		}
		// struct sock_extended_err begins with the error number.
		errno := syscall.Errno(binary.NativeEndian.Uint32(m.Data))
		if isRefusal(errno) {
			return fmt.Errorf("%w: %w", ErrRefused, errno)
		}
		return errno
	}
	return errors.New("unknown ICMP error")
}

func (c *sctpClientConn) Read(b []byte) (int, error) {
	packet := make([]byte, 1<<16)
	for {
		n, _, err := c.conn.ReadFromIP(packet)
		if err != nil {
			if err := c.associationError(err); err != nil {
				return 0, err
			}
			continue
		}
		if !sctpValid(packet[:n]) {
			continue
		}
		if source, destination := sctpPorts(packet); source != c.remote.Port() || destination != c.local.Port() {
			continue
		}
		if packet[sctpHeader] == sctpChunkAbort && !c.established.Load() {
			c.fail(fmt.Errorf("%w: abort", ErrRefused))
			return 0, c.failure()
		}
		return copy(b, sctpSetPorts(packet[:n], pionPort, pionPort)), nil
	}
}

func (c *sctpClientConn) Write(b []byte) (int, error) {
	packet := sctpSetPorts(b, c.local.Port(), c.remote.Port())
	for {
		_, err := c.conn.Write(packet)
		if err == nil {
			return len(b), nil
		}
		// The socket reports a pending error once, to Write or to Read.
		if err := c.associationError(err); err != nil {
			_ = c.conn.SetReadDeadline(time.Now())
			return 0, err
		}
		switch {
		case errors.Is(err, unix.EPERM): // This host's netfilter dropped the packet; treat it as lost.
			return len(b), nil
		case !isRefusal(err):
			return 0, err
		}
	}
}

func (c *sctpClientConn) Close() error {
	c.closeOnce.Do(func() { c.closeErr = c.conn.Close() })
	return c.closeErr
}

// LocalAddr returns the client's address with the port of the association.
func (c *sctpClientConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr returns the address that the client connected to.
func (c *sctpClientConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// SetDeadline sets the deadline of the socket.
func (c *sctpClientConn) SetDeadline(t time.Time) error { return c.conn.SetDeadline(t) }

// SetReadDeadline sets the read deadline of the socket.
func (c *sctpClientConn) SetReadDeadline(t time.Time) error { return c.conn.SetReadDeadline(t) }

// SetWriteDeadline sets the write deadline of the socket.
func (c *sctpClientConn) SetWriteDeadline(t time.Time) error { return c.conn.SetWriteDeadline(t) }

// sctpStack serves SCTP on one address of a host.
type sctpStack struct {
	name string
	addr netip.Addr
	conn *net.IPConn
	wg   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	ports  map[uint16]bool
	conns  map[sctpFlow]*sctpServerConn
}

// sctpFlow identifies an association of a sctpStack.
type sctpFlow struct {
	port   uint16 // server port
	remote netip.AddrPort
}

// sctpListener is an open port of a sctpStack.
type sctpListener struct {
	stack *sctpStack
	port  uint16
}

// listenSCTP opens a port. The caller holds h.mu.
func (h *Host) listenSCTP(addr netip.AddrPort) (*sctpListener, error) {
	stack := h.sctp[addr.Addr()]
	if stack == nil {
		stack = &sctpStack{name: h.Name, addr: addr.Addr(), ports: map[uint16]bool{}, conns: map[sctpFlow]*sctpServerConn{}}
		err := h.Do(func() (err error) {
			stack.conn, err = net.ListenIP(sctpNetwork(addr.Addr()), &net.IPAddr{IP: addr.Addr().AsSlice()})
			return err
		})
		if err != nil {
			return nil, err
		}
		h.sctp[addr.Addr()] = stack
		stack.wg.Go(stack.receive)
	}
	stack.mu.Lock()
	defer stack.mu.Unlock()
	if stack.ports[addr.Port()] {
		return nil, fmt.Errorf("listen on %s: %w", addr, syscall.EADDRINUSE)
	}
	stack.ports[addr.Port()] = true
	return &sctpListener{stack: stack, port: addr.Port()}, nil
}

// Close stops listening and aborts the associations of the port.
func (l *sctpListener) Close() error {
	l.stack.mu.Lock()
	delete(l.stack.ports, l.port)
	var conns []*sctpServerConn
	for flow, conn := range l.stack.conns {
		if flow.port == l.port {
			conns = append(conns, conn)
		}
	}
	l.stack.mu.Unlock()
	for _, conn := range conns {
		conn.abort()
		<-conn.done
	}
	return nil
}

func (s *sctpStack) close() error {
	s.mu.Lock()
	s.closed = true
	for _, conn := range s.conns {
		conn.stop()
	}
	s.mu.Unlock()
	err := s.conn.Close()
	s.wg.Wait()
	return err
}

// receive passes packets to their associations until the socket is closed.
func (s *sctpStack) receive() {
	packet := make([]byte, 1<<16)
	for {
		n, from, err := s.conn.ReadFromIP(packet)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		addr, _ := netip.AddrFromSlice(from.IP)
		if !sctpValid(packet[:n]) {
			continue
		}
		source, destination := sctpPorts(packet)
		flow := sctpFlow{port: destination, remote: netip.AddrPortFrom(addr.Unmap(), source)}
		if conn := s.connFor(flow, packet[:n]); conn != nil {
			select {
			case conn.packets <- sctpSetPorts(packet[:n], pionPort, pionPort):
			default: // drop, like a full socket buffer: the peer retransmits
			}
		}
	}
}

// connFor returns the connection that a packet belongs to, and creates it for a new
// association. It returns nil if the packet belongs to no association.
func (s *sctpStack) connFor(flow sctpFlow, packet []byte) *sctpServerConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if conn := s.conns[flow]; conn != nil || s.closed {
		return conn
	}
	// Clients on this host have their own sockets, whose packets arrive here too. Only the
	// first packet of an association certainly belongs to a server.
	if packet[sctpHeader] != sctpChunkInit || len(packet) < sctpHeader+2*sctpChunk {
		return nil
	}
	if !s.ports[flow.port] {
		abort := make([]byte, sctpHeader+sctpChunk)
		copy(abort[4:8], packet[sctpHeader+sctpChunk:]) // the verification tag that the peer expects
		abort[sctpHeader] = sctpChunkAbort
		abort[sctpHeader+3] = sctpChunk
		s.send(flow, abort)
		return nil
	}
	conn := &sctpServerConn{
		stack: s, flow: flow, packets: make(chan []byte, 64), closed: make(chan struct{}), done: make(chan struct{}),
	}
	s.conns[flow] = conn
	s.wg.Go(conn.serve)
	return conn
}

func (s *sctpStack) send(flow sctpFlow, packet []byte) {
	// A failed send is equivalent to a lost packet.
	_, _ = s.conn.WriteToIP(sctpSetPorts(packet, flow.port, flow.remote.Port()), &net.IPAddr{IP: flow.remote.Addr().AsSlice()})
}

// sctpServerConn is a net.Conn that carries the packets of one association of a sctpStack.
type sctpServerConn struct {
	stack     *sctpStack
	flow      sctpFlow
	packets   chan []byte
	closed    chan struct{}
	closeOnce sync.Once
	done      chan struct{} // closed when serve returns

	mu          sync.Mutex
	association *sctp.Association // once established
}

// serve answers the requests of one association.
func (c *sctpServerConn) serve() {
	defer close(c.done)
	defer func() {
		c.stop()
		c.stack.mu.Lock()
		delete(c.stack.conns, c.flow)
		c.stack.mu.Unlock()
	}()
	// Give up on a client that does not complete the handshake.
	giveUp := time.AfterFunc(DefaultTimeout, c.stop)
	association, err := sctp.ServerWithOptions(sctp.WithNetConn(c), sctp.WithLoggerFactory(sctpDiscardLogs()))
	giveUp.Stop()
	if err != nil {
		return
	}
	defer association.Close() //nolint:errcheck // Close of the connection never fails
	c.mu.Lock()
	c.association = association
	c.mu.Unlock()
	stream, err := association.AcceptStream()
	if err != nil {
		return
	}
	answer := Answer{Host: c.stack.name, Endpoint: netip.AddrPortFrom(c.stack.addr, c.flow.port), Source: c.flow.remote}
	buf := make([]byte, 64)
	for {
		n, err := stream.Read(buf)
		if err != nil {
			return
		}
		if _, err := stream.Write([]byte(answer.encode(strings.TrimSpace(string(buf[:n]))))); err != nil {
			return
		}
	}
}

// abort ends the association and notifies the client.
func (c *sctpServerConn) abort() {
	c.mu.Lock()
	association := c.association
	c.mu.Unlock()
	if association != nil {
		association.Abort("server closed")
	}
	c.stop()
}

func (c *sctpServerConn) Read(b []byte) (int, error) {
	select {
	case packet := <-c.packets:
		return copy(b, packet), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *sctpServerConn) Write(b []byte) (int, error) {
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	default:
	}
	c.stack.send(c.flow, b)
	return len(b), nil
}

// Close makes Read and Write fail. It returns nil.
func (c *sctpServerConn) Close() error {
	c.stop()
	return nil
}

func (c *sctpServerConn) stop() { c.closeOnce.Do(func() { close(c.closed) }) }

// LocalAddr returns the server's address.
func (c *sctpServerConn) LocalAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.stack.addr, c.flow.port))
}

// RemoteAddr returns the client's address as the server sees it.
func (c *sctpServerConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.flow.remote) }

// SetReadDeadline closes the connection if t has passed. pion uses it to interrupt reads on
// abort and close, and sets no other deadlines.
func (c *sctpServerConn) SetReadDeadline(t time.Time) error {
	if !t.IsZero() && !t.After(time.Now()) {
		return c.Close()
	}
	return nil
}

// SetDeadline calls SetReadDeadline; writes do not block.
func (c *sctpServerConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline does nothing: writes do not block.
func (c *sctpServerConn) SetWriteDeadline(time.Time) error { return nil }
