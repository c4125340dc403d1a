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

// SCTP in user space: RFC 9260. pion/sctp is made for WebRTC, where every
// association has its own tunnel and the ports are always 5000. Here a packet
// gets its real ports, and the checksum that goes with them, between pion and
// a raw socket.

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

// sctpValid reports whether packet has a header, a chunk and the right checksum.
func sctpValid(packet []byte) bool {
	return len(packet) >= sctpHeader+sctpChunk && binary.LittleEndian.Uint32(packet[8:]) == sctpChecksum(packet)
}

// sctpSetPorts returns the packet with other ports.
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

// sctpDiscardLogs keeps pion from writing to standard error.
func sctpDiscardLogs() logging.LoggerFactory {
	return &logging.DefaultLoggerFactory{Writer: io.Discard, DefaultLogLevel: logging.LogLevelDisabled}
}

// sctpClient is the connection of one client: an association with one stream.
type sctpClient struct {
	*sctp.Stream
	association *sctp.Association
	local       netip.AddrPort
}

// Close aborts the association: the server, and connection tracking, forget it
// at once.
func (c *sctpClient) Close() error {
	c.association.Abort("done")
	if err := c.association.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func (h *Host) dialSCTP(ctx context.Context, addr netip.AddrPort) (*sctpClient, error) {
	path := &sctpClientConn{remote: addr}
	err := h.Do(func() (err error) {
		path.conn, err = net.DialIP(sctpNetwork(addr.Addr()), nil, &net.IPAddr{IP: addr.Addr().AsSlice()})
		return err
	})
	if err != nil {
		return nil, err
	}
	local, _ := netip.AddrFromSlice(path.conn.LocalAddr().(*net.IPAddr).IP)
	path.local = netip.AddrPortFrom(local.Unmap(), h.nextSourcePort())
	if err := path.receiveErrors(); err != nil {
		return nil, errors.Join(err, path.Close())
	}
	association, err := sctp.ClientContext(ctx, sctp.WithNetConn(path), sctp.WithLoggerFactory(sctpDiscardLogs()))
	if err != nil {
		if failure := path.failure(); failure != nil {
			err = failure
		}
		return nil, errors.Join(err, path.Close())
	}
	path.established.Store(true)
	stream, err := association.OpenStream(sctpStream, sctp.PayloadTypeWebRTCBinary)
	if err != nil {
		return nil, errors.Join(err, association.Close())
	}
	return &sctpClient{Stream: stream, association: association, local: path.local}, nil
}

// sctpClientConn carries the packets of one association on a socket of its own.
type sctpClientConn struct {
	conn          *net.IPConn // connected
	local, remote netip.AddrPort
	established   atomic.Bool
	failed        atomic.Pointer[error]
	closeOnce     sync.Once
	closeErr      error
}

// receiveErrors asks for the ICMP messages that concern the socket, with the
// packet they answer: the kernel does not look at the ports of a raw socket's
// packets, and other associations have sockets between the same addresses.
func (p *sctpClientConn) receiveErrors() error {
	level, option := unix.IPPROTO_IP, unix.IP_RECVERR
	if p.remote.Addr().Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	raw, err := p.conn.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) { optErr = unix.SetsockoptInt(int(fd), level, option, 1) })
	return errors.Join(err, optErr)
}

func (p *sctpClientConn) failure() error {
	if err := p.failed.Load(); err != nil {
		return *err
	}
	return nil
}

func (p *sctpClientConn) fail(err error) { p.failed.CompareAndSwap(nil, &err) }

// associationError returns the error that concerns this association after the socket has
// returned err, or nil if it concerned another one.
func (p *sctpClientConn) associationError(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	raw, rawErr := p.conn.SyscallConn()
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
			if source, destination := sctpPorts(packet); source != p.local.Port() || destination != p.remote.Port() {
				continue
			}
			p.fail(icmpError(oob[:oobn]))
		}
	})
	if rawErr != nil {
		return rawErr
	}
	return p.failure()
}

// isRefusal reports whether an ICMP message's error says that the peer does not
// want the packet: port unreachable, protocol unreachable (IPv4), or a
// parameter problem as the next header is unknown (IPv6).
func isRefusal(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOPROTOOPT) || errors.Is(err, unix.EPROTO)
}

