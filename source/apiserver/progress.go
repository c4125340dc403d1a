package apiserver

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
)

// recovery is why a list or a watch was made anew although the API server had
// reported no error.
type recovery string

const (
	// recoverySilent is a watch without events and bookmarks.
	recoverySilent recovery = "silent"
	// recoveryUnfinished is a streamed list without the closing bookmark.
	recoveryUnfinished recovery = "unfinished"
	// recoveryBackwards is resource versions that went backwards.
	recoveryBackwards recovery = "backwards"
)

func recoveries() []recovery {
	return []recovery{recoverySilent, recoveryUnfinished, recoveryBackwards}
}

// progress counts what arrives of one kind, and remembers what the watch needs to
// know of its predecessors. A nil progress ignores what it is told.
type progress struct {
	resource resource
	log      *slog.Logger
	// requestRelist has the list made once more after a time.
	requestRelist func(after time.Duration)

	events        atomic.Uint64 // watch events, bookmarks and streamed objects
	completeLists atomic.Uint64 // complete lists
	// sendsBookmarks says that the server sends bookmarks while nothing changes.
	sendsBookmarks atomic.Bool
	// requireConsistent says that the next list must not be older than the request.
	requireConsistent atomic.Bool

	mu      sync.Mutex
	version string // everything up to it has arrived
	// newest is the object with the highest version, and newestVersion that version.
	newest        types.NamespacedName
	newestVersion string
	// expectedVersion and found, if not empty, are a version of an object and the lower one that
	// the server has now.
	expectedVersion, foundVersion string
	// watchEnds is when the server ends the last watch, or zero.
	watchEnds time.Time
	// failingSince is when requests began to fail, or zero.
	failingSince time.Time
	// streamingDisabledUntil is when streamed lists are tried again.
	streamingDisabledUntil time.Time
	// silentRequests counts the requests in a row that did not make any progress.
	silentRequests int
	recoveries     map[recovery]uint64
}

func (p *progress) countEvent() {
	if p != nil {
		p.events.Add(1)
	}
}

// onBookmark takes the version of a bookmark.
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

// setVersion takes the version up to which everything has arrived.
func (p *progress) setVersion(version string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !isBefore(version, p.version) { // else the next list reports it
		p.version = version
	}
}

// onReplace takes the version of a complete list.
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
	p.newest, p.newestVersion = types.NamespacedName{}, ""
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

// onObjectChange notes the version of an object.
func (p *progress) onObjectChange(name types.NamespacedName, version string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.newestVersion == "" || isBefore(p.newestVersion, version) {
		p.newest, p.newestVersion = name, version
	}
}

// newestObject returns the object with the highest version, if there is any.
func (p *progress) newestObject() (name types.NamespacedName, version string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.newest, p.newestVersion
}

// recordLowerVersion notes that an object has a lower version than is known.
func (p *progress) recordLowerVersion(known, found string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expectedVersion, p.foundVersion = known, found
}

// isBefore reports whether a is a lower version than b. Versions that are no
// numbers can't be compared.
func isBefore(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order < 0
}

// countRecoveryLocked is for those who hold the lock.
func (p *progress) countRecoveryLocked(r recovery) {
	if p.recoveries == nil {
		p.recoveries = map[recovery]uint64{}
	}
	p.recoveries[r]++
}

// beginWatch notes that a watch is requested, which the server ends after timeout
// seconds. It reports whether the watch before has ended early, and whether
// requests have failed for long.
func (p *progress) beginWatch(timeout *int64) (early, away bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	early = !p.watchEnds.IsZero() && now.Before(p.watchEnds)
	away = !p.failingSince.IsZero() && now.Sub(p.failingSince) > longOutageAfter
	p.watchEnds = time.Time{}
	if timeout != nil {
		p.watchEnds = now.Add(time.Duration(*timeout)*time.Second - earlyMargin)
	}
	return early, away
}

// earlyMargin is how much earlier than asked for a server may end a watch.
const earlyMargin = 10 * time.Second

// recordResponse notes whether a request failed.
func (p *progress) recordResponse(ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case ok:
		p.failingSince = time.Time{}
	case p.failingSince.IsZero():
		p.failingSince = time.Now()
		p.sendsBookmarks.Store(false) // The server that answers next may not send any.
	}
}

// streamingDisabled reports whether lists are not to be streamed now.
func (p *progress) streamingDisabled() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.streamingDisabledUntil)
}

// disableStreaming notes that a streamed list was not finished in time.
func (p *progress) disableStreaming(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.streamingDisabledUntil = now.Add(streamingDisabledFor)
	p.countRecoveryLocked(recoveryUnfinished)
}

// recordProgress notes that something has arrived.
func (p *progress) recordProgress() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silentRequests = 0
}

// recordSilence notes that a request made no progress, and whether that was unexpected. It
// returns how many of them there were in a row.
func (p *progress) recordSilence(unexpected bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silentRequests++
	if unexpected {
		p.countRecoveryLocked(recoverySilent)
	} else {
		p.watchEnds = time.Time{} // The end of the watch does not tell anything of the server.
	}
	return p.silentRequests
}

// onList notes that there is a list, so that there is nothing to verify of the
// watches before.
func (p *progress) onList() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watchEnds = time.Time{}
}
