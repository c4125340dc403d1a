package main

import (
	"math/rand/v2"
	"sync"
	"time"
)

// podSet is a set of pods, a bit for each.
type podSet uint32

func (s podSet) contains(pod int) bool { return s&(1<<pod) != 0 }

// nextRandom returns another set of pods that is not empty: one pod more, less or
// replaced, or all of them, or one alone.
func (s podSet) nextRandom(pods int) podSet {
	all, one := podSet(1)<<pods-1, podSet(1)<<rand.IntN(pods) //nolint:gosec // no secret
	next := s ^ one
	switch rand.IntN(8) { //nolint:gosec // no secret
	case 0:
		next = one
	case 1:
		next = all
	case 2:
		next = s&^(s&-s) | one // replaces the lowest
	}
	if next == 0 {
		return one
	}
	return next
}

// endpoints remembers which pods are endpoints of a Service in one family. Its
// methods may be called concurrently.
type endpoints struct {
	mu      sync.Mutex
	current podSet
	// removedAt says when a pod that is no endpoint was one for the last time. It is
	// zero for a pod that never was one.
	removedAt []time.Time
}

func newEndpoints(pods int) *endpoints {
	return &endpoints{current: 1<<pods - 1, removedAt: make([]time.Time, pods)}
}

func (e *endpoints) pods() podSet {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.current
}

// change makes next the endpoints. write writes them to the API, and its return is
// the moment from which a removed endpoint is stale.
func (e *endpoints) change(next podSet, write func() error) error {
	e.mu.Lock()
	before := e.current
	e.current |= next // From now on any of them may answer.
	e.mu.Unlock()
	err := write()
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		return err // Nobody knows whether it was written: both sets stay valid.
	}
	e.current = next
	for pod := range e.removedAt {
		if before.contains(pod) && !next.contains(pod) {
			e.removedAt[pod] = now
		}
	}
	return nil
}

// staleness returns for how long a pod had not been an endpoint at a time, or 0
// if it was one at that time or later.
func (e *endpoints) staleness(pod int, at time.Time) time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.current.contains(pod) || e.removedAt[pod].IsZero() {
		return 0
	}
	return max(0, at.Sub(e.removedAt[pod]))
}
