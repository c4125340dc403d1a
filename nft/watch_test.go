package nft_test

import (
	"bytes"
	"log/slog"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// Closing is no loss of the watch: it is not reported as one, neither when the
// watch waits for announcements nor before it does.
func TestCloseLogsNothing(t *testing.T) {
	t.Parallel()
	ns, err := nettest.NewNamespace("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	for _, open := range []time.Duration{0, 5 * time.Millisecond} {
		var log bytes.Buffer // read once Close has ended all that writes
		d, err := nft.Open(nft.Options{NetNS: ns.Fd(), Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(open)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if log.Len() > 0 {
			t.Errorf("closed after %s, logged:\n%s", open, log.String())
		}
	}
}
