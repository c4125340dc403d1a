package main

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// repairTime is how long connections may still fail after a disturbance: Fairlead promises to
// repair everything within this time.
const repairTime = time.Second

// result counts what happened to connections during one fault.
type result struct {
	// connections counts new connections, and for UDP datagrams. A connection counts as
	// failed if it gets no answer, a refusal, or an answer from a server of another Service,
	// or as disturbed if it also overlaps a disturbance.
	connections, failed, disturbed int
	// outage is the longest time between the beginnings of the first and the last connection
	// that failed because of one disturbance.
	outage time.Duration
	// resent counts connections that needed a TCP segment, a datagram or an SCTP association
	// more than once.
	resent int
	// stale counts connections that reached a removed endpoint. staleness is the longest time
	// since the removal.
	stale     int
	staleness time.Duration
	// stalest describes the connection with the longest staleness.
	stalest string
	// open counts connections to keep open. A connection that ends unexpectedly counts as
	// broken, or as disturbedOpen if it overlaps a disturbance.
	open, broken, disturbedOpen int
	// changes counts changed EndpointSlices, crashes the exits of Fairlead that the fault did
	// not cause.
	changes, crashes int
	// examples describes the first failures.
	examples []string
}

// maxExamples bounds the examples of a result.
const maxExamples = 5

func (r *result) add(o result) {
	r.connections += o.connections
	r.failed += o.failed
	r.disturbed += o.disturbed
	r.outage = max(r.outage, o.outage)
	r.resent += o.resent
	r.stale += o.stale
	r.staleness = max(r.staleness, o.staleness)
	r.open += o.open
	r.broken += o.broken
	r.disturbedOpen += o.disturbedOpen
	r.changes += o.changes
	r.crashes += o.crashes
}

// recorder collects the results of all faults from all clients. The result of a connection
// belongs to the fault during which the connection began or was last used. Its methods may be
// called concurrently.
type recorder struct {
	mu           sync.Mutex
	records      []*record
	disturbances []*disturbance
}

// disturbance is the time of a disturbance, and of the first and the last connection that it
// made fail.
type disturbance struct {
	interval

	failed interval
}

// record is the result of one fault and the time of its start.
type record struct {
	begin  time.Time
	result result
}

// interval is the time of a disturbance. A zero end means that the disturbance continues.
type interval struct{ begin, end time.Time }

// overlaps reports whether the interval, extended by repairTime, overlaps the time from begin
// to end.
func (i interval) overlaps(begin, end time.Time) bool {
	return !end.Before(i.begin) && (i.end.IsZero() || !begin.After(i.end.Add(repairTime)))
}

// recordFailed records that a connection failed that began at a time. It returns the time
// between the first and the last of these connections.
func (d *disturbance) recordFailed(at time.Time) time.Duration {
	if d.failed.begin.IsZero() || at.Before(d.failed.begin) {
		d.failed.begin = at
	}
	if at.After(d.failed.end) {
		d.failed.end = at
	}
	return d.failed.end.Sub(d.failed.begin)
}

// beginFault starts the record of the next fault. The record is final when no connection of
// that time can fail any more.
func (r *recorder) beginFault() *record {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := &record{begin: time.Now()}
	r.records = append(r.records, next)
	return next
}

// resultAt returns the result of the fault at a time. The caller holds r.mu.
func (r *recorder) resultAt(t time.Time) *result {
	for _, record := range slices.Backward(r.records) {
		if !t.Before(record.begin) {
			return &record.result
		}
	}
	return &result{} // before the first fault
}

// snapshot returns a copy of a record's result.
func (r *recorder) snapshot(record *record) result {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := record.result
	got.examples = slices.Clone(got.examples)
	return got
}

// disturb runs fn, which inevitably loses connections, and records the time as a disturbance.
func (r *recorder) disturb(fn func() error) error {
	r.mu.Lock()
	d := &disturbance{interval: interval{begin: time.Now()}}
	r.disturbances = append(r.disturbances, d)
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		d.end = time.Now()
	}()
	return fn()
}

// findDisturbance returns the last disturbance that overlaps the time from begin to end. The
// caller holds r.mu.
func (r *recorder) findDisturbance(begin, end time.Time) (*disturbance, bool) {
	for _, d := range slices.Backward(r.disturbances) {
		if d.overlaps(begin, end) {
			return d, true
		}
	}
	return nil, false
}

