// Package logrepeat limits how often a recurring problem is logged, so that clients and
// Services cannot flood the log.
package logrepeat

import (
	"sync"
	"time"
)

const (
	// Quiet is the time without an occurrence that ends an episode.
	Quiet = time.Minute
	// Repeat is the time between two log lines of an episode that lasts.
	Repeat = 10 * time.Minute
)

// Limiter selects the occurrences of one problem that are logged: the first of an
// episode, and one every [Repeat] while the episode lasts. An episode ends after
// [Quiet] without an occurrence. The zero value is ready to use. Methods are safe for
// concurrent use.
type Limiter struct {
	mu             sync.Mutex
	last, reported time.Time // zero before the first occurrence
	unreported     uint64
}

// Allow records an occurrence and reports whether to log it. If so, occurrences is the
// number of occurrences since the previous log line, this one included.
func (l *Limiter) Allow(now time.Time) (occurrences uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unreported++
	ok = l.last.IsZero() || now.Sub(l.last) >= Quiet || now.Sub(l.reported) >= Repeat
	l.last = now
	if !ok {
		return 0, false
	}
	occurrences, l.unreported, l.reported = l.unreported, 0, now
	return occurrences, true
}
