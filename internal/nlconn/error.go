package nlconn

import "golang.org/x/sys/unix"

// Error is the kernel's error answer to a request.
type Error struct {
	Errno unix.Errno
	// Text is the message of the extended acknowledgement (NLMSGERR_ATTR_MSG), empty for many
	// errors.
	Text string
}

// Error returns the text of the errno and the kernel's message.
func (e *Error) Error() string {
	if e.Text == "" {
		return e.Errno.Error()
	}
	return e.Errno.Error() + ": " + e.Text
}

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }
