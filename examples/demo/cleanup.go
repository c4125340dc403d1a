package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// cleanupStack is what there is to undo.
type cleanupStack struct{ steps []func() error }

func (u *cleanupStack) add(step func() error) { u.steps = append(u.steps, step) }

// run undoes everything, the last first.
func (u *cleanupStack) run() error {
	var errs []error
	for _, step := range slices.Backward(u.steps) {
		errs = append(errs, step())
	}
	u.steps = nil
	return errors.Join(errs...)
}

// tempPrefix begins the names of the demo's folders in the folder for such.
const tempPrefix = "fairlead-demo-"

// netnsConfig is where ip-netns(8) looks for files that are to replace those
// in /etc, in folders with the names of namespaces.
const netnsConfig = "/etc/netns"

// removeLeftovers removes what runs have left that were killed. Named
// namespaces are those of one run only, so with keep set it claims the name,
// until the function that it returns is called.
func removeLeftovers(ctx context.Context, name string, keep bool) (release func() error, err error) {
	release = func() error { return nil }
	if err := removeTemp(); err != nil {
		return nil, fmt.Errorf("remove what an earlier run has left: %w", err)
	}
	// An abstract socket is a lock that the kernel releases with the process.
	// Runs without -keep hold it for a moment.
	var lock net.Listener
	for range 10 {
		lock, err = new(net.ListenConfig).Listen(ctx, "unix", "@"+name)
		if !errors.Is(err, syscall.EADDRINUSE) || !keep {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && keep:
		return nil, fmt.Errorf("another demo with -keep is running under the name %s: end it, or choose another -name", name)
	case errors.Is(err, syscall.EADDRINUSE):
		return release, nil // What is there is in use.
	case err != nil:
		return nil, fmt.Errorf("claim the name %s: %w", name, err)
	}
	if err := errors.Join(nettest.RemoveNamespaces(name), removeNetnsConfig(name+"-*")); err != nil {
		return nil, errors.Join(fmt.Errorf("remove what an earlier run has left: %w", err), lock.Close())
	}
	if keep {
		return lock.Close, nil
	}
	return release, lock.Close()
}

// makeTemp makes a folder that is locked as long as the process lives.
func makeTemp() (path string, remove func() error, err error) {
	for {
		path, err = os.MkdirTemp("", tempPrefix)
		if err != nil {
			return "", nil, err
		}
		lock, err := lockDir(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EWOULDBLOCK) {
			continue // Another run took it for a left-over one before it was locked.
		}
		if err != nil {
			return "", nil, errors.Join(err, os.RemoveAll(path))
		}
		return path, func() error { return errors.Join(os.RemoveAll(path), lock.Close()) }, nil
	}
}

// lockDir locks a folder. The error wraps EWOULDBLOCK if somebody else has, and
// os.ErrNotExist if the folder has gone meanwhile.
func lockDir(path string) (*os.File, error) {
	dir, err := os.Open(path) //nolint:gosec // a name of ours
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		_, err = os.Lstat(path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), dir.Close())
	}
	return dir, nil
}

// removeTemp removes the folders of runs that live no more.
func removeTemp() error {
	paths, err := filepath.Glob(filepath.Join(os.TempDir(), tempPrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range paths {
		info, err := os.Lstat(path)
		if err != nil || !info.IsDir() {
			continue
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); !ok || stat.Uid != 0 {
			continue // Not ours.
		}
		lock, err := lockDir(path)
		if err != nil {
			continue // In use, or gone.
		}
		errs = append(errs, os.RemoveAll(path), lock.Close())
	}
	return errors.Join(errs...)
}

// addNetnsConfig makes `ip netns exec` give programs the content as
// /etc/resolv.conf.
func addNetnsConfig(namespace, resolvConf string) error {
	dir := filepath.Join(netnsConfig, namespace)
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // as the rest of /etc
		return err
	}
	return os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(resolvConf), 0o644) //nolint:gosec // as the rest of /etc
}

// removeNetnsConfig removes what addNetnsConfig has made for the namespaces
// whose names match the pattern.
func removeNetnsConfig(pattern string) error {
	dirs, err := filepath.Glob(filepath.Join(netnsConfig, pattern))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	if len(dirs) > 0 {
		// It stays if it holds anything else.
		_ = os.Remove(netnsConfig)
	}
	return errors.Join(errs...)
}
