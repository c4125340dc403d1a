// Package sync keeps a dataplane.Dataplane programmed with what is wanted, at a
// cost that follows what changes and not what there is.
//
// A [Syncer] is told what is wanted with [Syncer.Update] and [Syncer.SetNode],
// from any goroutine. Both put it into a mailbox and return. One goroutine,
// [Syncer.Run], empties the mailbox, calls the dataplane, and owns everything
// else in this package. While a call is in flight, further changes gather in
// the mailbox, the last one for each key, and go in the next call: a slow
// kernel makes calls larger, up to a limit, and an idle one gets every change at
// once. There is no minimum period between calls.
//
// # Turns
//
// A call of Apply gets changes of some 4,096 frontends and endpoints; more wait in a
// queue. Kubernetes Services take turns in it as flows do in a fair queue, so small
// changes come first, the ports of one huge Service delay no other's, and none
// waits for ever. Changes between which a frontend moves go in one call.
//
// # The tables
//
//   - desired: what was asked for, by key.
//   - applied: what the kernel is known to hold. It changes after a write
//     that took, never before.
//   - failing: the keys that did not take. For most of them, what the kernel
//     holds is unknown: its old value, its new one, or a mix.
//
// Between two steps of Run, desired and applied differ for failing keys and for
// those in the queue, or everything is unknown: before the first Replace, and after a
// call that failed as a whole. The next Replace has what is in the queue.
//
// # Apply or Replace
//
// Changes of known keys take Apply, which costs as much as the changes.
// Replace, which reads the kernel and compares everything, is called
//
//   - when the initial list is complete,
//   - when the node has changed,
//   - when somebody else has changed the kernel (drift): at once, and after a
//     delay that grows to a second, or nine times what a Replace takes, when
//     it happens again and again,
//   - when keys are failing, or everything is: after a delay that doubles with
//     each attempt from [Options.RetryMin] to [Options.RetryMax],
//   - every [Options.ResyncPeriod], if that is set.
//
// Replace is given the Services of [Options.Prioritize] first, such as the cluster's
// DNS, and all in the order of their keys, but for what a Service has beyond the
// weight of a call of Apply, which comes last. [Commit] says when the first and the
// last were complete.
//
// A failing key takes no part in Apply, because Apply trusts the old value of a
// change and a failing key has none to trust. It waits for the next Replace
// while all other keys go on as ever. Assuming that a failed key still has its
// old value is the mistake to avoid: many histories with faults then end
// with a wrong kernel (the tests of package dataplane show it).
//
// A key that fails with dataplane.ErrUnsupported is not tried again before its
// Service changes. The kernel holds nothing for it, and Replace is not given it.
package sync
