// Package kube translates Kubernetes objects for this node. It converts Services and
// EndpointSlices to [dataplane.Service] values, and the Node object, ServiceCIDRs and interface
// addresses to the [dataplane.Node]. It follows the rules of kube-proxy; this page lists the
// differences. Anything that objects request and do not get is reported as a [Problem].
//
// The package only computes: it has no I/O, clocks, locks or goroutines. A source delivers each
// change as a [Delta]. A [Tracker] keeps the necessary parts of the objects and returns a
// [Result], at a cost proportional to the change and not to the number of Services.
//
// # Frontends
//
// For each IP family in which a Service has a cluster IP, each Service port has one
// dataplane.Service per kind of frontend:
//
//   - ClusterIP: the cluster IP.
//   - NodePort: the port's nodePort, for the types NodePort and LoadBalancer.
//   - ExternalIP: spec.externalIPs of the family.
//   - LoadBalancer: status.loadBalancer.ingress[].ip of the family, unless its ipMode is Proxy.
//     An address that is also in spec.externalIPs has only this kind.
//
// The following Services have no frontends: headless Services, Services of type ExternalName,
// Services without a cluster IP, and Services with the label
// service.kubernetes.io/service-proxy-name, which selects another proxy.
//
// # Endpoints
//
// The endpoints of a Service port come from the EndpointSlices in the Service's namespace that
// have the Service's name in the label kubernetes.io/service-name. The addressType must be the
// family, and the slice must have a port with the same name and protocol. If several entries
// have the same address, a non-terminating entry is preferred over a terminating one, and then
// a ready entry over a non-ready one.
//
// The traffic policy Cluster selects the ready endpoints that topology hints allow. If no
// endpoint is ready, it selects serving terminating endpoints. The policy Local selects the
// ready endpoints on this node and ignores hints. If no endpoint on this node is ready, it
// selects serving terminating ones. An endpoint is on this node if its nodeName says so.
//
// Hints are taken from EndpointSlices only. The controller that writes them reads
// spec.trafficDistribution and the annotation service.kubernetes.io/topology-mode. Hints are
// evaluated in this order:
//
//  1. If every ready endpoint has hints for nodes and at least one hint names this node, the
//     endpoints with a hint for this node are selected.
//  2. Otherwise, if every ready endpoint has hints for zones and at least one hint names the
//     zone in this node's label topology.kubernetes.io/zone, the endpoints with a hint for this
//     zone are selected.
//  3. Otherwise, all ready endpoints are selected.
//
// An existing UDP flow stays with its endpoint while the endpoint serves, even if traffic policy,
// hints or termination exclude the endpoint from new connections. Such endpoints are in
// Service.Serving. An SCTP association also stays with an endpoint that is not ready, unless the
// endpoint is terminating and not serving.
//
// # Traffic policies
//
// Connections to a cluster IP follow internalTrafficPolicy. Clients outside the pod network are
// masqueraded. Connections to the other kinds of frontends follow externalTrafficPolicy:
//
//   - Cluster: connections go to all endpoints and are always masqueraded.
//   - Local: connections go to the endpoints on this node and keep the client's address.
//     Connections from this node and its pods go to all endpoints of the cluster.
//
// Connections are rejected if no endpoint is usable in the whole cluster. They are dropped if
// only the policy leaves no endpoint, so that a load balancer tries another node.
//
// loadBalancerSourceRanges apply to the kind LoadBalancer. A range that covers all addresses of a
// family opens the Service to that family. A family without ranges is open too, unless a range
// that may belong to it is invalid; then no client of that family is allowed.
//
// The annotation fairlead.io/balancing selects how connections are distributed, for all frontends of
// the Service: random, round-robin, source-hash or least-connections. If the backend does not support
// the value, a problem is reported and the default is used.
//
// The annotation fairlead.io/ipvs-scheduler selects the IPVS scheduler by the kernel's name, and takes
// precedence with IPVS. If the backend does not have this scheduler, a problem is reported and the
// default is used. A backend without schedulers reports a problem unless the Service has the other
// annotation as well.
//
// # Conflicts
//
// A frontend (protocol, address, port) belongs to one Service port. If several ports claim it,
// the owner is determined by these rules, in order:
//
//  1. A cluster IP takes precedence over every other kind. Otherwise a user could intercept the
//     connections of another Service by listing its cluster IP as an external IP
//     (CVE-2020-8554).
//  2. The Service with the oldest creationTimestamp.
//  3. The first Service by namespace and name.
//  4. The first port in the Service.
//
// The other Services keep their remaining frontends and take over the frontend when its owner is
// deleted. A problem is reported for each field and owner. In kube-proxy the last Service wins.
//
// # Problems
//
// A [Problem] is reported once and persists until it is resolved. At most 20 problems of a
// Service are reported individually, followed by the number of the others.
//
// A port without a match in any EndpointSlice is a problem if there are slices with endpoints.
// The controller updates the slices after the Service. The problem is therefore not reported
// until a slice is delivered in the same Delta as the last change of the Service's ports, or
// later.
//
// # Other differences from kube-proxy
//
//   - Loopback, link-local and multicast addresses are rejected as endpoints and external IPs, as
//     the API server rejects new ones. Such an address would let a Service reach into the node,
//     or intercept an address that the node uses.
//   - A cluster IP that is a loopback, link-local, multicast or broadcast address, or an address
//     of the node, is reported and not served. The Service's other addresses are. The node's
//     addresses are the addresses of the Node object and of its interfaces, except the loopback
//     device and dummy interfaces: NodeLocal DNSCache and kube-proxy's ipvs mode bind cluster IPs
//     to dummy interfaces.
//   - A port with more than 65,535 endpoints, the limit of the dataplane, is reported and not
//     served.
//   - At most 262,144 frontends, endpoints and source ranges of a Service are programmed, counted
//     separately for every port, family and kind of frontend. Cluster IPs and node ports are
//     programmed first. The rest is reported.
//   - If --nodeport-addresses lists networks of one family only, the other family has no node
//     ports. Addresses inside a ServiceCIDR, which another proxy may have left on an interface,
//     are never selected by networks or by the keyword all.
//   - Health-check node ports count endpoints as described below.
//
// # Health-check node ports
//
// The healthCheckNodePort of a Service of type LoadBalancer with externalTrafficPolicy Local
// reports the number of ready pods on this node: distinct addresses, over all ports. For each
// family, kube-proxy has a separate listener and count. Fairlead uses the larger number for
// both.
//
// # The node
//
// [DetectLocal] defines how to detect pod traffic, and [NodePortAddresses] defines the addresses
// of node ports. Unlike in kube-proxy, both follow changes of the Node object and of the
// interfaces. So do ServiceCIDRs. The node's own pod networks are used in every mode, so that its
// pods reach Services with externalTrafficPolicy Local even if other pods are not detected.
package kube
