package nlconn

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/mdlayher/netlink"
)

const (
	// BatchSize is how many requests [Conn.Batch] sends by one system call. That is
	// enough for the system call not to matter, and other users get the kernel's lock
	// in between.
	BatchSize = 512

	// MessageSize is the size in bytes of the buffer that a Conn reads with. The kernel
	// fills a buffer of a dump up to the size that its reader has used, at most 32 KiB
	// (net/netlink/af_netlink.c, netlink_dump). For each buffer, the dump of a set walks
	// the set from its start, so small buffers make a large dump quadratic.
	MessageSize = 32 << 10

	// The send buffer holds the requests of one system call, the receive buffer the
	// errors that answer them, each with its request.
	sendBuffer    = 4 << 20
	receiveBuffer = 8 << 20
	// answerTimeout limits the wait for the kernel's next answer. The kernel answers
	// while it handles a request, so only a defect takes this long.
	answerTimeout = 30 * time.Second
	// deadlineRenewMessages is after how many messages of a dump the limit is set again.
	deadlineRenewMessages = 1024
)

// Conn is a connection to one netlink protocol in one network namespace. It must not
// be used by several goroutines at once.
type Conn struct {
	protocol, netns int
	// conn is nil after a failure of the socket, whose answers may still come. The next
	// request opens another socket.
	conn *netlink.Conn
	// sequence is the number of the last request.
	sequence uint32
	// deadline is when the socket stops to wait for answers.
	deadline time.Time
}

