// Package sync keeps a dataplane.Dataplane in the desired state. The cost of a change depends on
// its size and not on the number of Services.
//
// [Syncer.Update] and [Syncer.SetNode] set the desired state from any goroutine. They store it in
// an inbox and return. One goroutine, [Syncer.Run], empties the inbox, calls the dataplane and
// owns all other state of this package. Changes that arrive during a dataplane call wait in the
// inbox, the latest for each key, and are part of the next call. A slow kernel therefore gets
// larger calls, up to a limit, and an idle kernel gets each change immediately. The syncer
// enforces no minimum interval between calls.
//
// # Fairness
//
// One call of Apply contains changes with up to about 4,096 frontends and endpoints. Further
// changes wait in a queue, in which Kubernetes Services take turns like the flows of a fair
// queue. Small changes come first, the ports of a huge Service do not delay other Services, and
// no change waits forever. Changes that move a frontend from one Service to another are part of
// the same call.
//
// # State
//
//   - desired is the requested Service of each key.
//   - applied is the state that the kernel is known to hold. It changes only after a successful
//     write.
//   - failing contains the keys whose last write failed. For most of them the state of the kernel
//     is unknown: the old value, the new value or a mix.
//
// Between two steps of Run, desired and applied differ only for failing and queued keys, unless
// the state of every key is unknown. That is the case before the first Replace and after a call
// that failed as a whole. The next Replace includes all queued changes.
//
// # Apply or Replace
//
// Changes of keys with a known state use Apply, whose cost is proportional to the changes.
// Replace reads the kernel and compares everything. The syncer calls Replace in these cases:
//
//   - The initial list is complete.
//   - The node has changed.
//   - Another program has changed the kernel (drift). Replace follows immediately, or after a
//     delay if drift recurs. The delay grows to one second or to nine times the duration of a
//     Replace, whichever is longer.
//   - Keys are failing or the state of every key is unknown. The delay doubles with each attempt
//     from [Options.RetryMin] to [Options.RetryMax].
//   - [Options.ResyncPeriod], if set, has passed.
//
// Replace programs the Services selected by [Options.Prioritize] first, for example cluster DNS,
// and all Services in the order of their keys. The part of a large Service that exceeds the
// weight of one Apply comes last. A [Commit] reports when the first and the last Service were
// complete.
//
// Apply skips failing keys, because Apply trusts Old and the old value of a failing key is
// unknown. Failing keys wait for the next Replace while all other keys continue to use Apply.
// Assuming that a failed key keeps its old value would be wrong: many histories with faults then
// end in a wrong kernel state (see the tests of package dataplane).
//
// A key that failed with dataplane.ErrUnsupported is retried only after its Service has changed.
// The kernel holds nothing for such a key, and Replace skips it.
package sync
