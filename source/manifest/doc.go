// Package manifest delivers Kubernetes objects from a folder of plain YAML files. It does
// for them what a control plane does: it sets defaults, allocates cluster IPs and node
// ports, and builds EndpointSlices from Pods.
//
// # Files
//
// As kubectl apply -f does, the package reads all files of the folder whose names end in
// .yaml, .yml or .json. It ignores hidden files and subfolders. A file holds any number of
// documents: v1 Service, v1 Pod, discovery.k8s.io/v1 EndpointSlice, or a v1 List of these.
// Objects of other kinds are skipped with a warning, because the files of most tutorials
// contain some. A misspelled kind or apiVersion is an error instead.
//
// The folder is watched, and each change is delivered at once, with one exception. If a
// file is rewritten and now has no objects, its previous objects are deleted only after two
// seconds: in "kubectl get -o yaml > a.yaml", the shell empties the file long before
// kubectl fills it. Renaming a file into place, removing a file, and replacing the link
// ..data, as the kubelet does for a mounted ConfigMap, work too. A link to a file elsewhere
// is followed when it is read, but the target is not watched. A dangling link is logged as
// a warning.
//
// The package does not wait for a writer that pauses in the middle of a file: the objects
// that the file does not contain yet are deleted until the writer continues. Rename such a
// file into place instead.
//
// Parsing is strict: unknown fields, wrong types and invalid values are errors with file,
// line, field and fix. An error in one object does not hide the errors of others. For one
// object, all unknown fields and wrong types are reported together; invalid values are
// reported after these are fixed. For a document that is not YAML, only the first error is
// reported. Valid objects without effect are logged as warnings: a Pod with labels that has
// no address although its status.phase is Running or unset, and an EndpointSlice without
// the label kubernetes.io/service-name.
//
// An object with an error keeps its last valid version. If the object cannot be identified,
// for example in a document that is not YAML, all previous objects of the file that are
// missing from it are kept. All other objects are delivered. If an object occurs twice, the
// first occurrence by file name and line is active, and the other is an error. An
// occurrence that was kept from an unreadable file is active only if it is the only one.
//
// # Cluster IPs
//
// A Service without a cluster IP gets one from the Service CIDR of each IP family that it
// needs. The address is derived from the Service's namespace and name only. It is therefore
// the same after a restart and on each node, whatever the order of the files. The exception
// is an address that is in use: the Service gets the next free one, so that its address
// also depends on the other Service. Further rules:
//
//   - While the program runs and the Service needs a cluster IP, the Service keeps its
//     address, whatever happens to other Services.
//   - An address that a file requests is never allocated to another Service. If a file
//     requests an address that another Service has, that is an error until the other
//     Service releases the address.
//   - The first and the last address of a network are not allocated. Of an IPv6 network
//     larger than /66, only the first 2^62 addresses are used.
//
// # Node ports
//
// A Service of type NodePort or LoadBalancer gets a node port for each port without one. A
// Service of type LoadBalancer with externalTrafficPolicy Local also gets a
// healthCheckNodePort. Like addresses, node ports are derived from the Service's namespace,
// name and port only, unless they are in use. A Service keeps its node port as long as it
// has a port with that number and protocol. Ports that files request have precedence. The
// rules follow the API server's defaults:
//
//   - The range is 30000 to 32767. Ports up to 30085 are allocated only when no others are
//     free (KEP-3668). Use these in files: they are unlikely to be allocated to another
//     Service.
//   - Ports with one number in several protocols get the same node port if it is free.
//     Other ports get a number that is free in all protocols.
//   - With allocateLoadBalancerNodePorts: false, only the healthCheckNodePort is allocated.
//   - Each allocated node port is logged.
//   - If two Services request the same number and protocol, the second is an error until
//     the first releases it.
//
// Unlike an API server, the package accepts any port number in a file, because the
// administrator of the node writes the files. A node port takes traffic from a program that
// listens on it: nodePort: 22 makes SSH unreachable. Two Services may request the same
// number in different protocols.
//
// # Other fields
//
// Defaults are those of the API server, and Services that it rejects are errors. Because no
// load balancer controller runs, a file may contain the status that the controller would
// write, status.loadBalancer.ingress.
//
// Files contain no Node object. Therefore:
//
//   - The node has no zone. Topology hints for zones are ignored, and trafficDistribution
//     PreferSameZone and PreferClose have no effect. Hints for nodes are used, and
//     PreferSameNode creates them.
//   - The node has no primary addresses. Node ports are served on all its addresses, unless
//     --nodeport-addresses is set.
//
// # Endpoints
//
// For each Service with a selector, the package builds EndpointSlices from the Pods that
// the selector matches, in addition to EndpointSlices in files. A Pod is an endpoint if it
// has an address in status.podIP or status.podIPs and its phase is neither Succeeded nor
// Failed. It is ready if its condition Ready is True. A Pod without this condition, as in
// hand-written files, is ready if its status.phase is unset or Running. A Pod with a
// deletionTimestamp is terminating. A Pod without spec.nodeName is on this node.
package manifest
