package nlconn

import (
	"errors"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

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

// parseAnswer returns the number of a request and the kernel's answer in an error of
// netlink.Conn, or nil for an error of the socket.
func parseAnswer(err error) (sequence uint32, answer error) {
	var op *netlink.OpError
	if !errors.As(err, &op) || op.Sequence == 0 {
		return 0, nil
	}
	var errno unix.Errno
	if !errors.As(op.Err, &errno) {
		return 0, nil
	}
	return op.Sequence, &Error{Errno: errno, Text: op.Message}
}
