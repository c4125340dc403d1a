// Package scratchns creates network namespaces in which the agent tries features of the kernel,
// without a change of the node's own namespace.
package scratchns

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Error is returned if the process may not create a network namespace.
type Error struct{ Err error }

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("cannot create a network namespace, which needs CAP_SYS_ADMIN: %v", e.Err)
}

// Unwrap returns the kernel's error.
func (e *Error) Unwrap() error { return e.Err }

// New returns a new network namespace. It exists until the file is closed. The error is an [*Error] if
// the process lacks a privilege.
func New() (*os.File, error) {
	type result struct {
		file *os.File
		err  error
	}
	created := make(chan result)
	go func() {
		// The thread is not unlocked, so it ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			created <- result{nil, &Error{err}}
			return
		}
		file, err := os.Open("/proc/thread-self/ns/net")
		created <- result{file, err}
	}()
	r := <-created
	return r.file, r.err
}
