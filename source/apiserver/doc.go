// Package apiserver delivers the objects of a Kubernetes API server, and writes
// Kubernetes Events.
//
// # Source
//
// A [Source] follows Services, EndpointSlices, this node's Node and, where they
// are served and allowed, ServiceCIDRs. The server leaves out what is of no use
// here: Services that are headless or have the label
// service.kubernetes.io/service-proxy-name, and EndpointSlices with the label
// service.kubernetes.io/headless. An object that gets such a label is delivered as
// deleted.
//
// Nothing is delivered before the lists of Services and EndpointSlices are complete,
// and nothing is ever deleted because a list is late or the API server is away: only a
// complete list, or the server's word, says that an object is gone. After an outage
// what has changed meanwhile is delivered, and nothing else. The other lists are
// waited for some seconds only.
//
// The API server is not trusted to be complete, fresh and growing:
//
//   - Objects are compared by a hash of UID, resource version and content. Two
//     objects with the same name and version may differ after a restore of etcd.
//   - A list that lacks more than half of the Services or EndpointSlices is made
//     once more before anything is removed ([Options.MassRemovalDelay]).
//   - A streamed list has a minute until its closing bookmark, other lists two
//     minutes. A watch without events and bookmarks for three minutes is made anew.
//   - After a watch has ended early, the current resource version is compared with
//     the one that the next watch begins at: for a version that it has not reached
//     yet, kube-apiserver sends nothing and reports no error.
//   - What fails for long is logged again and again, with growing pauses.
//
// Changes are delivered at once while there are few. Where they go on coming faster
// than BatchPeriod says, what arrives during a period is read together, since to be
// woken for each takes more of the processor than the change does. While the receiver is
// busy they gather as well, the last of each name, so that a burst ends in few Deltas.
//
//	connection ──► reflector ──► store ──► mailbox ──► deliver
//	 (paced)      (client-go)  (versions)  (the last of each name)
//
// There is no cache: a store knows no more of an object than hashes, so that a
// later list can be compared; the one copy of each object is with whom it was
// delivered to. Objects are trimmed to what somebody reads, while a list is
// still arriving where the server streams lists (WatchList, Kubernetes 1.34 and
// later by default), and equal strings share their memory.
//
// The rights needed are list and watch of services, nodes, endpointslices of
// discovery.k8s.io and servicecidrs of networking.k8s.io.
//
// What client-go logs by itself is passed to the Logger at level Debug and below.
// Its parts that log without being asked, such as the refresh of credentials, use
// klog's global logger, which is for the program to set.
//
// # Events
//
// [Events] writes Warnings about Services and one Normal Event about the Node at
// the start. The right needed is create and patch of events of events.k8s.io.
//
// It does not use client-go's broadcaster, which takes Events of one object and
// reason for the same whatever they say, so that the second problem of a Service
// would not be seen.
package apiserver
