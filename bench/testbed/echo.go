package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Echo is a thread that sleeps until it receives a byte over TCP on loopback, and sends it back. A
// round trip is two wake-ups without any work. An agent needs at least one to show the effect of
// an event.
//
// An Echo must not be used concurrently. The caller must close it.
type Echo struct {
	client *os.File
	ended  chan struct{}
}

// NewEcho starts the thread.
func NewEcho(ctx context.Context) (*Echo, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer l.Close() //nolint:errcheck // it has no data
	client, err := new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	defer client.Close() //nolint:errcheck // blockingFile duplicates it
	server, err := l.Accept()
	if err != nil {
		return nil, fmt.Errorf("accept: %w", err)
	}
	defer server.Close() //nolint:errcheck // blockingFile duplicates it
	clientFile, err := blockingFile(client)
	if err != nil {
		return nil, err
	}
	serverFile, err := blockingFile(server)
	if err != nil {
		return nil, errors.Join(err, clientFile.Close())
	}
	e := &Echo{client: clientFile, ended: make(chan struct{})}
	go func() {
		defer close(e.ended)
		defer serverFile.Close() //nolint:errcheck // the client sees the end
		runtime.LockOSThread()
		for {
			if err := echoByte(int(serverFile.Fd())); err != nil {
				return
			}
		}
	}()
	return e, nil
}

// blockingFile returns a connection whose reads block a thread. With the poller of the Go runtime,
// the caller's own thread would receive the answer, and nothing would have to wake up.
func blockingFile(conn net.Conn) (*os.File, error) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, fmt.Errorf("unexpected connection %T", conn)
	}
	f, err := tcp.File()
	if err != nil {
		return nil, fmt.Errorf("duplicate the connection: %w", err)
	}
	if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
		return nil, errors.Join(fmt.Errorf("make the connection blocking: %w", err), f.Close())
	}
	return f, nil
}

var errClosed = errors.New("connection closed")

// readByte waits for a byte.
func readByte(fd int) error {
	var b [1]byte
	for {
		switch n, err := unix.Read(fd, b[:]); {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return os.NewSyscallError("read", err)
		case n == 0:
			return errClosed
		default:
			return nil
		}
	}
}

func writeByte(fd int) error {
	_, err := unix.Write(fd, []byte{0})
	return os.NewSyscallError("write", err)
}

func echoByte(fd int) error {
	if err := readByte(fd); err != nil {
		return err
	}
	return writeByte(fd)
}

// RoundTrip sends a byte and waits until it comes back.
func (e *Echo) RoundTrip() (time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, start := int(e.client.Fd()), time.Now()
	if err := writeByte(fd); err != nil {
		return 0, fmt.Errorf("send: %w", err)
	}
	if err := readByte(fd); err != nil {
		return 0, fmt.Errorf("receive: %w", err)
	}
	return time.Since(start), nil
}

// Close ends the thread.
func (e *Echo) Close() error {
	err := e.client.Close()
	<-e.ended
	if err != nil {
		return fmt.Errorf("close the connection: %w", err)
	}
	return nil
}
