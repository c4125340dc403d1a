// Package conntrack deletes stale connection-tracking entries. A stale entry sends a client to
// another destination than its Service has now. After its deletion, the kernel translates the
// client's next packet by the current rules.
//
// A UDP flow has no end: the kernel keeps the translation of the first datagram until no
// datagram is sent for a while (net.netfilter.nf_conntrack_udp_timeout). A client that keeps
// sending from one port therefore stays with a removed endpoint, or stays untranslated if the
// frontend did not exist when the flow began. The same happens to two other kinds of clients.
// An SCTP client may repeat its INIT from the same port, as in telecommunications. A TCP
// client repeats its SYN if a removed endpoint did not answer.
//
// A [Cleaner] receives every commit ([Cleaner.OnCommit]) and the node ([Cleaner.SetNode]). It
// scans the entries after a commit has changed the kernel's maps. Before that, the next
// datagram would create the same entry again.
//
// # Stale entries
//
// The Cleaner considers only entries in the default zone whose original destination is a
// frontend. For node ports, the destination must be an address that [dataplane.Node] lists for
// node ports. The endpoint of an entry is the source of the replies.
//
// An entry is never stale while its endpoint serves the frontend. An endpoint serves if it
// accepts new flows, or if it is in Service.Serving and thus keeps its existing flows. There
// is one exception: an SCTP entry without a reply is stale if its endpoint is in
// Service.Serving, because that endpoint may never answer.
//
// Otherwise an entry for UDP or SCTP is stale in these cases:
//
//   - Its endpoint was removed from the Service, or the Service or frontend was deleted.
//   - It is not translated, because the frontend did not exist or had no endpoint when the
//     flow began.
//   - A Replace has happened, before which the kernel may have held any state. This applies to
//     all entries of all frontends, and to entries of node ports at addresses removed from
//     [dataplane.Node] since the start.
//
// A TCP entry is stale only if it has no reply. The Cleaner deletes an attempt to connect to a
// removed endpoint a second after the change or later ([connAttempts]). An established
// connection ends without help, with a reset or a timeout.
//
// After a Replace, a TCP entry without a reply is also stale if it is not translated. The kernel
// creates such an entry for a SYN that arrives while the rules are missing. It keeps the entry
// for two minutes after the last SYN (net.netfilter.nf_conntrack_tcp_timeout_syn_sent), and does
// not translate later packets with the same addresses and ports: neither the repeated SYN of this
// connection, nor the SYN of a later connection with the same source port.
//
// # Cost
//
// A change that cannot make entries stale, such as an added endpoint, costs only a comparison.
// The other changes of a commit share a few dumps of the table. The kernel filters each dump
// (Linux 5.8) by the affected frontends, or by protocol if there are many. Older kernels
// ignore the filter; the Cleaner detects this from the entries and uses one dump for
// everything. The kernel walks the whole table for each dump. Therefore no dump runs in the
// committing goroutine, and the Cleaner pauses between scans for most of the time.
//
// While changes are frequent, the Cleaner listens to the kernel's events for new UDP and SCTP entries.
// It then scans only for frontends and endpoints with flows, and every ten seconds for all changed ones.
// Rare changes cost less than events would. docs/design/0010-conntrack-cleaning.md has the measurements.
//
// TCP endpoints change all the time, so TCP entries are scanned at most every five seconds.
// The kernel returns only entries without a reply (Linux 5.15), of which there are few. The scans
// after a Replace include them.
//
// UDP and SCTP frontends are scanned again one to two seconds after the first scan. A datagram
// may have passed the old maps and then waited, in a queue to user space (NFQUEUE) or on a
// preempted processor. It creates its entry only after the first scan.
package conntrack
