package apiserver

import (
	"log/slog"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// massRemovalMinObjects is the number of objects up to which a list may remove most of them
// at once, unless it removes all.
const massRemovalMinObjects = 10

// removal describes what a list would remove. before is the number of known objects,
// removed the number of those missing from the list, and listed the number of objects in
// the list.
type removal struct{ before, removed, listed int }

// isMass reports whether the removal is more likely caused by a broken API server, such as
// one with an empty etcd or of another cluster, than by a user.
func (rm removal) isMass() bool {
	if 2*rm.removed <= rm.before {
		return false
	}
	return rm.removed > massRemovalMinObjects || rm.removed == rm.before && rm.before > 1
}

// removalHold holds removals when a list lacks more than half of the programmed objects,
// until a list made after the delay confirms them. Removals by watch events are not held. A
// nil removalHold holds nothing.
//
// All methods except heldObjects must be called from one goroutine.
type removalHold struct {
	resource resource
	delay    time.Duration
	log      *slog.Logger
	// requestRelist requests another list after a delay.
	requestRelist func(after time.Duration)
	// programmedServices returns the names of the Services for which an earlier run of the
	// program left endpoints in the kernel. It is called once.
	programmedServices func() map[types.NamespacedName]struct{}
	// onHold, if not nil, is called when removals start to be held.
	onHold func(resource string, removed, before int)

	programmedNames map[types.NamespacedName]struct{} // result of programmedServices
	programmedRead  bool
	since           time.Time // when removals were first held; zero if none are held
	decisionLogs    []func()

	mu        sync.Mutex
	heldCount int
}

// active reports whether removals are held.
func (h *removalHold) active() bool { return h != nil && !h.since.IsZero() }

// heldObjects returns the number of objects whose removal is held.
func (h *removalHold) heldObjects() int {
	if h == nil {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.heldCount
}

func (h *removalHold) setHeld(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.heldCount = n
}

// readProgrammed returns the Services that an earlier run left in the kernel.
func (h *removalHold) readProgrammed() map[types.NamespacedName]struct{} {
	if h == nil || h.programmedServices == nil || h.delay <= 0 {
		return nil
	}
	if !h.programmedRead {
		h.programmedRead, h.programmedNames = true, h.programmedServices()
	}
	return h.programmedNames
}

// decide reports whether to hold the removals of a list. The caller calls logDecisions
// after it releases its locks.
func (h *removalHold) decide(rm removal) bool {
	if h == nil || h.delay <= 0 {
		return false
	}
	attrs := []any{"resource", string(h.resource), "programmed", rm.before, "removed", rm.removed, "listed", rm.listed}
	now := time.Now()
	switch {
	case !rm.isMass():
		h.programmedNames = nil
		if h.active() {
			h.since = time.Time{}
			h.setHeld(0)
			h.decisionLogs = append(h.decisionLogs, func() { h.log.Info("list from the API server is complete again; nothing was removed", attrs...) })
		}
		return false
	case !h.active():
		h.since = now
		h.setHeld(rm.removed)
		h.requestRelist(h.delay)
		h.decisionLogs = append(h.decisionLogs, func() {
			h.log.Warn("list from the API server lacks more than half of the programmed objects; nothing is removed until another list confirms it. "+
				"Check that this is the right cluster and that etcd has its data; --mass-removal-delay sets the delay",
				append(attrs, "delay", h.delay)...)
			if h.onHold != nil {
				h.onHold(string(h.resource), rm.removed, rm.before)
			}
		})
		return true
	case now.Sub(h.since) < h.delay:
		h.setHeld(rm.removed)
		h.requestRelist(h.delay - now.Sub(h.since))
		return true
	default:
		h.since, h.programmedNames = time.Time{}, nil
		h.setHeld(0)
		h.decisionLogs = append(h.decisionLogs, func() {
			h.log.Warn("list from the API server still lacks more than half of the programmed objects; removing them now", attrs...)
		})
		return false
	}
}

// logDecisions logs the results of decide.
func (h *removalHold) logDecisions() {
	if h == nil {
		return
	}
	for _, report := range h.decisionLogs {
		report()
	}
	h.decisionLogs = nil
}
