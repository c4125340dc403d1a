// Package kube says what Kubernetes objects mean for this node: it turns
// Services and their EndpointSlices into the [dataplane.Service] values that
// the node must have, and the Node object, ServiceCIDRs and the addresses of
// interfaces into the [dataplane.Node]. It follows kube-proxy's rules; where it
// does not, this page says so. What objects ask for and do not get is a
// [Problem].
//
// Everything here is computation: no I/O, no clock, no lock, no goroutine. A
// source delivers each change as a [Delta]; a [Tracker] keeps what it needs of the objects and
// answers with a [Result], at a cost that follows the change and not the number
// of Services.
//
// # Frontends
//
// Each port of a Service gives, in each IP family that the Service has a cluster
// IP in, one dataplane.Service for each kind of frontend that it has:
//
//   - ClusterIP: the cluster IP.
//   - NodePort: the port's nodePort, for the types NodePort and LoadBalancer.
//   - ExternalIP: spec.externalIPs of the family.
//   - LoadBalancer: status.loadBalancer.ingress[].ip of the family, unless its
//     ipMode is Proxy. Whatever is in spec.externalIPs too is of this kind only.
//
// Headless Services, Services of type ExternalName, Services without a cluster
// IP, and those with the label service.kubernetes.io/service-proxy-name (which
// ask for another proxy) give none.
//
// # Endpoints
//
// Endpoints come from the EndpointSlices of the Service's namespace whose label
// kubernetes.io/service-name is its name, whose addressType is the family, and
// whose port has the same name and protocol as the Service's port. Where slices
// contradict each other about an address, an entry that is not terminating goes
// before one that is, and a ready one before one that is not.
//
// The traffic policy Cluster takes the ready endpoints that hints leave; if
// there are none ready, those that are terminating and still serve. The policy
// Local takes the ready endpoints of this node, or else those of this node that
// are terminating and still serve; hints mean nothing to it. Endpoints are of
// this node if their nodeName says so.
//
// Hints are those in the slices: spec.trafficDistribution and the annotation
// service.kubernetes.io/topology-mode are for the controller that writes them.
// If every ready endpoint has hints for nodes, and one of them is for this node,
// only those for this node are taken. Or else, if every ready endpoint has hints
// for zones, and one of them is for the zone in this node's label
// topology.kubernetes.io/zone, only those for this zone. Or else all.
//
// Those who have been talking to an endpoint over UDP go on as long as it serves,
// whatever traffic policy, hints and its termination say of new connections: it
// is in Service.Serving then. So do those who have an association of SCTP with it,
// also while it is not ready, unless it terminates and does not serve.
//
// # Treatment
//
// Connections to a cluster IP go by internalTrafficPolicy, and clients that are
// no pods are masqueraded. Those to the other kinds go by externalTrafficPolicy:
// with Cluster, to all endpoints and always masqueraded; with Local, to this
// node's endpoints, with the client's address as it is, but those of this node
// and of its pods reach the endpoints of the whole cluster. Where no endpoint is
// usable anywhere connections are rejected; where only the policy leaves none,
// they are dropped, so that a load balancer tries another node.
//
// loadBalancerSourceRanges hold for the kind LoadBalancer. A range of everything
// opens the Service to its family, and so does the lack of ranges of a family,
// but not where an entry can't be read: then nobody of that family is let in.
//
// The annotation fairlead.io/ipvs-scheduler names the IPVS scheduler that picks
// among the endpoints, for all frontends of the Service. Where the backend has
// none of that name, or no schedulers at all, that is a problem, and endpoints are
// picked as those of any other Service.
//
// # Collisions
//
// A frontend (protocol, address, port) belongs to one Service port. If several
// claim it, a cluster IP goes before everything else, so that nobody can catch
// the connections of another Service by naming its cluster IP as an external one
// (CVE-2020-8554). Then it goes to the Service with the oldest
// creationTimestamp, then to the first by namespace and name, then to the first
// port in the Service. The others go without this one frontend, are reported,
// once for each field and owner, and take over when the owner goes. With
// kube-proxy the last one wins.
//
// # Problems
//
// A [Problem] is reported when it comes up, and stays until it is gone. Of one
// Service at most 20 are named, and the number of the others.
//
// A port that no EndpointSlice knows, although there are slices with endpoints,
// is one once a slice of the Service was delivered in the same Delta as the last
// change of the Service's ports, or in a later one: before, the slice that the
// controller writes because of the change may be on its way.
//
// # Other differences from kube-proxy
//
//   - Loopback, link-local and multicast addresses are refused as endpoints and
//     external IPs, as the API server refuses new ones: they would let a Service
//     reach into the node, or take what the node itself uses.
//   - A cluster IP that is a loopback, link-local, multicast or broadcast address, or
//     one of the node's own, is reported and not served; the Service's other
//     addresses are. The node's own are those of the Node object, and those of its
//     interfaces other than the loopback device and dummy interfaces: NodeLocal
//     DNSCache and kube-proxy's mode ipvs bind cluster IPs to dummy interfaces.
//   - A port with more than 65,535 endpoints is not served, but reported: it is
//     what the dataplane can hold.
//   - Of one Service at most 262,144 frontends, endpoints and source ranges are
//     programmed, each counted for every port, family and kind of frontend; cluster
//     IPs and node ports before the others. What is beyond is reported.
//   - Where --nodeport-addresses names networks of one family, the other has no
//     node ports; and addresses inside a ServiceCIDR, which another proxy may have
//     left on an interface, are never among those that networks, or all, stand for.
//   - Health-check node ports count as said below.
//
// # Health-check node ports
//
// A Service of type LoadBalancer with externalTrafficPolicy Local has its
// healthCheckNodePort answered with the number of ready pods on this node:
// distinct addresses, over all ports. kube-proxy counts the families apart, each
// for its own listener; here the larger number counts for both.
//
// # The node
//
// Which clients are pods is told by [DetectLocal], and where node ports are
// served by [NodePortAddresses]. Unlike kube-proxy's, these follow the Node
// object and the interfaces as they change, as do ServiceCIDRs; and the node's
// own pod networks are known in every mode, so that its pods reach Services with
// externalTrafficPolicy Local whatever is known of other pods.
package kube
