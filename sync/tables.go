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

	node     dataplane.Node
	complete bool // the initial list is complete
	replaced bool // a Replace has succeeded

	desired map[dataplane.Key]*dataplane.Service
	// applied is what the kernel holds, save for keys that are failing with
	// state unknown and while everything is unknown: then it is what was last
	// known.
	applied map[dataplane.Key]*dataplane.Service
	failing map[dataplane.Key]*failure
	// queue has the keys whose change waits for its turn. For these, too, desired and
	// applied differ.
	queue queue
	// merged is the number of the last input that merge has taken.
	merged uint64

	// allUnknown is set before the first Replace and after a call that failed
	// as a whole. Only Replace is possible then.
	allUnknown bool
	allErr     error // why, nil before the first Replace
	attempts   int   // calls that failed as a whole, in a row

	// pending is when the oldest change was handed over that is in no failing
	// key and has not been part of a successful call; zero if there is none.
	pending time.Time
	// untried says that a change waits for the next Replace.
	untried bool

	nodeChanged bool
	repairAt    time.Time // when failing keys, or everything, are due; zero for never
	driftAt     time.Time // when the drift seen is due; zero for none seen
	lostAt      time.Time // when the repair of a loss is due; zero for none
	resyncAt    time.Time // zero for never

	driftRepairs  int // in a row
	lastDrift     time.Time
	replaceLasted time.Duration // the last Replace
	lastReplace   time.Time     // its end

	lastSuccess time.Time
	// shown is failing as Status shows it, made anew after failing changed.
	shown      map[dataplane.Key]error
	shownStale bool

	spare map[dataplane.Key]input // for the inbox to use again
}

// failure is a key that did not take.
type failure struct {
	state    failureState
	err      error
	attempts int
	handed   time.Time // when the oldest change was handed over that did not take
	reported string    // the error that was logged last; empty for none
}

type failureState uint8

const (
	// unknown: the kernel may hold anything for the key; it waits for Replace.
	unknown failureState = iota
	// refused: the backend does not support the Service, and the kernel holds
	// nothing. It waits for the Service to change.
	refused
	// revised: it was refused, and the Service has changed.
	revised
)

func newTables(dp dataplane.Dataplane, opts Options) tables {
	var lost <-chan struct{}
	if notifier, ok := dp.(dataplane.LossNotifier); ok {
		lost = notifier.Lost()
	}
	return tables{
		dp:         dp,
		opts:       opts,
		log:        opts.Logger,
		drift:      dp.Drift(),
		lost:       lost,
		desired:    map[dataplane.Key]*dataplane.Service{},
		applied:    map[dataplane.Key]*dataplane.Service{},
		failing:    map[dataplane.Key]*failure{},
		queue:      newQueue(),
		allUnknown: true,
		untried:    true,
	}
}

// merge takes the input into desired, and the changes that can be applied into the
// queue. All other changes wait for a Replace.
func (t *tables) merge(in inbox) {
	if in.node != nil && !in.node.Equal(t.node) {
		t.node = *in.node
		t.nodeChanged = true
	}
	t.complete = t.complete || in.complete
	for k, c := range in.changes {
		f := t.failing[k]
		if t.allUnknown || f != nil && f.state == unknown {
			if c.svc.Equal(t.desired[k]) {
				continue
			}
			t.want(k, c.svc)
			t.untried = true
			switch {
			case f == nil:
				t.pending = earlier(t.pending, c.at)
			case f.state == refused:
				f.state, f.handed = revised, c.at
			case f.state == unknown && !t.allUnknown:
				t.retrySoon()
			}
			continue
		}
		if f != nil && f.state == refused {
			if c.svc.Equal(t.desired[k]) {
				continue
			}
			f.state, f.handed = revised, c.at
		}
		have := t.applied[k]
		if c.svc.Equal(have) {
			// Undone, or said again. Keeping the value we have frees the other.
			t.want(k, have)
			t.queue.remove(k)
			if f != nil {
				t.recovered(k, f)
			}
			continue
		}
		t.want(k, c.svc)
		t.queue.put(dataplane.Change{Old: have, New: c.svc}, c.at, t.merged)
	}
	t.merged = in.seq
}

// oldest returns when the oldest change was handed over that waits in the queue; zero
// if there is none.
func (t *tables) oldest() time.Time {
	if e := t.queue.first(); e != nil {
		return e.at
	}
	return time.Time{}
}

