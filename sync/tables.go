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

// tables is what Run knows: the wanted, the programmed and the failing. It is
// used by one goroutine and has no locks.
type tables struct {
	dp    dataplane.Dataplane
	opts  Options
	log   *slog.Logger
	drift <-chan struct{}
	lost  <-chan struct{} // nil if the dataplane tells no loss

	node         dataplane.Node
	listComplete bool // the initial list is complete
	replacedOnce bool // a Replace has succeeded

	desired map[dataplane.Key]*dataplane.Service
	// applied is what the kernel holds, save for keys that are failing with
	// state unknown and while everything is unknown: then it is what was last
	// known.
	applied map[dataplane.Key]*dataplane.Service
	failing map[dataplane.Key]*failure
	// queue has the keys whose change waits for its turn. For these, too, desired and
	// applied differ.
	queue queue
	// mergedSeq is the number of the last input that merge has taken.
	mergedSeq uint64

	// allUnknown is set before the first Replace and after a call that failed
	// as a whole. Only Replace is possible then.
	allUnknown  bool
	callErr     error // why, nil before the first Replace
	failedCalls int   // calls that failed as a whole, in a row

	// pendingSince is when the oldest change was handed over that is in no failing
	// key and has not been part of a successful call; zero if there is none.
	pendingSince time.Time
	// awaitsReplace says that a change waits for the next Replace.
	awaitsReplace bool

	nodeChanged   bool
	repairAt      time.Time // when failing keys, or everything, are due; zero for never
	driftRepairAt time.Time // when the drift seen is due; zero for none seen
	lossRepairAt  time.Time // when the repair of a loss is due; zero for none
	resyncAt      time.Time // zero for never

	driftRepairs        int // in a row
	lastDriftRepair     time.Time
	lastReplaceDuration time.Duration // the last Replace
	lastReplaceEnd      time.Time     // its end

	lastSuccess time.Time
	// failingErrors is failing as Status shows it, made anew after failing changed.
	failingErrors      map[dataplane.Key]error
	failingErrorsStale bool

	spareChanges map[dataplane.Key]input // for the inbox to use again
}

// failure is a key that did not take.
type failure struct {
	state        failureState
	err          error
	attempts     int
	pendingSince time.Time // when the oldest change was handed over that did not take
	lastLogged   string    // the error that was logged last; empty for none
}

type failureState uint8

