package main

import (
	"math/rand/v2"
	"sync"
	"time"
)

// podSet is a set of pods, one bit each.
type podSet uint32

func (s podSet) contains(pod int) bool { return s&(1<<pod) != 0 }

// nextRandom returns another set of pods that is not empty. It adds, removes or replaces one
// pod, or returns all pods or a single one.
func (s podSet) nextRandom(pods int) podSet {
	all, one := podSet(1)<<pods-1, podSet(1)<<rand.IntN(pods) //nolint:gosec // no secret
	next := s ^ one
	switch rand.IntN(8) { //nolint:gosec // no secret
	case 0:
		next = one
	case 1:
		next = all
	case 2:
		next = s&^(s&-s) | one // replace the lowest
	}
	if next == 0 {
		return one
	}
	return next
}

// endpoints records which pods are endpoints of a Service in one family. Its methods may be
// called concurrently.
type endpoints struct {
	mu      sync.Mutex
	current podSet
	// removedAt is when each pod last stopped being an endpoint. It is zero for a pod that
	// never was one.
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

// change replaces the endpoints by next. write writes them to the API. A removed endpoint is
// stale from the moment that write returns.
func (e *endpoints) change(next podSet, write func() error) error {
	e.mu.Lock()
	before := e.current
	e.current |= next // from now on any of them may answer
	e.mu.Unlock()
	err := write()
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		return err // it is unknown whether the API stored the change: both sets stay valid
	}
	e.current = next
	for pod := range e.removedAt {
		if before.contains(pod) && !next.contains(pod) {
			e.removedAt[pod] = now
		}
	}
	return nil
}

// staleness returns for how long a pod had not been an endpoint at a time, or 0 if it was an
// endpoint at that time or later.
func (e *endpoints) staleness(pod int, at time.Time) time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.current.contains(pod) || e.removedAt[pod].IsZero() {
		return 0
	}
	return max(0, at.Sub(e.removedAt[pod]))
}
