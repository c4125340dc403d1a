package sync

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// Syncer keeps a dataplane in the desired state. Create it with [New].
type Syncer struct {
	opts Options
	log  *slog.Logger

	wake    chan struct{} // capacity 1; signals that the inbox is not empty
	stopped chan struct{} // closed when Run returns

	mu       sync.Mutex
	started  bool // Run was called
	inbox    inbox
	status   Status
	triedSeq uint64 // all input up to this sequence number has been tried
	waiters  []waiter

	// stepping is held by the goroutine that uses tables: Run, Prepare or UpdateInline.
	stepping semaphore
	tables   tables
	// runCtx is the context of Run, nil while Run does not run. armedAt is the time for which
	// Run has set its timer, or zero. stepping protects both.
	runCtx  context.Context //nolint:containedctx // Calls of UpdateInline end with Run.
	armedAt time.Time
}

// inbox contains the input that Run has not processed yet.
type inbox struct {
	changes      map[dataplane.Key]input
	oldestUpdate time.Time // of the changes; zero without changes
	node         *dataplane.Node
	listComplete bool
	seq          uint64 // sequence number of the last input
}

// input is the latest Service for a key, nil if it was deleted, and the time of the first Update
// that the Syncer has not processed yet.
type input struct {
	svc       *dataplane.Service
	updatedAt time.Time
}

// waiter is a blocked call of WaitSynced.
type waiter struct {
	seq  uint64
	done chan struct{}
}

// ErrStopped is returned by [Syncer.WaitSynced] when Run has returned.
var ErrStopped = errors.New("the syncer has stopped")

// New returns a Syncer for dp. It does nothing until [Syncer.Run] is called. The Syncer owns the
// dataplane until Run returns; the caller then closes it.
func New(dp dataplane.Dataplane, opts Options) *Syncer {
	opts = opts.withDefaults()
	return &Syncer{
		opts:     opts,
		log:      opts.Logger,
		wake:     make(chan struct{}, 1),
		stopped:  make(chan struct{}),
		stepping: make(semaphore, 1),
		inbox:    inbox{changes: map[dataplane.Key]input{}, seq: 1},
		tables:   newTables(dp, opts),
	}
}

// Update sets the desired Services of the given keys; nil deletes a Service. If a frontend moves
// from one Service to another, both changes must be in the same Update. The dataplane then
// receives them in one call. One Update results in one call unless it is large: then small
// Services come first. Update keeps the Services but not the map.
//
// Update does not wait for the kernel and may be called from any goroutine, before and during
// Run. An entry whose key differs from the key of its Service is a bug in the caller. Update logs
// it as an error and ignores it.
func (s *Syncer) Update(changes map[dataplane.Key]*dataplane.Service) {
	if s.addChanges(changes) {
		s.wakeRun()
	}
}

// UpdateInline is like Update, but makes the dataplane call itself if the call is small and Run is
// idle. This saves two changes of goroutines, which take longer than the call. After a call that
// took long, UpdateInline leaves calls to Run for a while, so it rarely blocks for long. It must not
// be called while the caller holds a lock that [Options.OnCommit] needs.
func (s *Syncer) UpdateInline(changes map[dataplane.Key]*dataplane.Service) {
	if s.addChanges(changes) && (len(changes) > inlineWeight || !s.tryStep()) {
		s.wakeRun()
	}
}

// addChanges adds changes to the inbox. It reports whether there are any.
func (s *Syncer) addChanges(changes map[dataplane.Key]*dataplane.Service) bool {
	if len(changes) == 0 {
		return false
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.inbox.changes) == 0 && len(changes) > maxSpareChanges {
		s.inbox.changes = make(map[dataplane.Key]input, len(changes))
	}
	for k, svc := range changes {
		if svc != nil && svc.Key != k {
			s.log.Error("update ignored: the Service has a different key", "service", svc.Key.String(), "key", k.String())
			continue
		}
		in, ok := s.inbox.changes[k]
		if !ok {
			in.updatedAt = now
		}
		in.svc = svc
		s.inbox.changes[k] = in
	}
	if s.inbox.oldestUpdate.IsZero() {
		s.inbox.oldestUpdate = now
	}
	s.inbox.seq++
	return true
}

const (
	// inlineWeight is the largest weight of a call that UpdateInline makes, see callWeight. The
	// kernel needs less than a millisecond for it.
	inlineWeight = 256
	// slowCall is the duration of a call after which UpdateInline makes no calls for
	// inlinePause. Another program may block the kernel's lock.
	slowCall    = 20 * time.Millisecond
	inlinePause = 200 * time.Millisecond
)

