package connlimit

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// retryMin and retryMax bound the delay between failed attempts to accept.
	retryMin = 5 * time.Millisecond
	retryMax = time.Second
	// pollTimeout bounds each wait for a client while the process has no file descriptors
	// left. It delays Close.
	pollTimeout = 100 * time.Millisecond
)

// Listener returns a listener whose connections count towards the limits. Accept retries
// after transient errors such as too many open files. Close closes inner.
func (l *Limiter) Listener(inner net.Listener) net.Listener {
	wrapped := &listener{Listener: inner, limiter: l, done: make(chan struct{})}
	wrapped.refillReserve()
	return wrapped
}

type listener struct {
	net.Listener

	limiter *Limiter
	done    chan struct{}
	closing sync.Once

	mu      sync.Mutex
	closed  bool
	reserve []int // eventfds, which need no file system
}

// Accept implements [net.Listener].
func (l *listener) Accept() (net.Conn, error) {
	delay := retryMin
	for {
		inner, err := l.Listener.Accept()
		if err == nil {
			return l.limiter.admit(inner, l.refillReserve), nil
		}
		select {
		case <-l.done:
			return nil, net.ErrClosed
		default:
		}
		if !IsTransient(err) {
			return nil, err
		}
		if failures, ok := l.limiter.acceptErrors.Allow(time.Now()); ok {
			l.limiter.log.Warn("cannot accept connections, will retry",
				"address", l.Addr().String(), "error", err, "failures", failures)
		}
		if isOutOfDescriptors(err) {
			if !l.awaitClient() {
				continue // check for Close, then wait again
			}
			if l.releaseReserve() || l.limiter.displaceForDescriptor() {
				// Retry immediately. Another goroutine may have taken the descriptor already.
				if inner, err := l.Listener.Accept(); err == nil {
					return l.limiter.admit(inner, l.refillReserve), nil
				}
			}
		}
		select {
		case <-l.done:
			return nil, net.ErrClosed
		case <-time.After(delay):
		}
		delay = min(2*delay, retryMax)
		l.refillReserve()
	}
}

// IsTransient reports whether a later attempt to accept a connection, or to read from a
// socket, may succeed: because the kernel lacks memory or descriptors, or because the error
// concerns only one connection (accept(2)).
func IsTransient(err error) bool {
	for _, e := range []syscall.Errno{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EPERM, syscall.ECONNABORTED,
		syscall.ENETDOWN, syscall.EPROTO, syscall.ENOPROTOOPT, syscall.EHOSTDOWN, syscall.ENONET, syscall.EHOSTUNREACH,
		syscall.EOPNOTSUPP, syscall.ENETUNREACH,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func isOutOfDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// awaitClient waits up to pollTimeout for a client and reports whether one is there. It is
// needed because accept(2) fails without a free descriptor before it checks for a client.
func (l *listener) awaitClient() bool {
	socket, ok := l.Listener.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return true
	}
	var ready bool
	err = raw.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(pollTimeout.Milliseconds())) //nolint:gosec // a descriptor
		ready = n > 0 && err == nil
	})
	return ready || err != nil
}

// releaseReserve closes one descriptor of the reserve and reports whether there was one.
func (l *listener) releaseReserve() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.reserve) == 0 {
		return false
	}
	last := len(l.reserve) - 1
	_ = unix.Close(l.reserve[last])
	l.reserve = l.reserve[:last]
	return true
}

// refillReserve opens the missing descriptors of the reserve, as far as it can.
func (l *listener) refillReserve() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.closed && len(l.reserve) < l.limiter.options.Reserve {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return
		}
		l.reserve = append(l.reserve, fd)
	}
}

// Close implements [net.Listener]. It does not close accepted connections.
func (l *listener) Close() error {
	l.closing.Do(func() { close(l.done) })
	l.mu.Lock()
	l.closed = true
	for _, fd := range l.reserve {
		_ = unix.Close(fd)
	}
	l.reserve = nil
	l.mu.Unlock()
	return l.Listener.Close()
}
