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

	tables tables // owned by Run
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
		opts:    opts,
		log:     opts.Logger,
		wake:    make(chan struct{}, 1),
		stopped: make(chan struct{}),
		inbox:   inbox{changes: map[dataplane.Key]input{}, seq: 1},
		tables:  newTables(dp, opts),
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
	if len(changes) == 0 {
		return
	}
	now := time.Now()
	s.mu.Lock()
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
	s.unlockAndWake()
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
			in := s.drainInbox()
			s.tables.merge(in)
			s.publish(in)
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
	var armed time.Time
	for {
		if at := t.nextReplaceAt(); !at.Equal(armed) {
			if armed = at; at.IsZero() {
				timer.Stop()
			} else {
				timer.Reset(time.Until(at))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-timer.C:
			armed = time.Time{}
		case _, ok := <-t.drift:
			if !ok {
				t.drift = nil // a closed channel would always be ready
				continue
			}
			t.onDrift(time.Now())
		case _, ok := <-t.lost:
			if !ok {
				t.lost = nil
				continue
			}
			t.onLoss(time.Now())
		}
		s.step(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if len(t.queue.entries) > 0 {
			s.wakeRun()
		}
	}
}

// step processes the inbox and makes the dataplane call that is due, if any.
func (s *Syncer) step(ctx context.Context) {
	t := &s.tables
	in := s.drainInbox()
	t.merge(in)
	reason := t.replaceDue(time.Now())
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
			return
		}
		if s.opts.OnCommit != nil {
			s.opts.OnCommit(commit)
		}
	}
	s.publish(in)
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
