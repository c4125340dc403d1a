package agent

import (
	"sync/atomic"
	"time"

	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/sync"
)

// observers passes values to functions. All functions must be added before the first value.
type observers[T any] struct{ functions []func(T) }

func (o *observers[T]) add(f func(T)) { o.functions = append(o.functions, f) }

func (o *observers[T]) notify(value T) {
	for _, f := range o.functions {
		f(value)
	}
}

// progress tracks the calls to the dataplane.
type progress struct {
	status func() sync.Status
	// programmed is closed after the first successful call to the dataplane. isProgrammed
	// prevents closing it twice; only onCommit uses it.
	programmed   chan struct{}
	isProgrammed bool
	// failingSince is the start of the first of consecutive calls that failed completely, nil
	// if the last call succeeded.
	failingSince atomic.Pointer[time.Time]
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

// healthProgress returns the time since when the dataplane has been behind: changes are
// pending, a call is in flight, or calls fail. Until the first success only failures count,
// because the initial list may take long. It is safe for concurrent use.
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
