package nlconn

import "golang.org/x/sys/unix"

// Error is the kernel's refusal of a request.
type Error struct {
	Errno unix.Errno
	// Text is the text of the extended acknowledgement (NLMSGERR_ATTR_MSG), which
	// many errors lack.
	Text string
}

// Error returns the errno's text and the kernel's.
func (e *Error) Error() string {
	if e.Text == "" {
		return e.Errno.Error()
	}
	return e.Errno.Error() + ": " + e.Text
}

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }
