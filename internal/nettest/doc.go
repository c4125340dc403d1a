// Package nettest builds small networks from network namespaces. To the kernel they look like
// a Kubernetes node; tests open real connections in them.
//
// A [Network] is one node, its pods, and one outside host:
//
//	pod ──veth──┐
//	pod ──veth──┤ node ──veth── outside
//	pod ──veth──┘
//
// All links are routed and point to point. No bridge is involved, so each packet between two
// hosts passes the netfilter hooks of the node. Neighbour entries are permanent and IPv6
// duplicate address detection is off, so hosts send their first packet without delay. The
// package uses netlink only: it needs root, but no programs.
//
// Namespaces are anonymous unless [Options].Name is set. File descriptors keep them alive, and
// the kernel removes them when the process ends for any reason.
//
// Hosts serve ([Host.Serve]) and connect ([Host.Open], [Host.Connect]) over TCP, UDP and SCTP.
// A server answers with its name, the address that the connection reached, and the source
// address that it saw. A client thus learns how the node changed the connection. SCTP needs
// no kernel support: pion/sctp provides the associations over raw IP sockets.
package nettest
