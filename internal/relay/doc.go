// Package relay serves the node ports of TCP at 127.0.0.1 and ::1, where the
// kernel's packet filter can't: it would have to give a packet from a loopback
// address to another host, which drops it. So a program listens there, connects
// to an endpoint for each client, and copies both ways.
//
// A [Relay] is told of every commit ([Relay.OnCommit]), so that it serves what
// is programmed and nothing else, and of the families that are wanted
// ([Relay.SetFamilies]), of which there is none at first. A commit costs as much
// as the node ports of TCP among its changes.
//
// # What clients meet
//
// A node port without endpoints, or without a Service, is not listened on: the
// kernel refuses its clients. All others get an endpoint, chosen at random from
// those that the node's own connections go to at the node's address: with
// externalTrafficPolicy Local these are the cluster's
// ([dataplane.ServiceSpec.Endpoints]). Source ranges are of load balancers, and
// take no part. With session affinity all clients of a node port and a family
// share one endpoint, as they share an address, until it leaves or none of them
// has connected for the timeout.
//
// An endpoint that refuses, or is not to be reached, is passed over for another:
// up to three are tried, within five seconds, of which one that does not answer
// takes its share. If none answers the client, whose connection was accepted
// before, is reset. Pods see an address of the node as the client's.
//
// The end of either stream is passed on by itself, so that a client may go on
// reading after it has said all; an error ends both sides with a reset. A
// connection lasts until client or endpoint end it, whatever becomes of the
// Service and the endpoint meanwhile, as one does that the kernel translates.
// Unlike that one it does not outlive the program.
//
// # Bounds
//
// A connection takes six file descriptors at most, two sockets and two pipes to
// move data without copying it through the program. There are no more
// connections at a time than [Options.MaxConnections]. A node port gets at most
// three times as many as are free, so that none keeps others from being served;
// further clients are reset. A connection that one side has closed ends when
// nothing moves for [Options.HalfClosedTimeout], and a silent one when its peer's
// host does not answer probes ([Options.KeepAlive]). A silent one of live hosts stays.
//
// A port that is taken holds no other up, and is tried again; so is a port beyond
// [Options.MaxListeners].
package relay
