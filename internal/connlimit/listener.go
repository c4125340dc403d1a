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
	// retryMin and retryMax are the delays between attempts to accept that fail.
	retryMin = 5 * time.Millisecond
	retryMax = time.Second
	// pollTimeout is how long Accept waits for a client at once while there are no
	// descriptors. It delays Close.
	pollTimeout = 100 * time.Millisecond
)

// Listener returns a listener whose connections count. Accept goes on after errors
// that pass, such as too many open files. Close closes inner.
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
			l.limiter.log.Warn("connections can't be accepted; trying again until it succeeds",
				"address", l.Addr().String(), "error", err, "failures", failures)
		}
		if isOutOfDescriptors(err) {
			if !l.awaitClient() {
				continue // whether it is closed, and for another while
			}
			if l.releaseReserve() || l.limiter.displaceForDescriptor() {
				// The first retry is immediate, but a descriptor may be somebody else's by now.
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

// IsTransient reports whether a later attempt to accept a connection, or to read
// from a socket, may succeed: the kernel lacks memory or descriptors, or the error
// belongs to one connection (accept(2)).
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

// awaitClient waits up to pollTimeout for a client, and reports whether there is
// one. accept(2) fails for want of a descriptor before it looks for a client.
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

// releaseReserve frees a descriptor of the reserve, and reports whether there was one.
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

// refillReserve opens what is missing of the reserve, as far as it can.
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

// Close implements [net.Listener]. Connections stay.
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
