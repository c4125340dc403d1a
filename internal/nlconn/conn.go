package nlconn

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// BatchSize is the maximum number of requests that [Conn.Batch] sends in one system call.
	// With this size the cost of the system call is negligible, and other users get the
	// kernel's lock in between.
	BatchSize = 512

	// MessageSize is the size in bytes of the receive buffer. The kernel fills the buffer of a
	// dump up to the largest size used by the reader so far, at most 32 KiB
	// (net/netlink/af_netlink.c, netlink_dump). For each buffer, the dump of an nftables set
	// walks the set from its start. Small buffers therefore make a large dump quadratic.
	MessageSize = 32 << 10

	// The send buffer holds the requests of one system call. The receive buffer holds the
	// error answers, each of which includes its request.
	sendBuffer    = 4 << 20
	receiveBuffer = 8 << 20
	// answerTimeout limits the wait for the kernel's next answer. The kernel answers while it
	// handles a request, so the timeout expires only after a bug.
	answerTimeout = 30 * time.Second
	// deadlineRenewMessages is the number of dump messages after which the deadline is
	// renewed.
	deadlineRenewMessages = 1024
)

// Conn is a connection to one netlink protocol in one network namespace. It must not be used
// concurrently.
type Conn struct {
	protocol, netns int
	// conn is nil after an error of the socket, because old answers may still arrive there.
	// The next request opens a new socket.
	conn *netlink.Conn
	// sequence is the sequence number of the last request.
	sequence uint32
	// deadline is the socket's current deadline.
	deadline time.Time
	socket   socketIO
}

// Dial connects to a netlink protocol (unix.NETLINK_*) in the network namespace of the file
// descriptor netns, or in the thread's namespace if netns is 0. The file descriptor must stay
// open until Close.
func Dial(protocol, netns int) (*Conn, error) {
	c := &Conn{protocol: protocol, netns: netns}
	if err := c.dial(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Conn) dial() error {
	conn, err := netlink.Dial(c.protocol, &netlink.Config{NetNS: c.netns, Strict: true})
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	if err := errors.Join(conn.SetWriteBuffer(sendBuffer), conn.SetReadBuffer(receiveBuffer)); err != nil {
		return errors.Join(fmt.Errorf("set netlink socket buffers: %w", err), conn.Close())
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return errors.Join(fmt.Errorf("access netlink socket: %w", err), conn.Close())
	}
	c.conn, c.deadline = conn, time.Time{}
	c.socket.attach(raw)
	return nil
}

// Close closes the connection.
func (c *Conn) Close() error {
	if c.conn == nil {
		return nil
	}
	return c.conn.Close()
}

// Get sends a request that the kernel answers with one message, and returns the message's
// data. An error from the kernel wraps a unix.Errno.
func (c *Conn) Get(ctx context.Context, request netlink.Message) (data []byte, err error) {
	err = c.exchange(ctx, request, func(m message) { data = slices.Clone(m.data) })
	return data, err
}

// Dump sends a dump request and calls visit with the data of each message. The data are valid
// until visit returns. After an error of visit, Dump discards the remaining messages and
// returns that error.
//
// interrupted reports that the kernel's state changed during the dump (NLM_F_DUMP_INTR). An
// error from the kernel wraps a unix.Errno.
func (c *Conn) Dump(ctx context.Context, request netlink.Message, visit func(data []byte) error) (interrupted bool, err error) {
	request.Header.Flags |= netlink.Dump
	var failure error
	err = c.exchange(ctx, request, func(m message) {
		interrupted = interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
		if failure == nil && m.typ != unix.NLMSG_DONE {
			failure = visit(m.data)
		}
	})
	return interrupted, errors.Join(err, failure)
}

// exchange sends a request and calls visit with each answer, including the end of a dump
// (NLMSG_DONE).
func (c *Conn) exchange(ctx context.Context, request netlink.Message, visit func(message)) (err error) {
	done, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer func() { done(err) }()
	request.Header.Flags |= netlink.Request
	request.Header.Sequence = c.next(1)
	c.socket.reset()
	c.socket.append(request)
	if err := c.socket.flush(); err != nil {
		return fmt.Errorf("send netlink request: %w", err)
	}
	count := 0
	for more := true; more; {
		datagram, err := c.socket.receive()
		if err != nil {
			return fmt.Errorf("receive netlink answer: %w", err)
		}
		for len(datagram) > 0 {
			var m message
			if m, datagram, err = nextMessage(datagram); err != nil {
				return fmt.Errorf("receive netlink answer: %w", err)
			}
			if m.sequence != request.Header.Sequence {
				continue
			}
			answer, err := m.answer()
			if err != nil {
				return fmt.Errorf("receive netlink answer: %w", err)
			}
			if answer != nil {
				return answer
			}
			if count++; count%deadlineRenewMessages == 0 {
				if err := c.setDeadline(ctx); err != nil {
					return err
				}
			}
			visit(m)
			more = m.flags&unix.NLM_F_MULTI != 0 && m.typ != unix.NLMSG_DONE
		}
	}
	return nil
}

// next returns the sequence number of the first of n requests. The numbers of a batch are
// consecutive, and none is 0.
func (c *Conn) next(n int) uint32 {
	if c.sequence > math.MaxUint32-uint32(n) { //nolint:gosec // at most BatchSize
		c.sequence = 0
	}
	c.sequence++
	return c.sequence
}

// begin prepares a request: it opens a socket if necessary, and sets the deadline. done must
// be called with the request's error. After an error of the socket, done closes the socket, so
// that later requests do not receive old answers.
func (c *Conn) begin(ctx context.Context) (done func(error), err error) {
	if c.conn == nil {
		if err := c.dial(); err != nil {
			return nil, err
		}
	}
	conn := c.conn
	stop := func() bool { return true }
	if ctx.Done() != nil {
		stop = context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	}
	done = func(err error) {
		var answer *Error
		if running := !stop(); running || err != nil && !errors.As(err, &answer) {
			_ = conn.Close()
			c.conn = nil
		}
	}
	if err := c.setDeadline(ctx); err != nil {
		done(err)
		return nil, err
	}
	return done, nil
}

// setDeadline sets a deadline of at least answerTimeout for the next answer. It renews the
// deadline only when less than answerTimeout remains, because a renewal takes as long as a
// request.
func (c *Conn) setDeadline(ctx context.Context) error {
	if now := time.Now(); c.deadline.Sub(now) < answerTimeout {
		c.deadline = now.Add(2 * answerTimeout)
		if err := c.conn.SetDeadline(c.deadline); err != nil {
			return fmt.Errorf("set netlink socket deadline: %w", err)
		}
	}
	if ctx.Err() == nil {
		return nil
	}
	// The new deadline may have replaced the one that ends the wait with ctx.
	if err := c.conn.SetDeadline(time.Unix(1, 0)); err != nil {
		return fmt.Errorf("set netlink socket deadline: %w", err)
	}
	return nil
}
