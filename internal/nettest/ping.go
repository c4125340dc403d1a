package nettest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	icmpHeader       = 8
	icmpEchoRequest  = 8   // RFC 792
	icmpEchoRequest6 = 128 // RFC 4443
)

// ESP is the number of an IP protocol for [Host.ProbeProtocol].
const ESP = 50

// Pinger sends ICMP echo requests with one identifier, which make one connection
// to the node's connection tracking. It is for one goroutine.
type Pinger struct {
	conn        net.Conn
	description string
	typ         byte
	sequence    uint16
}

// OpenPinger returns a Pinger to an address. It sends nothing.
func (h *Host) OpenPinger(addr netip.Addr) (*Pinger, error) {
	p := &Pinger{description: fmt.Sprintf("ping from %s to %s", h.Name, addr), typ: icmpEchoRequest}
	family, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	if addr.Is6() {
		family, protocol, p.typ = unix.AF_INET6, unix.IPPROTO_ICMPV6, icmpEchoRequest6
	}
	err := h.Do(func() error {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
		if err != nil {
			return err
		}
		file := os.NewFile(uintptr(fd), "ping") //nolint:gosec // a descriptor
		defer file.Close()                      //nolint:errcheck // a copy is used
		var to unix.Sockaddr = &unix.SockaddrInet6{Addr: addr.As16()}
		if addr.Is4() {
			to = &unix.SockaddrInet4{Addr: addr.As4()}
		}
		// The kernel chooses the identifier, and delivers what is for it.
		if err := unix.Connect(fd, to); err != nil {
			return err
		}
		p.conn, err = net.FileConn(file)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: open a socket: %w", p.description, err)
	}
	return p, nil
}

// Ask sends an echo request and waits for the answer from the address that it
// was sent to. An error wraps [ErrRefused], [ErrTimeout] or neither.
func (p *Pinger) Ask(ctx context.Context) error {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	deadline, _ := ctx.Deadline()
	if err := p.conn.SetReadDeadline(deadline); err != nil {
		return p.wrap(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = p.conn.SetReadDeadline(time.Now()) })
	defer stop()
	p.sequence++
	request := make([]byte, icmpHeader, icmpHeader+8)
	request[0] = p.typ
	binary.BigEndian.PutUint16(request[6:], p.sequence)
	request = append(request, "fairlead"...)
	// As with Conn.Ask, EPERM is a packet that this host dropped itself.
	if _, err := p.conn.Write(request); err != nil && !errors.Is(err, syscall.EPERM) {
		return p.wrap(err)
	}
	answer := make([]byte, 512)
	for {
		n, err := p.conn.Read(answer)
		if err != nil {
			return p.wrap(err)
		}
		if n >= icmpHeader && binary.BigEndian.Uint16(answer[6:]) == p.sequence {
			return nil
		}
	}
}

func (p *Pinger) wrap(err error) error { return (&Conn{description: p.description}).wrap("ask", err) }

// Close closes the socket.
func (p *Pinger) Close() error { return p.conn.Close() }

// Ping sends one echo request, see [Pinger.Ask].
func (h *Host) Ping(ctx context.Context, addr netip.Addr) error {
	p, err := h.OpenPinger(addr)
	if err != nil {
		return err
	}
	return errors.Join(p.Ask(ctx), p.Close())
}

// ProbeProtocol sends a packet of an IP protocol that nobody speaks, and waits until it is
// refused, or for anything in return. A protocol to take is [ESP]: the kernel's
// `reject` stays silent where it takes a packet's data for a wrong checksum
// (nf_reject.h, nf_reject_verify_csum). An error wraps [ErrRefused], [ErrTimeout] or
// neither.
func (h *Host) ProbeProtocol(ctx context.Context, protocol uint8, addr netip.Addr) error {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	knock := &Conn{description: fmt.Sprintf("IP protocol %d from %s to %s", protocol, h.Name, addr)}
	network := "ip4:"
	if addr.Is6() {
		network = "ip6:"
	}
	var conn *net.IPConn
	err := h.Do(func() (err error) {
		conn, err = net.DialIP(network+strconv.Itoa(int(protocol)), nil, &net.IPAddr{IP: addr.AsSlice()})
		return err
	})
	if err != nil {
		return knock.wrap("open a socket for", err)
	}
	defer conn.Close() //nolint:errcheck // nothing is lost with it
	deadline, _ := ctx.Deadline()
	if err := conn.SetReadDeadline(deadline); err != nil {
		return knock.wrap("ask", err)
	}
	if _, err := conn.Write([]byte("fairlead")); err != nil && !errors.Is(err, syscall.EPERM) {
		return knock.wrap("ask", err)
	}
	if _, err := conn.Read(make([]byte, 512)); err != nil {
		return knock.wrap("ask", err)
	}
	return nil
}
