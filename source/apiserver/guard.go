package apiserver

import (
	"log/slog"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// massRemovalFloor is the number of objects up to which a list may remove most of
// them at once, unless it removes all.
const massRemovalFloor = 10

// removal says what a list would remove: gone of the objects that there were
// before. listed is the number of objects in the list.
type removal struct{ before, gone, listed int }

// isMass reports whether the removal is more likely the fault of an API server,
// such as one with an empty etcd or one of another cluster, than what somebody did.
func (r removal) isMass() bool {
	if 2*r.gone <= r.before {
		return false
	}
	return r.gone > massRemovalFloor || r.gone == r.before && r.before > 1
}

// guard delays removals when a list lacks more than half of what is programmed,
// until a list that is made after the delay lacks it too. Removals by watch events
// are not its concern. A nil guard holds nothing.
//
// Its methods but heldObjects are called by one goroutine.
type guard struct {
	kind  kind
	delay time.Duration
	log   *slog.Logger
	// again has the list made once more after a time.
	again func(after time.Duration)
	// programmed has the names of the Services that an earlier run of the program
	// has left in the kernel with endpoints. It is called once.
	programmed func() map[types.NamespacedName]struct{}
	// onHold, if not nil, is called when removals begin to be held.
	onHold func(resource string, removed, before int)

	left    map[types.NamespacedName]struct{} // what programmed returned
	asked   bool
	since   time.Time // when removals were first held; zero if none are
	reports []func()

	mu   sync.Mutex
	held int
}

// holds reports whether removals are held.
func (g *guard) holds() bool { return g != nil && !g.since.IsZero() }

// heldObjects returns the number of objects whose removal is held.
func (g *guard) heldObjects() int {
	if g == nil {
		return 0
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.held
}

func (g *guard) setHeld(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = n
}

// takeProgrammed returns what an earlier run has left in the kernel.
func (g *guard) takeProgrammed() map[types.NamespacedName]struct{} {
	if g == nil || g.programmed == nil || g.delay <= 0 {
		return nil
	}
	if !g.asked {
		g.asked, g.left = true, g.programmed()
	}
	return g.left
}

// hold decides about the removals of a list. The caller calls report when it holds
// no lock.
func (g *guard) hold(r removal) bool {
	if g == nil || g.delay <= 0 {
		return false
	}
	attrs := []any{"resource", string(g.kind), "programmed", r.before, "removed", r.gone, "listed", r.listed}
	now := time.Now()
	switch {
	case !r.isMass():
		g.left = nil
		if g.holds() {
			g.since = time.Time{}
			g.setHeld(0)
			g.reports = append(g.reports, func() { g.log.Info("list of the API server is complete again; nothing was removed", attrs...) })
		}
		return false
	case !g.holds():
		g.since = now
		g.setHeld(r.gone)
		g.again(g.delay)
		g.reports = append(g.reports, func() {
			g.log.Warn("list of the API server lacks more than half of what is programmed; it is listed once more before anything is removed. "+
				"Check that this is the right cluster and that etcd has its data; --mass-removal-delay sets the time",
				append(attrs, "delay", g.delay)...)
			if g.onHold != nil {
				g.onHold(string(g.kind), r.gone, r.before)
			}
		})
		return true
	case now.Sub(g.since) < g.delay:
		g.setHeld(r.gone)
		g.again(g.delay - now.Sub(g.since))
		return true
	default:
		g.since, g.left = time.Time{}, nil
		g.setHeld(0)
		g.reports = append(g.reports, func() {
			g.log.Warn("list of the API server still lacks more than half of what is programmed; it is removed now", attrs...)
		})
		return false
	}
}

// report logs what hold has decided.
func (g *guard) report() {
	if g == nil {
		return
	}
	for _, report := range g.reports {
		report()
	}
	g.reports = nil
}
