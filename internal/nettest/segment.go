package nettest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

// Segment is the header of a TCP segment (RFC 9293) with its addresses.
type Segment struct {
	Source, Destination netip.AddrPort
	Seq, Ack            uint32
	Flags               TCPFlags
	// Len is the length of the data in bytes.
	Len int
}

// TCPFlags are the flags of a [Segment], encoded as in the TCP header.
type TCPFlags byte

// Flags that tests use.
const (
	FIN TCPFlags = 1
	SYN TCPFlags = 2
	RST TCPFlags = 4
	PSH TCPFlags = 8
	ACK TCPFlags = 16
)

const tcpHeader = 20

// marshal encodes the segment with zeros as data.
func (s Segment) marshal() []byte {
	b := make([]byte, tcpHeader+s.Len)
	binary.BigEndian.PutUint16(b, s.Source.Port())
	binary.BigEndian.PutUint16(b[2:], s.Destination.Port())
	binary.BigEndian.PutUint32(b[4:], s.Seq)
	binary.BigEndian.PutUint32(b[8:], s.Ack)
	b[12], b[13] = tcpHeader/4<<4, byte(s.Flags)
	const window = 512
	binary.BigEndian.PutUint16(b[14:], window)
	binary.BigEndian.PutUint16(b[16:], s.checksum(b))
	return b
}

// checksum returns the checksum of an encoded segment and its IPv4 or IPv6 pseudo-header.
func (s Segment) checksum(b []byte) uint16 {
	const protocol = 6
	var sum uint32
	add := func(b []byte) {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	add(s.Source.Addr().AsSlice())
	add(s.Destination.Addr().AsSlice())
	sum += protocol + uint32(len(b)) //nolint:gosec // a small number
	add(b)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum) //nolint:gosec // 16 bits are left
}

func parseSegment(b []byte, from, to netip.Addr) (Segment, bool) {
	if len(b) < tcpHeader || len(b) < int(b[12]>>4)*4 {
		return Segment{}, false
	}
	return Segment{
		Source:      netip.AddrPortFrom(from, binary.BigEndian.Uint16(b)),
		Destination: netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[2:])),
		Seq:         binary.BigEndian.Uint32(b[4:]),
		Ack:         binary.BigEndian.Uint32(b[8:]),
		Flags:       TCPFlags(b[13]),
		Len:         len(b) - int(b[12]>>4)*4,
	}, true
}

// SegmentConn receives a copy of the TCP segments that arrive at one address of a host, and
// sends segments from that address. It bypasses the host's own TCP. Its methods may be called
// concurrently.
type SegmentConn struct {
	addr netip.Addr
	conn *net.IPConn
	done chan struct{}

	mu       sync.Mutex
	received []Segment
}

// OpenSegmentConn returns a SegmentConn for one of the host's addresses. The caller closes
// it.
func (h *Host) OpenSegmentConn(addr netip.Addr) (*SegmentConn, error) {
	c := &SegmentConn{addr: addr, done: make(chan struct{})}
	network := "ip4:tcp"
	if addr.Is6() {
		network = "ip6:tcp"
	}
	err := h.Do(func() (err error) {
		c.conn, err = net.ListenIP(network, &net.IPAddr{IP: addr.AsSlice()})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open raw TCP socket on %s: %w", h.Name, err)
	}
	go c.receive()
	return c, nil
}

func (c *SegmentConn) receive() {
	defer close(c.done)
	b := make([]byte, 1<<16)
	for {
		n, from, err := c.conn.ReadFromIP(b)
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil { // for example an ICMP error
			time.Sleep(time.Millisecond)
			continue
		}
		source, _ := netip.AddrFromSlice(from.IP)
		if s, ok := parseSegment(b[:n], source.Unmap(), c.addr); ok {
			c.mu.Lock()
			c.received = append(c.received, s)
			c.mu.Unlock()
		}
	}
}

// Received returns the segments received so far, oldest first.
func (c *SegmentConn) Received() []Segment {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Segment(nil), c.received...)
}

// Send sends a segment. The source must be the address of the SegmentConn.
func (c *SegmentConn) Send(s Segment) error {
	// EPERM: this host's netfilter dropped the packet, see Conn.Ask.
	_, err := c.conn.WriteToIP(s.marshal(), &net.IPAddr{IP: s.Destination.Addr().AsSlice()})
	if err != nil && !errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("send segment from %s to %s: %w", s.Source, s.Destination, err)
	}
	return nil
}

// Close closes the socket and waits until no more segments are recorded.
func (c *SegmentConn) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}
