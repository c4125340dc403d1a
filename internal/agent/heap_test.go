package agent

import (
	"context"
	"runtime/debug"
	"testing"
)

// TestStartupHeap checks that garbage collections are delayed until all Services are programmed, and
// that GOGC and GOMEMLIMIT prevent this.
func TestStartupHeap(t *testing.T) {
	percent := func() int {
		p := debug.SetGCPercent(100)
		debug.SetGCPercent(p)
		return p
	}
	debug.SetGCPercent(70)
	t.Cleanup(func() { debug.SetGCPercent(100) })

	programmed := make(chan struct{})
	h := newStartupHeap()
	if got := percent(); h == nil || got != startupListGCPercent || len(h.reserve) == 0 {
		t.Fatalf("startup: GC percent %d, reserve %t; want %d and a reserve", got, h != nil, startupListGCPercent)
	}
	for range 2 { // for each Delta
		h.endLists()
		if got := percent(); got != startupGCPercent || len(h.reserve) == 0 {
			t.Fatalf("after the first lists: GC percent %d; want %d and a reserve", got, startupGCPercent)
		}
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	h.releaseAfter(stopped, programmed) // must return although programmed is still open
	close(programmed)
	h.releaseAfter(t.Context(), programmed)
	h.endLists()
	if got := percent(); got != 70 || h.reserve != nil {
		t.Errorf("after startup: GC percent %d, reserve %t; want 70 and no reserve", got, h.reserve != nil)
	}

	t.Setenv("GOGC", "80")
	if h := newStartupHeap(); h != nil || percent() != 70 {
		t.Error("settings changed although GOGC is set")
	}
	t.Setenv("GOGC", "")
	limit := debug.SetMemoryLimit(1 << 30)
	t.Cleanup(func() { debug.SetMemoryLimit(limit) })
	if h := newStartupHeap(); h != nil || percent() != 70 {
		t.Error("settings changed although a memory limit is set")
	}
	(*startupHeap)(nil).endLists()
	(*startupHeap)(nil).releaseAfter(t.Context(), nil)
}
