package sync

import (
	"time"

	"fairlead.io/fairlead/dataplane"
)

// Op is the verb of a [Commit].
type Op string

// The verbs of a dataplane.
const (
	OpApply   Op = "apply"
	OpReplace Op = "replace"
)

// Reason says why a [Commit] was made.
type Reason string

// The reasons for a commit. ReasonChange is the only one for an Apply.
// Where several are true of a Replace, the first in this order is given.
const (
	ReasonChange Reason = "change" // Services have changed.
	ReasonStart  Reason = "start"  // Nothing was programmed by this Syncer before.
	ReasonRetry  Reason = "retry"  // Something had failed.
	ReasonNode   Reason = "node"   // The node has changed.
	ReasonDrift  Reason = "drift"  // Somebody else has changed the kernel.
	ReasonResync Reason = "resync" // Options.ResyncPeriod has passed.
)

// Commit is one call to the dataplane and what became of it.
type Commit struct {
	Op     Op
	Reason Reason

	// Changes are those that took, in no order. Old is what was last known to
	// be programmed by this Syncer: in the commits with ReasonStart it is nil,
	// although a restart may have found the kernel programmed. A Replace that
	// only repaired the kernel has no changes.
	Changes []dataplane.Change

	// Failed has the keys that did not take. It is nil when all took, and when
	// the call failed as a whole.
	Failed map[dataplane.Key]error

	// Err is why the call failed as a whole, or nil. After such a call, nothing
	// that the kernel holds is known until a Replace succeeds.
	Err error

	// Services is the number of Services wanted, failing ones included.
	Services int

	// OldestUpdate is when the oldest change that this call carried was handed to
	// [Syncer.Update]; zero when it carried none. End minus Oldest is the time
	// that change took.
	OldestUpdate time.Time

	// Start and End are when the call began and returned.
	Start, End time.Time

	// FirstComplete and Last are when the first and the last of the Services of a
	// Replace were complete in the kernel, as the dataplane told on its way.
	// Services that failed do not count. Both are zero for an Apply, for a
	// Replace that completed none, and for one that failed as a whole.
	FirstComplete, LastComplete time.Time
}
