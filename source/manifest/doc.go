// Package manifest delivers the Kubernetes objects in a folder of plain YAML
// files, and does for them what a control plane would: sets defaults, gives
// addresses and node ports to Services, and finds their endpoints.
//
// # Files
//
// All files of the folder whose names end in .yaml, .yml or .json are read, as
// kubectl apply -f does; hidden files and subfolders are not. A file holds any
// number of documents: v1 Service, v1 Pod, discovery.k8s.io/v1 EndpointSlice, or
// a v1 List of them. Objects of other kinds are left out with a warning, as the
// files of most tutorials have some. A kind or an apiVersion that is nearly one
// of these is not left out: it is an error.
//
// The folder is watched, and each change delivered at once, with one exception: a
// file that is rewritten and has no objects now loses those that it had only when
// it has been so for two seconds, as a shell empties the file of
// kubectl get -o yaml > a.yaml long before kubectl fills it. Renaming a file into
// place, removing one, and replacing the link ..data as a mounted ConfigMap does
// work too. A link to a file elsewhere is followed when it is read, but that file
// is not watched; a link to nothing is warned of.
//
// Whatever is in a file when it is read counts. If a writer takes its time in the
// middle of a file, the objects that it has not written yet are gone until it
// has, so such a file should be renamed into place.
//
// Objects are read strictly: unknown fields, wrong types and bad values are
// errors, with file, line, field and fix. All objects of a file are looked at,
// whatever is wrong with others. Of one object, all unknown fields and wrong types
// are reported together, and then, when there are none, all bad values: an object
// with both takes two rounds. Of a document that is not YAML, the first error is
// reported. What is right but does nothing is warned of: a Pod with labels that
// has neither an address nor a status.phase other than Running, and an
// EndpointSlice without the label kubernetes.io/service-name.
//
// An object with an error stays as it last was. If it cannot even be named, as in
// a document that is not YAML, all objects stay that the file had and has no
// more. Every other object is delivered. If an object is in two places, the first
// by file name and line is used, and the other is an error; but one that can be
// read wins over one that is kept from a file that can be read no more.
//
// # Addresses
//
// A Service without an address gets one from the Service CIDR of each family it
// needs. The address follows from the Service's namespace and name alone, so it
// is the same after a restart and on every node, whatever the order of the
// files. There is one exception: if that address is taken, the Service gets the
// next free one, so it then also depends on the Service that has it. Further:
//
//   - An address that a Service has stays its own as long as the program runs and
//     the Service needs one, whatever happens to others.
//   - An address that a file says is never handed out. A Service whose file says
//     an address that another Service has is an error until that one gives it
//     up.
//   - The first and the last address of the network are not handed out. Of an
//     IPv6 network larger than /66, only the first 2^62 addresses are.
//
// # Node ports
//
// A Service of type NodePort or LoadBalancer gets a node port for each port
// without one, and one of type LoadBalancer with externalTrafficPolicy Local a
// healthCheckNodePort. As with addresses, they follow from the Service's
// namespace, name and port alone, unless they are taken; a port that a Service
// has stays its own, as long as the Service has a port of that number and
// protocol; and what a file says goes first. As the API server has it by default:
//
//   - They are from 30000 to 32767, those up to 30085 only when there are no
//     others (KEP-3668): use these in files, as no Service is likely to have been
//     given them.
//   - Ports of one number in several protocols have one node port, where it is
//     free. Other ports are given numbers that are free in all protocols.
//   - With allocateLoadBalancerNodePorts: false, none are given but for health
//     checks.
//   - Which they are is logged, as "node port given".
//   - If two Services say the same number and protocol, the second is an error
//     until the first gives it up.
//
// Unlike with an API server, files may say any port, as it is the administrator
// who writes them. One that a program on the node listens on is taken from it:
// with nodePort: 22, nobody can log in by SSH any more. And two Services may say
// the same number in different protocols.
//
// # Other fields
//
// Defaults are those of the API server, and what it refuses in a Service is an
// error. A load balancer's controller is nobody here, so a file may say what it
// would write: status.loadBalancer.ingress.
//
// There is no Node, and so:
//
//   - No zone. Hints of endpoints for zones are not followed, and
//     trafficDistribution PreferSameZone and PreferClose do nothing. Those for
//     nodes are, and PreferSameNode makes them.
//   - No primary addresses of the node. Node ports are served on all its
//     addresses, unless --nodeport-addresses says otherwise.
//
// # Endpoints
//
// For each Service with a selector there are EndpointSlices made from the Pods
// that it selects, besides those that files may hold for it. A Pod takes part if
// it has an address in status.podIP or status.podIPs and is neither Succeeded nor
// Failed. It is ready if its condition Ready says so; a Pod without this
// condition, as people write it, is ready if it has no status.phase or is
// Running. A Pod with a deletionTimestamp is terminating. A Pod without
// spec.nodeName is on this node.
package manifest
