package sync

import (
	"time"

	"fairlead.io/fairlead/dataplane"
)

// Status is a snapshot of the state of a [Syncer].
type Status struct {
	// Services is the number of desired Services, including failing ones, as of the last step of
	// Run.
	Services int

	// Failing contains the keys that are not programmed as desired, with the error of the last
	// attempt. The kernel's state for them is unknown, or empty if the error is
	// dataplane.ErrUnsupported. The map is shared and must not be modified.
	Failing map[dataplane.Key]error

	// Err is the error of the last call if it failed as a whole, and nil otherwise. While it is
	// not nil, the state of every key in the kernel is unknown.
	Err error

	// LastSuccess is the end of the last call that did not fail as a whole. It is zero before the
	// first such call.
	LastSuccess time.Time

	// PendingSince is the time of the oldest update that has not been part of a successful call
	// yet, or zero if no update is pending. Updates of failing keys do not count.
	PendingSince time.Time

	// CallSince is the start of the dataplane call that is in flight, or zero if none is.
	CallSince time.Time
}

// Status returns a snapshot. It does not wait for the kernel and may be called from any
// goroutine, before, during and after Run.
func (s *Syncer) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.PendingSince = earlier(st.PendingSince, s.inbox.oldestUpdate)
	return st
}

// earlier returns the earlier of two times. A zero time is ignored.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}
