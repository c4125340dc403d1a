package sync

import (
	"cmp"
	"context"
	"errors"
	"iter"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// tables is the state that Run owns: the desired and applied Services, the failing keys and the
// times of the next calls. One goroutine at a time uses it, see Syncer.stepping.
type tables struct {
	dp    dataplane.Dataplane
	opts  Options
	log   *slog.Logger
	drift <-chan struct{}
	lost  <-chan struct{} // nil if the dataplane does not report losses

	node         dataplane.Node
	listComplete bool // the initial list is complete
	replacedOnce bool // a Replace has succeeded

	desired map[dataplane.Key]*dataplane.Service
	// applied is the state of the kernel. For failing keys in state unknown, and for all keys
	// while allUnknown is set, it is the last known state.
	applied map[dataplane.Key]*dataplane.Service
	failing map[dataplane.Key]*failure
	// queue contains the changes that wait for Apply. For their keys, too, desired and applied
	// differ.
	queue queue
	// mergedSeq is the sequence number of the last input that merge has processed.
	mergedSeq uint64

	// allUnknown is set before the first Replace and after a call that failed as a whole. Only
	// Replace is possible while it is set.
	allUnknown  bool
	callErr     error // the reason, nil before the first Replace
	failedCalls int   // consecutive calls that failed as a whole

	// pendingSince is the time of the oldest update that has not been part of a successful
	// call, or zero if no update is pending. Updates of failing keys do not count.
	pendingSince time.Time
	// awaitsReplace is set if a change waits for the next Replace.
	awaitsReplace bool

	nodeChanged   bool
	repairAt      time.Time // next attempt for failing keys or all keys; zero for never
	driftRepairAt time.Time // next repair of drift; zero without drift
	lossRepairAt  time.Time // next repair of a loss; zero without a loss
	resyncAt      time.Time // next periodic resync; zero for never

	driftRepairs        int // consecutive
	lastDriftRepair     time.Time
	lastReplaceDuration time.Duration // duration of the last Replace
	lastReplaceEnd      time.Time     // end of the last Replace

	lastSuccess time.Time
	// inlineAfter is the time before which only Run makes calls, because a call took long.
	inlineAfter time.Time
	// failingErrors is the copy of failing in Status. It is rebuilt when failing has changed.
	failingErrors      map[dataplane.Key]error
	failingErrorsStale bool

	spareChanges map[dataplane.Key]input // an empty map for the next inbox
}

// failure is the state of a key whose last write failed.
type failure struct {
	state        failureState
	err          error
	attempts     int
	pendingSince time.Time // time of the oldest update that is not programmed
	lastLogged   string    // last error that was logged; empty for none
}

type failureState uint8

const (
	// unknown means that the kernel may hold anything for the key, which waits for Replace.
	unknown failureState = iota
	// unsupported means that the backend does not support the Service and the kernel holds
	// nothing. The key waits for a change of the Service.
	unsupported
	// unsupportedChanged means that an unsupported Service has changed.
	unsupportedChanged
)

func newTables(dp dataplane.Dataplane, opts Options) tables {
	var lost <-chan struct{}
	if notifier, ok := dp.(dataplane.LossNotifier); ok {
		lost = notifier.Lost()
	}
	return tables{
		dp:            dp,
		opts:          opts,
		log:           opts.Logger,
		drift:         dp.Drift(),
		lost:          lost,
		desired:       map[dataplane.Key]*dataplane.Service{},
		applied:       map[dataplane.Key]*dataplane.Service{},
		failing:       map[dataplane.Key]*failure{},
		queue:         newQueue(),
		allUnknown:    true,
		awaitsReplace: true,
	}
}

// merge stores the input in desired and queues the changes that Apply can program. All other
// changes wait for Replace.
func (t *tables) merge(in inbox) {
	if in.node != nil && !in.node.Equal(t.node) {
		t.node = *in.node
		t.nodeChanged = true
	}
	t.listComplete = t.listComplete || in.listComplete
	if len(t.desired) == 0 {
		t.desired = make(map[dataplane.Key]*dataplane.Service, len(in.changes))
	}
	for k, c := range in.changes {
		f := t.failing[k]
		if t.allUnknown || f != nil && f.state == unknown {
			if c.svc.Equal(t.desired[k]) {
				continue
			}
			t.setDesired(k, c.svc)
			t.awaitsReplace = true
			switch {
			case f == nil:
				t.pendingSince = earlier(t.pendingSince, c.updatedAt)
			case f.state == unsupported:
				f.state, f.pendingSince = unsupportedChanged, c.updatedAt
			case f.state == unknown && !t.allUnknown:
				t.retrySoon()
			}
			continue
		}
		if f != nil && f.state == unsupported {
			if c.svc.Equal(t.desired[k]) {
				continue
			}
			f.state, f.pendingSince = unsupportedChanged, c.updatedAt
		}
		have := t.applied[k]
		if c.svc.Equal(have) {
			// The change was undone or repeated. Keeping the old value lets the new one be freed.
			t.setDesired(k, have)
			t.queue.remove(k)
			if f != nil {
				t.onRecovery(k, f)
			}
			continue
		}
		t.setDesired(k, c.svc)
		t.queue.put(dataplane.Change{Old: have, New: c.svc}, c.updatedAt, t.mergedSeq)
	}
	t.mergedSeq = in.seq
}

// oldestQueued returns the time of the oldest update in the queue, or zero if the queue is empty.
func (t *tables) oldestQueued() time.Time {
	if e := t.queue.oldest(); e != nil {
		return e.updatedAt
	}
	return time.Time{}
}

// triedSeq returns the sequence number up to which all input has been tried.
func (t *tables) triedSeq() uint64 {
	if e := t.queue.oldest(); e != nil {
		return e.prevSeq
	}
	return t.mergedSeq
}

func (t *tables) setDesired(k dataplane.Key, svc *dataplane.Service) {
	if svc == nil {
		delete(t.desired, k)
	} else {
		t.desired[k] = svc
	}
}

func (t *tables) setApplied(k dataplane.Key, svc *dataplane.Service) {
	if svc == nil {
		delete(t.applied, k)
	} else {
		t.applied[k] = svc
	}
}

// retrySoon schedules an earlier attempt when a failing Service has changed, because the change
// may fix it. The attempt replaces everything, so it waits at least nine times as long as the
// last Replace took. A failing Service that keeps changing therefore uses at most a tenth of the
// time.
func (t *tables) retrySoon() {
	t.repairAt = earlier(t.repairAt, time.Now().Add(max(t.opts.RetryMin, 9*t.lastReplaceDuration)))
}

// maxDriftDelay is the maximum delay before recurring drift is repaired, unless nine times the
// duration of a Replace is longer. It is short because Services may be unreachable in the
// meantime.
const maxDriftDelay = time.Second

// lossDelay is the minimum time between the end of a Replace and the repair of a loss, and the
// delay after a conflict, because the other program may commit again. After the last such commit
// Services are unreachable for up to this time.
const lossDelay = 20 * time.Millisecond

// onLoss records that another program has removed state that packets may need. Unlike other
// drift, recurring losses do not wait longer.
func (t *tables) onLoss(now time.Time) {
	if !t.lossRepairAt.IsZero() {
		return
	}
	t.lossRepairAt = now
	if next := t.lastReplaceEnd.Add(lossDelay); next.After(now) {
		t.lossRepairAt = next
	}
}

// onDrift records that another program has changed the kernel.
func (t *tables) onDrift(now time.Time) {
	if !t.driftRepairAt.IsZero() {
		return
	}
	if now.Sub(t.lastDriftRepair) >= t.opts.RetryMax {
		t.driftRepairs = 0
	}
	t.driftRepairAt = now
	if t.driftRepairs > 0 {
		delay := min(t.retryDelay(t.driftRepairs), max(maxDriftDelay, 9*t.lastReplaceDuration))
		if at := t.lastDriftRepair.Add(delay); at.After(now) {
			t.driftRepairAt = at
		}
	}
}

// replaceDue returns the reason for which Replace is due, or an empty Reason.
func (t *tables) replaceDue(now time.Time) Reason {
	due := func(at time.Time) bool { return !at.IsZero() && !at.After(now) }
	switch {
	case !t.listComplete:
		return ""
	case t.allUnknown && !t.repairAt.IsZero() && !due(t.repairAt) && !due(t.lossRepairAt):
		return "" // no other reason makes success more likely
	case !t.replacedOnce:
		return ReasonStart
	case t.allUnknown || due(t.repairAt):
		return ReasonRetry
	case t.nodeChanged:
		return ReasonNode
	case due(t.driftRepairAt), due(t.lossRepairAt):
		return ReasonDrift
	case due(t.resyncAt):
		return ReasonResync
	}
	return ""
}

// nextReplaceAt returns the time at which replaceDue will return a reason if no event happens
// before, or zero for never.
func (t *tables) nextReplaceAt() time.Time {
	switch {
	case !t.listComplete:
		return t.repairAt
	case t.allUnknown:
		return earlier(t.repairAt, t.lossRepairAt)
	}
	return earlier(earlier(t.repairAt, t.lossRepairAt), earlier(t.driftRepairAt, t.resyncAt))
}

// replace programs all desired Services except unsupported ones. It returns false if ctx has
// ended and the result is unknown.
func (t *tables) replace(ctx context.Context, reason Reason, in inbox, start time.Time) (Commit, bool) {
	// This call repairs any drift reported up to now.
	select {
	case <-t.drift:
	default:
	}
	select {
	case <-t.lost:
	default:
	}
	drifted := !t.driftRepairAt.IsZero() || !t.lossRepairAt.IsZero()
	t.driftRepairAt, t.lossRepairAt, t.nodeChanged, t.awaitsReplace = time.Time{}, time.Time{}, false, false

	var progress progress
	err := t.dp.Replace(ctx, t.node, t.replaceOrder(), progress.update)
	end := time.Now()
	if err != nil && ctx.Err() != nil {
		return Commit{}, false
	}
	t.lastReplaceDuration, t.lastReplaceEnd = end.Sub(start), end
	if drifted {
		t.driftRepairs++
		t.lastDriftRepair = end
	}
	if t.opts.ResyncPeriod > 0 {
		t.resyncAt = end.Add(t.opts.ResyncPeriod)
	}
	c := Commit{
		Op: OpReplace, Reason: reason,
		Services: len(t.desired), OldestUpdate: earlier(t.pendingSince, t.oldestQueued()), Start: start, End: end,
	}
	waiting := t.queue.entries
	t.queue.clear()
	if c.Failed, c.Err = splitError(err); c.Err != nil {
		t.onCallFailure(&c)
		return c, true
	}
	c.FirstComplete, c.LastComplete = progress.firstAt, progress.lastAt
	t.onSuccess(end)
	t.replacedOnce = true
	t.allUnknown = false

	for k, f := range t.failing {
		if _, failed := c.Failed[k]; !failed && f.state != unsupported {
			c.OldestUpdate = earlier(c.OldestUpdate, f.pendingSince)
			t.onRecovery(k, f)
		}
	}
	if len(t.applied) == 0 {
		t.applied = make(map[dataplane.Key]*dataplane.Service, len(t.desired))
		if t.opts.OnCommit != nil {
			c.Changes = make([]dataplane.Change, 0, len(t.desired))
		}
	}
	for k, svc := range t.desired {
		if old := t.applied[k]; old != svc && !t.failedOrUnsupported(k, c.Failed) {
			t.applied[k] = svc
			if t.opts.OnCommit != nil && !svc.Equal(old) {
				c.Changes = append(c.Changes, dataplane.Change{Old: old, New: svc})
			}
		}
	}
	for k, old := range t.applied {
		if _, desired := t.desired[k]; !desired && !t.failedOrUnsupported(k, c.Failed) {
			delete(t.applied, k)
			if t.opts.OnCommit != nil {
				c.Changes = append(c.Changes, dataplane.Change{Old: old})
			}
		}
	}
	// Each key with an unknown state was part of this call and has failed again.
	t.repairAt = time.Time{}
	t.onKeyFailures(&c, func(k dataplane.Key) time.Time {
		if e := waiting[k]; e != nil {
			return e.updatedAt
		}
		return in.changes[k].updatedAt
	})
	t.logCommit(ctx, &c)
	return c, true
}

// failedOrUnsupported reports whether k is in failed or was skipped as unsupported.
func (t *tables) failedOrUnsupported(k dataplane.Key, failed map[dataplane.Key]error) bool {
	if len(failed) == 0 && len(t.failing) == 0 {
		return false
	}
	if _, ok := failed[k]; ok {
		return true
	}
	f := t.failing[k]
	return f != nil && f.state == unsupported
}

// progress records when Services of a Replace were complete.
type progress struct {
	firstAt, lastAt time.Time
	complete        int
}

// update records that the given number of Services are complete.
func (p *progress) update(complete int) {
	if complete <= p.complete {
		return
	}
	p.complete = complete
	p.lastAt = time.Now()
	if p.firstAt.IsZero() {
		p.firstAt = p.lastAt
	}
}

// replaceOrder returns the Services for Replace. Services selected by Options.Prioritize come
// first, and both groups are sorted by key, so that two calls with the same Services take the
// same steps. In each group, the part of a Kubernetes Service that exceeds callWeight comes last.
// Sorting is a small part of the cost of Replace.
func (t *tables) replaceOrder() iter.Seq[*dataplane.Service] {
	return func(yield func(*dataplane.Service) bool) {
		for _, first := range []bool{true, false} {
			var services []*dataplane.Service
			for k, svc := range t.desired {
				if f := t.failing[k]; t.hasPriority(k) == first && (f == nil || f.state != unsupported) {
					services = append(services, svc)
				}
			}
			slices.SortFunc(services, func(a, b *dataplane.Service) int { return a.Key.Compare(b.Key) })
			for _, svc := range largeLast(services) {
				if !yield(svc) {
					return
				}
			}
		}
	}
}

// hasPriority applies [Options.Prioritize].
func (t *tables) hasPriority(k dataplane.Key) bool {
	return t.opts.Prioritize != nil && t.opts.Prioritize(k)
}

// largeLast moves the part of each Kubernetes Service that exceeds callWeight to the end.
// services must be sorted by key. The moved Services are ordered by their cumulative weight
// within the Kubernetes Service.
func largeLast(services []*dataplane.Service) []*dataplane.Service {
	type excess struct {
		service *dataplane.Service
		weight  int // cumulative, within the Kubernetes Service
	}
	ordinary := services[:0]
	var large []excess
	var last dataplane.Key
	weight := 0
	for _, s := range services {
		if s.Key.Namespace != last.Namespace || s.Key.Name != last.Name {
			last, weight = s.Key, 0
		}
		if weight += weightOf(dataplane.Change{New: s}); weight <= callWeight {
			ordinary = append(ordinary, s)
		} else {
			large = append(large, excess{s, weight})
		}
	}
	slices.SortStableFunc(large, func(a, b excess) int { return cmp.Compare(a.weight, b.weight) })
	for _, l := range large {
		ordinary = append(ordinary, l.service)
	}
	return ordinary
}

// apply programs the next changes of the queue. It returns false if ctx has ended and the result
// is unknown.
func (t *tables) apply(ctx context.Context, start time.Time) (Commit, bool) {
	entries := t.queue.dequeue(callWeight)
	changes := make([]dataplane.Change, 0, len(entries))
	updatedAt := make(map[dataplane.Key]time.Time, len(entries))
	var oldest time.Time
	for _, e := range entries {
		changes = append(changes, e.Change)
		updatedAt[e.Key()] = e.updatedAt
		oldest = earlier(oldest, e.updatedAt)
	}
	err := t.dp.Apply(ctx, changes)
	end := time.Now()
	if err != nil && ctx.Err() != nil {
		return Commit{}, false
	}
	c := Commit{
		Op: OpApply, Reason: ReasonChange,
		Services: len(t.desired), OldestUpdate: oldest, Start: start, End: end,
	}
	if c.Failed, c.Err = splitError(err); c.Err != nil {
		t.onCallFailure(&c)
		return c, true
	}
	t.onSuccess(end)
	c.Changes = changes
	if len(c.Failed) > 0 {
		c.Changes = nil
	}
	for _, ch := range changes {
		k := ch.Key()
		if _, ok := c.Failed[k]; ok {
			continue
		}
		if len(c.Failed) > 0 {
			c.Changes = append(c.Changes, ch)
		}
		t.setApplied(k, ch.New)
		if f := t.failing[k]; f != nil {
			t.onRecovery(k, f)
		}
	}
	t.onKeyFailures(&c, func(k dataplane.Key) time.Time { return updatedAt[k] })
	t.logCommit(ctx, &c)
	return c, true
}

// splitError splits the error of a call into failed keys and a failure of the whole call. To be
// safe, it treats an error without keys, and a dataplane.Error that is joined with other errors,
// as a failure of the whole call.
func splitError(err error) (failed map[dataplane.Key]error, whole error) {
	for e := err; e != nil; e = errors.Unwrap(e) {
		keyed, ok := e.(*dataplane.Error) //nolint:errorlint // errors.As would look into joined errors.
		if ok && len(keyed.Failed) > 0 {
			return keyed.Failed, nil
		}
	}
	return nil, err
}

// onSuccess records that a call did not fail as a whole.
func (t *tables) onSuccess(end time.Time) {
	if t.callErr != nil {
		t.log.Info("dataplane recovered", "attempts", t.failedCalls)
	}
	t.callErr, t.failedCalls = nil, 0
	t.lastSuccess = end
	t.pendingSince = time.Time{}
}

// onCallFailure marks the state of all keys as unknown.
func (t *tables) onCallFailure(c *Commit) {
	delay := lossDelay
	if !errors.Is(c.Err, dataplane.ErrConflict) {
		t.failedCalls++
		delay = t.retryDelay(t.failedCalls)
	}
	t.repairAt = c.End.Add(delay)
	if t.callErr == nil || t.callErr.Error() != c.Err.Error() {
		t.log.Warn("dataplane call failed", "kind", string(c.Op), "reason", string(c.Reason), "services", c.Services,
			"retry_in", delay, "error", c.Err)
	}
	t.allUnknown = true
	t.callErr = c.Err
	t.pendingSince = earlier(c.OldestUpdate, t.oldestQueued())
	if len(t.queue.entries) > 0 { // the next Replace includes them
		t.queue.clear()
		t.awaitsReplace = true
	}
}

// onKeyFailures marks the failed keys of a call as unknown or unsupported. updatedAt returns the
// time of the update of a key, or zero if it is not known.
func (t *tables) onKeyFailures(c *Commit, updatedAt func(dataplane.Key) time.Time) {
	// A call can fail for every key. Log the first few by name. The others are logged after
	// a later attempt if they still fail.
	const named = 10
	logged, notLogged := 0, 0
	for k, err := range c.Failed {
		f := t.failing[k]
		if f == nil {
			f = &failure{}
			t.failing[k] = f
		}
		f.err = err
		f.attempts++
		if t.queue.entries[k] != nil { // the next Replace includes it
			t.queue.remove(k)
			t.awaitsReplace = true
		}
		if f.pendingSince.IsZero() {
			if f.pendingSince = updatedAt(k); f.pendingSince.IsZero() {
				f.pendingSince = c.OldestUpdate
			}
		}
		f.state = unknown
		var delay time.Duration
		if errors.Is(err, dataplane.ErrUnsupported) {
			f.state = unsupported
			if old := t.applied[k]; old != nil {
				delete(t.applied, k)
				c.Changes = append(c.Changes, dataplane.Change{Old: old})
			}
		} else {
			delay = t.retryDelay(f.attempts)
			t.repairAt = earlier(t.repairAt, c.End.Add(delay))
		}
		switch text := err.Error(); {
		case f.lastLogged == text:
		case logged == named:
			notLogged++
		default:
			logged++
			f.lastLogged = text
			if f.state == unsupported {
				t.log.Warn("service not supported", "service", k.String(), "error", err)
			} else {
				t.log.Warn("failed to program service", "service", k.String(), "retry_in", delay, "error", err)
			}
		}
		t.failingErrorsStale = true
	}
	if notLogged > 0 {
		t.log.Warn("failed to program more services", "services", notLogged)
	}
}

// onRecovery deletes the failure of k.
func (t *tables) onRecovery(k dataplane.Key, f *failure) {
	delete(t.failing, k)
	t.failingErrorsStale = true
	if f.lastLogged != "" {
		t.log.Info("service recovered", "service", k.String(), "attempts", f.attempts)
	}
}

// logCommit logs a call that did not fail as a whole.
func (t *tables) logCommit(ctx context.Context, c *Commit) {
	level := slog.LevelDebug
	if c.Reason == ReasonStart || c.Reason == ReasonDrift {
		level = slog.LevelInfo
	}
	if !t.log.Enabled(ctx, level) {
		return
	}
	var latency time.Duration // of the oldest update, including the time in the queue
	if !c.OldestUpdate.IsZero() {
		latency = c.End.Sub(c.OldestUpdate)
	}
	attrs := []any{
		"kind", string(c.Op), "reason", string(c.Reason),
		"changes", len(c.Changes), "failed", len(c.Failed), "services", c.Services,
		"took", c.End.Sub(c.Start), "latency", latency,
	}
	if !c.FirstComplete.IsZero() {
		attrs = append(attrs, "first_after", c.FirstComplete.Sub(c.Start), "last_after", c.LastComplete.Sub(c.Start))
	}
	t.log.Log(ctx, level, "committed", attrs...)
}

func (t *tables) status() Status {
	if t.failingErrorsStale {
		t.failingErrorsStale = false
		t.failingErrors = make(map[dataplane.Key]error, len(t.failing))
		for k, f := range t.failing {
			t.failingErrors[k] = f.err
		}
	}
	return Status{
		Services:     len(t.desired),
		Failing:      t.failingErrors,
		Err:          t.callErr,
		LastSuccess:  t.lastSuccess,
		PendingSince: earlier(t.pendingSince, t.oldestQueued()),
	}
}

func (t *tables) retryDelay(attempts int) time.Duration {
	return t.opts.retryDelay(attempts, rand.Float64())
}