// tryStep makes the dataplane call that is due, unless Run must make it. It reports whether Run
// need not be woken.
func (s *Syncer) tryStep() bool {
	if !s.stepping.TryLock() {
		return false
	}
	defer s.stepping.Unlock()
	t := &s.tables
	if s.runCtx == nil || s.runCtx.Err() != nil || t.allUnknown || len(t.queue.entries) > 0 || time.Now().Before(t.inlineAfter) {
		return false
	}
	return s.step(s.runCtx, inlineWeight) && len(t.queue.entries) == 0 && t.nextReplaceAt().Equal(s.armedAt)
}

// semaphore is a mutex whose holder may wait for the kernel. Unlike a [sync.Mutex], package synctest
// knows the goroutines that wait for it.
type semaphore chan struct{}

func (s semaphore) Lock() { s <- struct{}{} }

func (s semaphore) Unlock() { <-s }

func (s semaphore) TryLock() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

// SetNode sets the desired Node, which is the zero Node initially. It does not wait for the
// kernel and may be called from any goroutine, before and during Run.
func (s *Syncer) SetNode(node dataplane.Node) {
	s.mu.Lock()
	s.inbox.node = &node
	s.unlockAndWake()
}

// FinishInitialList marks the initial list of Services as complete. The Syncer programs nothing
// before: the first dataplane call contains the complete list, and until then the state that an
// earlier process left in the kernel stays in use. FinishInitialList does not block and may be
// called from any goroutine. Calling it again has no effect.
func (s *Syncer) FinishInitialList() {
	s.mu.Lock()
	s.inbox.listComplete = true
	s.unlockAndWake()
}

// unlockAndWake completes an input: it increments the sequence number, unlocks mu and wakes Run.
func (s *Syncer) unlockAndWake() {
	s.inbox.seq++
	s.mu.Unlock()
	s.wakeRun()
}

