package apiserver

import (
	"iter"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
)

// recovery is the reason for restarting a list or watch although the API server reported no
// error.
type recovery string

const (
	// recoverySilent is a watch without events and bookmarks.
	recoverySilent recovery = "silent"
	// recoveryUnfinished is a streamed list without its closing bookmark.
	recoveryUnfinished recovery = "unfinished"
	// recoveryBackwards is a resource version lower than before.
	recoveryBackwards recovery = "backwards"
)

func recoveries() []recovery {
	return []recovery{recoverySilent, recoveryUnfinished, recoveryBackwards}
}

// progress counts the events of one resource and keeps the state that a watch needs from
// earlier watches. The methods that a store calls accept a nil progress.
type progress struct {
	resource resource
	log      *slog.Logger
	// requestRelist requests another list after a delay.
	requestRelist func(after time.Duration)

	events        atomic.Uint64 // watch events, bookmarks and objects of streamed lists
	completeLists atomic.Uint64 // number of complete lists
	// sendsBookmarks is true if the server sends bookmarks while nothing changes.
	sendsBookmarks atomic.Bool
	// requireConsistent is true if the next list must not be served from a cache older than
	// the request.
	requireConsistent atomic.Bool

	mu      sync.Mutex
	version string // all changes up to this resource version have arrived
	// newest is the object with the highest resource version.
	newest newestObject
	// unverified, if not nil, is the state that the server's data must continue. It is set when
	// a watch ends early, and cleared by a successful check and by a list.
	unverified *knownState
	// expectedVersion and foundVersion, if not empty, are a known version of an object and
	// the lower version that the server returned.
	expectedVersion, foundVersion string
	// watchEnds is when the server is due to end the current watch, or zero.
	watchEnds time.Time
	// failingSince is when requests started to fail, or zero.
	failingSince time.Time
	// streamingDisabledUntil is when streamed lists are tried again.
	streamingDisabledUntil time.Time
	// silentRequests counts consecutive requests without any progress.
	silentRequests int
	recoveries     map[recovery]uint64
}

// newestObject is the last known change of an object. Its version is empty if none is known.
type newestObject struct {
	name    types.NamespacedName
	version string
	deleted bool
}

// knownState is the state of a resource before a watch.
type knownState struct {
	version string // all changes up to this resource version have arrived
	newest  newestObject
}

func (p *progress) countEvent() {
	if p != nil {
		p.events.Add(1)
	}
}

// onBookmark handles a bookmark. If its version is lower than before, it requests a list.
func (p *progress) onBookmark(version string) {
	if p == nil {
		return
	}
	p.countEvent()
	p.sendsBookmarks.Store(true)
	p.mu.Lock()
	back := isBefore(version, p.version)
	p.mu.Unlock()
	if back {
		p.requireConsistent.Store(true)
		p.requestRelist(0)
	}
}

// setVersion records that all changes up to version have arrived.
func (p *progress) setVersion(version string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !isBefore(version, p.version) { // the next list reports a lower version
		p.version = version
	}
}

// onReplace records a complete list with its version, and reports if versions went
// backwards.
func (p *progress) onReplace(version string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	before := p.version
	back := isBefore(version, before)
	if version != "" {
		p.version = version
	}
	p.silentRequests = 0
	p.newest, p.unverified = newestObject{}, nil
	now := version
	if p.foundVersion != "" {
		back, before, now = true, p.expectedVersion, p.foundVersion
		p.expectedVersion, p.foundVersion = "", ""
	}
	if back {
		p.countRecoveryLocked(recoveryBackwards)
	}
	p.mu.Unlock()
	p.requireConsistent.Store(false)
	p.completeLists.Add(1)
	if back {
		p.log.Warn("resource versions of the API server went backwards, as after a restore of etcd from a backup; "+
			"what the API server has now is programmed", "resource", string(p.resource), "before", before, "now", now)
	}
}

