// Package dataplane defines the contract between Fairlead's syncer and the backends that program
// the kernel.
//
// A [Dataplane] translates [Service] values into kernel state. Package nft uses nftables maps,
// package ipvs uses IPVS virtual servers. Kubernetes semantics (readiness, traffic policies,
// ownership of an address) are resolved before a Service reaches this package. A backend only
// translates.
//
// # Terms
//
//   - A [Frontend] is an address, port and protocol that clients connect to.
//   - An [Endpoint] is a pod address and port that a connection is translated to.
//   - A [Service] is one port of a Kubernetes Service in one IP family, with its frontends of one
//     [Kind] and a [ServiceSpec].
//   - Masquerading replaces the client's source address with an address of the node (SNAT), so
//     that replies return through the node.
//   - A packet is refused when it is dropped or rejected, see [Verdict].
//
// # Replace and Apply
//
// [Dataplane.Replace] takes the complete desired state, reads the kernel and writes the
// difference. [Dataplane.Apply] takes a set of changes and trusts their Old values instead of
// reading the kernel.
//
// The syncer calls Apply for changes of Services. It calls Replace at startup, after drift, after
// an error, and when the [Node] changes.
//
// # Laws
//
// Every backend obeys the following laws and every caller may rely on them. Randomized
// histories in this package's tests check them, and package dataplanetest checks them on a real
// kernel.
//
//  1. After Replace returns nil, Read returns StateOf of the Services passed to Replace.
//  2. After Apply returns nil, Read returns its previous result with the frontends of every Old
//     removed and those of every New added.
//  3. A call is compared as a whole. A [Frontend] that moves from one Service to another within
//     one call ends up with the new owner, in whatever order the changes are listed.
//  4. Replacing a state with an equal state writes nothing to the kernel.
//  5. A key listed in an [Error] has an unknown state: the kernel may hold its Old, its New or a
//     mix of both. The call succeeded for all other keys. After any other error, every key of
//     the call has an unknown state. Only Replace makes an unknown state known again.
package dataplane
