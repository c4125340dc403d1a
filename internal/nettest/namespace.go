package nettest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namedDir is where ip-netns(8) looks for named network namespaces.
const namedDir = "/run/netns"

// Namespace is a network namespace. Its methods may be called concurrently.
type Namespace struct {
	name string // in namedDir; empty for an anonymous one

	mu     sync.RWMutex // held for writing while handle is closed
	handle netns.NsHandle
}

// NewNamespace makes an empty network namespace, in which even the loopback
// device is down. It lives until Close, and as long as a socket, an interface
// elsewhere or a process uses it. With a name it is also entered under
// /run/netns, so that `ip netns exec NAME` works; that outlives the process.
func NewNamespace(name string) (*Namespace, error) {
	ns := &Namespace{name: name}
	err := onThread(func() error {
		own, err := netns.Get()
		if err != nil {
			return err
		}
		defer own.Close() //nolint:errcheck // only read from
		if ns.handle, err = netns.New(); err != nil {
			return err
		}
		return netns.Set(own)
	})
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	if name == "" {
		return ns, nil
	}
	if err := bindName(ns.handle, name); err != nil {
		return nil, errors.Join(fmt.Errorf("name the network namespace %s: %w", name, err), ns.handle.Close())
	}
	return ns, nil
}

// onThread runs fn on a locked thread. The thread is used again only when fn
// succeeded; otherwise nobody knows which namespace it is in, and it ends.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("the function ended its goroutine")
		defer func() { done <- err }()
		runtime.LockOSThread()
		if err = fn(); err == nil {
			runtime.UnlockOSThread()
		}
	}()
	return <-done
}

func bindName(handle netns.NsHandle, name string) error {
	if err := os.MkdirAll(namedDir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(namedDir, name)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", int(handle))
	if err := unix.Mount(from, path, "bind", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("bind %s: %w", path, err), os.Remove(path))
	}
	return nil
}

func unbindName(name string) error {
	path := filepath.Join(namedDir, name)
	// EINVAL: a file that nothing is mounted on, left by a crash between the two.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// RemoveNamespaces removes the namespaces under /run/netns that a [Network] of this
// name has left there, if it was not closed. It is no error if there are none.
func RemoveNamespaces(name string) error {
	entries, err := os.ReadDir(namedDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for left-over network namespaces: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), name+"-") {
			errs = append(errs, unbindName(e.Name()))
		}
	}
	return errors.Join(errs...)
}

// Fd returns the file descriptor of the namespace, as setns(2) and netlink
// libraries want it. It is valid until Close and stays the Namespace's.
func (ns *Namespace) Fd() int {
	ns.mu.RLock()
	defer ns.mu.RUnlock()
	return int(ns.handle)
}

// Do runs fn in the namespace, on a thread of its own, and returns its error.
// Sockets that fn makes stay in the namespace and can be used anywhere;
// processes it starts (ns.Do(cmd.Start)) stay in it too. Goroutines that fn
// starts are not in it. fn must not end its goroutine, as testing.T.FailNow
// does.
//
// A process started with Pdeathsig gets the signal when its thread ends, which
// may be at any time after Do: do not use it.
func (ns *Namespace) Do(fn func() error) error {
	var fnErr error
	err := onThread(func() error {
		own, err := netns.Get()
		if err != nil {
			return fmt.Errorf("find the thread's network namespace: %w", err)
		}
		defer own.Close() //nolint:errcheck // only read from
		if err := ns.enter(); err != nil {
			return err
		}
		fnErr = fn()
		if err := netns.Set(own); err != nil {
			return fmt.Errorf("leave the network namespace: %w", err)
		}
		return nil
	})
	return errors.Join(fnErr, err)
}

func (ns *Namespace) enter() error {
	ns.mu.RLock()
	defer ns.mu.RUnlock()
	if !ns.handle.IsOpen() {
		return fmt.Errorf("enter the network namespace: %w", os.ErrClosed)
	}
	if err := netns.Set(ns.handle); err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	return nil
}

// Listen listens on a stream socket in the namespace: network is "tcp", "tcp4"
// or "tcp6". The address is literal, and addr's port may be 0.
func (ns *Namespace) Listen(ctx context.Context, network string, addr netip.AddrPort) (net.Listener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = config.Listen(ctx, network, addr.String())
		return err
	})
	return l, err
}

// ListenPacket listens on a datagram socket in the namespace: network is
// "udp", "udp4" or "udp6".
func (ns *Namespace) ListenPacket(ctx context.Context, network string, addr netip.AddrPort) (net.PacketConn, error) {
	var c net.PacketConn
	err := ns.Do(func() (err error) {
		c, err = new(net.ListenConfig).ListenPacket(ctx, network, addr.String())
		return err
	})
	return c, err
}

// Dial connects from the namespace: network is "tcp" or "udp". Its signature
// is not net.Dialer's on purpose: names are not resolved, as the resolver's
// goroutines, and those that net.Dialer tries several addresses with, would
// not run in the namespace.
func (ns *Namespace) Dial(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	var dialer net.Dialer
	dialer.SetMultipathTCP(false)
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = dialer.DialContext(ctx, network, addr.String())
		return err
	})
	return c, err
}

// Close lets go of the namespace and removes its name. The kernel removes the
// namespace when nothing else uses it. Closing twice is no error.
func (ns *Namespace) Close() error {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if !ns.handle.IsOpen() {
		return nil
	}
	var errs []error
	if ns.name != "" {
		errs = append(errs, unbindName(ns.name))
	}
	errs = append(errs, ns.handle.Close())
	return errors.Join(errs...)
}
