// Package instance ensures that one Fairlead process at a time, in any mode, programs a
// network namespace: the process that holds the [Lock].
//
// The lock is an abstract unix socket (unix(7)). Abstract sockets belong to the network
// namespace, so host-network pods share the lock without sharing a file. The kernel
// releases the lock when the process exits for any reason. A waiting process stays
// connected to the holder's socket and wakes up when that connection closes.
package instance

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// lockAddress is the abstract address of the lock. The @ represents the leading zero byte.
const lockAddress = "@fairlead"

const (
	// retryInterval is the time between attempts when the process cannot wait on a
	// connection, because the holder is about to exit or accepts no connections.
	retryInterval = 10 * time.Millisecond
	// describeTimeout limits how long to wait for the holder's description. A holder
	// stopped by SIGSTOP never sends it.
	describeTimeout = 200 * time.Millisecond
	// maxWaiters limits the connections that a holder keeps open, because any process in
	// the network namespace can connect.
	maxWaiters = 16
	// maxDescription is the maximum length of a description in bytes.
	maxDescription = 256
)

// ErrOtherUser is returned when a process of another user holds the lock. Abstract sockets
// have no permissions, so any user can bind the address.
var ErrOtherUser = errors.New("the lock is held by another user's process")

// Options are the options of [Acquire].
type Options struct {
	// Description is one line of text that waiting instances show for this one.
	Description string
	// OnWaiting, if not nil, is called when another instance holds the lock, and again
	// each time the holder changes.
	OnWaiting func(Holder)

	address string // overrides lockAddress in tests
}

// Holder is the process that holds the lock.
type Holder struct {
	// PID is the process ID in this process's PID namespace, or 0 if it has none there.
	PID int
	// Description is the holder's Options.Description, empty if the holder does not answer.
	Description string
}

// String describes the holder by its PID and description.
func (h Holder) String() string {
	var parts []string
	if h.PID != 0 {
		parts = append(parts, fmt.Sprintf("PID %d", h.PID))
	}
	if h.Description != "" {
		parts = append(parts, h.Description)
	}
	if len(parts) == 0 {
		return "a process in another PID namespace"
	}
	return strings.Join(parts, ", ")
}

// Lock is held until Release or the end of the process.
type Lock struct {
	listener *net.UnixListener
	waiters  atomic.Int64
	done     sync.WaitGroup
	close    func() error
}

// Acquire returns the lock. While another process holds it, Acquire blocks until ctx is done,
// and then returns an error. The error wraps [ErrOtherUser] if a process of another user holds
// the lock; Acquire does not wait for that process.
func Acquire(ctx context.Context, opts Options) (*Lock, error) {
	for {
		lock, err := TryAcquire(opts) //nolint:contextcheck // a Lock outlives ctx
		if err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return lock, err
		}
		if err := opts.wait(ctx); err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

// TryAcquire returns the lock without blocking. The error wraps unix.EADDRINUSE if another
// process holds the lock.
func TryAcquire(opts Options) (*Lock, error) {
	listener, err := net.ListenUnix("unix", opts.addr())
	if err != nil {
		return nil, fmt.Errorf("acquire the instance lock of this node: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	lock := &Lock{listener: listener}
	lock.close = func() error {
		cancel()
		return listener.Close()
	}
	lock.done.Go(func() { lock.acceptWaiters(ctx, opts.Description) })
	return lock, nil
}

// FindHolder returns the holder of the lock, or nil if the lock is free. It waits at most
// 200 ms for the holder's description. The error wraps [ErrOtherUser] if a process of
// another user holds the lock.
func FindHolder(ctx context.Context) (*Holder, error) { return Options{}.findHolder(ctx) }

func (o Options) findHolder(ctx context.Context) (*Holder, error) {
	conn, err := o.dial(ctx)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find the instance that programs this node: %w", err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written to it
	holder, err := peerHolder(conn)
	if err != nil {
		return nil, err
	}
	holder.Description = readDescription(conn)
	return &holder, nil
}

func (o Options) addr() *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: cmp.Or(o.address, lockAddress)}
}

func (o Options) dial(ctx context.Context) (*net.UnixConn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", o.addr().Name)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil //nolint:forcetypeassert // the network is unix
}

// wait blocks until the holder may have released the lock, or ctx is done.
func (o Options) wait(ctx context.Context) error {
	conn, err := o.dial(ctx)
	if err != nil {
		// The holder has exited, or its accept queue is full.
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("wait for the instance that programs this node: %w", err)
		}
		sleep(ctx)
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		stop()
		_ = conn.Close()
	}()
	holder, err := peerHolder(conn)
	if err != nil {
		return err
	}
	holder.Description = readDescription(conn)
	began := time.Now()
	if o.OnWaiting != nil && ctx.Err() == nil {
		o.OnWaiting(holder)
	}
	_, _ = conn.Read(make([]byte, 1)) // blocks until the holder closes the connection
	if time.Since(began) < retryInterval {
		sleep(ctx) // the holder is about to exit, or has reached maxWaiters
	}
	return nil
}

func sleep(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(retryInterval):
	}
}

// peerHolder identifies the listening process by the kernel's socket credentials, which
// also works for a process stopped by SIGSTOP.
func peerHolder(conn *net.UnixConn) (Holder, error) {
	peer, err := peerCredentials(conn)
	if err != nil {
		return Holder{}, fmt.Errorf("read the credentials of the process that holds the instance lock: %w", err)
	}
	if !isTrusted(peer) {
		return Holder{}, fmt.Errorf("%w: PID %d, UID %d", ErrOtherUser, peer.Pid, peer.Uid)
	}
	return Holder{PID: int(peer.Pid)}, nil
}

func peerCredentials(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	if controlErr := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); controlErr != nil {
		return nil, controlErr
	}
	return peer, err
}

// isTrusted reports whether the peer runs as root or as this process's user.
func isTrusted(peer *unix.Ucred) bool {
	return peer.Uid == 0 || int(peer.Uid) == os.Geteuid()
}

// readDescription returns the description that the holder sends, empty after describeTimeout.
func readDescription(conn *net.UnixConn) string {
	_ = conn.SetReadDeadline(time.Now().Add(describeTimeout))
	defer conn.SetReadDeadline(time.Time{}) //nolint:errcheck // fails only on a closed connection
	line, err := bufio.NewReaderSize(conn, maxDescription).ReadSlice('\n')
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(strings.TrimSpace(string(line)), "")
}

// acceptWaiters accepts connections of waiting processes and keeps them open until ctx is done.
func (l *Lock) acceptWaiters(ctx context.Context, description string) {
	for {
		conn, err := l.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of file descriptors
			sleep(ctx)
			continue
		}
		peer, err := peerCredentials(conn)
		if err != nil || !isTrusted(peer) || l.waiters.Load() >= maxWaiters {
			_ = conn.Close()
			continue
		}
		l.waiters.Add(1)
		l.done.Go(func() {
			defer l.waiters.Add(-1)
			defer conn.Close() //nolint:errcheck // nothing to report it to
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			_, _ = conn.Write([]byte(description + "\n")) // fits into the socket buffer
			_, _ = conn.Read(make([]byte, 1))             // blocks until the waiting process disconnects
		})
	}
}

// Waiters returns the number of processes connected to the lock: processes that wait for it,
// and callers of [FindHolder].
func (l *Lock) Waiters() int { return int(l.waiters.Load()) }

// Release releases the lock. Calling it on a nil Lock does nothing.
func (l *Lock) Release() error {
	if l == nil {
		return nil
	}
	err := l.close()
	l.done.Wait()
	return err
}
