package sync

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// Syncer programs a dataplane with what is wanted. Make one with [New].
type Syncer struct {
	opts Options
	log  *slog.Logger

	wake    chan struct{} // one slot: the inbox has something
	stopped chan struct{} // closed when Run has returned

	mu       sync.Mutex
	started  bool // Run was called
	inbox    inbox
	status   Status
	triedSeq uint64 // all input up to this number has been tried
	waiters  []waiter

	tables tables // owned by Run
}

// inbox is what was handed over since Run last looked.
type inbox struct {
	changes      map[dataplane.Key]input
	oldestUpdate time.Time // of the changes; zero if there are none
	node         *dataplane.Node
	listComplete bool
	seq          uint64 // number of the last input
}

// input is the last value handed over for a key, nil for deleted, and the time
// of the first one.
type input struct {
	svc       *dataplane.Service
	updatedAt time.Time
}

// waiter is a call to WaitSynced.
type waiter struct {
	seq  uint64
	done chan struct{}
}

// ErrStopped is returned by [Syncer.WaitSynced] when Run has returned.
var ErrStopped = errors.New("the syncer has stopped")

// New returns a Syncer for dp. It starts nothing: call [Syncer.Run]. The
// dataplane belongs to the Syncer until Run has returned; closing it is then
// left to the caller.
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

// Update hands over changes: the Services now wanted, and nil for those that
// are not wanted any more. A frontend that moves between Services must leave the one
// and join the other in the same Update; both then go to the dataplane in one
// call. All of an Update does, unless it is large: then the Services with little
// go first. Update keeps the Services but not the map.
//
// It does not block on the kernel and may be called from any goroutine, before
// and during Run. An entry whose key is not its Service's is a bug of the
// caller: it is logged as an error and left out.
func (s *Syncer) Update(changes map[dataplane.Key]*dataplane.Service) {
	if len(changes) == 0 {
		return
	}
	now := time.Now()
	s.mu.Lock()
	for k, svc := range changes {
		if svc != nil && svc.Key != k {
			s.log.Error("update left out: a Service under another key", "service", svc.Key.String(), "key", k.String())
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

// SetNode hands over the node. Before the first call it is the zero Node. It
// does not block on the kernel and may be called from any goroutine, before and
// during Run.
func (s *Syncer) SetNode(node dataplane.Node) {
	s.mu.Lock()
	s.inbox.node = &node
	s.unlockAndWake()
}

// FinishInitialList says that everything there is has been handed over. Nothing is
// programmed before: the first thing the dataplane gets is the complete list,
// and what a previous run of the program left in the kernel serves until then.
// It does not block and may be called from any goroutine; calling it again has
// no effect.
func (s *Syncer) FinishInitialList() {
	s.mu.Lock()
	s.inbox.listComplete = true
	s.unlockAndWake()
}

// unlockAndWake ends the handing over of an input: it unlocks mu and wakes Run.
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

// WaitSynced blocks until everything that was handed over before the call has
// been tried: it is programmed, or Status says what failed. It returns an error
// only when ctx ends first, or Run returns.
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

// Run programs the dataplane until ctx ends and then returns nil; the call in
// flight is given ctx too. What is programmed stays in place. It returns an
// error only when it is called a second time.
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
				t.drift = nil // Or it would be received from for ever.
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

// step takes what is in the inbox and makes the call it needs, if any.
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

// drainInbox empties the inbox.
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

// publish makes the outcome of a step visible.
func (s *Syncer) publish(in inbox) {
	t := &s.tables
	// The map is used again unless it is large: clearing it, and the memory it
	// holds, would follow the largest batch ever seen.
	if len(in.changes) <= 1024 {
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
