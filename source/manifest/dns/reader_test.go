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

// failingReader returns each error in turn, then a query.
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

// TestReadErrors checks that transient errors are retried and that a closed socket ends the
// reader.
func TestReadErrors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		wrapped := func(e syscall.Errno) error { return &net.OpError{Op: "read", Err: e} }
		inner := &failingReader{errs: []error{wrapped(syscall.ENOBUFS), wrapped(syscall.ENOMEM), net.ErrClosed}}
		r := retryingReader{inner}
		if _, _, err := r.ReadUDP(nil, time.Second); !errors.Is(err, net.ErrClosed) {
			t.Errorf("error %v, want net.ErrClosed", err)
		}
		if query, _, err := r.ReadUDP(nil, time.Second); err != nil || len(query) == 0 {
			t.Errorf("query %q, error %v", query, err)
		}
	})
}