// icmpError returns the error in the control message of an error queue, see
// ip(7). That the peer has no SCTP at all, in any words, is a refusal.
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
	return errors.New("an ICMP error of unknown kind")
}

func (p *sctpClientConn) Read(b []byte) (int, error) {
	packet := make([]byte, 1<<16)
	for {
		n, _, err := p.conn.ReadFromIP(packet)
		if err != nil {
			if err := p.associationError(err); err != nil {
				return 0, err
			}
			continue
		}
		if !sctpValid(packet[:n]) {
			continue
		}
		if source, destination := sctpPorts(packet); source != p.remote.Port() || destination != p.local.Port() {
			continue
		}
		if packet[sctpHeader] == sctpChunkAbort && !p.established.Load() {
			p.fail(fmt.Errorf("%w: abort", ErrRefused))
			return 0, p.failure()
		}
		return copy(b, sctpSetPorts(packet[:n], pionPort, pionPort)), nil
	}
}

func (p *sctpClientConn) Write(b []byte) (int, error) {
	packet := sctpSetPorts(b, p.local.Port(), p.remote.Port())
	for {
		_, err := p.conn.Write(packet)
		if err == nil {
			return len(b), nil
		}
		// The socket reports a pending error once, here or to Read.
		if err := p.associationError(err); err != nil {
			_ = p.conn.SetReadDeadline(time.Now())
			return 0, err
		}
		switch {
		case errors.Is(err, unix.EPERM): // Dropped by this host's netfilter: lost.
			return len(b), nil
		case !isRefusal(err):
			return 0, err
		}
	}
}

func (p *sctpClientConn) Close() error {
	p.closeOnce.Do(func() { p.closeErr = p.conn.Close() })
	return p.closeErr
}

// LocalAddr returns the client's address, with the port of the association.
func (p *sctpClientConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(p.local) }

// RemoteAddr returns the address that the client connected to.
func (p *sctpClientConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(p.remote) }

// SetDeadline is the socket's.
func (p *sctpClientConn) SetDeadline(t time.Time) error { return p.conn.SetDeadline(t) }

// SetReadDeadline is the socket's.
func (p *sctpClientConn) SetReadDeadline(t time.Time) error { return p.conn.SetReadDeadline(t) }

// SetWriteDeadline is the socket's.
func (p *sctpClientConn) SetWriteDeadline(t time.Time) error { return p.conn.SetWriteDeadline(t) }

// sctpStack is the SCTP of one address of a host, for servers.
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

// sctpFlow identifies an association of a stack.
type sctpFlow struct {
	port   uint16 // of the server
	remote netip.AddrPort
}

// sctpListener is a port of a stack.
type sctpListener struct {
	stack *sctpStack
	port  uint16
}

// listenSCTP is called with the host locked.
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

// Close stops listening, and aborts the associations of the port.
func (l *sctpListener) Close() error {
	l.stack.mu.Lock()
	delete(l.stack.ports, l.port)
	var paths []*sctpServerConn
	for flow, path := range l.stack.conns {
		if flow.port == l.port {
			paths = append(paths, path)
		}
	}
	l.stack.mu.Unlock()
	for _, path := range paths {
		path.abort()
		<-path.done
	}
	return nil
}

func (s *sctpStack) close() error {
	s.mu.Lock()
	s.closed = true
	for _, path := range s.conns {
		path.stop()
	}
	s.mu.Unlock()
	err := s.conn.Close()
	s.wg.Wait()
	return err
}

// receive hands packets to their associations until the socket is closed.
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
		if path := s.connFor(flow, packet[:n]); path != nil {
			select {
			case path.packets <- sctpSetPorts(packet[:n], pionPort, pionPort):
			default: // As a full socket buffer: the peer sends it again.
			}
		}
	}
}

