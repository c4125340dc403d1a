package agent

import (
	"context"
	"math"
	"os"
	"runtime/debug"
	"sync/atomic"
)

// Until all Services are programmed for the first time, the heap would be collected some thirty
// times while it grows, which takes a third of the CPU time of a cold start. Therefore it may
// grow further: until the first lists are complete, by startupListGCPercent and startupGrowth bytes,
// because most of its content then is objects that are converted and discarded. Afterwards it
// grows by half until the first commit, and then the memory returns to the operating system.
// docs/design/0021-starts-at-100000-services.md has the measurements.
const (
	startupListGCPercent = 200
	startupGCPercent     = 50
	startupGrowth        = 32 << 20
)

// startupHeap holds the garbage collector settings during a cold start.
type startupHeap struct {
	// reserve is memory that is never touched and therefore never resident, but counts as
	// heap for the garbage collector.
	reserve    []byte
	listsEnded atomic.Bool
	// gcPercent is the previous setting, which releaseAfter restores.
	gcPercent int
}

// newStartupHeap delays garbage collections. It returns nil and changes nothing if GOGC or
// GOMEMLIMIT is set.
func newStartupHeap() *startupHeap {
	if os.Getenv("GOGC") != "" || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return nil
	}
	percent := debug.SetGCPercent(startupListGCPercent)
	return &startupHeap{reserve: make([]byte, startupGrowth*100/startupListGCPercent), gcPercent: percent}
}

// endLists limits the heap more strictly, because the first lists are complete. It may be called
// for each Delta.
func (h *startupHeap) endLists() {
	if h == nil || h.listsEnded.Swap(true) {
		return
	}
	debug.SetGCPercent(startupGCPercent)
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
