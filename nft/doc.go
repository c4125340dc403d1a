// Package nft is the nftables backend: a [dataplane.Dataplane] whose rules are
// constant and whose Services are elements of maps.
//
// It owns two tables, `ip fairlead` and `ip6 fairlead`, and touches nothing
// else. For IPv4 the table reads like this (IPv6 is the same with ip6):
//
//	map services {                 # frontend : class
//	    type ipv4_addr . inet_proto . inet_service : classid
//	    elements = { 10.96.0.10 . tcp . 80 comment "default/backend:http" : 0:3,
//	                 0.0.0.0 . tcp . 30080 comment "default/backend:http" : 41:3 }
//	}
//	map endpoints-a {              # frontend . slot : endpoint; 0 to f, by the last digit of address or node port
//	    type ipv4_addr . inet_proto . inet_service . classid : ipv4_addr . inet_service
//	    elements = { 10.96.0.10 . tcp . 80 . fa1d:0 : 10.244.1.5 . 8080, … }
//	}
//	map classes {                  # class : chain
//	    type classid : verdict
//	    elements = { 0:3 : goto class-3, 41:3 : goto class-3-always-node-port }
//	}
//	map masquerades { … }          # class : chain that decides whether a client is masqueraded
//	set hairpin { … }              # endpoint . endpoint . frontend, for pods of this node
//	set cluster-ips { … }          # of Services: their other ports are rejected
//	set ping-internal { … }        # and ping-external: addresses whose pings are answered
//	set endpoint-ports { … }       # ports that some endpoint has
//	set node-port-addrs { … }      # and pod-cidrs, local-pods, service-cidrs: what dataplane.Node says
//	set node-port-networks { … }   # the same; while it has elements, the rules with node-port-addrs exist for it, too
//	counter rejected-no-endpoints  # and others: the reasons not to serve a connection
//
//	set ahead { type nf_proto }    # has ipv4 while Fairlead translates before other proxies
//	chain nat-prerouting {         # and nat-output: the same for the node's own connections, behind
//	                               # ip daddr 127.0.0.0/8 goto localhost; nat-prerouting-ahead and
//	                               # nat-output-ahead at dstnat - 1, for which != @ahead return
//	    type nat hook prerouting priority dstnat + 1
//	    meta nfproto @ahead return
//	    meta priority set ip daddr . meta l4proto . th dport map @services meta priority vmap @classes
//	    ip daddr @node-port-addrs meta priority set ip daddr & 0.0.0.0 . meta l4proto . th dport map @services meta priority vmap @classes
//	}
//	chain class-3 {                # draws a slot
//	    meta priority set numgen random mod 3 offset 4196204544 jump translate
//	    meta priority set numgen random mod 1 offset 4196204544 jump translate
//	    drop
//	}
//	chain class-0 {
//	    counter name "rejected-no-endpoints" goto reject
//	}
//	chain translate {
//	    ip daddr & 0.0.0.15 == 0.0.0.10 dnat to ip daddr . meta l4proto . th dport . meta priority map @endpoints-a
//	    …
//	}
//	chain filter-prerouting-post-dnat {     # and output
//	    type filter hook prerouting priority dstnat + 10
//	    meta priority & fffe:0 == fa1c:0 meta priority set none
//	}
//	chain filter-forward {                  # and output
//	    type filter hook forward priority filter
//	    ct state new ip daddr @cluster-ips counter name "rejected-undeclared-port" goto reject
//	    ct state new ip daddr @service-cidrs counter name "dropped-no-service" drop
//	    ct state invalid tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid
//	}                                       # and input; output also drops the node's resets in answer to such
//	chain nat-postrouting {
//	    type nat hook postrouting priority srcnat
//	    ct status dnat goto masquerading    # hairpin, then services and masquerades
//	}
//
// # Classes
//
// A class says how many endpoints there are, and in its other bits all that
// is yes or no about a [dataplane.ServiceSpec]; see the type class. Chains exist
// for classes in use, so the number of rules depends on how many different
// kinds and sizes of Services there are, not on how many Services.
//
// What is more than that has maps of its own, which only the chains of such
// classes look into:
//
//   - externalTrafficPolicy: Local: `external` has the class of the list of local
//     endpoints, whose slots are fa1c:0 and up. `chain external` sends clients
//     there that are neither the node nor its pods.
//   - Session affinity: `timeouts` has the frontend's timeout, for which there is
//     a chain. `affinity-0` to `affinity-f` remember for a client and a frontend, for
//     that long, the ID of an endpoint: a slot would not do, as endpoints change slots.
//     So `slots` goes from slot to ID, and `sticky-endpoints` from ID to endpoint:
//     an ID that is not there any more is forgotten when it is met. Packets write
//     these maps, and an AffinityLimiter makes room in them. They are bounded, and a
//     full one concerns the frontends of its shard only: `affinity-full` counts
//     connections whose clients are not remembered. `affinity-networks` limits how
//     many clients of one IPv6 network of 64 bits a frontend remembers;
//     `affinity-network-limit` counts the others.
//   - Source ranges: `source-ranges-24` has frontend and network for each range of
//     that prefix length, to be looked up with so many bits of the client's
//     address. The sets and their rules exist for lengths in use. No interval
//     set is needed, ranges may overlap, and one Service costs what it has.
//
// A node port is a frontend with the unspecified address in all of these, and
// chains for such classes make the address of the packet that.
//
// # Many frontends
//
// Where a Service has 8 frontends of a kind or more, elements for each frontend and
// endpoint would be too many. Such frontends share a list:
//
//	map lists { … }                # frontend : list ID
//	map list-sizes { … }           # list ID . first slot : number of endpoints
//	map shared-endpoints-1 { … }   # list ID . slot : endpoint; 0 to 7, by list ID
//	set shared-hairpin { … }       # endpoint . endpoint . list ID
//	set shared-source-ranges-24 { … }
//
//	chain class-1-always-shared {
//	    goto shared
//	}
//	chain shared {
//	    jump list                  # meta priority set ip daddr . meta l4proto . th dport map @lists
//	    meta priority set meta priority . numgen random mod 1 offset … map @list-sizes meta priority vmap @list-draws
//	    drop
//	}
//	chain list-3-shared-1 {
//	    jump list
//	    dnat to meta priority . numgen random mod 3 offset … map @shared-endpoints-1
//	    …
//	}
//
// The class of such a frontend has the size 1 where there are endpoints, so that an
// endpoint that comes or goes changes the list alone. A list ID is a priority of
// fa18:1 and up. Session affinity knows no lists. docs/design/shared-endpoint-lists.md
// has the reasons.
//
// # Invalid packets
//
// The kernel does not translate a packet of TCP that its connection tracking calls
// invalid. One from an endpoint would reach the client with the endpoint's own
// address, or where the client is masqueraded, this node, with no socket for it.
// Either answers with a reset, and the endpoint gives up a connection that is in
// order. The chain invalid drops such packets, and the counter dropped-invalid
// counts them. Since what is invalid belongs to no connection any more, that one
// was a Service's is told by what is left:
//
//   - It has ACK, and neither SYN, FIN nor RST: without a connection it would have
//     begun one, so there is one and it does not fit. A SYN-ACK, FIN or RST is
//     invalid as well where the node sees no more than what a server answers,
//     because they come first; they pass. A reset harms nobody.
//   - Its source port is one that some endpoint has. What a client sends is all
//     invalid where the node sees nothing that the server answers.
//   - It is from or to a pod, where [dataplane.Node] tells pods. Where it does not,
//     packets to the node itself pass.
//
// What passes to the node itself, as from an endpoint that is another node or its
// pod, is answered by the kernel where no socket is for it: with a reset without
// ACK, which is invalid too. filter-output drops these where they go to a port that
// some endpoint has. Resets of the node's own connections are not invalid.
//
// What does not fit is, from Linux 6.1, a segment beyond the receiver's window, or
// one that acknowledges what has not been seen. Before, segments that come late
// are as well, although they have been acknowledged already, and those are common
// (nf_conntrack_proto_tcp.c, tcp_in_window, "ignore overly delayed tcp packets").
// With the sysctl net.netfilter.nf_conntrack_tcp_be_liberal, which kube-proxy's
// flag --conntrack-tcp-be-liberal sets, none of these is invalid: all but resets
// are translated whatever their numbers, and nothing is left to drop. With
// nf_conntrack_tcp_loose off, which is not the default, no connection begins in
// its middle; then what a server answers to a client who reaches it past this node
// is invalid, and is dropped from ports that endpoints have, and a server on such a
// port is not told that the node has lost a connection.
//
// # Pings
//
// With Node.PingServiceIPs, new echo requests that no Service's rules are for are
// sent to an address of the node, if the Service's address is in the set for the
// client: ping-external for those who would get local endpoints where the policy
// is Local, and ping-internal for all others. Connection tracking gives the answer
// the Service's address. Without the option both sets are empty and there are no
// rules. A program that goes on to ping is one connection; the chain pinged looks
// at every request whether a cluster IP still has an endpoint. At other addresses
// such a program is answered until it pauses for as long as the kernel remembers
// it (net.netfilter.nf_conntrack_icmp_timeout, 30 s), and so it is everywhere when
// the option is switched off.
//
// # Node ports at loopback addresses
//
// The node's connections to 127.0.0.0/8 or ::1 and a node port are rejected in
// nat-output, by looking up services as for any node port, but for TCP with
// Node.LocalhostNodePorts. That lookup is all that others to these addresses meet,
// with their first packet, and connections to other addresses meet one comparison.
// Nothing is translated: the kernel sends no packet from a loopback address to
// another host.
//
// # Packets to loopback addresses
//
// With the sysctl route_localnet of an interface, which kube-proxy's iptables mode sets
// and leaves behind, the kernel accepts packets to 127.0.0.0/8 from other hosts. With
// Node.ProtectLoopback the chain loopback-from-network drops them, and the counter
// dropped-loopback counts them:
//
//	chain filter-prerouting-post-dnat {
//	    ip daddr 127.0.0.0/8 iifname != "lo" goto loopback-from-network
//	}
//	chain loopback-from-network {
//	    ct direction reply return
//	    ct status dnat return
//	    counter name "dropped-loopback" drop
//	}
//
// All other packets meet one comparison of a byte. The chain sees addresses after
// translation, so it passes packets that another program translates to a loopback
// address, such as kube-proxy's node ports on localhost or a service mesh.
//
// # Translators
//
// With [Options].Translator somebody else picks the endpoints, and what is above
// decides who is served, who is masqueraded, and what becomes of the rest. Each list
// of endpoints is a virtual server then: classes have a size of 0 or 1, slot 0 has
// the virtual server's address, and there is nothing for session affinity. A class
// with the bit through has no slot: its connections are let through to the
// frontend's own address.
//
//	map services { elements = { 10.96.0.10 . tcp . 80 : 100:1, 203.0.113.3 . tcp . 443 : 0:1 } }
//	map endpoints-3 { elements = { 203.0.113.3 . tcp . 443 . fa1d:0 : 250.29.0.1 . 443 } }
//	chain class-1-through {
//	    meta priority set none dnat to ip daddr
//	}
//	chain filter-prerouting-post-dnat {     # as the translator may have the node take cluster IPs
//	    …
//	    ct state new ip daddr @cluster-ips fib daddr type != local goto undeclared
//	}
//	chain undeclared {
//	    meta priority set ip daddr . meta l4proto . th dport map @services meta priority set none return
//	    counter name "rejected-undeclared-port" goto reject
//	}
//	chain nat-postrouting {
//	    ct status dnat goto masquerading
//	    ct original ip daddr @cluster-ips goto masquerading
//	}
//
// bound-ips has the addresses that the Translator binds to the node; see
// [BoundAddressService]. Connections to them that no frontend takes are rejected or dropped.
// Packets that the node sends there, and that the Translator sends to one of the
// node's own addresses, get a new route:
//
//	set bound-ips { elements = { 10.96.0.10 } }
//	chain nat-output {                      # and filter-prerouting-post-dnat
//	    …
//	    ip daddr @bound-ips fib daddr type != local goto bound
//	}
//	chain bound {
//	    ip daddr @cluster-ips counter name "rejected-undeclared-port" goto reject
//	    counter name "dropped-no-service" drop
//	}
//	chain route-output {                    # filter-output-post-dnat flips the bit back
//	    type route hook output priority dstnat + 9
//	    oifname != "lo" ct original ip daddr @bound-ips fib daddr type local meta mark set meta mark ^ 0x80000000
//	}
//
// endpoint-ports and hairpin are those of the endpoints all the same. The node's own
// connections that are let through must be translated before filter-output, where
// those to a cluster IP are rejected.
//
// # Why it is built like this
//
// Services and endpoints are elements of data maps, and these the kernel adds
// and removes in time that does not depend on the size of the map. A verdict
// map with a goto an element would be simpler, but a new goto makes the kernel
// walk all elements of all verdict maps at commit (nf_tables_api.c,
// nft_table_validate): 17 ms an update at 50,000 Services. For a like reason
// no chain of a class refers to endpoints: see table.translateChain.
//
// The class, and then the slot, travel from one map to the next in the packet's
// priority, because `nft` cannot print a rule that looks one lookup's result
// up in another map. NAT chains see the first packet of a connection only, and
// the chain behind puts the priority back to none.
//
// The slots of a list are 0 to N-1 without a hole. An endpoint that leaves is
// replaced by the one in the last slot, so that at most three elements change.
//
// Connections that no endpoint can take are rejected or dropped in the same nat
// chains, and for the same lookup, that the others are translated by.
//
// # A packet and a commit at the same time
//
// A commit is atomic, but a packet reads several maps, and a commit can come
// between two reads. The second of these has been seen to lose connections:
//
//   - A packet holds the old class and finds its slot gone. The second rule of
//     its class sends it to slot 0, which a Service with endpoints always has.
//     Where there is none any more, the packet is dropped, and when the client
//     sends it again, it meets the new state.
//   - A packet reads a class whose chain the commit has made, or the next one
//     removes. The kernel decides on entry which generation of rules a packet
//     sees (nf_tables_core.c, nft_do_chain), so a chain that is newer than the
//     packet's entry is empty for it. So a new class is committed before the
//     first Service that is in it, and removed a while after the last.
package nft
