package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
)

// TestEventsLost checks that each of many new entries is either received or counted as lost, and that
// the filter drops entries that are not translated.
func TestEventsLost(t *testing.T) {
	t.Parallel()
	const entries = 2000
	tests := []struct {
		name           string
		options        EventsOptions
		translated     bool
		received, lost bool
	}{
		{name: "a large buffer loses nothing", translated: true, received: true},
		{name: "a small buffer", options: EventsOptions{receiveBuffer: 8 << 10}, translated: true, received: true, lost: true},
		// The kernel marks entries as translated only if nftables has translated them. TestMonitor of package
		// top receives such entries through the filter.
		{name: "the filter drops other entries before the buffer", options: EventsOptions{TranslatedOnly: true, receiveBuffer: 8 << 10}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			tt.options.NetNS = ns.Fd()
			events, err := OpenEvents(tt.options)
			if err != nil {
				t.Fatal(err)
			}
			defer events.Close()
			endpoint := ""
			if tt.translated {
				endpoint = "10.0.0.1:53"
			}
			k := openTable(t, ns)
			for i := range entries {
				insertEntries(t, k, newTestEntry(fmt.Sprintf("10.1.%d.%d:53", i/200, i%200), "10.96.0.10:53", endpoint))
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			lost, err := events.Lost()
			if err != nil {
				t.Fatal(err)
			}
			want := entries - int(lost) //nolint:gosec // at most entries
			if !tt.received {
				want = 0
			}
			received := 0
			if want == 0 {
				cancel()
			}
			err = events.Receive(ctx, func(c Connection) {
				wantConnection := Connection{dataplane.UDP, netip.MustParseAddrPort("10.96.0.10:53"), netip.MustParseAddrPort("10.0.0.1:53")}
				if c != wantConnection {
					t.Errorf("connection %v, want %v", c, wantConnection)
				}
				if received++; received == want {
					cancel()
				}
			})
			if !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			if received != want || tt.lost != (lost > 0) {
				t.Errorf("received %d and lost %d of %d, want %d", received, lost, entries, want)
			}
		})
	}
}

// TestCheckEvents reads the sysctl of a network namespace.
func TestCheckEvents(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	for value, want := range map[string]error{"2": nil, "1": nil, "0": ErrEventsOff} {
		if err := network.Node.Do(func() error {
			if err := os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_events", []byte(value), 0o600); err != nil {
				return err
			}
			if err := CheckEvents(); !errors.Is(err, want) {
				t.Errorf("nf_conntrack_events=%s: error %v, want %v", value, err, want)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}
