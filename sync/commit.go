package sync

import (
	"time"

	"fairlead.io/fairlead/dataplane"
)

// Op is the dataplane method that a [Commit] called.
type Op string

// Dataplane methods that change the kernel.
const (
	OpApply   Op = "apply"
	OpReplace Op = "replace"
)

// Reason is the reason for a [Commit].
type Reason string

// Reasons for a commit. Apply always has ReasonChange. If several reasons hold for a Replace, the
// first one in this order is reported.
const (
	ReasonChange Reason = "change" // Services have changed.
	ReasonStart  Reason = "start"  // This Syncer has not programmed anything yet.
	ReasonRetry  Reason = "retry"  // An earlier call or key failed.
	ReasonNode   Reason = "node"   // The node has changed.
	ReasonDrift  Reason = "drift"  // Another program has changed the kernel.
	ReasonResync Reason = "resync" // Options.ResyncPeriod has passed.
)

// Commit describes one call of the dataplane and its result.
type Commit struct {
	Op     Op
	Reason Reason

	// Changes contains the successful changes, in no particular order. Old is the value that this
	// Syncer last programmed. It is nil in commits with ReasonStart, even if the kernel was
	// already programmed (warm restart). A Replace that only repairs the kernel has no changes.
	Changes []dataplane.Change

	// Failed contains the keys that failed. It is nil if no key failed or if the call failed as a
	// whole.
	Failed map[dataplane.Key]error

	// Err is the error of a call that failed as a whole, and nil otherwise. After such a call the
	// state of all keys is unknown until a Replace succeeds.
	Err error

	// Services is the number of desired Services, including failing ones.
	Services int

	// OldestUpdate is the time of the oldest [Syncer.Update] in this call, or zero if the call
	// contains none. End minus OldestUpdate is the latency of that update.
	OldestUpdate time.Time

	// Start and End are the times at which the call began and returned.
	Start, End time.Time

	// FirstComplete and LastComplete are the times at which the first and the last Service of a
	// Replace were complete in the kernel, as reported by the dataplane. Failed Services do not
	// count. Both are zero for Apply, for a Replace that completed no Service, and for a call
	// that failed as a whole.
	FirstComplete, LastComplete time.Time
}
