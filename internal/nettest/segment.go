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
	// Len is the number of bytes of data.
	Len int
}

// TCPFlags are flags of a [Segment], as in the header.
type TCPFlags byte

// The flags that tests use.
const (
	FIN TCPFlags = 1
	SYN TCPFlags = 2
	RST TCPFlags = 4
	PSH TCPFlags = 8
	ACK TCPFlags = 16
)

const tcpHeader = 20

// marshal returns the segment with zeros as its data.
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

// checksum is that of the segment and the pseudo-header of both IPs.
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

// SegmentConn sees the segments of TCP that arrive at one address of a host, besides
// the host's own TCP, and sends others that look as if they were from that. Its
// methods may be called concurrently.
type SegmentConn struct {
	addr netip.Addr
	conn *net.IPConn
	done chan struct{}

	mu       sync.Mutex
	received []Segment
}

// OpenSegmentConn returns a Wire of one of the host's addresses. The caller closes it.
func (h *Host) OpenSegmentConn(addr netip.Addr) (*SegmentConn, error) {
	w := &SegmentConn{addr: addr, done: make(chan struct{})}
	network := "ip4:tcp"
	if addr.Is6() {
		network = "ip6:tcp"
	}
	err := h.Do(func() (err error) {
		w.conn, err = net.ListenIP(network, &net.IPAddr{IP: addr.AsSlice()})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen to the TCP of %s: %w", h.Name, err)
	}
	go w.receive()
	return w, nil
}

func (w *SegmentConn) receive() {
	defer close(w.done)
	b := make([]byte, 1<<16)
	for {
		n, from, err := w.conn.ReadFromIP(b)
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil { // an ICMP message, say
			time.Sleep(time.Millisecond)
			continue
		}
		source, _ := netip.AddrFromSlice(from.IP)
		if s, ok := parseSegment(b[:n], source.Unmap(), w.addr); ok {
			w.mu.Lock()
			w.received = append(w.received, s)
			w.mu.Unlock()
		}
	}
}

// Received returns the segments that have arrived so far, the oldest first.
func (w *SegmentConn) Received() []Segment {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Segment(nil), w.received...)
}

// Send sends a segment. Its source must be the Wire's address.
func (w *SegmentConn) Send(s Segment) error {
	// As with Conn.Ask, EPERM is a packet that this host dropped itself.
	_, err := w.conn.WriteToIP(s.marshal(), &net.IPAddr{IP: s.Destination.Addr().AsSlice()})
	if err != nil && !errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("send a segment from %s to %s: %w", s.Source, s.Destination, err)
	}
	return nil
}

// Close stops listening.
func (w *SegmentConn) Close() error {
	err := w.conn.Close()
	<-w.done
	return err
}
