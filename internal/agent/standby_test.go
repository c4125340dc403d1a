package agent

import (
	"context"
	"log/slog"
	"testing"
)

// TestWhenActive checks that an active instance runs each of its parts, even when another part has
// failed before: Events that report the failure are still to be sent.
func TestWhenActive(t *testing.T) {
	t.Parallel()
	done, cancel := context.WithCancel(t.Context())
	cancel()
	for _, active := range []bool{false, true} {
		s := newStandby(slog.New(slog.DiscardHandler), "")
		if active {
			close(s.activated)
		}
		// A select between two ready channels chooses by chance, so one attempt would show little.
		const attempts = 100
		ran := 0
		run := s.whenActive(func(context.Context) error { ran++; return nil })
		for range attempts {
			if err := run(done); err != nil {
				t.Fatal(err)
			}
		}
		if want := map[bool]int{true: attempts}[active]; ran != want {
			t.Errorf("active %t: ran %d times of %d, want %d", active, ran, attempts, want)
		}
	}
}
