// Package apiload measures the load that Service proxies cause on a Kubernetes API server:
// requests, bytes and processor time, when a proxy starts, for each kind of change, and
// while nothing changes.
//
// It starts a real etcd, kube-apiserver and kube-controller-manager. Nodes, Pods and Services
// are written to etcd; the EndpointSlice controller creates the EndpointSlices. Each client
// of the API server has a network namespace with a link of its own, whose counters give the
// bytes, and a user of its own, by which the audit log counts its requests. Clients that
// follow changes run at the same time and receive the same changes.
package apiload
