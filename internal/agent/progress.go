package agent

import (
	"sync/atomic"
	"time"

	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/sync"
)

// observers passes each value on to all functions that were added. All are added
// before the first value.
type observers[T any] struct{ functions []func(T) }

func (o *observers[T]) add(f func(T)) { o.functions = append(o.functions, f) }

func (o *observers[T]) notify(value T) {
	for _, f := range o.functions {
		f(value)
	}
}

// progress tracks how far the dataplane is.
type progress struct {
	status func() sync.Status
	// programmed is closed after the first call to the dataplane that succeeds.
	// isProgrammed guards the close; only committed uses it.
	programmed   chan struct{}
	isProgrammed bool
	failingSince atomic.Pointer[time.Time] // since when calls to the dataplane fail as a whole
}

func newProgress(status func() sync.Status) *progress {
	return &progress{status: status, programmed: make(chan struct{})}
}

// onCommit records the result of a call to the dataplane.
func (p *progress) onCommit(c sync.Commit) {
	switch {
	case c.Err == nil:
		p.failingSince.Store(nil)
		if !p.isProgrammed {
			p.isProgrammed = true
			close(p.programmed)
		}
	case p.failingSince.Load() == nil:
		p.failingSince.Store(&c.Start)
	}
}

// healthProgress returns since when the dataplane has work to do: changes that wait, a call that
// has not returned, or calls that fail. Until the first call succeeds only failures
// count, because the first list may take long. It may be called from any goroutine.
func (p *progress) healthProgress() health.Progress {
	status := p.status()
	if status.LastSuccess.IsZero() {
		var h health.Progress
		if failing := p.failingSince.Load(); failing != nil {
			h.WaitingSince = *failing
		}
		return h
	}
	h := health.Progress{LastSuccess: status.LastSuccess, WaitingSince: status.PendingSince}
	for _, at := range []*time.Time{&status.CallSince, p.failingSince.Load()} {
		if at != nil && !at.IsZero() && (h.WaitingSince.IsZero() || at.Before(h.WaitingSince)) {
			h.WaitingSince = *at
		}
	}
	return h
}
