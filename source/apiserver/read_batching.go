package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"k8s.io/client-go/rest"
)

const (
	// readBurst is how many readings may follow each other without a pause.
	readBurst = 10
	// batchBytes is how many bytes are read without waiting any longer, so that
	// a pause holds up no server that has much to tell.
	batchBytes = 64 << 10
)

// dialFunc is how a [rest.Config] connects.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// readBatcher has connections read once a period in the long run. To be woken for a change
// takes more of the processor than the change itself, and what has gathered
// meanwhile is read by one waking.
type readBatcher struct {
	period time.Duration
	// watchingOnly reports whether there is nothing to hear but changes.
	watchingOnly func() bool
	// afterFunc calls a function later, unless stop is called and reports that it was
	// in time.
	afterFunc func(time.Duration, func()) (stop func() bool)
}

func newReadBatcher(period time.Duration, following func() bool) readBatcher {
	return readBatcher{period: period, watchingOnly: following, afterFunc: func(d time.Duration, f func()) func() bool {
		return time.AfterFunc(d, f).Stop
	}}
}

// wrapConfig returns a configuration whose connections are paced, if there is a period.
func (p readBatcher) wrapConfig(config *rest.Config) *rest.Config {
	if p.period <= 0 {
		return config
	}
	dial := baseDial(config)
	config = rest.CopyConfig(config)
	config.Dial = p.wrapDial(dial)
	return config
}

// baseDial returns how a configuration connects.
func baseDial(config *rest.Config) dialFunc {
	if config.Dial != nil {
		return config.Dial
	}
	// As client-go has it.
	return (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext
}

// wrapDial returns a dialFunc that paces the connections of TCP that next makes.
func (p readBatcher) wrapDial(next dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := next(ctx, network, address)
		if err != nil {
			return nil, err
		}
		tcp, ok := conn.(*net.TCPConn)
		if !ok {
			return conn, nil
		}
		socket, err := tcp.SyscallConn()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("socket of the connection to %s: %w", address, err), conn.Close())
		}
		return &batchedConn{Conn: conn, batcher: p, socket: socket, limiter: rate.NewLimiter(rate.Every(p.period), readBurst)}, nil
	}
}

// batchedConn is a connection of TCP that is not read again for a while once nothing
// more was there. It has one reader at a time, as those of net/http and crypto/tls.
type batchedConn struct {
	net.Conn

	batcher readBatcher
	socket  syscall.RawConn
	limiter *rate.Limiter
	drained bool
}

// Read implements [net.Conn].
func (c *batchedConn) Read(b []byte) (int, error) {
	if c.drained && c.batcher.watchingOnly() {
		reading := c.limiter.Reserve()
		if delay := reading.Delay(); delay > 0 && !c.waitForBatch(delay) {
			reading.Cancel()
		}
	}
	n, err := c.Conn.Read(b)
	c.drained = n < len(b)
	return n, err
}

// waitForBatch waits until there is something to read: what there is after the delay, or
// much, or an end. It reports whether the delay has passed. Until then the low-water
// mark of the socket is high, so that what arrives doesn't wake this program at all.
func (c *batchedConn) waitForBatch(delay time.Duration) bool {
	if err := c.setLowWaterMark(batchBytes); err != nil {
		return true
	}
	// Lowering the mark wakes whoever waits for what is there.
	lower := func() { _ = c.setLowWaterMark(1) } // or else it is closed
	stop := c.batcher.afterFunc(delay, lower)
	// The error is that the connection was closed, or its deadline is over: Read
	// has the same.
	_ = c.socket.Read(readable)
	if !stop() {
		return true
	}
	lower()
	return false
}

// setLowWaterMark sets how many bytes make the socket readable.
func (c *batchedConn) setLowWaterMark(n int) error {
	var err error
	if controlErr := c.socket.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, n)
	}); controlErr != nil {
		return controlErr
	}
	return err
}

// readable reports whether the socket is: that there is as much as the low-water
// mark asks for, or as much as fits, or the peer has closed, or an error.
func readable(fd uintptr) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}, 0)
		if err != unix.EINTR {
			return err != nil || n > 0
		}
	}
}
