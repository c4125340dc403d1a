// Package health serves the health-check endpoints of a node. Load balancers and probes are
// written for kube-proxy, so paths, status codes, headers and bodies are the same
// (k8s.io/kubernetes/pkg/proxy/healthcheck and KEP-3836).
//
//   - [Proxy] reports the health of the node: /healthz for load balancers and /livez for the
//     kubelet.
//   - [Ports] serves the health-check node ports. The load balancer of a Service with
//     externalTrafficPolicy Local uses them to find the nodes that have endpoints.
//   - [Serve] runs an HTTP server and retries until it can listen.
//
// Servers limit the duration and the size of requests, and package connlimit limits their
// connections, so that no client can prevent others from getting an answer.
package health
