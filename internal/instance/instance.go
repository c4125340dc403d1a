// Package instance keeps a node to one writer: of all Fairlead processes in a
// network namespace, whatever their mode, one at a time holds the [Lock].
//
// The lock is an abstract unix socket (man 7 unix), which belongs to the network
// namespace, so that it is shared by host-network pods that share no file. The
// kernel releases it when the process ends, however it ends. Who waits is
// connected to it, and is woken by the end of that connection.
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

// lockAddress is that of the lock. The @ stands for the zero byte of an abstract
// address.
const lockAddress = "@fairlead"

const (
	// retryInterval is the time between attempts when the holder can't be waited for,
	// as it is about to end or does not accept connections.
	retryInterval = 10 * time.Millisecond
	// describeTimeout is how long a holder may take to describe itself. One that is
	// stopped never does.
	describeTimeout = 200 * time.Millisecond
	// maxWaiters is how many connections a holder keeps: anybody in the network
	// namespace can make them.
	maxWaiters = 16
	// maxDescription is in bytes.
	maxDescription = 256
)

// ErrOtherUser is returned when the lock is held by a process of another user,
// which is no Fairlead of this node's operator. Abstract sockets have no
// permissions.
var ErrOtherUser = errors.New("the lock is held by another user's process")

// Options are the options of [Acquire].
type Options struct {
	// Description is shown to instances that wait for this one: one line.
	Description string
	// Waiting, if not nil, is called when another instance holds the lock, and
	// again for each further one.
	OnWaiting func(Holder)

	address string // tests have their own
}

// Holder is the process that holds the lock.
type Holder struct {
	// PID is the process's ID as this process sees it; 0 if it is in a PID
	// namespace that this process cannot see.
	PID int
	// Description is the holder's Options.Description; empty if it does not answer.
	Description string
}

// String returns the holder in words.
func (h Holder) String() string {
	var parts []string
	if h.PID != 0 {
		parts = append(parts, fmt.Sprintf("PID %d", h.PID))
	}
	if h.Description != "" {
		parts = append(parts, h.Description)
	}
	if len(parts) == 0 {
		return "a process that this one cannot see"
	}
	return strings.Join(parts, ", ")
}

// Lock is held until Release, or the end of the process.
type Lock struct {
	listener *net.UnixListener
	waiters  atomic.Int64
	done     sync.WaitGroup
	close    func() error
}

// Acquire returns the lock when no other process holds it. It blocks until then,
// or until ctx is done.
//
// The error wraps [ErrOtherUser] if a process of another user holds the lock.
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

// TryAcquire returns the lock, or an error that wraps unix.EADDRINUSE if another
// process holds it. It does not block.
func TryAcquire(opts Options) (*Lock, error) {
	listener, err := net.ListenUnix("unix", opts.addr())
	if err != nil {
		return nil, fmt.Errorf("take the lock of this node's instances: %w", err)
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

// FindHolder returns the holder of the lock, or nil if there is none. It waits for the
// holder's description, a fraction of a second at most.
//
// The error wraps [ErrOtherUser] if a process of another user holds the lock.
func FindHolder(ctx context.Context) (*Holder, error) { return Options{}.findHolder(ctx) }

func (o Options) findHolder(ctx context.Context) (*Holder, error) {
	conn, err := o.dial(ctx)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ask who programs this node: %w", err)
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
	return conn.(*net.UnixConn), nil //nolint:forcetypeassert // of this network
}

// wait returns when the holder of the lock may have released it.
func (o Options) wait(ctx context.Context) error {
	conn, err := o.dial(ctx)
	if err != nil {
		// Gone since, or too many wait for it.
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
	_, _ = conn.Read(make([]byte, 1)) // until its end: nothing more is sent
	if time.Since(began) < retryInterval {
		sleep(ctx) // The holder is about to end, or refuses to be waited for.
	}
	return nil
}

func sleep(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(retryInterval):
	}
}

// peerHolder returns who listens at the other end. The kernel tells, so that a
// process that is stopped is known as well.
func peerHolder(conn *net.UnixConn) (Holder, error) {
	peer, err := peerCredentials(conn)
	if err != nil {
		return Holder{}, fmt.Errorf("ask the kernel who holds the lock of this node's instances: %w", err)
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

// isTrusted reports whether a process is root's, or this process's user's.
func isTrusted(peer *unix.Ucred) bool {
	return peer.Uid == 0 || int(peer.Uid) == os.Geteuid()
}

// readDescription reads the holder's description.
func readDescription(conn *net.UnixConn) string {
	_ = conn.SetReadDeadline(time.Now().Add(describeTimeout))
	defer conn.SetReadDeadline(time.Time{}) //nolint:errcheck // it is closed then
	line, err := bufio.NewReaderSize(conn, maxDescription).ReadSlice('\n')
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(strings.TrimSpace(string(line)), "")
}

// acceptWaiters keeps connections of those who wait.
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
			defer conn.Close() //nolint:errcheck // the other end sees it
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			_, _ = conn.Write([]byte(description + "\n")) // fits into the socket's buffer
			_, _ = conn.Read(make([]byte, 1))             // until its end: nobody sends anything
		})
	}
}

// Waiters returns how many processes wait for the lock, or ask who holds it.
func (l *Lock) Waiters() int { return int(l.waiters.Load()) }

// Release releases the lock. A nil Lock has nothing to release.
func (l *Lock) Release() error {
	if l == nil {
		return nil
	}
	err := l.close()
	l.done.Wait()
	return err
}
