package main

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// settleTime is how long after a disturbance connections may still fail: the time
// within which Fairlead promises to have repaired everything.
const settleTime = time.Second

// result is what happened to connections during one fault.
type result struct {
	// connections that clients opened, with datagrams that they sent. Failed ones
	// got no answer, a refusal, or an answer from a server of another Service. Those
	// that overlap a disturbance count as disturbed instead.
	connections, failed, disturbed int
	// resent connections needed a TCP segment, a datagram or an SCTP association more
	// than once.
	resent int
	// stale connections reached an endpoint after it was removed, by at most staleness.
	stale     int
	staleness time.Duration
	// stalest describes the connection with that staleness.
	stalest string
	// open connections stayed, or were to stay. Broken ones ended by themselves; those
	// that overlap a disturbance count as disturbedOpen instead.
	open, broken, disturbedOpen int
	// changes is the number of changed EndpointSlices, crashes that of Fairlead's ends
	// which the fault did not cause.
	changes, crashes int
	// examples describe the first failures.
	examples []string
}

// maxExamples bounds the examples of a result.
const maxExamples = 5

func (r *result) add(o result) {
	r.connections += o.connections
	r.failed += o.failed
	r.disturbed += o.disturbed
	r.resent += o.resent
	r.stale += o.stale
	r.staleness = max(r.staleness, o.staleness)
	r.open += o.open
	r.broken += o.broken
	r.disturbedOpen += o.disturbedOpen
	r.changes += o.changes
	r.crashes += o.crashes
}

// recorder collects the results of all faults from all clients. What happens to a
// connection counts for the fault during which it began, or was used for the last
// time. Its methods may be called concurrently.
type recorder struct {
	mu           sync.Mutex
	records      []*record
	disturbances []interval
}

// record is the result of the fault that began at a time.
type record struct {
	begin  time.Time
	result result
}

// interval is the time of a disturbance. A zero end means that it lasts.
type interval struct{ begin, end time.Time }

// overlaps reports whether the interval, with the time to settle, and the time
// from begin to end have a moment in common.
func (i interval) overlaps(begin, end time.Time) bool {
	return !end.Before(i.begin) && (i.end.IsZero() || !begin.After(i.end.Add(settleTime)))
}

// beginFault begins the result of the next fault and returns it. It is final once
// no connection of that time can fail any more.
func (r *recorder) beginFault() *record {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := &record{begin: time.Now()}
	r.records = append(r.records, next)
	return next
}

// at returns the result of the fault at a time. It is called with the recorder locked.
func (r *recorder) at(t time.Time) *result {
	for _, record := range slices.Backward(r.records) {
		if !t.Before(record.begin) {
			return &record.result
		}
	}
	return &result{} // before the first fault
}

// resultOf returns a copy of a record's result.
func (r *recorder) resultOf(record *record) result {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := record.result
	got.examples = slices.Clone(got.examples)
	return got
}

// disturb runs fn, which loses connections by its nature.
func (r *recorder) disturb(fn func() error) error {
	r.mu.Lock()
	n := len(r.disturbances)
	r.disturbances = append(r.disturbances, interval{begin: time.Now()})
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.disturbances[n].end = time.Now()
	}()
	return fn()
}

// disturbance returns the last disturbance that overlaps a time. It is called with the
// recorder locked.
func (r *recorder) disturbance(begin, end time.Time) (interval, bool) {
	for _, i := range slices.Backward(r.disturbances) {
		if i.overlaps(begin, end) {
			return i, true
		}
	}
	return interval{}, false
}

// connected records a connection to a target that began at a time and that an endpoint
// answered. staleness is how long the endpoint had been removed when the connection began,
// or 0.
func (r *recorder) connected(to fmt.Stringer, begin time.Time, resent uint32, staleness time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.at(begin)
	got.connections++
	if resent > 0 {
		got.resent++
	}
	if staleness > 0 {
		got.stale++
	}
	if staleness > got.staleness {
		got.staleness = staleness
		got.stalest = fmt.Sprintf("%s: %s", begin.Format(clock), to)
	}
}

// failed records a connection that failed.
func (r *recorder) failed(begin, end time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.at(begin)
	got.connections++
	if _, disturbed := r.disturbance(begin, end); disturbed {
		got.disturbed++
		return
	}
	got.failed++
	got.example(begin, end, err)
}

// opened records that n connections are open now.
func (r *recorder) opened(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at(time.Now()).open += n
}

// broke records that an open connection, last used at begin, does not answer any more.
func (r *recorder) broke(begin, end time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if by, disturbed := r.disturbance(begin, end); disturbed {
		// It may have been idle since the fault before, and may be noticed in the next.
		r.at(by.begin).disturbedOpen++
		return
	}
	got := r.at(begin)
	got.broken++
	got.example(begin, end, fmt.Errorf("an open connection broke: %w", err))
}

// changed records a changed EndpointSlice, crashed an end of Fairlead by itself.
func (r *recorder) changed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at(time.Now()).changes++
}

func (r *recorder) crashed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at(time.Now()).crashes++
}

// clock is how the times of examples are written.
const clock = "15:04:05.000"

func (r *result) example(begin, end time.Time, err error) {
	if len(r.examples) < maxExamples {
		r.examples = append(r.examples, fmt.Sprintf("%s to %s: %v", begin.Format(clock), end.Format(clock), err))
	}
}

// The report is a Markdown table, so that it can go into a document as it is.
const header = `| fault | connections | failed | failed in the disturbance | sent again | open: broken | broken by the disturbance | stale at most | allowed | changes |
|---|---|---|---|---|---|---|---|---|---|`

// line returns the fault's line of the report.
func (f fault) line(r result) string {
	return fmt.Sprintf("| %s | %d | %d | %d | %d | %d: %d | %d | %s | %s | %d |", f.name, r.connections, r.failed, r.disturbed,
		r.resent, r.open, r.broken, r.disturbedOpen, r.staleness.Round(time.Millisecond), f.limit(), r.changes)
}

func (f fault) limit() string {
	if f.stale == 0 {
		return ""
	}
	return f.stale.String()
}

func (f fault) skipped(reason string) string {
	return fmt.Sprintf("| %s | not here: %s | | | | | | | | |", f.name, reason)
}

// exceeded describes how the result exceeds what the fault may do.
func (f fault) exceeded(r result) []string {
	var problems []string
	exceeds := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	if r.connections == 0 {
		exceeds("no client opened a connection")
	}
	if r.changes == 0 && !f.noChanges {
		exceeds("no EndpointSlice was changed")
	}
	if r.failed > 0 {
		exceeds("%d of %d connections failed, 0 are allowed", r.failed, r.connections)
	}
	if r.broken > 0 {
		exceeds("%d of %d open connections broke, 0 are allowed", r.broken, r.open)
	}
	if !f.disturbs && r.disturbed+r.disturbedOpen > 0 {
		exceeds("connections were disturbed, but the fault disturbs none")
	}
	if f.keepsOpen && r.disturbedOpen > 0 {
		exceeds("%d of %d open connections broke by the disturbance, 0 are allowed", r.disturbedOpen, r.open)
	}
	if r.staleness > f.stale {
		exceeds("an endpoint got connections %s after it was removed, %s is allowed: %s", r.staleness, f.stale, r.stalest)
	}
	if r.crashes > 0 && !f.ends {
		exceeds("Fairlead ended by itself %d times", r.crashes)
	}
	return problems
}
