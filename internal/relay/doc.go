// Package relay serves TCP node ports at 127.0.0.1 and ::1. The kernel's packet filter
// cannot: it would have to send a packet with a loopback source address to another host,
// which drops it. A [Relay] listens on the node port instead, connects to an endpoint for
// each client, and copies data in both directions.
//
// The caller passes every commit to [Relay.OnCommit], so a Relay serves only endpoints that
// are programmed, and enables IP families with [Relay.SetFamilies]; initially none is enabled.
// The cost of a commit grows with the number of TCP node ports among its changes.
//
// # Client behavior
//
// A node port without endpoints, or without a Service, has no listener: the kernel refuses
// its clients. Clients of all other node ports get an endpoint, chosen at random from the
// endpoints that the node's own connections reach at the node's address. With
// externalTrafficPolicy Local these are the endpoints of the whole cluster
// ([dataplane.ServiceSpec.Endpoints]). Source ranges apply to load balancers only. With
// session affinity all clients of a node port and family share one endpoint, because they
// share an address. They keep it until the endpoint is removed or no client has connected for
// the affinity timeout.
//
// If an endpoint refuses the connection or is unreachable, the Relay tries another: up to
// three within five seconds. An endpoint that does not answer uses up only its share of that
// time. If none answers, the Relay resets the client, whose connection it has already
// accepted. Pods see an address of the node as the client's address.
//
// The end of each stream is forwarded separately, so a client can continue to read after it
// has closed its sending direction. An error resets both connections. Like a connection that
// the kernel translates, a relayed connection lasts until the client or the endpoint ends it,
// even if the Service or the endpoint is removed. Unlike a translated connection, it does not
// outlive the program.
//
// # Limits
//
// A connection uses at most six file descriptors: two sockets, and two pipes that move data
// without copying it through the program. [Options.MaxConnections] limits the number of
// connections. A node port can hold at most three times as many slots as are free, so no node
// port can starve another; further clients are reset. A connection that one side has closed
// ends when no data moves for [Options.HalfClosedTimeout]. An idle connection ends when the
// peer's host does not answer keepalive probes ([Options.KeepAlive]). Idle connections
// between live hosts stay open.
//
// A port that is already in use does not delay the others, and the Relay retries it. It also
// retries ports beyond [Options.MaxListeners].
package relay
