// Package conntrack deletes connection-tracking entries that would keep clients
// from where a Service is now served, so that the next packet is translated anew.
//
// A flow of UDP has no end: what the first datagram's translation was stays
// until nothing was sent for a while (net.netfilter.nf_conntrack_udp_timeout). A
// client that goes on sending from one port is stuck with an endpoint that has
// left, or with a frontend that was none when the flow began. So is a client of
// SCTP that sends its INIT again from the same port, as those of
// telecommunications do, and a client of TCP that sends its SYN again because an
// endpoint that has left did not answer.
//
// A [Cleaner] is told of every commit ([Cleaner.OnCommit]) and of the node
// ([Cleaner.SetNode]), and looks at the entries after the commit has changed the
// kernel's maps: before, the next datagram would make the same entry again.
//
// # Which entries go
//
// All of them are in the default zone, and were addressed to a frontend; a node
// port counts on the addresses that [dataplane.Node] has for node ports.
// The endpoint is where replies come from. No entry goes whose endpoint serves
// the frontend now: one that takes new flows, and one of Service.Serving, which
// only keeps those that it has. Of the others go
//
//   - those to an endpoint that has left the Service, or whose Service or
//     frontend is gone;
//   - those that were not translated, as the frontend was none when they began,
//     or had no endpoint;
//   - after a Replace, which may have found anything, all of a frontend, and those
//     to a node port by an address that has left [dataplane.Node] since the start.
//
// That is so for UDP and SCTP. Of SCTP, an entry without a reply also goes if its
// endpoint is in Service.Serving: it may never answer.
//
// Of TCP only entries without a reply go ([attempts]), a second after the change or
// later: a connection that was answered ends by itself, with a reset or a timeout.
// After a Replace the entries of TCP stay; a SYN is sent again for two minutes at
// most.
//
// # What it costs
//
// Changes that cannot leave a stale entry behind, such as one more endpoint,
// cost nothing but a comparison. All others of a commit share a few dumps of the
// table, each narrowed by the kernel (Linux 5.8) to the frontends in question,
// or to a protocol where they are many. Older kernels ignore the narrowing: that is seen
// in what they answer, and one dump serves for all. In the kernel a dump walks
// the whole table, which is why none is made in the goroutine that commits, and
// why looks that follow on each other leave most of the time to others.
//
// Endpoints of TCP come and go all the time, so their entries are looked at every
// five seconds at most, and the kernel is asked for those without a reply only
// (Linux 5.15), which are few.
//
// The frontends of UDP and SCTP are looked at once more one or two seconds later: a datagram that had
// passed the old maps and waited, in a queue to user space (NFQUEUE) or on a
// processor that was taken away, makes its entry only then.
package conntrack
