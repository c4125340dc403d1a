package nettest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The servers and clients in this file exchange one byte, the server's identity, and use
// system calls directly. Tests that open a million connections need them, because package net
// takes several times as long.

// IdentityServer writes its identity to each client that connects.
type IdentityServer struct {
	fd   int
	done chan struct{}
}

// ServeIdentity answers TCP connections or UDP datagrams to one of the host's addresses with
// one byte. It closes a TCP connection after the byte. The caller closes the server.
func (h *Host) ServeIdentity(network string, addr netip.AddrPort, identity byte) (*IdentityServer, error) {
	s := &IdentityServer{done: make(chan struct{})}
	err := h.Do(func() (err error) {
		s.fd, err = bindSocket(network, addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("serve %s on %s: %w", network, h.Name, err)
	}
	answer := s.answerDatagrams
	if network == TCP {
		answer = s.answerConnections
	}
	go func() {
		defer close(s.done)
		answer([]byte{identity})
	}()
	return s, nil
}

func (s *IdentityServer) answerConnections(identity []byte) {
	for {
		c, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC)
		switch {
		case err == nil:
			_, _ = unix.Write(c, identity)
			_ = unix.Close(c)
		case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ECONNABORTED):
			return
		}
	}
}

func (s *IdentityServer) answerDatagrams(identity []byte) {
	buf := make([]byte, 16)
	for {
		n, from, err := unix.Recvfrom(s.fd, buf, 0)
		switch {
		case err == nil && from == nil, err == nil && n == 0: // shut down
			return
		case err == nil:
			// A failed send is equivalent to a lost datagram.
			_ = unix.Sendto(s.fd, identity, 0, from)
		case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ECONNREFUSED):
			return
		}
	}
}

// Close stops the server. It must be called once.
func (s *IdentityServer) Close() error {
	_ = unix.Shutdown(s.fd, unix.SHUT_RDWR) // unblocks the server's system call
	<-s.done
	return unix.Close(s.fd)
}

func bindSocket(network string, addr netip.AddrPort) (fd int, err error) {
	kind := unix.SOCK_STREAM
	if network == UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err = unix.Socket(socketDomain(addr.Addr()), kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("create socket: %w", err)
	}
	if err := unix.Bind(fd, socketAddress(addr)); err != nil {
		return 0, errors.Join(fmt.Errorf("bind to %s: %w", addr, err), unix.Close(fd))
	}
	if network == UDP {
		return fd, nil
	}
	const backlog = 1024
	if err := unix.Listen(fd, backlog); err != nil {
		return 0, errors.Join(fmt.Errorf("listen on %s: %w", addr, err), unix.Close(fd))
	}
	return fd, nil
}

func socketDomain(addr netip.Addr) int {
	if addr.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func socketAddress(addr netip.AddrPort) unix.Sockaddr {
	if addr.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
}

// IdentityClient requests the identity of servers started by [Host.ServeIdentity]. Its
// methods use the network namespace of the calling thread (see [Namespace.Do]). They may be
// called concurrently.
type IdentityClient struct {
	// Timeout bounds each step of a TCP connection, and the whole of a UDP request.
	Timeout time.Duration

	mu sync.Mutex
	// port is the last UDP source port, as an offset from the first one. It starts at random
	// because the host may have had another client.
	port    uint16
	started bool
}

// Connect opens a TCP connection. It returns the server's identity and the number of segments
// that the client retransmitted. Connect resets the connection at the end, so that neither
// side keeps state.
func (c *IdentityClient) Connect(addr netip.AddrPort) (identity byte, resent uint32, err error) {
	fd, err := c.socket(addr, unix.SOCK_STREAM)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, 0, fmt.Errorf("set SO_LINGER: %w", err)
	}
	if err := c.connect(fd, socketAddress(addr)); err != nil {
		return 0, 0, fmt.Errorf("connect: %w", err)
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, 0, fmt.Errorf("read TCP_INFO: %w", err)
	}
	var answer []byte
	for len(answer) < 2 {
		var buf [2]byte
		n, err := unix.Read(fd, buf[:])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, 0, fmt.Errorf("read the answer: %w", err)
		case n == 0 && len(answer) == 1:
			return answer[0], info.Total_retrans, nil
		case n == 0:
			return 0, 0, errors.New("server closed the connection without an answer")
		default:
			answer = append(answer, buf[:n]...)
		}
	}
	return 0, 0, fmt.Errorf("answer is longer than one byte: %v", answer)
}

