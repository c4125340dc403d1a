package agent

import (
	"context"
	"math"
	"os"
	"runtime/debug"
)

// Until all Services are programmed for the first time, the heap would be collected some thirty
// times while it grows, which takes a third of the CPU time of a cold start. Therefore it may
// grow by startupGrowth bytes beyond the limit of GOGC=50; after the first commit, the memory
// returns to the operating system. With 10,000 Services of 10 endpoints, resident memory peaks
// at 125 to 149 MB and ends at 72 MB. Without startupGrowth these are 112 and 92 MB; with Go's
// default GOGC=100, 135 and 105 MB. Doubling startupGrowth saves another tenth of the time.
const (
	startupGCPercent = 50
	startupGrowth    = 32 << 20
)

// startupHeap holds the garbage collector settings during a cold start.
type startupHeap struct {
	// reserve is memory that is never touched and therefore never resident, but counts as
	// heap for the garbage collector.
	reserve []byte
	// gcPercent is the previous setting, which releaseAfter restores.
	gcPercent int
}

// newStartupHeap delays garbage collections. It returns nil and changes nothing if GOGC or
// GOMEMLIMIT is set.
func newStartupHeap() *startupHeap {
	if os.Getenv("GOGC") != "" || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return nil
	}
	percent := debug.SetGCPercent(startupGCPercent)
	return &startupHeap{reserve: make([]byte, startupGrowth*100/startupGCPercent), gcPercent: percent}
}

// releaseAfter waits for the first commit, restores the settings and frees the memory.
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
