package agent

import (
	"context"
	"math"
	"os"
	"runtime/debug"
)

// While everything is read and programmed for the first time, a heap that grows
// from nothing would be collected some thirty times, which is a third of the
// processor time of a start. So it may grow by startGrowth beyond what GOGC=50
// allows, and what it has taken goes back to the system when everything is
// programmed. With 10,000 Services of 10 endpoints 125 to 149 MB are the most that is
// ever resident then, and 72 MB stay; without, it would be 112 and 92 MB, with Go's own
// GOGC=100 135 and 105 MB. Twice as much saves another tenth of the time.
const (
	startPercent = 50
	startGrowth  = 32 << 20
)

// startHeap is the garbage collector's setting until all is programmed.
type startHeap struct {
	// reserve is memory that is never touched, and so never resident, but which
	// the collector counts.
	reserve []byte
	// percent is the setting before, which is the one to have afterwards.
	percent int
}

// newStartHeap puts collections off. It returns nil, and changes nothing, if the
// environment says how the memory is to be used (GOGC, GOMEMLIMIT).
func newStartHeap() *startHeap {
	if os.Getenv("GOGC") != "" || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return nil
	}
	percent := debug.SetGCPercent(startPercent)
	return &startHeap{reserve: make([]byte, startGrowth*100/startPercent), percent: percent}
}

// end waits until everything is programmed, and then gives the memory back.
func (h *startHeap) end(ctx context.Context, programmed <-chan struct{}) {
	if h == nil {
		return
	}
	select {
	case <-ctx.Done():
		return
	case <-programmed:
	}
	h.reserve = nil
	debug.SetGCPercent(h.percent)
	debug.FreeOSMemory()
}
