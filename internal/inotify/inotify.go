// Package inotify explains the kernel's limits of inotify, which all programs of a user share.
package inotify

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// LimitError reports that a folder cannot be watched because a limit of the kernel is reached.
type LimitError struct {
	Err error
	// Fix says what to change.
	Fix string
}

func (e *LimitError) Error() string { return fmt.Sprintf("%v: %s", e.Err, e.Fix) }

func (e *LimitError) Unwrap() error { return e.Err }

// Explain returns a [LimitError] if err, from creating an inotify instance or adding a watch to
// it, is due to a limit, and err otherwise.
func Explain(err error) error {
	switch {
	case errors.Is(err, syscall.EMFILE):
		return &LimitError{err, "raise the sysctl fs.inotify.max_user_instances" + current("max_user_instances")}
	case errors.Is(err, syscall.ENOSPC):
		return &LimitError{err, "raise the sysctl fs.inotify.max_user_watches" + current("max_user_watches")}
	case errors.Is(err, syscall.ENFILE):
		return &LimitError{err, "raise the sysctl fs.file-max"}
	case errors.Is(err, syscall.ENOMEM):
		return &LimitError{err, "free memory"}
	default:
		return err
	}
}

// current returns the value of a limit, in parentheses.
func current(name string) string {
	value, err := os.ReadFile("/proc/sys/fs/inotify/" + name)
	if err != nil {
		return ""
	}
	return " (" + strings.TrimSpace(string(value)) + ")"
}
