package relay

import (
	stdsync "sync"

	"fairlead.io/fairlead/dataplane"
)

// portShare limits a node port to this many times the number of free slots. One busy node
// port gets three quarters of all slots, and n busy node ports get 3/(3n+1) each. A node port
// without connections always finds a free slot, without ending a connection of another one
// (Choudhury and Hahne, Dynamic Queue Length Thresholds, 1998).
const portShare = 3

// admission is the result of a request for a slot.
type admission int

const (
	admitted admission = iota
	rejectedNoSlots
	rejectedPortShare
)

// slots divides the connections of a Relay among its node ports. A client must hold a slot
// while it is connected. Methods may be called concurrently.
type slots struct {
	max int

	mu   stdsync.Mutex
	used int
	// byPort outlives the port, because connections do. It has no zero values.
	byPort map[dataplane.Frontend]int
}

// acquire requests a slot for a client of a node port. If it returns admitted, the caller
// must release the slot.
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
