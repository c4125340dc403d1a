package agent

import (
	"context"
	"runtime/debug"
	"testing"
)

// TestStartupHeap says that collections are put off until everything is programmed,
// and that who sets GOGC or GOMEMLIMIT gets what they say.
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
	if got := percent(); h == nil || got != startupGCPercent || len(h.reserve) == 0 {
		t.Fatalf("at the start collections are at %d %%, with a reserve %v; want %d %%, and one", got, h != nil, startupGCPercent)
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	h.releaseAfter(stopped, programmed) // returns, or the program would not stop
	close(programmed)
	h.releaseAfter(t.Context(), programmed)
	if got := percent(); got != 70 || h.reserve != nil {
		t.Errorf("afterwards collections are at %d %%, with a reserve %v; want the 70 of before, and none", got, h.reserve != nil)
	}

	t.Setenv("GOGC", "80")
	if h := newStartupHeap(); h != nil || percent() != 70 {
		t.Error("something was changed although GOGC is set")
	}
	t.Setenv("GOGC", "")
	limit := debug.SetMemoryLimit(1 << 30)
	t.Cleanup(func() { debug.SetMemoryLimit(limit) })
	if h := newStartupHeap(); h != nil || percent() != 70 {
		t.Error("something was changed although there is a limit")
	}
	(*startupHeap)(nil).releaseAfter(t.Context(), nil)
}
