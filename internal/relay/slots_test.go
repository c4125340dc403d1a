package relay

import (
	"fmt"
	"net/netip"
	"testing"

	"fairlead.io/fairlead/dataplane"
)

func nodePortFrontend(port int) dataplane.Frontend {
	return dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(port))} //nolint:gosec // small
}

// TestSlotSharing checks that another node port gets a slot however many node ports hold all
// the slots they can get.
func TestSlotSharing(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		max, busy int
		each      int // minimum number of slots of a busy node port
		newcomer  int // minimum number of slots of a node port that starts later
	}{
		{4096, 1, 3072, 768},
		{4096, 2, 1755, 438},
		{4096, 100, 40, 9},
		{16, 1, 12, 3},
		{1, 1, 1, 0},
	} {
		t.Run(fmt.Sprintf("%d slots and %d busy ports", test.max, test.busy), func(t *testing.T) {
			t.Parallel()
			s := &slots{max: test.max, byPort: map[dataplane.Frontend]int{}}
			for more := true; more; { // round-robin, until no port gets another slot
				more = false
				for port := range test.busy {
					more = s.acquire(nodePortFrontend(port)) == admitted || more
				}
			}
			for port := range test.busy {
				if got := s.byPort[nodePortFrontend(port)]; got < test.each {
					t.Errorf("port %d has %d slots, want at least %d", port, got, test.each)
				}
			}
			if got := s.acquire(nodePortFrontend(0)); got == admitted {
				t.Error("the first port gets another slot")
			}
			newcomer := nodePortFrontend(test.busy)
			var got int
			for s.acquire(newcomer) == admitted {
				got++
			}
			if got < test.newcomer {
				t.Errorf("a node port that starts later gets %d slots, want at least %d", got, test.newcomer)
			}
			// The shares converge as connections of the busy ports end and new ones begin.
			all := append([]dataplane.Frontend{newcomer}, make([]dataplane.Frontend, test.busy)...)
			for port := range test.busy {
				all[port+1] = nodePortFrontend(port)
			}
			for range 20 * test.max {
				for _, f := range all {
					if s.byPort[f] > 0 {
						s.release(f)
					}
				}
				for _, f := range all {
					for range 2 {
						s.acquire(f)
					}
				}
			}
			for _, f := range all[1:] {
				if a, b := s.byPort[f], s.byPort[newcomer]; a-b > 2+test.max/len(all)/4 && test.max > 1 {
					t.Errorf("shares do not converge: %d and %d slots", a, b)
				}
			}
			for _, f := range all {
				for s.byPort[f] > 0 {
					s.release(f)
				}
			}
			if s.used != 0 || len(s.byPort) != 0 {
				t.Errorf("%d slots in use by %v after all were released", s.used, s.byPort)
			}
		})
	}
}
