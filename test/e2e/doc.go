// Package e2e holds the end-to-end tests: Fairlead as it is shipped, next to a
// real API server and controller manager, with real connections.
//
// The tests are behind the build tag e2e; `make e2e` runs them, as root. A small
// cluster is made of network namespaces: a node on which the fairlead binary
// runs with the ServiceAccount and the rights of deploy/rbac.yaml, pods, and a
// host outside which is also where the control plane is. What a kubelet would
// do, the tests do: they write the status of Pods, and each Pod is a namespace
// with a server. Addresses of Services are given by the API server and
// EndpointSlices are written by the controller manager.
//
// A scenario has a Kubernetes namespace for itself and runs beside others,
// unless it stops something that all need.
package e2e