// connFor returns the path that a packet belongs to, or nil if nobody wants it.
func (s *sctpStack) connFor(flow sctpFlow, packet []byte) *sctpServerConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if path := s.conns[flow]; path != nil || s.closed {
		return path
	}
	// Clients of this host have sockets of their own, which get the same
	// packets: only the first packet of an association is for sure not theirs.
	if packet[sctpHeader] != sctpChunkInit || len(packet) < sctpHeader+2*sctpChunk {
		return nil
	}
	if !s.ports[flow.port] {
		abort := make([]byte, sctpHeader+sctpChunk)
		copy(abort[4:8], packet[sctpHeader+sctpChunk:]) // the tag that the peer wants to see
		abort[sctpHeader] = sctpChunkAbort
		abort[sctpHeader+3] = sctpChunk
		s.send(flow, abort)
		return nil
	}
	path := &sctpServerConn{
		stack: s, flow: flow, packets: make(chan []byte, 64), closed: make(chan struct{}), done: make(chan struct{}),
	}
	s.conns[flow] = path
	s.wg.Go(path.serve)
	return path
}

func (s *sctpStack) send(flow sctpFlow, packet []byte) {
	// A packet that cannot be sent is a lost one.
	_, _ = s.conn.WriteToIP(sctpSetPorts(packet, flow.port, flow.remote.Port()), &net.IPAddr{IP: flow.remote.Addr().AsSlice()})
}

// sctpServerConn carries the packets of one association of a stack.
type sctpServerConn struct {
	stack     *sctpStack
	flow      sctpFlow
	packets   chan []byte
	closed    chan struct{}
	closeOnce sync.Once
	done      chan struct{} // closed when serve has returned

	mu          sync.Mutex
	association *sctp.Association // once established
}

// serve answers the requests of one association.
func (p *sctpServerConn) serve() {
	defer close(p.done)
	defer func() {
		p.stop()
		p.stack.mu.Lock()
		delete(p.stack.conns, p.flow)
		p.stack.mu.Unlock()
	}()
	// A client that goes away half-way is forgotten.
	giveUp := time.AfterFunc(DefaultTimeout, p.stop)
	association, err := sctp.ServerWithOptions(sctp.WithNetConn(p), sctp.WithLoggerFactory(sctpDiscardLogs()))
	giveUp.Stop()
	if err != nil {
		return
	}
	defer association.Close() //nolint:errcheck // the path's Close never fails
	p.mu.Lock()
	p.association = association
	p.mu.Unlock()
	stream, err := association.AcceptStream()
	if err != nil {
		return
	}
	answer := Answer{Host: p.stack.name, Endpoint: netip.AddrPortFrom(p.stack.addr, p.flow.port), Source: p.flow.remote}
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

// abort ends the association so that the client knows.
func (p *sctpServerConn) abort() {
	p.mu.Lock()
	association := p.association
	p.mu.Unlock()
	if association != nil {
		association.Abort("server closed")
	}
	p.stop()
}

func (p *sctpServerConn) Read(b []byte) (int, error) {
	select {
	case packet := <-p.packets:
		return copy(b, packet), nil
	case <-p.closed:
		return 0, net.ErrClosed
	}
}

func (p *sctpServerConn) Write(b []byte) (int, error) {
	select {
	case <-p.closed:
		return 0, net.ErrClosed
	default:
	}
	p.stack.send(p.flow, b)
	return len(b), nil
}

// Close makes Read and Write fail. It returns nil.
func (p *sctpServerConn) Close() error {
	p.stop()
	return nil
}

func (p *sctpServerConn) stop() { p.closeOnce.Do(func() { close(p.closed) }) }

// LocalAddr returns the server's address.
func (p *sctpServerConn) LocalAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.stack.addr, p.flow.port))
}

// RemoteAddr returns the client's address as the server sees it.
func (p *sctpServerConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(p.flow.remote) }

// SetReadDeadline ends all reads if t has passed, which is how an abort and a
// close interrupt them; pion sets no other deadline.
func (p *sctpServerConn) SetReadDeadline(t time.Time) error {
	if !t.IsZero() && !t.After(time.Now()) {
		return p.Close()
	}
	return nil
}

// SetDeadline is SetReadDeadline.
func (p *sctpServerConn) SetDeadline(t time.Time) error { return p.SetReadDeadline(t) }

// SetWriteDeadline does nothing: writes do not block.
func (p *sctpServerConn) SetWriteDeadline(time.Time) error { return nil }
