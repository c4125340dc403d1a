// Package nettest makes small networks of network namespaces that look like a
// Kubernetes node to the kernel, and opens real connections in them.
//
// A [Network] is one node, the pods on it, and one host outside:
//
//	pod ──veth──┐
//	pod ──veth──┤ node ──veth── outside
//	pod ──veth──┘
//
// Everything is routed, point to point: each packet between two hosts passes
// the node's netfilter hooks, and there is no bridge. Neighbours are entered by
// hand and IPv6 addresses are not probed for duplicates, so the first packet
// leaves at once. All of it is made by netlink; no program is needed besides the
// kernel, and root.
//
// Namespaces are anonymous unless [Options].Name is set: they are held by file
// descriptors and are gone with the process, however it ends.
//
// Hosts serve ([Host.Serve]) and connect ([Host.Open], [Host.Connect]) over TCP,
// UDP and SCTP. A server answers with its name, the address it was reached at
// and the source address it saw, so that a client learns what the node did to
// the connection. SCTP needs no kernel support: associations are those of
// pion/sctp over raw IP sockets.
package nettest
