package dns

import (
	"errors"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// failingReader fails with each error in turn, and then reads.
type failingReader struct {
	dns.Reader

	errs []error
}

func (r *failingReader) ReadUDP(*net.UDPConn, time.Duration) ([]byte, *dns.SessionUDP, error) {
	if len(r.errs) == 0 {
		return []byte("query"), nil, nil
	}
	err := r.errs[0]
	r.errs = r.errs[1:]
	return nil, nil, err
}

// A lack of memory does not end the server, as the end of its socket does.
func TestReadErrors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		wrapped := func(e syscall.Errno) error { return &net.OpError{Op: "read", Err: e} }
		inner := &failingReader{errs: []error{wrapped(syscall.ENOBUFS), wrapped(syscall.ENOMEM), net.ErrClosed}}
		r := retryingReader{inner}
		if _, _, err := r.ReadUDP(nil, time.Second); !errors.Is(err, net.ErrClosed) {
			t.Errorf("error %v, want that the socket is closed", err)
		}
		if query, _, err := r.ReadUDP(nil, time.Second); err != nil || len(query) == 0 {
			t.Errorf("query %q, error %v", query, err)
		}
	})
}
