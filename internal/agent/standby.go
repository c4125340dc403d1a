package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	stdsync "sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/instance"
)

// standby keeps the parts that write to the kernel, listen on the node's ports or
// speak for the node from running before this instance is the node's only one.
// Until then the program follows its source, so that it can take over at once.
type standby struct {
	log       *slog.Logger
	options   instance.Options
	activated chan struct{} // closed when this instance is the only one

	mu         stdsync.Mutex
	lock       *instance.Lock // nil without one
	standingBy atomic.Bool    // on standby
}

func newStandby(log *slog.Logger, description string) *standby {
	s := &standby{log: log, activated: make(chan struct{})}
	s.options = instance.Options{Description: description, OnWaiting: func(h instance.Holder) {
		s.standingBy.Store(true)
		s.log.Warn("another Fairlead programs this node; standing by until it ends", "other", h.String())
	}}
	return s
}

// instanceDescription returns the description of this instance for others.
func instanceDescription(o Options) string {
	host, err := os.Hostname()
	if err != nil {
		host = o.Config.Tracker.NodeName
	}
	return fmt.Sprintf("fairlead %s in mode %s on %s", o.Version, o.Config.Mode, host)
}

// start activates this instance at once, if there is no other one, and else in the
// group when the other one has ended.
func (s *standby) start(ctx context.Context, group *errgroup.Group) {
	if lock, err := instance.TryAcquire(s.options); err == nil { //nolint:contextcheck // a Lock outlives ctx
		s.activate(lock)
		return
	}
	group.Go(func() error {
		lock, err := instance.Acquire(ctx, s.options)
		switch {
		case ctx.Err() != nil:
			if lock != nil {
				return lock.Release()
			}
			return nil
		case err != nil:
			// Whoever keeps the lock from us must not keep Services from the node.
			s.log.ErrorContext(ctx, "can't tell whether another Fairlead programs this node; going on as if there were none", "error", err)
		case s.standingBy.Load():
			s.log.InfoContext(ctx, "the other Fairlead has ended; taking over")
		}
		s.activate(lock)
		return nil
	})
}

func (s *standby) activate(lock *instance.Lock) {
	s.mu.Lock()
	s.lock = lock
	s.mu.Unlock()
	s.standingBy.Store(false)
	close(s.activated)
}

// whenActive returns a function that calls run as soon as this instance is active.
func (s *standby) whenActive(run func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return nil
		case <-s.activated:
			return run(ctx)
		}
	}
}

// The standby looks for something to prefetch every prefetchPeriod, and leaves nineteen
// twentieths of the time to others.
const (
	prefetchPeriod    = 200 * time.Millisecond
	prefetchIdleRatio = 19
)

// prefetch has the dataplane read what the other instance has programmed, again when
// that has changed, until this instance is active. Then there is less to do.
func (s *standby) prefetch(ctx context.Context, dp dataplane.Dataplane) {
	prefetcher, ok := dp.(dataplane.Prefetcher)
	if !ok {
		return
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for !s.isActive() {
		select {
		case <-ctx.Done():
			return
		case <-s.activated:
			return
		case <-timer.C:
		}
		start := time.Now()
		if err := prefetcher.Prefetch(ctx); err != nil && ctx.Err() == nil {
			s.log.DebugContext(ctx, "what the other Fairlead has programmed was not read in advance", "error", err)
		}
		timer.Reset(max(prefetchPeriod, prefetchIdleRatio*time.Since(start)))
	}
}

// isActive reports whether this instance may write to the kernel.
func (s *standby) isActive() bool {
	select {
	case <-s.activated:
		return true
	default:
		return false
	}
}

// isStandby reports whether this instance waits for another one's end.
func (s *standby) isStandby() bool { return s.standingBy.Load() }

// waitingInstances returns how many other instances wait for this one's end.
func (s *standby) waitingInstances() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock == nil {
		return 0
	}
	return s.lock.Waiters()
}

// release lets the next instance take over.
func (s *standby) release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock == nil {
		return nil
	}
	lock := s.lock
	s.lock = nil
	return lock.Release()
}
