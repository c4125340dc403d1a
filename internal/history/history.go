// Package history remembers the last changes of Services and the last events of the node, such as
// repairs of drift. Its memory is bounded, and the cost of recording a commit depends only on the
// changes in that commit.
package history

import (
	"fmt"
	"net/netip"
	"slices"
	stdsync "sync"
	"sync/atomic"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/sync"
)

// Bounds of a Recorder.
const (
	maxChanges          = 512
	maxEvents           = 128
	maxChangesPerCommit = 64
	maxTriggers         = 1024
	maxNamedEndpoints   = 3
)

// Action is the effect of a Change.
type Action string

// Actions.
const (
	Added   Action = "added"
	Updated Action = "updated"
	Removed Action = "removed"
	Failed  Action = "failed"
)

// Change describes a change of a Service that reached the kernel, or failed to.
type Change struct {
	Time   time.Time
	Key    dataplane.Key
	Action Action
	// Before and After are the numbers of endpoints.
	Before, After int
	// AddedEndpoints and RemovedEndpoints contain the first endpoints that only one of the two
	// states has.
	AddedEndpoints, RemovedEndpoints []netip.AddrPort
	// Latency is the time from the arrival of the oldest change in the commit until the kernel
	// acknowledged the commit.
	Latency time.Duration
	// SinceTrigger is the time from the change of the endpoints in the API, by the clock of the
	// EndpointSlice controller, until the kernel acknowledged it. It is zero if it is unknown.
	SinceTrigger time.Duration
	// Err is the reason of a failure.
	Err string
}

// EventKind is the kind of an Event.
type EventKind string

// Kinds of events. The other kinds are the reasons of commits, such as start and drift.
const (
	Rebuild    EventKind = "rebuild"
	OtherProxy EventKind = "other-proxy"
	Reload     EventKind = "reload"
)

// Event describes an event of the node. Consecutive events with the same kind and message are one
// Event.
type Event struct {
	First, Last time.Time
	Count       int
	Kind        EventKind
	Message     string
	// Failed reports that the event is an error.
	Failed bool
	// Duration is the duration of the last commit, zero for other events.
	Duration time.Duration
}

// Totals counts since the start of the process.
type Totals struct {
	Commits, Changes, Failures uint64
	DriftRepairs, Rebuilds     uint64
	LastDriftRepair            time.Time
	LastCommit                 time.Time
}

// Recorder records changes and events. Its methods are safe for concurrent use.
type Recorder struct {
	started time.Time
	version atomic.Uint64

	mu      stdsync.Mutex
	changes ring[Change]
	events  ring[Event]
	totals  Totals
	// triggers contains the time of the oldest change of endpoints that no commit contained yet.
	triggers map[service]time.Time
	// failing contains the last recorded error of keys, so that retries are recorded once.
	failing map[dataplane.Key]string
}

type service struct{ namespace, name string }

// New returns an empty Recorder.
func New() *Recorder {
	return &Recorder{
		started:  time.Now(),
		changes:  ring[Change]{limit: maxChanges},
		events:   ring[Event]{limit: maxEvents},
		triggers: map[service]time.Time{},
		failing:  map[dataplane.Key]string{},
	}
}

// Version returns a number that changes with each record.
func (r *Recorder) Version() uint64 { return r.version.Load() }

// Totals returns the counts.
func (r *Recorder) Totals() Totals {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.totals
}

// Changes returns up to limit changes, the latest first. A limit of 0 means all.
func (r *Recorder) Changes(limit int) []Change {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changes.latest(limit)
}

// Events returns up to limit events, the latest first. A limit of 0 means all.
func (r *Recorder) Events(limit int) []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.events.latest(limit)
}

// RecordTrigger records that endpoints of a Service changed at the given time, which is from
// another machine's clock. It ignores times before the start of the process.
func (r *Recorder) RecordTrigger(namespace, name string, at time.Time) {
	if at.Before(r.started) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.triggers) >= maxTriggers {
		clear(r.triggers)
	}
	if _, ok := r.triggers[service{namespace, name}]; !ok {
		r.triggers[service{namespace, name}] = at
	}
}

// RecordEvent records an event that is not a commit.
func (r *Recorder) RecordEvent(kind EventKind, failed bool, message string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if kind == Rebuild {
		r.totals.Rebuilds++
	}
	now := time.Now()
	r.addEvent(Event{First: now, Last: now, Count: 1, Kind: kind, Message: message, Failed: failed})
	r.version.Add(1)
}

// OnCommit records a call to the dataplane; see [sync.Options].
func (r *Recorder) OnCommit(c sync.Commit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.version.Add(1)
	r.totals.Commits++
	r.totals.LastCommit = c.End
	if c.Err != nil {
		r.totals.Failures++
		r.addCommitEvent(c, "the commit failed: "+c.Err.Error())
		return
	}
	if c.Reason == sync.ReasonDrift {
		r.totals.DriftRepairs++
		r.totals.LastDriftRepair = c.End
	}
	if message := successMessage(c); message != "" {
		r.addCommitEvent(c, message)
	}
	if c.Reason != sync.ReasonStart {
		r.addChanges(c)
	}
	r.addFailures(c)
}

