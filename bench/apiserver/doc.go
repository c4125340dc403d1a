// Package apiserver is what a benchmark feeds programs with that follow a
// Kubernetes API server: it lists and streams Services, EndpointSlices, Nodes and
// ServiceCIDRs, and takes Events without keeping them.
//
// It is a feed, not an API server to test behaviour against: nothing is stored,
// defaulted, validated or authorised, timeouts that clients ask for are ignored
// so that no measurement meets a reconnection, and lists are one page whatever the
// limit. For behaviour there is test/controlplane, which runs the real one, and benchmarks can
// be fed by it too, see bench/compare.
//
// What it is, is fast and exact in time: an object is encoded once, however many
// programs on however many Servers it is served to, and [Server.Put] hands it to
// all streams before it returns, so that the time of the call is the time of the
// event.
//
// Clients are those of client-go: JSON and protobuf, list and watch, streamed lists
// (WatchList), label selectors, and of field selectors those that kube-proxy and
// Fairlead use.
package apiserver