// connect calls connect(2) and waits for the connection if a signal interrupts the call.
func (c *IdentityClient) connect(fd int, to unix.Sockaddr) error {
	err := unix.Connect(fd, to)
	for errors.Is(err, unix.EINTR) {
		timeout := int(c.Timeout.Milliseconds())
		if _, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, timeout); err != nil { //nolint:gosec // a descriptor
			continue
		}
		var code int
		if code, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
			err = unix.Errno(code) //nolint:gosec // an error number
		}
	}
	return err
}

// Ask sends a UDP datagram from a source port that the client has not used recently. It
// returns the server's identity and the number of retransmissions. Like a resolver, Ask
// retransmits every second, until Timeout has passed.
func (c *IdentityClient) Ask(addr netip.AddrPort) (identity byte, resent uint32, err error) {
	fd, err := c.socket(addr, unix.SOCK_DGRAM)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := c.bindNextPort(fd, addr.Addr()); err != nil {
		return 0, 0, err
	}
	if err := unix.Connect(fd, socketAddress(addr)); err != nil {
		return 0, 0, fmt.Errorf("connect: %w", err)
	}
	wait := min(c.Timeout, time.Second)
	if err := setTimeout(fd, unix.SO_RCVTIMEO, wait); err != nil {
		return 0, 0, err
	}
	for begin := time.Now(); ; resent++ {
		if _, err := unix.Write(fd, []byte{'?'}); err != nil {
			return 0, resent, fmt.Errorf("send: %w", err)
		}
		var buf [2]byte
		n, err := unix.Read(fd, buf[:])
		switch {
		case err == nil && n == 1:
			return buf[0], resent, nil
		case err == nil:
			return 0, resent, fmt.Errorf("answer has %d bytes, want 1", n)
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR), time.Since(begin) >= c.Timeout-wait/2:
			return 0, resent, fmt.Errorf("receive: %w", err)
		}
	}
}

// bindNextPort binds a socket to the next source port. With a reused port, connection
// tracking would send the flow where the earlier one went.
func (c *IdentityClient) bindNextPort(fd int, to netip.Addr) error {
	const first, ports = 20_000, 40_000
	anywhere := netip.IPv4Unspecified()
	if to.Is6() {
		anywhere = netip.IPv6Unspecified()
	}
	for range ports {
		c.mu.Lock()
		if !c.started {
			c.started, c.port = true, rand.N[uint16](ports) //nolint:gosec // no secret
		}
		c.port = (c.port + 1) % ports
		port := first + c.port
		c.mu.Unlock()
		err := unix.Bind(fd, socketAddress(netip.AddrPortFrom(anywhere, port)))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return fmt.Errorf("bind to port %d: %w", port, err)
		}
	}
	return fmt.Errorf("bind: all %d ports are in use", ports)
}

func (c *IdentityClient) socket(addr netip.AddrPort, kind int) (int, error) {
	fd, err := unix.Socket(socketDomain(addr.Addr()), kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("create socket: %w", err)
	}
	if err := errors.Join(setTimeout(fd, unix.SO_SNDTIMEO, c.Timeout), setTimeout(fd, unix.SO_RCVTIMEO, c.Timeout)); err != nil {
		return 0, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// setTimeout sets SO_SNDTIMEO or SO_RCVTIMEO.
func setTimeout(fd, option int, d time.Duration) error {
	value := unix.NsecToTimeval(d.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &value); err != nil {
		return fmt.Errorf("set socket timeout: %w", err)
	}
	return nil
}
