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

// namedDir is the directory of named network namespaces, see ip-netns(8).
const namedDir = "/run/netns"

// Namespace is a network namespace. Its methods may be called concurrently.
type Namespace struct {
	name string // file name in namedDir; empty for an anonymous namespace

	mu     sync.RWMutex // write-locked while Close closes handle
	handle netns.NsHandle
}

// NewNamespace creates an empty network namespace; even its loopback device is down. The
// kernel keeps the namespace until Close, and for as long as a socket, a veth peer or a
// process uses it. A nonempty name also adds it to /run/netns, so that `ip netns exec NAME`
// works; that entry outlives the process.
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
		return nil, fmt.Errorf("create network namespace: %w", err)
	}
	if name == "" {
		return ns, nil
	}
	if err := bindName(ns.handle, name); err != nil {
		return nil, errors.Join(fmt.Errorf("name network namespace %s: %w", name, err), ns.handle.Close())
	}
	return ns, nil
}

// onThread runs fn on a locked thread. The thread is reused only if fn succeeds. After an
// error its namespace is unknown, so the thread is terminated.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("function exited its goroutine")
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
	// EINVAL: nothing is mounted, after a crash between creating the file and mounting.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// RemoveNamespaces removes the namespaces under /run/netns that an unclosed [Network] with
// this name left behind, if any.
func RemoveNamespaces(name string) error {
	entries, err := os.ReadDir(namedDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list network namespaces: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), name+"-") {
			errs = append(errs, unbindName(e.Name()))
		}
	}
	return errors.Join(errs...)
}

// Fd returns the file descriptor of the namespace, for setns(2) and netlink libraries. The
// Namespace owns the descriptor and closes it in Close.
func (ns *Namespace) Fd() int {
	ns.mu.RLock()
	defer ns.mu.RUnlock()
	return int(ns.handle)
}

// Do runs fn in the namespace, on its own thread, and returns the error of fn. Sockets that
// fn creates belong to the namespace and can be used from any goroutine. Processes that fn
// starts (ns.Do(cmd.Start)) run in the namespace; goroutines that fn starts do not. fn must
// not exit its goroutine, as testing.T.FailNow does.
//
// Do not set Pdeathsig on a process started in fn: the signal is sent when the thread ends,
// at any time after Do.
func (ns *Namespace) Do(fn func() error) error {
	var fnErr error
	err := onThread(func() error {
		own, err := netns.Get()
		if err != nil {
			return fmt.Errorf("get network namespace of the thread: %w", err)
		}
		defer own.Close() //nolint:errcheck // only read from
		if err := ns.enter(); err != nil {
			return err
		}
		fnErr = fn()
		if err := netns.Set(own); err != nil {
			return fmt.Errorf("leave network namespace: %w", err)
		}
		return nil
	})
	return errors.Join(fnErr, err)
}

func (ns *Namespace) enter() error {
	ns.mu.RLock()
	defer ns.mu.RUnlock()
	if !ns.handle.IsOpen() {
		return fmt.Errorf("enter network namespace: %w", os.ErrClosed)
	}
	if err := netns.Set(ns.handle); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return nil
}

// Listen listens on a stream socket in the namespace. The network is "tcp", "tcp4" or "tcp6".
// The port of addr may be 0.
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

// ListenPacket listens on a datagram socket in the namespace. The network is "udp", "udp4" or
// "udp6".
func (ns *Namespace) ListenPacket(ctx context.Context, network string, addr netip.AddrPort) (net.PacketConn, error) {
	var c net.PacketConn
	err := ns.Do(func() (err error) {
		c, err = new(net.ListenConfig).ListenPacket(ctx, network, addr.String())
		return err
	})
	return c, err
}

// Dial connects from the namespace. The network is "tcp" or "udp". Unlike net.Dialer, Dial
// takes an address and no host name: the goroutines of the resolver, and the goroutines in
// which net.Dialer tries several addresses, would not run in the namespace.
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

// Close releases the namespace and removes its name. The kernel removes the namespace when
// nothing else uses it. Close may be called more than once.
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
