package apiserver

import (
	"log/slog"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// massRemovalMinObjects is the number of objects up to which a list may remove most of
// them at once, unless it removes all.
const massRemovalMinObjects = 10

// removal says what a list would remove: gone of the objects that there were
// before. listed is the number of objects in the list.
type removal struct{ before, removed, listed int }

// isMass reports whether the removal is more likely the fault of an API server,
// such as one with an empty etcd or one of another cluster, than what somebody did.
func (r removal) isMass() bool {
	if 2*r.removed <= r.before {
		return false
	}
	return r.removed > massRemovalMinObjects || r.removed == r.before && r.before > 1
}

// removalHold delays removals when a list lacks more than half of what is programmed,
// until a list that is made after the delay lacks it too. Removals by watch events
// are not its concern. A nil guard holds nothing.
//
// Its methods but heldObjects are called by one goroutine.
type removalHold struct {
	resource resource
	delay    time.Duration
	log      *slog.Logger
	// requestRelist has the list made once more after a time.
	requestRelist func(after time.Duration)
	// programmedServices has the names of the Services that an earlier run of the program
	// has left in the kernel with endpoints. It is called once.
	programmedServices func() map[types.NamespacedName]struct{}
	// onHold, if not nil, is called when removals begin to be held.
	onHold func(resource string, removed, before int)

	programmedNames map[types.NamespacedName]struct{} // what programmed returned
	programmedRead  bool
	since           time.Time // when removals were first held; zero if none are
	decisionLogs    []func()

	mu        sync.Mutex
	heldCount int
}

// active reports whether removals are held.
func (g *removalHold) active() bool { return g != nil && !g.since.IsZero() }

// heldObjects returns the number of objects whose removal is held.
func (g *removalHold) heldObjects() int {
	if g == nil {
		return 0
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.heldCount
}

func (g *removalHold) setHeld(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.heldCount = n
}

// readProgrammed returns what an earlier run has left in the kernel.
func (g *removalHold) readProgrammed() map[types.NamespacedName]struct{} {
	if g == nil || g.programmedServices == nil || g.delay <= 0 {
		return nil
	}
	if !g.programmedRead {
		g.programmedRead, g.programmedNames = true, g.programmedServices()
	}
	return g.programmedNames
}

// decide decides about the removals of a list. The caller calls report when it holds
// no lock.
func (g *removalHold) decide(r removal) bool {
	if g == nil || g.delay <= 0 {
		return false
	}
	attrs := []any{"resource", string(g.resource), "programmed", r.before, "removed", r.removed, "listed", r.listed}
	now := time.Now()
	switch {
	case !r.isMass():
		g.programmedNames = nil
		if g.active() {
			g.since = time.Time{}
			g.setHeld(0)
			g.decisionLogs = append(g.decisionLogs, func() { g.log.Info("list of the API server is complete again; nothing was removed", attrs...) })
		}
		return false
	case !g.active():
		g.since = now
		g.setHeld(r.removed)
		g.requestRelist(g.delay)
		g.decisionLogs = append(g.decisionLogs, func() {
			g.log.Warn("list of the API server lacks more than half of what is programmed; it is listed once more before anything is removed. "+
				"Check that this is the right cluster and that etcd has its data; --mass-removal-delay sets the time",
				append(attrs, "delay", g.delay)...)
			if g.onHold != nil {
				g.onHold(string(g.resource), r.removed, r.before)
			}
		})
		return true
	case now.Sub(g.since) < g.delay:
		g.setHeld(r.removed)
		g.requestRelist(g.delay - now.Sub(g.since))
		return true
	default:
		g.since, g.programmedNames = time.Time{}, nil
		g.setHeld(0)
		g.decisionLogs = append(g.decisionLogs, func() {
			g.log.Warn("list of the API server still lacks more than half of what is programmed; it is removed now", attrs...)
		})
		return false
	}
}

// logDecisions logs what hold has decided.
func (g *removalHold) logDecisions() {
	if g == nil {
		return
	}
	for _, report := range g.decisionLogs {
		report()
	}
	g.decisionLogs = nil
}