// successMessage describes a commit, empty for commits that are listed as changes only.
func successMessage(c sync.Commit) string {
	switch c.Reason {
	case sync.ReasonStart:
		return "all Services were programmed for the first time"
	case sync.ReasonRetry:
		return "failed Services were programmed again"
	case sync.ReasonNode:
		return "the node's addresses or settings changed"
	case sync.ReasonDrift:
		return "changes by another program were repaired"
	case sync.ReasonResync:
		return "the kernel was compared with the desired state"
	case sync.ReasonChange:
		if len(c.Changes) > maxChangesPerCommit {
			return fmt.Sprintf("%d Service ports changed at once; only the first %d are listed", len(c.Changes), maxChangesPerCommit)
		}
	}
	return ""
}

func (r *Recorder) addCommitEvent(c sync.Commit, message string) {
	r.addEvent(Event{
		First: c.End, Last: c.End, Count: 1, Kind: EventKind(c.Reason), Message: message, Failed: c.Err != nil, Duration: c.End.Sub(c.Start),
	})
}

// addEvent adds an event, or counts it with the last event if that is the same.
func (r *Recorder) addEvent(e Event) {
	if last := r.events.last(); last != nil && last.Kind == e.Kind && last.Message == e.Message {
		last.Count++
		last.Last, last.Duration = e.Last, e.Duration
		return
	}
	r.events.add(e)
}

func (r *Recorder) addChanges(c sync.Commit) {
	r.totals.Changes += uint64(len(c.Changes))
	var latency time.Duration
	if !c.OldestUpdate.IsZero() {
		latency = c.End.Sub(c.OldestUpdate)
	}
	for i, change := range c.Changes {
		key := change.Key()
		if len(r.failing) > 0 {
			delete(r.failing, key)
		}
		if i >= maxChangesPerCommit {
			continue
		}
		record := Change{Time: c.End, Key: key, Latency: latency}
		switch {
		case change.Old == nil:
			record.Action, record.After = Added, len(change.New.Endpoints)
		case change.New == nil:
			record.Action, record.Before = Removed, len(change.Old.Endpoints)
		default:
			record.Action, record.Before, record.After = Updated, len(change.Old.Endpoints), len(change.New.Endpoints)
			record.AddedEndpoints, record.RemovedEndpoints = compareEndpoints(change.Old.Endpoints, change.New.Endpoints)
		}
		if at, ok := r.triggers[service{key.Namespace, key.Name}]; ok {
			record.SinceTrigger = max(0, c.End.Sub(at))
		}
		r.changes.add(record)
	}
	if len(r.triggers) > 0 {
		for _, change := range c.Changes {
			delete(r.triggers, service{change.Key().Namespace, change.Key().Name})
		}
	}
}

// addFailures records keys that failed with a new error.
func (r *Recorder) addFailures(c sync.Commit) {
	added := 0
	for key, err := range c.Failed {
		text := err.Error()
		if r.failing[key] == text || added == maxChangesPerCommit {
			continue
		}
		added++
		if len(r.failing) >= maxTriggers {
			clear(r.failing)
		}
		r.failing[key] = text
		r.totals.Failures++
		r.changes.add(Change{Time: c.End, Key: key, Action: Failed, Err: text})
	}
}

// compareEndpoints returns the first endpoints that only one of two sorted lists has.
func compareEndpoints(before, after []dataplane.Endpoint) (added, removed []netip.AddrPort) {
	for len(before)+len(after) > 0 && (len(added) < maxNamedEndpoints || len(removed) < maxNamedEndpoints) {
		var order int
		switch {
		case len(before) == 0:
			order = 1
		case len(after) == 0:
			order = -1
		default:
			order = before[0].Addr.Compare(after[0].Addr)
		}
		switch {
		case order == 0:
			before, after = before[1:], after[1:]
		case order < 0:
			if len(removed) < maxNamedEndpoints {
				removed = append(removed, before[0].Addr)
			}
			before = before[1:]
		default:
			if len(added) < maxNamedEndpoints {
				added = append(added, after[0].Addr)
			}
			after = after[1:]
		}
	}
	return added, removed
}

// ring contains the last values that were added, up to a limit.
type ring[T any] struct {
	limit  int
	values []T
	next   int // index of the oldest value once the ring is full
}

func (r *ring[T]) add(value T) {
	if len(r.values) < r.limit {
		r.values = append(r.values, value)
		return
	}
	r.values[r.next] = value
	r.next = (r.next + 1) % r.limit
}

// last returns the latest value, nil for an empty ring.
func (r *ring[T]) last() *T {
	if len(r.values) == 0 {
		return nil
	}
	return &r.values[(r.next+len(r.values)-1)%len(r.values)]
}

// latest returns copies of up to limit values, the latest first.
func (r *ring[T]) latest(limit int) []T {
	all := slices.Concat(r.values[r.next:], r.values[:r.next])
	slices.Reverse(all)
	if limit > 0 && len(all) > limit {
		all = all[:limit]
	}
	return all
}
