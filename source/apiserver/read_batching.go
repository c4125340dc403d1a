package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
)

const (
	// changeBurst is the number of changes that may follow each other without a pause.
	changeBurst = 10
	// batchedChanges is the average number of changes in a period from which reads pause. A pause
	// takes as much processor time as a wakeup, so it saves nothing for fewer changes.
	batchedChanges = 2
	// batchBytes is the number of buffered bytes that ends a pause, so that bulk data is
	// not delayed.
	batchBytes = 64 << 10
)

// dialFunc is the type of [rest.Config]'s Dial.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// readBatcher makes reads pause for a period while changes are frequent. Each wakeup of the process
// for a change costs more CPU time than the change itself; one wakeup reads all data that arrived
// during a pause.
type readBatcher struct {
	period time.Duration
	// watchingOnly reports whether no list is being read. Only then are reads batched.
	watchingOnly func() bool
	// changes returns the number of changes received so far.
	changes func() uint64
	// afterFunc calls a function after a delay. If stop returns true, it has prevented the
	// call.
	afterFunc func(time.Duration, func()) (stop func() bool)

	mu sync.Mutex
	// credit is the number of changes that may still arrive without a pause: at countedAt, and
	// after counted changes. It grows by batchedChanges in each period.
	credit    float64
	counted   uint64
	countedAt time.Time
}

func newReadBatcher(period time.Duration, watchingOnly func() bool, changes func() uint64) *readBatcher {
	return &readBatcher{
		period: period, watchingOnly: watchingOnly, changes: changes, credit: changeBurst,
		afterFunc: func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop },
	}
}

// shouldPause reports whether the next read should pause.
func (p *readBatcher) shouldPause(now time.Time) bool {
	changes := p.changes()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.credit += batchedChanges * float64(now.Sub(p.countedAt)) / float64(p.period)
	p.credit = min(p.credit, changeBurst) - float64(changes-p.counted)
	p.credit = max(p.credit, -changeBurst) // soon after frequent changes, single ones do not wait
	p.counted, p.countedAt = changes, now
	return p.credit < 0
}

// wrapConfig returns a configuration whose TCP connections are batched. It returns config
// itself if the period is not positive.
func (p *readBatcher) wrapConfig(config *rest.Config) *rest.Config {
	if p.period <= 0 {
		return config
	}
	dial := baseDial(config)
	config = rest.CopyConfig(config)
	config.Dial = p.wrapDial(dial)
	return config
}

// baseDial returns the dial function of a configuration.
func baseDial(config *rest.Config) dialFunc {
	if config.Dial != nil {
		return config.Dial
	}
	// client-go's default.
	return (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext
}

// wrapDial returns a dialFunc that batches reads of next's TCP connections.
func (p *readBatcher) wrapDial(next dialFunc) dialFunc {
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
			return nil, errors.Join(fmt.Errorf("get socket of connection to %s: %w", address, err), conn.Close())
		}
		return &batchedConn{Conn: conn, batcher: p, socket: socket}, nil
	}
}

// batchedConn is a TCP connection that delays a read if the previous read emptied the
// socket. It supports one reader at a time, as used by net/http and crypto/tls.
type batchedConn struct {
	net.Conn

	batcher *readBatcher
	socket  syscall.RawConn
	drained bool
}

// Read implements [net.Conn].
func (c *batchedConn) Read(b []byte) (int, error) {
	if c.drained && c.batcher.watchingOnly() && c.batcher.shouldPause(time.Now()) {
		c.waitForBatch()
	}
	n, err := c.Conn.Read(b)
	c.drained = n < len(b)
	return n, err
}

// waitForBatch waits until the socket is readable after a period, or earlier if it has batchBytes
// of data, the connection ends or its read deadline passes. Meanwhile, the socket's low-water mark
// (SO_RCVLOWAT) is high, so that arriving data does not wake the process.
func (c *batchedConn) waitForBatch() {
	if err := c.setLowWaterMark(batchBytes); err != nil {
		return
	}
	// Lowering the mark wakes the reader if there is data. It fails only if the socket is closed.
	lower := func() { _ = c.setLowWaterMark(1) }
	stop := c.batcher.afterFunc(c.batcher.period, lower)
	// An error means that the connection is closed or its deadline has passed. Read
	// returns the same error.
	_ = c.socket.Read(readable)
	if stop() {
		lower()
	}
}

// setLowWaterMark sets the number of bytes that makes the socket readable.
func (c *batchedConn) setLowWaterMark(n int) error {
	var err error
	if controlErr := c.socket.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, n)
	}); controlErr != nil {
		return controlErr
	}
	return err
}

// readable reports whether the socket is readable: it has as many bytes as the low-water
// mark or its buffer allows, the peer has closed it, or it has an error.
func readable(fd uintptr) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}, 0)
		if err != unix.EINTR {
			return err != nil || n > 0
		}
	}
}
