package agent

import (
	"context"
	"math"
	"os"
	"runtime/debug"
)

// While everything is read and programmed for the first time, a heap that grows
// from nothing would be collected some thirty times, which is a third of the
// processor time of a start. So it may grow by startupGrowth beyond what GOGC=50
// allows, and what it has taken goes back to the system when everything is
// programmed. With 10,000 Services of 10 endpoints 125 to 149 MB are the most that is
// ever resident then, and 72 MB stay; without, it would be 112 and 92 MB, with Go's own
// GOGC=100 135 and 105 MB. Twice as much saves another tenth of the time.
const (
	startupGCPercent = 50
	startupGrowth    = 32 << 20
)

// startupHeap is the garbage collector's setting until all is programmed.
type startupHeap struct {
	// reserve is memory that is never touched, and so never resident, but which
	// the collector counts.
	reserve []byte
	// gcPercent is the setting before, which is the one to have afterwards.
	gcPercent int
}

// newStartupHeap puts collections off. It returns nil, and changes nothing, if the
// environment says how the memory is to be used (GOGC, GOMEMLIMIT).
func newStartupHeap() *startupHeap {
	if os.Getenv("GOGC") != "" || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return nil
	}
	percent := debug.SetGCPercent(startupGCPercent)
	return &startupHeap{reserve: make([]byte, startupGrowth*100/startupGCPercent), gcPercent: percent}
}

// releaseAfter waits until everything is programmed, and then gives the memory back.
func (h *startupHeap) releaseAfter(ctx context.Context, programmed <-chan struct{}) {
	if h == nil {
		return
	}
	select {
	case <-ctx.Done():
		return
	case <-programmed:
	}
	h.reserve = nil
	debug.SetGCPercent(h.gcPercent)
	debug.FreeOSMemory()
}
