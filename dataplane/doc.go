// Package dataplane is the contract between Fairlead's syncer and the kernel.
//
// A [Dataplane] turns [Service] values into kernel state: package nft does it
// with nftables maps. Everything that Kubernetes decides (which endpoints are
// ready, which policy applies, which of two Services owns an address) is settled
// before a Service reaches this package; a Dataplane translates and decides
// nothing.
//
// # The two verbs
//
// [Dataplane.Replace] is given everything and reads the kernel first;
// [Dataplane.Apply] is given what changed and trusts what it is told about the
// past. Every event takes Apply. Start, restart, repair of drift, recovery from
// an error and a change of the [Node] take Replace.
//
// # The laws
//
// Any implementation, and any caller, may rely on these. They are proven by the
// randomised histories in this package's tests and by dataplanetest, which runs
// against a real kernel.
//
//  1. After a Replace that returned nil, Read returns StateOf the Services given.
//  2. After an Apply that returned nil, Read returns what it returned before,
//     with every Old taken out and every New put in.
//  3. The difference of a call is taken over the call as a whole: a [Frontend]
//     that leaves one Service and joins another in the same call ends with the
//     latter, in whatever order the changes are listed.
//  4. Replacing a state by an equal one writes nothing to the kernel.
//  5. A key named in an [Error] is unknown: the kernel may hold its Old, its
//     New, or any mix. All other keys of the call took. After any other error
//     everything in the call is unknown. Only Replace makes an unknown key
//     known again.
package dataplane
