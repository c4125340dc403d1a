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

// cleanupStack collects functions that remove what the demo creates.
type cleanupStack struct{ steps []func() error }

func (u *cleanupStack) add(step func() error) { u.steps = append(u.steps, step) }

// run calls all functions in reverse order.
func (u *cleanupStack) run() error {
	var errs []error
	for _, step := range slices.Backward(u.steps) {
		errs = append(errs, step())
	}
	u.steps = nil
	return errors.Join(errs...)
}

// tempPrefix is the prefix of the names of the demo's temporary directories.
const tempPrefix = "fairlead-demo-"

// netnsConfig is the directory where ip-netns(8) looks for replacements of files in /etc, in
// subdirectories named after namespaces.
const netnsConfig = "/etc/netns"

// removeLeftovers removes what killed runs have left behind. Only one run at a time can use a name
// for its namespaces, so with keep, removeLeftovers locks the name until the caller calls release.
func removeLeftovers(ctx context.Context, name string, keep bool) (release func() error, err error) {
	release = func() error { return nil }
	if err := removeTemp(); err != nil {
		return nil, fmt.Errorf("remove leftovers of an earlier run: %w", err)
	}
	// An abstract socket is a lock that the kernel releases when the process ends.
	// Runs without -keep hold the lock only briefly.
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
		return release, nil // a run with -keep uses the name
	case err != nil:
		return nil, fmt.Errorf("lock the name %s: %w", name, err)
	}
	if err := errors.Join(nettest.RemoveNamespaces(name), removeNetnsConfig(name+"-*")); err != nil {
		return nil, errors.Join(fmt.Errorf("remove leftovers of an earlier run: %w", err), lock.Close())
	}
	if keep {
		return lock.Close, nil
	}
	return release, lock.Close()
}

// makeTemp creates a temporary directory that stays locked until the process ends.
func makeTemp() (path string, remove func() error, err error) {
	for {
		path, err = os.MkdirTemp("", tempPrefix)
		if err != nil {
			return "", nil, err
		}
		lock, err := lockDir(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EWOULDBLOCK) {
			continue // another run removed it as a leftover before it was locked
		}
		if err != nil {
			return "", nil, errors.Join(err, os.RemoveAll(path))
		}
		return path, func() error { return errors.Join(os.RemoveAll(path), lock.Close()) }, nil
	}
}

// lockDir locks a directory. The error wraps EWOULDBLOCK if another process has locked it, and
// os.ErrNotExist if the directory has been removed.
func lockDir(path string) (*os.File, error) {
	dir, err := os.Open(path) //nolint:gosec // a name chosen by the demo
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

// removeTemp removes the temporary directories of runs that have ended.
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
			continue // of another user
		}
		lock, err := lockDir(path)
		if err != nil {
			continue // in use or already removed
		}
		errs = append(errs, os.RemoveAll(path), lock.Close())
	}
	return errors.Join(errs...)
}

// addNetnsConfig makes `ip netns exec` show programs resolvConf as /etc/resolv.conf.
func addNetnsConfig(namespace, resolvConf string) error {
	dir := filepath.Join(netnsConfig, namespace)
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // as the rest of /etc
		return err
	}
	return os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(resolvConf), 0o644) //nolint:gosec // as the rest of /etc
}

// removeNetnsConfig removes the files of addNetnsConfig for the namespaces whose names match
// pattern.
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
		// Remove fails if the directory contains anything else.
		_ = os.Remove(netnsConfig)
	}
	return errors.Join(errs...)
}
