package flowoffload

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"
)

// TestActivePause checks that connections are counted at most for one hundredth of the time.
func TestActivePause(t *testing.T) {
	t.Parallel()
	now := time.Unix(0, 0)
	counts, failure := 0, error(nil)
	a := &active{
		now: func() time.Time { return now }, log: slog.New(slog.DiscardHandler),
		count: func(context.Context) (int, error) {
			counts++
			now = now.Add(20 * time.Millisecond)
			return counts, failure
		},
	}
	for _, step := range []struct {
		name   string
		pause  time.Duration
		fails  error
		want   int
		counts int
	}{
		{"first", 0, nil, 1, 1},
		{"scrape within the pause", 1999 * time.Millisecond, nil, 1, 1},
		{"scrape after the pause", time.Millisecond, nil, 2, 2},
		{"failure", 15 * time.Second, errors.ErrUnsupported, 3, 3},
		{"failure within the pause", time.Second, errors.ErrUnsupported, 3, 3},
		{"recovery", 15 * time.Second, nil, 4, 4},
	} {
		now, failure = now.Add(step.pause), step.fails
		got, err := a.read(t.Context())
		if got != step.want || counts != step.counts || !errors.Is(err, step.fails) {
			t.Errorf("%s: %d connections after %d counts, error %v; want %d after %d", step.name, got, counts, err, step.want, step.counts)
		}
	}
}
