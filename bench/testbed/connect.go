package testbed

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// AcceptAndClose accepts and closes connections on a port of all addresses of the host until the caller
// calls stop. It makes system calls directly, because connecting takes only a few microseconds.
func AcceptAndClose(host *nettest.Host, port uint16) (stop func() error, err error) {
	fd := -1
	err = host.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return os.NewSyscallError("socket", err)
		}
		// Without this option, a connection whose end has not yet arrived keeps others from the port.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return errors.Join(os.NewSyscallError("setsockopt", err), unix.Close(fd))
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}); err != nil {
			return errors.Join(os.NewSyscallError("bind", err), unix.Close(fd))
		}
		const backlog = 128
		if err := unix.Listen(fd, backlog); err != nil {
			return errors.Join(os.NewSyscallError("listen", err), unix.Close(fd))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", host.Name, err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			switch {
			case err == nil:
				_ = unix.Close(c)
			case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ECONNABORTED):
				return
			}
		}
	}()
	return func() error {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // ends accept
		<-ended
		return os.NewSyscallError("close", unix.Close(fd))
	}, nil
}

// Connect connects from the thread's network namespace, waits until the peer has closed the
// connection, and resets it, so that the port can be reused at once. It returns how long
// connect(2) took.
func Connect(addr netip.AddrPort) (took time.Duration, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, os.NewSyscallError("setsockopt", err)
	}
	// A lost connection gets no answer.
	timeout := unix.NsecToTimeval(int64(10 * time.Second))
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &timeout); err != nil {
			return 0, os.NewSyscallError("setsockopt", err)
		}
	}
	begin := time.Now()
	// With a timeout, the kernel does not restart a call that a signal interrupts (signal(7)). The
	// next connect(2) waits for the same connection.
	for {
		err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()})
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return 0, os.NewSyscallError("connect", err)
		}
	}
	took = time.Since(begin)
	for {
		if _, err = unix.Read(fd, make([]byte, 1)); !errors.Is(err, unix.EINTR) {
			return took, os.NewSyscallError("read", err)
		}
	}
}
