package logrepeat_test

import (
	"testing"
	"time"

	"fairlead.io/fairlead/internal/logrepeat"
)

func TestAllow(t *testing.T) {
	t.Parallel()
	var l logrepeat.Limiter
	start := time.Now()
	for _, step := range []struct {
		after time.Duration
		want  uint64 // 0 if nothing is logged
	}{
		{0, 1},
		{time.Second, 0},
		{30 * time.Second, 0},
		{89 * time.Second, 0},
		{89*time.Second + logrepeat.Quiet, 4}, // a new episode
		{150 * time.Second, 0},
	} {
		got, ok := l.Allow(start.Add(step.after))
		if ok != (step.want > 0) || got != step.want {
			t.Errorf("after %s: Allow() = %d, %t, want %d occurrences", step.after, got, ok, step.want)
		}
	}
	// An episode that lasts an hour is logged once every Repeat.
	var lines, sum uint64
	begin := start.Add(time.Hour)
	for at := time.Duration(0); at < time.Hour; at += time.Second {
		if n, ok := l.Allow(begin.Add(at)); ok {
			lines++
			sum += n
		}
	}
	if lines != 6 || sum != 3002 {
		t.Errorf("%d lines with %d occurrences in total, want 6 with 3002", lines, sum)
	}
}