// onObjectChange records the version of an object, or of its deletion.
func (p *progress) onObjectChange(name types.NamespacedName, version string, deleted bool) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.newest.version == "" || isBefore(p.newest.version, version) {
		p.newest = newestObject{name: name, version: version, deleted: deleted}
	}
}

// beginVerification returns the state that the server's data must continue, for a watch that
// begins at version. It returns nil if no verification is needed. An earlier state that is not
// verified takes precedence: a watch may have delivered newer changes since.
func (p *progress) beginVerification(endedEarly bool, version string) *knownState {
	p.mu.Lock()
	defer p.mu.Unlock()
	if endedEarly && p.unverified == nil {
		p.unverified = &knownState{version: version, newest: p.newest}
	}
	return p.unverified
}

// endVerification records that the server's data continue the known state.
func (p *progress) endVerification() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unverified = nil
}

// isNewestDeletion reports whether the last known change is the deletion of an object.
func (p *progress) isNewestDeletion(name types.NamespacedName) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.newest.deleted && p.newest.name == name
}

// checkListed records it if a list has a lower version of the newest known object. It takes the
// names and versions of the list.
func (p *progress) checkListed(objects iter.Seq2[types.NamespacedName, string]) {
	if p == nil {
		return
	}
	p.mu.Lock()
	newest := p.newest
	if p.unverified != nil {
		newest = p.unverified.newest
	}
	p.mu.Unlock()
	for name, version := range objects {
		if name == newest.name && isBefore(version, newest.version) {
			p.recordLowerVersion(newest.version, version)
		}
	}
}

// recordLowerVersion records that the server has a lower version of an object than known.
func (p *progress) recordLowerVersion(known, found string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expectedVersion, p.foundVersion = known, found
}

// isBefore reports whether version a is lower than b. Versions that are not numbers can't
// be compared: it then returns false.
func isBefore(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order < 0
}

// countRecoveryLocked counts a recovery. The caller holds mu.
func (p *progress) countRecoveryLocked(r recovery) {
	if p.recoveries == nil {
		p.recoveries = map[recovery]uint64{}
	}
	p.recoveries[r]++
}

// beginWatch records a watch request that the server ends after timeout seconds. It reports
// whether the previous watch ended early, and whether requests failed for longer than
// longOutageAfter.
func (p *progress) beginWatch(timeout *int64) (early, longOutage bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	early = !p.watchEnds.IsZero() && now.Before(p.watchEnds)
	longOutage = !p.failingSince.IsZero() && now.Sub(p.failingSince) > longOutageAfter
	p.watchEnds = time.Time{}
	if timeout != nil {
		p.watchEnds = now.Add(time.Duration(*timeout)*time.Second - earlyMargin)
	}
	return early, longOutage
}

// earlyMargin is how much earlier than requested a server may end a watch.
const earlyMargin = 10 * time.Second

// recordResponse records whether a request succeeded.
func (p *progress) recordResponse(ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case ok:
		p.failingSince = time.Time{}
	case p.failingSince.IsZero():
		p.failingSince = time.Now()
		p.sendsBookmarks.Store(false) // another server may answer next
	}
}

// streamingDisabled reports whether lists must not be streamed for now.
func (p *progress) streamingDisabled() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.streamingDisabledUntil)
}

// disableStreaming disables streamed lists for streamingDisabledFor, because a streamed
// list did not finish in time.
func (p *progress) disableStreaming(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.streamingDisabledUntil = now.Add(streamingDisabledFor)
	p.countRecoveryLocked(recoveryUnfinished)
}

// recordProgress records that data arrived.
func (p *progress) recordProgress() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silentRequests = 0
}

// recordSilence records a request without progress, and whether that is unexpected. It
// returns the number of consecutive such requests.
func (p *progress) recordSilence(unexpected bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silentRequests++
	if unexpected {
		p.countRecoveryLocked(recoverySilent)
	} else {
		p.watchEnds = time.Time{} // ending this watch early says nothing about the server
	}
	return p.silentRequests
}

// onList records that a list was received, so that the next watch need not verify versions.
func (p *progress) onList() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watchEnds = time.Time{}
}