// tried returns the number of the last input of which everything has been tried.
func (t *tables) tried() uint64 {
	if e := t.queue.first(); e != nil {
		return e.after
	}
	return t.merged
}

func (t *tables) want(k dataplane.Key, svc *dataplane.Service) {
	if svc == nil {
		delete(t.desired, k)
	} else {
		t.desired[k] = svc
	}
}

func (t *tables) programmed(k dataplane.Key, svc *dataplane.Service) {
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
	t.repairAt = earlier(t.repairAt, time.Now().Add(max(t.opts.RetryMin, 9*t.replaceLasted)))
}

// maxDriftDelay is the longest that repeated drift waits for its repair, save
// where a repair itself takes so long that nine tenths of the time must be left
// to others. Services may be dead meanwhile, so it is short.
const maxDriftDelay = time.Second

// lossDelay is how long the loss of something waits for its repair if a Replace
// has just ended, and how long a call waits after a conflict: somebody else may be
// about to commit again. At the end of a disturbance Services are dead for as long.
const lossDelay = 20 * time.Millisecond

// lostSomething records that somebody else has removed what packets may need. Unlike
// other drift it does not wait longer when it happens again and again.
func (t *tables) lostSomething(now time.Time) {
	if !t.lostAt.IsZero() {
		return
	}
	t.lostAt = now
	if next := t.lastReplace.Add(lossDelay); next.After(now) {
		t.lostAt = next
	}
}

// drifted notes that somebody else has changed the kernel.
func (t *tables) drifted(now time.Time) {
	if !t.driftAt.IsZero() {
		return
	}
	if now.Sub(t.lastDrift) >= t.opts.RetryMax {
		t.driftRepairs = 0
	}
	t.driftAt = now
	if t.driftRepairs > 0 {
		delay := min(t.delay(t.driftRepairs), max(maxDriftDelay, 9*t.replaceLasted))
		if at := t.lastDrift.Add(delay); at.After(now) {
			t.driftAt = at
		}
	}
}

// replaceDue returns why a Replace is due, or nothing.
func (t *tables) replaceDue(now time.Time) Reason {
	due := func(at time.Time) bool { return !at.IsZero() && !at.After(now) }
	switch {
	case !t.complete:
		return ""
	case t.allUnknown && !t.repairAt.IsZero() && !due(t.repairAt) && !due(t.lostAt):
		return "" // No other reason makes a call more likely to work.
	case !t.replaced:
		return ReasonStart
	case t.allUnknown || due(t.repairAt):
		return ReasonRetry
	case t.nodeChanged:
		return ReasonNode
	case due(t.driftAt), due(t.lostAt):
		return ReasonDrift
	case due(t.resyncAt):
		return ReasonResync
	}
	return ""
}

// nextReplace returns when replaceDue will have a reason if nothing else
// happens; zero for never.
func (t *tables) nextReplace() time.Time {
	switch {
	case !t.complete:
		return t.repairAt
	case t.allUnknown:
		return earlier(t.repairAt, t.lostAt)
	}
	return earlier(earlier(t.repairAt, t.lostAt), earlier(t.driftAt, t.resyncAt))
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
	drifted := !t.driftAt.IsZero() || !t.lostAt.IsZero()
	t.driftAt, t.lostAt, t.nodeChanged, t.untried = time.Time{}, time.Time{}, false, false

	var progress progress
	err := t.dp.Replace(ctx, t.node, t.offered(), progress.completed)
	end := time.Now()
	if err != nil && ctx.Err() != nil {
		return Commit{}, false
	}
	t.replaceLasted, t.lastReplace = end.Sub(start), end
	if drifted {
		t.driftRepairs++
		t.lastDrift = end
	}
	if t.opts.ResyncPeriod > 0 {
		t.resyncAt = end.Add(t.opts.ResyncPeriod)
	}
	c := Commit{
		Kind: KindReplace, Reason: reason,
		Services: len(t.desired), Oldest: earlier(t.pending, t.oldest()), Start: start, End: end,
	}
	waiting := t.queue.entries
	t.queue.clear()
	if c.Failed, c.Err = outcome(err); c.Err != nil {
		t.failedWhole(&c)
		return c, true
	}
	c.First, c.Last = progress.first, progress.last
	t.succeeded(end)
	t.replaced = true
	t.allUnknown = false

	for k, f := range t.failing {
		if _, again := c.Failed[k]; !again && f.state != refused {
			c.Oldest = earlier(c.Oldest, f.handed)
			t.recovered(k, f)
		}
	}
	for k, svc := range t.desired {
		if old := t.applied[k]; old != svc && !t.didFail(k, c.Failed) {
			t.applied[k] = svc
			if t.opts.OnCommit != nil && !svc.Equal(old) {
				c.Changes = append(c.Changes, dataplane.Change{Old: old, New: svc})
			}
		}
	}
	for k, old := range t.applied {
		if _, wanted := t.desired[k]; !wanted && !t.didFail(k, c.Failed) {
			delete(t.applied, k)
			if t.opts.OnCommit != nil {
				c.Changes = append(c.Changes, dataplane.Change{Old: old})
			}
		}
	}
	// Every key that is unknown was in this call and has failed again.
	t.repairAt = time.Time{}
	t.failed(&c, func(k dataplane.Key) time.Time {
		if e := waiting[k]; e != nil {
			return e.at
		}
		return in.changes[k].at
	})
	t.report(ctx, &c)
	return c, true
}

