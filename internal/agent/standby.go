package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	stdsync "sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/internal/instance"
)

// standby delays components that program the kernel, listen on ports or write Events until no
// other instance is active on the node. Meanwhile the agent watches its source, so that it can
// take over without delay.
type standby struct {
	log       *slog.Logger
	options   instance.Options
	activated chan struct{} // closed when this instance becomes active

	mu         stdsync.Mutex
	lock       *instance.Lock // nil without one
	standingBy atomic.Bool    // waiting for another instance to exit
}

func newStandby(log *slog.Logger, description string) *standby {
	s := &standby{log: log, activated: make(chan struct{})}
	s.options = instance.Options{Description: description, OnWaiting: func(h instance.Holder) {
		s.standingBy.Store(true)
		s.log.Warn("another Fairlead programs this node; on standby until it exits", "other", h.String())
	}}
	return s
}

// instanceDescription describes this instance to other instances.
func instanceDescription(o Options) string {
	host, err := os.Hostname()
	if err != nil {
		host = o.Config.Tracker.NodeName
	}
	return fmt.Sprintf("fairlead %s in mode %s on %s", o.Version, o.Config.Mode, host)
}

// start activates this instance at once if no other instance is active. Otherwise it starts a
// goroutine in the group that activates this instance when the other one has exited.
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
			// A process of another user that holds the lock must not prevent programming.
			s.log.ErrorContext(ctx, "acquiring the instance lock failed; continuing as if no other Fairlead programs this node", "error", err)
		case s.standingBy.Load():
			s.log.InfoContext(ctx, "the other Fairlead has exited; taking over")
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

// whenActive returns a function that waits until this instance is active and then calls run. An
// active instance calls run even if ctx is done already, because run may have work to finish, such
// as queued Events to send.
func (s *standby) whenActive(run func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			if !s.isActive() {
				return nil
			}
		case <-s.activated:
		}
		return run(ctx)
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

// isStandby reports whether this instance waits for another one to exit.
func (s *standby) isStandby() bool { return s.standingBy.Load() }

// waitingInstances returns the number of instances that wait for this one to exit.
func (s *standby) waitingInstances() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock == nil {
		return 0
	}
	return s.lock.Waiters()
}

// release releases the instance lock, so that the next instance takes over.
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
