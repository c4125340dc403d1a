package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// conn is a netlink socket through which many requests are sent at once: the
// kernel answers them in order, and within one system call. The libraries send
// one, and wait for its answer.
type conn struct {
	fd     int
	seq    uint32
	buffer []byte
}

// Socket buffers. All requests of a call are in the send buffer at once, and all
// their errors in the receive buffer.
const (
	sendBuffer    = 4 << 20
	receiveBuffer = 8 << 20
	// requestsAtOnce is how many requests one call has. It is far more than what
	// is needed for the system call not to matter, and others who want the
	// kernel's lock get it in between.
	requestsAtOnce = 512
	// answerLimit is for how long an answer is waited for, which is there when the
	// requests have been sent.
	answerLimit = 30 * time.Second
)

// dial opens a socket of a netlink protocol in a network namespace, or in that of
// the thread if it is 0.
func dial(netns, protocol int) (*conn, error) {
	c := &conn{buffer: make([]byte, 1<<16)}
	err := inNamespace(netns, func() error {
		var err error
		if c.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol); err != nil {
			return fmt.Errorf("open netlink socket: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := c.setUp(); err != nil {
		return nil, errors.Join(fmt.Errorf("set up netlink socket: %w", err), c.close())
	}
	return c, nil
}

func (c *conn) setUp() error {
	limit := unix.NsecToTimeval(answerLimit.Nanoseconds())
	return errors.Join(
		unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer),
		unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer),
		// Errors without the request, which is known by its number.
		unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1),
		unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1),
		unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
	)
}

func (c *conn) close() error { return unix.Close(c.fd) }

// inNamespace runs fn on a thread in a network namespace, unless it is 0.
func inNamespace(netns int, fn func() error) error {
	if netns == 0 {
		return fn()
	}
	done := make(chan error, 1)
	go func() {
		// The thread is not used again if it can't go back.
		runtime.LockOSThread()
		own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- fmt.Errorf("find the thread's network namespace: %w", err)
			return
		}
		defer unix.Close(own) //nolint:errcheck // only read from
		if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		err = fn()
		if back := unix.Setns(own, unix.CLONE_NEWNET); back != nil {
			done <- errors.Join(err, fmt.Errorf("leave the network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// message is a netlink message: its type, and what comes behind the header.
type message struct {
	typ, flags uint16
	body       []byte
}

const headerLen = unix.NLMSG_HDRLEN

// appendTo appends the message with its header, in the host's byte order.
func (m message) appendTo(b []byte, seq uint32) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(headerLen+len(m.body))) //nolint:gosec // a small request
	b = binary.NativeEndian.AppendUint16(b, m.typ)
	b = binary.NativeEndian.AppendUint16(b, m.flags|unix.NLM_F_REQUEST)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, m.body...)
	return pad(b)
}

func pad(b []byte) []byte {
	for len(b)%unix.NLMSG_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

// send sends messages to the kernel.
func (c *conn) send(messages []byte) error {
	for {
		err := unix.Sendto(c.fd, messages, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// transact sends the messages, many at once, and returns the kernel's answer to
// each: nil or an errno. Any other error is about all of them, of which some may
// have been carried out.
func (c *conn) transact(messages []message) ([]error, error) {
	answers := make([]error, len(messages))
	var out []byte
	for first := 0; first < len(messages); first += requestsAtOnce {
		part := messages[first:min(first+requestsAtOnce, len(messages))]
		out = out[:0]
		base := c.seq + 1
		for i, m := range part {
			// Errors are always answered; that all is done, only the last tells.
			if i == len(part)-1 {
				m.flags |= unix.NLM_F_ACK
			}
			c.seq++
			out = m.appendTo(out, c.seq)
		}
		if err := c.send(out); err != nil {
			return nil, fmt.Errorf("send %d netlink requests: %w", len(part), err)
		}
		err := c.receive(func(h header, body []byte) (done bool, err error) {
			i := h.seq - base
			if h.typ != unix.NLMSG_ERROR || i >= uint32(len(part)) { //nolint:gosec // few
				return false, nil // an answer to something older, that was given up
			}
			answers[first+int(i)] = errnoOf(body)
			return h.seq == c.seq, nil
		})
		if err != nil {
			return nil, err
		}
	}
	return answers, nil
}

// dump sends a request for a dump and calls each with the body of every message.
func (c *conn) dump(m message, each func(body []byte) error) error {
	c.seq++
	m.flags |= unix.NLM_F_DUMP
	if err := c.send(m.appendTo(nil, c.seq)); err != nil {
		return fmt.Errorf("send a netlink request: %w", err)
	}
	var failed error // the rest of the dump has to be received all the same
	err := c.receive(func(h header, body []byte) (bool, error) {
		switch {
		case h.seq != c.seq:
			return false, nil
		case h.typ == unix.NLMSG_ERROR:
			return true, errnoOf(body)
		case h.typ == unix.NLMSG_DONE:
			return true, errnoOf(body)
		}
		if failed == nil {
			failed = each(body)
		}
		return false, nil
	})
	return errors.Join(err, failed)
}

// header is what of a message's header is looked at.
type header struct {
	typ uint16
	seq uint32
}

// receive calls each with the messages that arrive until it is done or fails.
func (c *conn) receive(each func(h header, body []byte) (done bool, err error)) error {
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buffer, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("receive netlink answers: %w", err)
		}
		for b := c.buffer[:n]; len(b) >= headerLen; {
			length := int(binary.NativeEndian.Uint32(b))
			if length < headerLen || length > len(b) {
				return errors.New("receive netlink answers: a message is cut off")
			}
			h := header{typ: binary.NativeEndian.Uint16(b[4:]), seq: binary.NativeEndian.Uint32(b[8:])}
			done, err := each(h, b[headerLen:length])
			if done || err != nil {
				return err
			}
			b = b[min(len(b), (length+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
		}
	}
}

// errnoOf returns the error in the body of an answer or of a dump's end.
func errnoOf(body []byte) error {
	if len(body) < 4 {
		return nil
	}
	if code := int32(binary.NativeEndian.Uint32(body)); code < 0 { //nolint:gosec // it is one
		return unix.Errno(-code)
	}
	return nil
}

// attrs builds netlink attributes.
type attrs []byte

func (a attrs) bytes(typ uint16, data []byte) attrs {
	a = binary.NativeEndian.AppendUint16(a, uint16(4+len(data))) //nolint:gosec // short
	a = binary.NativeEndian.AppendUint16(a, typ)
	return pad(append(a, data...))
}

func (a attrs) uint16(typ, v uint16) attrs {
	return a.bytes(typ, binary.NativeEndian.AppendUint16(nil, v))
}

func (a attrs) uint32(typ uint16, v uint32) attrs {
	return a.bytes(typ, binary.NativeEndian.AppendUint32(nil, v))
}

func (a attrs) text(typ uint16, s string) attrs { return a.bytes(typ, append([]byte(s), 0)) }

// typeMask leaves flags out of an attribute's type (linux/netlink.h, NLA_TYPE_MASK).
const typeMask = 1<<14 - 1

// each calls visit with each of the attributes.
func (a attrs) each(visit func(typ uint16, data []byte)) {
	for len(a) >= 4 {
		length := int(binary.NativeEndian.Uint16(a))
		if length < 4 || length > len(a) {
			return
		}
		visit(binary.NativeEndian.Uint16(a[2:])&typeMask, a[4:length])
		a = a[min(len(a), (length+3)&^3):]
	}
}
