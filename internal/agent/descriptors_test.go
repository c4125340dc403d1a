package agent

import (
	"math"
	"testing"
)

// TestDivideDescriptors checks the shares, and that they leave a quarter of all descriptors.
func TestDivideDescriptors(t *testing.T) {
	t.Parallel()
	for files, want := range map[uint64]descriptors{
		0:       {1, 1, 1, 1},
		1024:    {64, 128, 128, 32},
		65536:   {4096, 8192, 8192, 256},
		1 << 20: {4096, 65536, 65536, 256},

		math.MaxUint64: {4096, 65536, 65536, 256},
	} {
		got := divideDescriptors(files)
		if got != want {
			t.Errorf("%d files: %+v, want %+v", files, got, want)
		}
		const perRelayConnection, servers = 6, 4
		sum := got.relayConnections*perRelayConnection + got.relayListeners + got.healthCheckListeners + got.serverConnections*servers
		if files >= 64 && uint64(sum) > files/4*3 { //nolint:gosec // positive
			t.Errorf("%d files: shares add up to %d, want at most three quarters", files, sum)
		}
	}
}