// didFail reports whether k did not take in a call that failed for these keys,
// or was not part of it because it is refused.
func (t *tables) didFail(k dataplane.Key, failed map[dataplane.Key]error) bool {
	if len(failed) == 0 && len(t.failing) == 0 {
		return false
	}
	if _, ok := failed[k]; ok {
		return true
	}
	f := t.failing[k]
	return f != nil && f.state == refused
}

// progress is how far a Replace has come.
type progress struct {
	first, last time.Time
	complete    int
}

// completed notes that so many Services are complete.
func (p *progress) completed(complete int) {
	if complete <= p.complete {
		return
	}
	p.complete = complete
	p.last = time.Now()
	if p.first.IsZero() {
		p.first = p.last
	}
}

// offered returns the Services that Replace is given: those of Options.First
// come first, and all in the order of their keys, so that two calls with the same
// Services make the same steps. Of a Kubernetes Service that has more than a call of
// Apply is given, the rest comes last. Sorting is a small part of what a Replace costs.
func (t *tables) offered() iter.Seq[*dataplane.Service] {
	return func(yield func(*dataplane.Service) bool) {
		for _, first := range []bool{true, false} {
			var services []*dataplane.Service
			for k, svc := range t.desired {
				if f := t.failing[k]; t.comesFirst(k) == first && (f == nil || f.state != refused) {
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

// comesFirst applies [Options.First].
func (t *tables) comesFirst(k dataplane.Key) bool { return t.opts.First != nil && t.opts.First(k) }

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
	entries := t.queue.next(callWeight)
	changes := make([]dataplane.Change, 0, len(entries))
	handed := make(map[dataplane.Key]time.Time, len(entries))
	var oldest time.Time
	for _, e := range entries {
		changes = append(changes, e.Change)
		handed[e.Key()] = e.at
		oldest = earlier(oldest, e.at)
	}
	err := t.dp.Apply(ctx, changes)
	end := time.Now()
	if err != nil && ctx.Err() != nil {
		return Commit{}, false
	}
	c := Commit{
		Kind: KindApply, Reason: ReasonChange,
		Services: len(t.desired), Oldest: oldest, Start: start, End: end,
	}
	if c.Failed, c.Err = outcome(err); c.Err != nil {
		t.failedWhole(&c)
		return c, true
	}
	t.succeeded(end)
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
		t.programmed(k, ch.New)
		if f := t.failing[k]; f != nil {
			t.recovered(k, f)
		}
	}
	t.failed(&c, func(k dataplane.Key) time.Time { return handed[k] })
	t.report(ctx, &c)
	return c, true
}

// outcome splits the error of a call: keys that failed, or a failure as a
// whole. A failure that names no key is one as a whole, to be safe, and so is
// one that is joined with others: the keys are then only part of the matter.
func outcome(err error) (failed map[dataplane.Key]error, whole error) {
	for e := err; e != nil; e = errors.Unwrap(e) {
		keyed, ok := e.(*dataplane.Error) //nolint:errorlint // errors.As would look into joined errors.
		if ok && len(keyed.Failed) > 0 {
			return keyed.Failed, nil
		}
	}
	return nil, err
}

// succeeded notes that a call did not fail as a whole.
func (t *tables) succeeded(end time.Time) {
	if t.allErr != nil {
		t.log.Info("dataplane works again", "attempts", t.attempts)
	}
	t.allErr, t.attempts = nil, 0
	t.lastSuccess = end
	t.pending = time.Time{}
}

// failedWhole makes everything unknown.
func (t *tables) failedWhole(c *Commit) {
	delay := lossDelay
	if !errors.Is(c.Err, dataplane.ErrConflict) {
		t.attempts++
		delay = t.delay(t.attempts)
	}
	t.repairAt = c.End.Add(delay)
	if t.allErr == nil || t.allErr.Error() != c.Err.Error() {
		t.log.Warn("dataplane failed", "kind", string(c.Kind), "reason", string(c.Reason), "services", c.Services,
			"retry_in", delay, "error", c.Err)
	}
	t.allUnknown = true
	t.allErr = c.Err
	t.pending = earlier(c.Oldest, t.oldest())
	if len(t.queue.entries) > 0 { // the next Replace has them
		t.queue.clear()
		t.untried = true
	}
}

// failed makes the failed keys of a call unknown, or refused. handed returns when the
// change of a key was handed over, or zero.
func (t *tables) failed(c *Commit, handed func(dataplane.Key) time.Time) {
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
			t.untried = true
		}
		if f.handed.IsZero() {
			if f.handed = handed(k); f.handed.IsZero() {
				f.handed = c.Oldest
			}
		}
		f.state = unknown
		var delay time.Duration
		if errors.Is(err, dataplane.ErrUnsupported) {
			f.state = refused
			if old := t.applied[k]; old != nil {
				delete(t.applied, k)
				c.Changes = append(c.Changes, dataplane.Change{Old: old})
			}
		} else {
			delay = t.delay(f.attempts)
			t.repairAt = earlier(t.repairAt, c.End.Add(delay))
		}
		switch text := err.Error(); {
		case f.reported == text:
		case logged == named:
			silent++
		default:
			logged++
			f.reported = text
			if f.state == refused {
				t.log.Warn("service not supported", "service", k.String(), "error", err)
			} else {
				t.log.Warn("service failed", "service", k.String(), "retry_in", delay, "error", err)
			}
		}
		t.shownStale = true
	}
	if silent > 0 {
		t.log.Warn("more services failed", "services", silent)
	}
}

// recovered forgets the failure of k.
func (t *tables) recovered(k dataplane.Key, f *failure) {
	delete(t.failing, k)
	t.shownStale = true
	if f.reported != "" {
		t.log.Info("service no longer fails", "service", k.String(), "attempts", f.attempts)
	}
}

// report logs a call that did not fail as a whole.
func (t *tables) report(ctx context.Context, c *Commit) {
	level := slog.LevelDebug
	if c.Reason == ReasonStart || c.Reason == ReasonDrift {
		level = slog.LevelInfo
	}
	if !t.log.Enabled(ctx, level) {
		return
	}
	var latency time.Duration // of the oldest change, waiting included
	if !c.Oldest.IsZero() {
		latency = c.End.Sub(c.Oldest)
	}
	attrs := []any{
		"kind", string(c.Kind), "reason", string(c.Reason),
		"changes", len(c.Changes), "failed", len(c.Failed), "services", c.Services,
		"took", c.End.Sub(c.Start), "latency", latency,
	}
	if !c.First.IsZero() {
		attrs = append(attrs, "first_after", c.First.Sub(c.Start), "last_after", c.Last.Sub(c.Start))
	}
	t.log.Log(ctx, level, "committed", attrs...)
}

func (t *tables) status() Status {
	if t.shownStale {
		t.shownStale = false
		t.shown = make(map[dataplane.Key]error, len(t.failing))
		for k, f := range t.failing {
			t.shown[k] = f.err
		}
	}
	return Status{
		Services:     len(t.desired),
		Failing:      t.shown,
		Err:          t.allErr,
		LastSuccess:  t.lastSuccess,
		PendingSince: earlier(t.pending, t.oldest()),
	}
}

func (t *tables) delay(attempts int) time.Duration {
	return t.opts.delay(attempts, rand.Float64())
}