// wakeRun wakes Run.
func (s *Syncer) wakeRun() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// WaitSynced blocks until the Syncer has tried all input from before the call: the input is
// programmed, or Status contains the error. It returns an error only if ctx ends first or Run
// returns.
func (s *Syncer) WaitSynced(ctx context.Context) error {
	s.mu.Lock()
	if s.triedSeq >= s.inbox.seq {
		s.mu.Unlock()
		return nil
	}
	w := waiter{seq: s.inbox.seq, done: make(chan struct{})}
	s.waiters = append(s.waiters, w)
	s.mu.Unlock()
	select {
	case <-w.done:
		return nil
	case <-s.stopped:
		return ErrStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// The delays between two prefetches of Prepare: at least prefetchPeriod, and prefetchIdleRatio
// times the last prefetch, so that prefetching uses at most one tenth of the time.
const (
	prefetchPeriod    = 200 * time.Millisecond
	prefetchIdleRatio = 9
)

// Prepare processes input without programming the dataplane, until a value arrives or ctx ends.
// If the dataplane is a [dataplane.Prefetcher], it prepares the first Replace meanwhile. Prepare
// must return before Run is called.
func (s *Syncer) Prepare(ctx context.Context, done <-chan struct{}) {
	prefetcher, _ := s.tables.dp.(dataplane.Prefetcher)
	timer := time.NewTimer(0)
	defer timer.Stop()
	defer s.wakeRun()
	for {
		select {
		case <-ctx.Done():
			return
		case <-done:
			return
		case <-s.wake:
			s.stepping.Lock()
			in := s.drainInbox()
			s.tables.merge(in)
			s.publish(in)
			s.stepping.Unlock()
			continue
		case <-timer.C:
		}
		if prefetcher == nil || !s.tables.listComplete {
			timer.Reset(prefetchPeriod)
			continue
		}
		select {
		case <-done: // do not delay the first Replace
			return
		default:
		}
		start := time.Now()
		if err := prefetcher.Prefetch(ctx, dataplane.Desired{Node: s.tables.node, Services: s.tables.replaceOrder()}); err != nil && ctx.Err() == nil {
			s.log.DebugContext(ctx, "reading the kernel ahead of the first commit failed", "error", err)
		}
		timer.Reset(max(prefetchPeriod, prefetchIdleRatio*time.Since(start)))
	}
}

// Run programs the dataplane until ctx ends and then returns nil. It passes ctx to the dataplane,
// so an active call ends too. The programmed state stays in place. Run returns an error only if
// it was called before.
func (s *Syncer) Run(ctx context.Context) error {
	s.mu.Lock()
	again := s.started
	s.started = true
	s.mu.Unlock()
	if again {
		return errors.New("sync: Run was called before")
	}
	defer close(s.stopped)

	t := &s.tables
	if prefetcher, ok := t.dp.(dataplane.Prefetcher); ok && !t.listComplete {
		// Read what an earlier process left in the kernel while the initial list arrives.
		if err := prefetcher.Prefetch(ctx, dataplane.Desired{}); err != nil && ctx.Err() == nil {
			s.log.DebugContext(ctx, "reading the kernel ahead of the first commit failed", "error", err)
		}
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	<-timer.C
	s.stepping.Lock()
	s.runCtx = ctx
	s.stepping.Unlock()
	defer func() { // waits for UpdateInline
		s.stepping.Lock()
		s.runCtx = nil
		s.stepping.Unlock()
	}()
	for {
		s.arm(timer)
		var onEvent func(time.Time)
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-timer.C:
			onEvent = func(time.Time) { s.armedAt = time.Time{} }
		case _, ok := <-t.drift:
			if !ok {
				t.drift = nil // a closed channel would always be ready
				continue
			}
			onEvent = t.onDrift
		case _, ok := <-t.lost:
			if !ok {
				t.lost = nil
				continue
			}
			onEvent = t.onLoss
		}
		s.stepping.Lock()
		if onEvent != nil {
			onEvent(time.Now())
		}
		s.step(ctx, 0)
		more := len(t.queue.entries) > 0
		s.stepping.Unlock()
		if ctx.Err() != nil {
			return nil
		}
		if more {
			s.wakeRun()
		}
	}
}

// arm sets the timer to the time of the next Replace.
func (s *Syncer) arm(timer *time.Timer) {
	s.stepping.Lock()
	defer s.stepping.Unlock()
	at := s.tables.nextReplaceAt()
	if at.Equal(s.armedAt) {
		return
	}
	if s.armedAt = at; at.IsZero() {
		timer.Stop()
	} else {
		timer.Reset(time.Until(at))
	}
}

// step processes the inbox and makes the dataplane call that is due, if any. If maxWeight is not 0,
// step makes only calls of Apply up to this weight, and reports false if another call is due. The
// caller holds stepping.
func (s *Syncer) step(ctx context.Context, maxWeight int) bool {
	t := &s.tables
	in := s.drainInbox()
	t.merge(in)
	reason := t.replaceDue(time.Now())
	if maxWeight > 0 && (reason != "" || t.queue.weight > maxWeight) {
		s.publish(in)
		return false
	}
	if reason != "" || len(t.queue.entries) > 0 {
		start := time.Now()
		s.mu.Lock()
		s.status.CallSince = start
		s.status.PendingSince = earlier(t.pendingSince, t.oldestQueued())
		s.mu.Unlock()
		var commit Commit
		var ok bool
		if reason != "" {
			commit, ok = t.replace(ctx, reason, in, start)
		} else {
			commit, ok = t.apply(ctx, start)
		}
		if !ok {
			return true // ctx has ended
		}
		if reason == "" && commit.End.Sub(commit.Start) > slowCall {
			t.inlineAfter = commit.End.Add(inlinePause)
		}
		if s.opts.OnCommit != nil {
			s.opts.OnCommit(commit)
		}
	}
	s.publish(in)
	return true
}

// drainInbox returns the content of the inbox and leaves it empty.
func (s *Syncer) drainInbox() inbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.inbox
	s.inbox = inbox{changes: s.tables.spareChanges, seq: in.seq}
	if s.inbox.changes == nil {
		s.inbox.changes = map[dataplane.Key]input{}
	}
	s.tables.spareChanges = nil
	return in
}

// maxSpareChanges is the largest number of changes whose map is used again.
const maxSpareChanges = 1024

// publish updates the Status and wakes the waiters after a step.
func (s *Syncer) publish(in inbox) {
	t := &s.tables
	// Reuse the map unless it is large. Clearing it takes time, and it takes memory, in
	// proportion to the largest batch it ever held.
	if len(in.changes) <= maxSpareChanges {
		clear(in.changes)
		t.spareChanges = in.changes
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = t.status()
	if t.awaitsReplace {
		return
	}
	s.triedSeq = t.triedSeq()
	keep := s.waiters[:0]
	for _, w := range s.waiters {
		if w.seq <= s.triedSeq {
			close(w.done)
		} else {
			keep = append(keep, w)
		}
	}
	clear(s.waiters[len(keep):])
	s.waiters = keep
}