const (
	// unknown: the kernel may hold anything for the key; it waits for Replace.
	unknown failureState = iota
	// refused: the backend does not support the Service, and the kernel holds
	// nothing. It waits for the Service to change.
	unsupported
	// revised: it was refused, and the Service has changed.
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

// merge takes the input into desired, and the changes that can be applied into the
// queue. All other changes wait for a Replace.
func (t *tables) merge(in inbox) {
	if in.node != nil && !in.node.Equal(t.node) {
		t.node = *in.node
		t.nodeChanged = true
	}
	t.listComplete = t.listComplete || in.listComplete
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
			// Undone, or said again. Keeping the value we have frees the other.
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

// oldestQueued returns when the oldest change was handed over that waits in the queue; zero
// if there is none.
func (t *tables) oldestQueued() time.Time {
	if e := t.queue.oldest(); e != nil {
		return e.updatedAt
	}
	return time.Time{}
}

// triedSeq returns the number of the last input of which everything has been tried.
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

// retrySoon brings the next attempt forward when a failing Service has changed:
// the change may be the cure. As the attempt is a Replace of everything, it
// leaves nine tenths of the time to others, even when a failing Service keeps
// changing.
func (t *tables) retrySoon() {
	t.repairAt = earlier(t.repairAt, time.Now().Add(max(t.opts.RetryMin, 9*t.lastReplaceDuration)))
}

// maxDriftDelay is the longest that repeated drift waits for its repair, save
// where a repair itself takes so long that nine tenths of the time must be left
// to others. Services may be dead meanwhile, so it is short.
const maxDriftDelay = time.Second

// lossDelay is how long the loss of something waits for its repair if a Replace
// has just ended, and how long a call waits after a conflict: somebody else may be
// about to commit again. At the end of a disturbance Services are dead for as long.
const lossDelay = 20 * time.Millisecond

// onLoss records that somebody else has removed what packets may need. Unlike
// other drift it does not wait longer when it happens again and again.
func (t *tables) onLoss(now time.Time) {
	if !t.lossRepairAt.IsZero() {
		return
	}
	t.lossRepairAt = now
	if next := t.lastReplaceEnd.Add(lossDelay); next.After(now) {
		t.lossRepairAt = next
	}
}

// onDrift notes that somebody else has changed the kernel.
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

// replaceDue returns why a Replace is due, or nothing.
func (t *tables) replaceDue(now time.Time) Reason {
	due := func(at time.Time) bool { return !at.IsZero() && !at.After(now) }
	switch {
	case !t.listComplete:
		return ""
	case t.allUnknown && !t.repairAt.IsZero() && !due(t.repairAt) && !due(t.lossRepairAt):
		return "" // No other reason makes a call more likely to work.
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

// nextReplaceAt returns when replaceDue will have a reason if nothing else
// happens; zero for never.
func (t *tables) nextReplaceAt() time.Time {
	switch {
	case !t.listComplete:
		return t.repairAt
	case t.allUnknown:
		return earlier(t.repairAt, t.lossRepairAt)
	}
	return earlier(earlier(t.repairAt, t.lossRepairAt), earlier(t.driftRepairAt, t.resyncAt))
}

// replace makes the kernel hold what is desired, less what was refused. It
// returns false when ctx has ended and nothing can be said.
func (t *tables) replace(ctx context.Context, reason Reason, in inbox, start time.Time) (Commit, bool) {
	// Drift announced until now is repaired by this call.
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
		if _, again := c.Failed[k]; !again && f.state != unsupported {
			c.OldestUpdate = earlier(c.OldestUpdate, f.pendingSince)
			t.onRecovery(k, f)
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
		if _, wanted := t.desired[k]; !wanted && !t.failedOrUnsupported(k, c.Failed) {
			delete(t.applied, k)
			if t.opts.OnCommit != nil {
				c.Changes = append(c.Changes, dataplane.Change{Old: old})
			}
		}
	}
	// Every key that is unknown was in this call and has failed again.
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

// failedOrUnsupported reports whether k did not take in a call that failed for these keys,
// or was not part of it because it is refused.
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

// progress is how far a Replace has come.
type progress struct {
	firstAt, lastAt time.Time
	complete        int
}

// update notes that so many Services are complete.
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

// replaceOrder returns the Services that Replace is given: those of Options.Prioritize
// come first, and all in the order of their keys, so that two calls with the same
// Services make the same steps. Of a Kubernetes Service that has more than a call of
// Apply is given, the rest comes last. Sorting is a small part of what a Replace costs.
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

// largeLast returns Services, which are in the order of their keys, in this order but for
// what a Kubernetes Service has beyond callWeight: that comes last, in the order of how
// much its Service has before it.
func largeLast(services []*dataplane.Service) []*dataplane.Service {
	type excess struct {
		service *dataplane.Service
		before  int
	}
	ordinary := services[:0]
	var large []excess
	var last dataplane.Key
	before := 0
	for _, s := range services {
		if s.Key.Namespace != last.Namespace || s.Key.Name != last.Name {
			last, before = s.Key, 0
		}
		if before += weightOf(dataplane.Change{New: s}); before <= callWeight {
			ordinary = append(ordinary, s)
		} else {
			large = append(large, excess{s, before})
		}
	}
	slices.SortStableFunc(large, func(a, b excess) int { return cmp.Compare(a.before, b.before) })
	for _, l := range large {
		ordinary = append(ordinary, l.service)
	}
	return ordinary
}

// apply carries out the changes whose turn it is. It returns false when ctx has ended
// and nothing can be said.
func (t *tables) apply(ctx context.Context, start time.Time) (Commit, bool) {
	entries := t.queue.dequeue(callWeight)
	changes := make([]dataplane.Change, 0, len(entries))
	handed := make(map[dataplane.Key]time.Time, len(entries))
	var oldest time.Time
	for _, e := range entries {
		changes = append(changes, e.Change)
		handed[e.Key()] = e.updatedAt
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
	t.onKeyFailures(&c, func(k dataplane.Key) time.Time { return handed[k] })
	t.logCommit(ctx, &c)
	return c, true
}

// splitError splits the error of a call: keys that failed, or a failure as a
// whole. A failure that names no key is one as a whole, to be safe, and so is
// one that is joined with others: the keys are then only part of the matter.
func splitError(err error) (failed map[dataplane.Key]error, whole error) {
	for e := err; e != nil; e = errors.Unwrap(e) {
		keyed, ok := e.(*dataplane.Error) //nolint:errorlint // errors.As would look into joined errors.
		if ok && len(keyed.Failed) > 0 {
			return keyed.Failed, nil
		}
	}
	return nil, err
}

// onSuccess notes that a call did not fail as a whole.
func (t *tables) onSuccess(end time.Time) {
	if t.callErr != nil {
		t.log.Info("dataplane works again", "attempts", t.failedCalls)
	}
	t.callErr, t.failedCalls = nil, 0
	t.lastSuccess = end
	t.pendingSince = time.Time{}
}

// onCallFailure makes everything unknown.
func (t *tables) onCallFailure(c *Commit) {
	delay := lossDelay
	if !errors.Is(c.Err, dataplane.ErrConflict) {
		t.failedCalls++
		delay = t.retryDelay(t.failedCalls)
	}
	t.repairAt = c.End.Add(delay)
	if t.callErr == nil || t.callErr.Error() != c.Err.Error() {
		t.log.Warn("dataplane failed", "kind", string(c.Op), "reason", string(c.Reason), "services", c.Services,
			"retry_in", delay, "error", c.Err)
	}
	t.allUnknown = true
	t.callErr = c.Err
	t.pendingSince = earlier(c.OldestUpdate, t.oldestQueued())
	if len(t.queue.entries) > 0 { // the next Replace has them
		t.queue.clear()
		t.awaitsReplace = true
	}
}

// onKeyFailures makes the failed keys of a call unknown, or refused. handed returns when the
// change of a key was handed over, or zero.
func (t *tables) onKeyFailures(c *Commit, handed func(dataplane.Key) time.Time) {
	// A call can fail for all of its keys at once. A few are logged by name,
	// the others, if they keep failing, after a later attempt.
	const named = 10
	logged, silent := 0, 0
	for k, err := range c.Failed {
		f := t.failing[k]
		if f == nil {
			f = &failure{}
			t.failing[k] = f
		}
		f.err = err
		f.attempts++
		if t.queue.entries[k] != nil { // the next Replace has it
			t.queue.remove(k)
			t.awaitsReplace = true
		}
		if f.pendingSince.IsZero() {
			if f.pendingSince = handed(k); f.pendingSince.IsZero() {
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
			silent++
		default:
			logged++
			f.lastLogged = text
			if f.state == unsupported {
				t.log.Warn("service not supported", "service", k.String(), "error", err)
			} else {
				t.log.Warn("service failed", "service", k.String(), "retry_in", delay, "error", err)
			}
		}
		t.failingErrorsStale = true
	}
	if silent > 0 {
		t.log.Warn("more services failed", "services", silent)
	}
}

// onRecovery forgets the failure of k.
func (t *tables) onRecovery(k dataplane.Key, f *failure) {
	delete(t.failing, k)
	t.failingErrorsStale = true
	if f.lastLogged != "" {
		t.log.Info("service no longer fails", "service", k.String(), "attempts", f.attempts)
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
	var latency time.Duration // of the oldest change, waiting included
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
