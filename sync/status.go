package sync

import (
	"time"

	"fairlead.io/fairlead/dataplane"
)

// Status is what a [Syncer] was like at one moment.
type Status struct {
	// Services is the number of Services wanted, failing ones included, as of
	// the last step of Run.
	Services int

	// Failing has the keys that are not programmed as wanted, with the reason.
	// What the kernel holds for them is unknown, or nothing where the reason is
	// dataplane.ErrUnsupported. The map is shared and must not be changed.
	Failing map[dataplane.Key]error

	// Err is why the last call failed as a whole, or nil. While it is not nil,
	// nothing that the kernel holds is known.
	Err error

	// LastSuccess is when the last call ended that did not fail as a whole;
	// zero if there was none.
	LastSuccess time.Time

	// PendingSince is when the oldest change was handed over that has not been
	// part of a successful call yet; zero if there is none. Failing keys do
	// not count.
	PendingSince time.Time

	// CallSince is when the call to the dataplane that is in flight began; zero
	// if there is none.
	CallSince time.Time
}

// Status returns a snapshot. It does not block on the kernel, and may be called
// from any goroutine, before, during and after Run.
func (s *Syncer) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.PendingSince = earlier(st.PendingSince, s.inbox.oldestUpdate)
	return st
}

// earlier returns the earlier of two times, of which a zero one means none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}
