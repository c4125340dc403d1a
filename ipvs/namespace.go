package ipvs

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// inNamespace runs fn on a thread in the network namespace netns, or on the current thread if
// netns is 0.
func inNamespace(netns int, fn func() error) error {
	if netns == 0 {
		return fn()
	}
	done := make(chan error, 1)
	go func() {
		// If the thread cannot return to its namespace, it stays locked and ends with the
		// goroutine.
		runtime.LockOSThread()
		own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- fmt.Errorf("open the thread's network namespace: %w", err)
			return
		}
		defer unix.Close(own) //nolint:errcheck // only read from
		if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = fn()
		if back := unix.Setns(own, unix.CLONE_NEWNET); back != nil {
			done <- errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}
