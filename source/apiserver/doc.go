// Package apiserver delivers objects from a Kubernetes API server and writes Kubernetes
// Events.
//
// # Source
//
// A [Source] lists and watches Services, EndpointSlices, this node's Node and, if the
// server serves them and RBAC allows it, ServiceCIDRs. Label and field selectors make the
// server leave out objects that a Service proxy does not need: headless Services, Services
// with the label service.kubernetes.io/service-proxy-name, and EndpointSlices with the
// label service.kubernetes.io/headless. An object that gets one of these labels is
// delivered as deleted. API servers before Kubernetes 1.31 can't leave out headless Services.
//
// The first Delta is delivered when the lists of Services and EndpointSlices are complete;
// the other lists are optional and delay it by at most 35 seconds. A late list or an
// unreachable API server never deletes an object: only a complete list or a watch event
// does. After an outage the Source delivers only the objects that changed in the meantime.
//
// The Source tolerates an API server whose data is incomplete, outdated or restored from a
// backup:
//
//   - It compares objects by a hash of UID, resource version and content. After etcd is
//     restored from a backup, two different objects can have the same name and version.
//   - If a list lacks more than half of the Services or EndpointSlices, the Source lists
//     again before it removes anything ([Options.MassRemovalDelay]).
//   - A streamed list must send its closing bookmark within a minute; other lists must
//     complete within two minutes. A watch that receives neither events nor bookmarks for
//     three minutes is restarted.
//   - After a watch ends early, the Source compares the server's current resource version
//     with the version at which the next watch begins. kube-apiserver accepts a watch from
//     a version that it has not reached yet: it sends nothing and reports no error.
//   - A failure that lasts is logged repeatedly, at growing intervals.
//
// The Source reads rare changes immediately. If at least two changes keep arriving in each
// [Options.BatchPeriod], it reads the changes of each period together, because each wakeup
// of the process costs more CPU time than the change itself. While the receiver is busy,
// changes are coalesced by name, so that a burst results in few Deltas.
//
//	connection ──► watch stream ──► reflector ──► store ──► delta queue ──► deliver
//	 (batched)      (decodes)       (client-go)  (hashes)  (latest per name)
//
// One goroutine, the reflector's, takes a change from the response to deliver.
//
// The Source has no object cache. The store keeps only hashes, to compare later lists with;
// only the receiver keeps the objects. The Source trims each object to the fields that
// Fairlead reads and shares the memory of equal strings. If the server streams lists
// (WatchList, the default since Kubernetes 1.34), objects are trimmed while the list is
// still arriving.
//
// The Source needs the rights to list and watch services, nodes,
// endpointslices.discovery.k8s.io and servicecidrs.networking.k8s.io.
//
// Messages of client-go are passed to the Logger at level Debug and below. Parts of
// client-go that use klog's global logger, such as the refresh of credentials, are not
// covered: the program configures klog.
//
// # Events
//
// [Events] writes Warning Events about Services and about the Node, and a Normal Event
// about the Node at startup. It needs the rights to create and patch events.events.k8s.io.
//
// It does not use client-go's broadcaster, which treats Events of one object and reason as
// equal even if their notes differ: the second problem of a Service would not be shown.
package apiserver
