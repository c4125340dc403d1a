// Package apiserver implements the API server of benchmarks: it lists and streams Services,
// EndpointSlices, Nodes and ServiceCIDRs to the programs under test, and accepts Events without
// storing them.
//
// It is not suitable for tests of behavior: it does not persist, default, validate or authorize
// anything. It ignores timeouts requested by clients, so that no measurement includes a
// reconnection, and returns lists as one page whatever the limit. test/controlplane runs the real
// API server for such tests, and for benchmarks as well, see package compare.
//
// The package is fast and has precise timing. Each object is encoded once for all clients of all
// Servers. [Server.Put] passes objects to all watches before it returns, so that the time of the
// call is the time of the event.
//
// It supports the clients of client-go: JSON and protobuf, list and watch, streaming lists
// (WatchList), label selectors, and the field selectors that kube-proxy and Fairlead use.
package apiserver