// Dial connects to a netlink protocol (unix.NETLINK_*) in the network namespace of a file
// descriptor, or in the thread's own if netns is 0. The file descriptor must
// stay open until Close.
func Dial(protocol, netns int) (*Conn, error) {
	c := &Conn{protocol: protocol, netns: netns}
	if err := c.dial(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Conn) dial() error {
	conn, err := netlink.Dial(c.protocol, &netlink.Config{NetNS: c.netns, Strict: true, MessageBufferSize: MessageSize})
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	if err := errors.Join(conn.SetWriteBuffer(sendBuffer), conn.SetReadBuffer(receiveBuffer)); err != nil {
		return errors.Join(fmt.Errorf("set the buffers of a netlink socket: %w", err), conn.Close())
	}
	c.conn, c.deadline = conn, time.Time{}
	return nil
}

// Close closes the connection.
func (c *Conn) Close() error {
	if c.conn == nil {
		return nil
	}
	return c.conn.Close()
}

// Batch sends requests, BatchSize of them by one system call, and waits for the
// kernel. It returns the kernel's answer to each request: nil or an error that wraps a
// unix.Errno. It sets the requests' sequence numbers and flags Request and Acknowledge.
//
// The second error is about the socket or ctx: some requests may have been carried out,
// and none has an answer.
func (c *Conn) Batch(ctx context.Context, requests []netlink.Message) ([]error, error) {
	answers := make([]error, len(requests))
	for first := 0; first < len(requests); first += BatchSize {
		end := min(first+BatchSize, len(requests))
		if err := c.batch(ctx, requests[first:end], answers[first:end]); err != nil {
			return nil, err
		}
	}
	return answers, nil
}

func (c *Conn) batch(ctx context.Context, requests []netlink.Message, answers []error) (err error) {
	done, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer func() { done(err) }()
	for i := range requests {
		requests[i].Header.Flags |= netlink.Request
		if i == len(requests)-1 {
			requests[i].Header.Flags |= netlink.Acknowledge
		}
		requests[i].Header.Sequence = c.next(len(requests) - i)
	}
	first := requests[0].Header.Sequence
	if _, err := c.conn.SendMessages(requests); err != nil {
		return fmt.Errorf("send %d netlink requests: %w", len(requests), err)
	}
	for {
		sequence, answer, err := c.receiveAnswer()
		if err != nil {
			return err
		}
		if i := uint64(sequence - first); i < uint64(len(requests)) {
			answers[i] = answer
			if i == uint64(len(requests)-1) {
				return nil
			}
		}
	}
}

// receiveAnswer returns the kernel's next answer and the number of the request.
func (c *Conn) receiveAnswer() (sequence uint32, answer, err error) {
	messages, err := c.conn.Receive()
	if err != nil {
		if sequence, answer := parseAnswer(err); answer != nil {
			return sequence, answer, nil
		}
		return 0, nil, fmt.Errorf("receive netlink answers: %w", err)
	}
	if len(messages) == 0 {
		return 0, nil, errors.New("receive netlink answers: an empty message")
	}
	return messages[0].Header.Sequence, nil, nil
}

// Get sends a request that the kernel answers by one message, and returns the
// message's data. An error of the kernel wraps a unix.Errno.
func (c *Conn) Get(ctx context.Context, request netlink.Message) (data []byte, err error) {
	err = c.exchange(ctx, request, func(m netlink.Message) { data = m.Data })
	return data, err
}

// Dump sends a request for a dump, and calls visit with the data of each message. The data
// is visit's to keep. After an error of visit Dump reads the rest without calling visit,
// and returns that error.
//
// interrupted reports that the dump does not show one state of the kernel
// (NLM_F_DUMP_INTR). An error of the kernel wraps a unix.Errno.
func (c *Conn) Dump(ctx context.Context, request netlink.Message, visit func(data []byte) error) (interrupted bool, err error) {
	request.Header.Flags |= netlink.Dump
	var failure error
	err = c.exchange(ctx, request, func(m netlink.Message) {
		interrupted = interrupted || m.Header.Flags&netlink.DumpInterrupted != 0
		if failure == nil {
			failure = visit(m.Data)
		}
	})
	return interrupted, errors.Join(err, failure)
}

// exchange sends a request and calls visit with the messages that answer it.
func (c *Conn) exchange(ctx context.Context, request netlink.Message, visit func(netlink.Message)) (err error) {
	done, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer func() { done(err) }()
	request.Header.Flags |= netlink.Request
	request.Header.Sequence = c.next(1)
	if _, err := c.conn.Send(request); err != nil {
		return fmt.Errorf("send a netlink request: %w", err)
	}
	count := 0
	for m, err := range c.conn.ReceiveIter() {
		if err != nil {
			if _, answer := parseAnswer(err); answer != nil {
				return answer
			}
			return fmt.Errorf("receive a netlink answer: %w", err)
		}
		if count++; count%deadlineRenewMessages == 0 {
			if err := c.setDeadline(ctx); err != nil {
				return err
			}
		}
		visit(m)
	}
	return nil
}

// next returns the number of the next of n requests. Numbers of a batch follow one
// another, and none is 0, which netlink.Conn would replace.
func (c *Conn) next(n int) uint32 {
	if c.sequence > math.MaxUint32-uint32(n) { //nolint:gosec // at most BatchSize
		c.sequence = 0
	}
	c.sequence++
	return c.sequence
}

// begin prepares a request: it opens a socket if the last one failed, and limits the wait. done
// ends that; after an error of the socket it closes the socket, so that no answer is
// taken for one to a later request.
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

// setDeadline limits the wait for the next answer to answerTimeout or somewhat more. It sets
// another deadline only when the last one comes near, as that takes as long as a request.
func (c *Conn) setDeadline(ctx context.Context) error {
	if now := time.Now(); c.deadline.Sub(now) < answerTimeout {
		c.deadline = now.Add(2 * answerTimeout)
		if err := c.conn.SetDeadline(c.deadline); err != nil {
			return fmt.Errorf("set the time limit of a netlink socket: %w", err)
		}
	}
	if ctx.Err() == nil {
		return nil
	}
	// The deadline may have replaced the one that ends the wait with ctx.
	if err := c.conn.SetDeadline(time.Unix(1, 0)); err != nil {
		return fmt.Errorf("set the time limit of a netlink socket: %w", err)
	}
	return nil
}
