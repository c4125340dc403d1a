// Package health answers those who ask whether this node can take connections,
// in the way that kube-proxy does, since load balancers and probes are written
// for its answers (k8s.io/kubernetes/pkg/proxy/healthcheck, and KEP-3836).
//
//   - [Proxy] is the node's health: /healthz for load balancers, and /livez for
//     the kubelet.
//   - [Ports] are the health-check node ports, where the load balancer of a
//     Service with externalTrafficPolicy: Local asks whether this node has
//     endpoints of it.
//   - [Serve] is an HTTP server that keeps trying to listen.
//
// Servers bound the time and the size of requests, and package connlimit their
// connections, so that no client keeps others from being answered.
package health
