package nft_test

import (
	"bytes"
	"log/slog"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/nft"
)

// TestCloseLogsNothing checks that Close is not logged as a loss of the watch, whether or not
// the watch is already waiting for notifications.
func TestCloseLogsNothing(t *testing.T) {
	t.Parallel()
	ns := nettest.NamespaceT(t)
	for _, open := range []time.Duration{0, 5 * time.Millisecond} {
		var log bytes.Buffer // read after Close has stopped all writers
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
