// Package e2e contains the end-to-end tests. They run the fairlead binary as it is shipped,
// with a real API server and controller manager, and make real connections.
//
// The tests have the build tag e2e; `make e2e` runs them as root. Network namespaces form a
// small cluster: a node that runs the fairlead binary with the ServiceAccount and the
// permissions of deploy/rbac.yaml, pods, and an outside host that also runs the control
// plane. The tests do the work of a kubelet: they write the status of Pods, and each Pod is a
// namespace with a server. The API server allocates the addresses of Services, and the
// controller manager writes EndpointSlices.
//
// Each scenario has its own Kubernetes namespace and runs in parallel with others, unless it
// stops a shared component.
package e2e
