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

// ESP is the IP protocol number of ESP, for [Host.ProbeProtocol].
const ESP = 50

// Pinger sends ICMP echo requests with one identifier. The node's connection tracking treats
// them as one connection. A Pinger must not be used concurrently.
type Pinger struct {
	conn        net.Conn
	description string
	typ         byte
	sequence    uint16
}

// OpenPinger returns a Pinger for an address. It sends no packet.
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
		defer file.Close()                      //nolint:errcheck // net.FileConn duplicates it
		var to unix.Sockaddr = &unix.SockaddrInet6{Addr: addr.As16()}
		if addr.Is4() {
			to = &unix.SockaddrInet4{Addr: addr.As4()}
		}
		// The kernel chooses the identifier and delivers the matching replies.
		if err := unix.Connect(fd, to); err != nil {
			return err
		}
		p.conn, err = net.FileConn(file)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: open socket: %w", p.description, err)
	}
	return p, nil
}

// Ask sends an echo request and waits for the reply from the same address. Its error may wrap
// [ErrRefused] or [ErrTimeout].
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
	// EPERM: this host's netfilter dropped the packet, see Conn.Ask.
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

// ProbeProtocol sends a packet of an IP protocol without listeners and waits for a refusal or
// any response. Use a protocol such as [ESP]: the kernel's `reject` sends nothing if it
// interprets the packet's data as a wrong checksum (nf_reject.h, nf_reject_verify_csum). The
// error may wrap [ErrRefused] or [ErrTimeout].
func (h *Host) ProbeProtocol(ctx context.Context, protocol uint8, addr netip.Addr) error {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	c := &Conn{description: fmt.Sprintf("IP protocol %d from %s to %s", protocol, h.Name, addr)}
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
		return c.wrap("open socket for", err)
	}
	defer conn.Close() //nolint:errcheck // nothing is buffered
	deadline, _ := ctx.Deadline()
	if err := conn.SetReadDeadline(deadline); err != nil {
		return c.wrap("ask", err)
	}
	if _, err := conn.Write([]byte("fairlead")); err != nil && !errors.Is(err, syscall.EPERM) {
		return c.wrap("ask", err)
	}
	if _, err := conn.Read(make([]byte, 512)); err != nil {
		return c.wrap("ask", err)
	}
	return nil
}
