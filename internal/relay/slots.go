package relay

import (
	stdsync "sync"

	"fairlead.io/fairlead/dataplane"
)

// portShare limits a node port to this many times the slots that are free. So one
// busy node port gets three quarters of all slots, n of them 3/(3n+1) each, and a
// node port without connections always finds a free slot, without a connection of
// another one being ended for it (Choudhury and Hahne, Dynamic Queue Length
// Thresholds, 1998).
const portShare = 3

// admission says why a client gets no slot.
type admission int

const (
	admitted admission = iota
	rejectedNoSlots
	rejectedPortShare
)

// slots share the connections of a Relay among its node ports. Methods may be
// called from any goroutine.
type slots struct {
	max int

	mu   stdsync.Mutex
	used int
	// byPort survives the port itself, whose connections outlive it. It has no
	// zeros.
	byPort map[dataplane.Frontend]int
}

// acquire gives a slot to a client of a node port. After admitted, the caller
// releases it.
func (s *slots) acquire(port dataplane.Frontend) admission {
	s.mu.Lock()
	defer s.mu.Unlock()
	free := s.max - s.used
	switch held := s.byPort[port]; {
	case free <= 0:
		return rejectedNoSlots
	case held >= portShare*free:
		return rejectedPortShare
	default:
		s.used++
		s.byPort[port] = held + 1
		return admitted
	}
}

func (s *slots) release(port dataplane.Frontend) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used--
	s.byPort[port]--
	if s.byPort[port] == 0 {
		delete(s.byPort, port)
	}
}