// recordConnected records a connection that started at begin and that an endpoint answered.
// staleness is how long before begin the endpoint was removed, or 0.
func (r *recorder) recordConnected(to fmt.Stringer, begin time.Time, resent uint32, staleness time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.resultAt(begin)
	got.connections++
	if resent > 0 {
		got.resent++
	}
	if staleness > 0 {
		got.stale++
	}
	if staleness > got.staleness {
		got.staleness = staleness
		got.stalest = fmt.Sprintf("%s: %s", begin.Format(timeFormat), to)
	}
}

// recordFailed records a failed connection.
func (r *recorder) recordFailed(begin, end time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.resultAt(begin)
	got.connections++
	if d, disturbed := r.findDisturbance(begin, end); disturbed {
		got.disturbed++
		got.outage = max(got.outage, d.recordFailed(begin))
		return
	}
	got.failed++
	got.addExample(begin, end, err)
}

// recordOpened records n open connections.
func (r *recorder) recordOpened(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resultAt(time.Now()).open += n
}

// recordBroken records an open connection, last used at begin, that does not answer any more.
func (r *recorder) recordBroken(begin, end time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if by, disturbed := r.findDisturbance(begin, end); disturbed {
		// The connection may have been idle since an earlier fault, and may be found broken
		// during a later one.
		r.resultAt(by.begin).disturbedOpen++
		return
	}
	got := r.resultAt(begin)
	got.broken++
	got.addExample(begin, end, fmt.Errorf("an open connection broke: %w", err))
}

// recordChange records a changed EndpointSlice.
func (r *recorder) recordChange() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resultAt(time.Now()).changes++
}

// recordCrash records an unexpected exit of Fairlead.
func (r *recorder) recordCrash() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resultAt(time.Now()).crashes++
}

// timeFormat is the format of times in examples.
const timeFormat = "15:04:05.000"

func (r *result) addExample(begin, end time.Time, err error) {
	if len(r.examples) < maxExamples {
		r.examples = append(r.examples, fmt.Sprintf("%s to %s: %v", begin.Format(timeFormat), end.Format(timeFormat), err))
	}
}

// The report is a Markdown table that documents can include.
const tableHeader = `| fault | connections | failed | failed in the disturbance | for at most | sent again | open: broken | broken by the disturbance | stale at most | allowed | changes |
|---|---|---|---|---|---|---|---|---|---|---|`

// tableRow returns the fault's line of the report.
func (f fault) tableRow(r result) string {
	return fmt.Sprintf("| %s | %d | %d | %d | %s | %d | %d: %d | %d | %s | %s | %d |", f.name, r.connections, r.failed, r.disturbed,
		r.outage.Round(time.Millisecond), r.resent, r.open, r.broken, r.disturbedOpen, r.staleness.Round(time.Millisecond), f.stalenessLimit(), r.changes)
}

func (f fault) stalenessLimit() string {
	if f.maxStaleness == 0 {
		return ""
	}
	return f.maxStaleness.String()
}

func (f fault) skippedRow(reason string) string {
	return fmt.Sprintf("| %s | not run: %s | | | | | | | | | |", f.name, reason)
}

// violations describes how the result exceeds the limits of the fault.
func (f fault) violations(r result) []string {
	var problems []string
	add := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	if r.connections == 0 {
		add("no client opened a connection")
	}
	if r.changes == 0 && !f.noChanges {
		add("no EndpointSlice was changed")
	}
	if r.failed > 0 {
		add("%d of %d connections failed, 0 are allowed", r.failed, r.connections)
	}
	if r.broken > 0 {
		add("%d of %d open connections broke, 0 are allowed", r.broken, r.open)
	}
	if !f.disturbs && r.disturbed+r.disturbedOpen > 0 {
		add("connections were disturbed, but the fault must disturb none")
	}
	if f.maxOutage > 0 && r.outage > f.maxOutage {
		add("connections failed for %s because of one disturbance, %s is allowed", r.outage, f.maxOutage)
	}
	if f.keepsOpen && r.disturbedOpen > 0 {
		add("the disturbance broke %d of %d open connections, 0 are allowed", r.disturbedOpen, r.open)
	}
	if r.staleness > f.maxStaleness {
		add("an endpoint got connections %s after it was removed, %s is allowed: %s", r.staleness, f.maxStaleness, r.stalest)
	}
	if r.crashes > 0 && !f.crashesFairlead {
		add("Fairlead exited unexpectedly %d times", r.crashes)
	}
	return problems
}
