package nlconn

import (
	"context"
	"fmt"

	"github.com/mdlayher/netlink"
)

// Batch sends requests, up to BatchSize per system call, and waits for the kernel. It returns
// the kernel's answer to each request: nil, or an error that wraps a unix.Errno. It sets the
// sequence number and the flags Request and Acknowledge of the requests.
//
// The second error is about the socket or ctx. In this case the kernel may have executed some
// requests, and no answers are returned.
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
	c.socket.reset()
	for i := range requests {
		requests[i].Header.Flags |= netlink.Request
		if i == len(requests)-1 {
			requests[i].Header.Flags |= netlink.Acknowledge
		}
		requests[i].Header.Sequence = c.next(len(requests) - i)
		c.socket.append(requests[i])
	}
	first := requests[0].Header.Sequence
	if err := c.socket.flush(); err != nil {
		return fmt.Errorf("send %d netlink requests: %w", len(requests), err)
	}
	for answered := false; !answered; {
		datagram, err := c.socket.receive()
		if err != nil {
			return fmt.Errorf("receive netlink answers: %w", err)
		}
		for len(datagram) > 0 {
			var m message
			if m, datagram, err = nextMessage(datagram); err != nil {
				return fmt.Errorf("receive netlink answers: %w", err)
			}
			if i := uint64(m.sequence - first); i < uint64(len(requests)) {
				if answers[i], err = m.answer(); err != nil {
					return fmt.Errorf("receive netlink answers: %w", err)
				}
				answered = answered || i == uint64(len(requests)-1)
			}
		}
	}
	return nil
}
