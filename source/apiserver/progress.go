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
	kind kind
	log  *slog.Logger
	// again has the list made once more after a time.
	again func(after time.Duration)

	events atomic.Uint64 // watch events, bookmarks and streamed objects
	lists  atomic.Uint64 // complete lists
	// bookmarks says that the server sends bookmarks while nothing changes.
	bookmarks atomic.Bool
	// consistent says that the next list must not be older than the request.
	consistent atomic.Bool

	mu      sync.Mutex
	version string // everything up to it has arrived
	// newest is the object with the highest version, and newestVersion that version.
	newest        types.NamespacedName
	newestVersion string
	// known and found, if not empty, are a version of an object and the lower one that
	// the server has now.
	known, found string
	// ends is when the server ends the last watch, or zero.
	ends time.Time
	// lost is when requests began to fail, or zero.
	lost time.Time
	// unstreamedUntil is when streamed lists are tried again.
	unstreamedUntil time.Time
	// hung counts the requests in a row that did not make any progress.
	hung       int
	recoveries map[recovery]uint64
}

func (p *progress) event() {
	if p != nil {
		p.events.Add(1)
	}
}

// bookmark takes the version of a bookmark.
func (p *progress) bookmark(version string) {
	if p == nil {
		return
	}
	p.event()
	p.bookmarks.Store(true)
	p.mu.Lock()
	back := isBefore(version, p.version)
	p.mu.Unlock()
	if back {
		p.consistent.Store(true)
		p.again(0)
	}
}

// reached takes the version up to which everything has arrived.
func (p *progress) reached(version string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !isBefore(version, p.version) { // else the next list reports it
		p.version = version
	}
}

// replaced takes the version of a complete list.
func (p *progress) replaced(version string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	before := p.version
	back := isBefore(version, before)
	if version != "" {
		p.version = version
	}
	p.hung = 0
	p.newest, p.newestVersion = types.NamespacedName{}, ""
	now := version
	if p.found != "" {
		back, before, now = true, p.known, p.found
		p.known, p.found = "", ""
	}
	if back {
		p.count(recoveryBackwards)
	}
	p.mu.Unlock()
	p.consistent.Store(false)
	p.lists.Add(1)
	if back {
		p.log.Warn("resource versions of the API server went backwards, as after a restore of etcd from a backup; "+
			"what the API server has now is programmed", "resource", string(p.kind), "before", before, "now", now)
	}
}

// changed notes the version of an object.
func (p *progress) changed(name types.NamespacedName, version string) {
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

// foundLower notes that an object has a lower version than is known.
func (p *progress) foundLower(known, found string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known, p.found = known, found
}

// isBefore reports whether a is a lower version than b. Versions that are no
// numbers can't be compared.
func isBefore(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order < 0
}

// count is for those who hold the lock.
func (p *progress) count(r recovery) {
	if p.recoveries == nil {
		p.recoveries = map[recovery]uint64{}
	}
	p.recoveries[r]++
}

// begin notes that a watch is requested, which the server ends after timeout
// seconds. It reports whether the watch before has ended early, and whether
// requests have failed for long.
func (p *progress) begin(timeout *int64) (early, away bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	early = !p.ends.IsZero() && now.Before(p.ends)
	away = !p.lost.IsZero() && now.Sub(p.lost) > awayLimit
	p.ends = time.Time{}
	if timeout != nil {
		p.ends = now.Add(time.Duration(*timeout)*time.Second - earlyMargin)
	}
	return early, away
}

// earlyMargin is how much earlier than asked for a server may end a watch.
const earlyMargin = 10 * time.Second

// answered notes whether a request failed.
func (p *progress) answered(ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case ok:
		p.lost = time.Time{}
	case p.lost.IsZero():
		p.lost = time.Now()
		p.bookmarks.Store(false) // The server that answers next may not send any.
	}
}

// avoidsStreams reports whether lists are not to be streamed now.
func (p *progress) avoidsStreams() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.unstreamedUntil)
}

// unfinished notes that a streamed list was not finished in time.
func (p *progress) unfinished(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unstreamedUntil = now.Add(unstreamedFor)
	p.count(recoveryUnfinished)
}

// moved notes that something has arrived.
func (p *progress) moved() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hung = 0
}

// silent notes that a request made no progress, and whether that was unexpected. It
// returns how many of them there were in a row.
func (p *progress) silent(unexpected bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hung++
	if unexpected {
		p.count(recoverySilent)
	} else {
		p.ends = time.Time{} // The end of the watch does not tell anything of the server.
	}
	return p.hung
}

// listed notes that there is a list, so that there is nothing to verify of the
// watches before.
func (p *progress) listed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ends = time.Time{}
}
