// Package nft implements [dataplane.Dataplane] with nftables. The rules do not depend on
// the number of Services: Services and endpoints are elements of maps.
//
// The package owns two tables, `ip fairlead` and `ip6 fairlead`, and changes no other
// table. The IPv4 table looks like this (the IPv6 table uses ip6):
//
//	map services {                 # frontend : service class
//	    type ipv4_addr . inet_proto . inet_service : classid
//	    elements = { 10.96.0.10 . tcp . 80 comment "default/backend:http" : 0:3,
//	                 0.0.0.0 . tcp . 30080 comment "default/backend:http" : 41:3 }
//	}
//	map endpoints-a {              # frontend . slot : endpoint; 0 to f, by the last hex digit of address or node port
//	    type ipv4_addr . inet_proto . inet_service . classid : ipv4_addr . inet_service
//	    elements = { 10.96.0.10 . tcp . 80 . fa1d:0 : 10.244.1.5 . 8080, … }
//	}
//	map classes {                  # service class : class chain
//	    type classid : verdict
//	    elements = { 0:3 : goto class-3, 41:3 : goto class-3-always-node-port }
//	}
//	map masquerades { … }          # service class : chain that decides whether to masquerade a client
//	set hairpin { … }              # endpoint . endpoint . frontend, for pods of this node
//	set cluster-ips { … }          # cluster IPs; connections to undeclared ports are rejected
//	set ping-internal { … }        # and ping-external: addresses that answer pings
//	set endpoint-ports { … }       # ports of all endpoints
//	set node-port-addrs { … }      # and pod-cidrs, local-pods, service-cidrs: fields of dataplane.Node
//	set node-port-networks { … }   # if not empty, the rules for node-port-addrs exist for it as well
//	counter rejected-no-endpoints  # and others: packets refused, by reason
//
//	set ahead { type nf_proto }    # contains ipv4 while Fairlead translates before other proxies
//	chain nat-prerouting {         # and nat-output, for the node's own connections, which starts with
//	                               # ip daddr 127.0.0.0/8 goto localhost
//	    type nat hook prerouting priority dstnat + 1
//	    meta priority set ip daddr . meta l4proto . th dport map @services meta priority vmap @classes
//	    ip daddr @node-port-addrs meta priority set ip daddr & 0.0.0.0 . meta l4proto . th dport map @services meta priority vmap @classes
//	}
//	chain class-3 {                # selects a slot
//	    meta priority set numgen random mod 3 offset 4196204544 jump translate
//	    meta priority set numgen random mod 1 offset 4196204544 jump translate
//	    drop
//	}
//	chain class-0 {
//	    counter name "rejected-no-endpoints" goto reject
//	}
//	chain translate {
//	    ip daddr & 0.0.0.12 == 0.0.0.8 goto translate-8
//	    …
//	}
//	chain translate-8 {
//	    ip daddr & 0.0.0.15 == 0.0.0.10 meta priority set none dnat to ip daddr . meta l4proto . th dport . meta priority map @endpoints-a
//	    …
//	}
//	chain filter-forward {                  # and output
//	    type filter hook forward priority filter
//	    ct state invalid,new goto new-or-invalid
//	}
//	chain new-or-invalid {                  # and new-or-invalid-output
//	    ct state invalid goto invalid-tcp
//	    ip daddr @cluster-ips counter name "rejected-undeclared-port" goto reject
//	    ip daddr 10.96.0.0/16 counter name "dropped-no-service" drop
//	}
//	chain invalid-tcp {                     # filter-input has the same rule, behind ct state invalid;
//	                                        # invalid-tcp-output also drops the node's resets to invalid packets
//	    tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid
//	}
//	chain nat-postrouting {
//	    type nat hook postrouting priority srcnat
//	    ct status dnat goto masquerading    # hairpin, then services and masquerades
//	}
//
// The comments in `services` name the Service. At external addresses, they also contain the
// [dataplane.Kind], as in "default/backend:http LoadBalancer".
//
// # Terms
//
// A frontend has two endpoint lists: the cluster list ([dataplane.ServiceSpec].Endpoints)
// and the local list (LocalEndpoints). The endpoints of a list occupy its slots, which are
// numbered from 0. The frontends of a shard have an address, or a node port, that ends in
// the same hex digit. A service class encodes how the tables handle the connections to a
// frontend; see below. A verdict element is an element of a verdict map, which sends the
// packets of a class to a chain. A packet is refused if the rules drop or reject it. The
// node's own connections start on the node itself. A local pod is a pod of this node. Each
// commit to nftables starts a new generation of the kernel's rulesets.
//
// # Service classes
//
// A service class is a number that contains the number of endpoints and the properties of
// a [dataplane.ServiceSpec] that are true or false; see the type serviceClass. Each class
// in use has a chain. So the number of rules depends on how many combinations of size and
// properties exist, not on how many Services exist.
//
// The remaining properties have separate maps. Only the chains of classes that need such a
// map look it up:
//
//   - externalTrafficPolicy: Local: the map `external` contains the class for the local
//     list, whose slots start at fa1c:0. `chain external` sends clients there that are
//     neither the node nor local pods.
//   - Session affinity: the map `timeouts` contains the frontend's timeout, and each timeout
//     in use has a chain. The maps `affinity-0` to `affinity-f` store the endpoint ID of each
//     client and frontend for the timeout. They store an ID because endpoints change slots.
//     The maps `slots-0` to `slots-f` translate a slot to an ID, and `sticky-endpoints-0` to
//     `sticky-endpoints-f` an ID to an endpoint. The rules delete an ID that has no endpoint when a packet finds it. Packets write the
//     affinity maps, and an [AffinityLimiter] makes room in them. Their size is limited. A
//     full map affects only the frontends of its shard: `affinity-full` counts connections
//     of clients that are not stored. `affinity-networks` limits how many clients of one
//     IPv6 network of 64 bits each frontend stores; `affinity-network-limit` counts the
//     others.
//   - Source ranges: the set `source-ranges-24` contains frontend and network for each range
//     with a prefix length of 24. The rule looks up as many bits of the client's address. Sets
//     and rules exist for prefix lengths in use. This needs no interval sets, ranges may
//     overlap, and the cost of a Service depends on its own ranges only.
//
// In all of these, a node port is a frontend with the unspecified address. The chains of
// node port classes replace the address of the packet by the unspecified address.
//
// # Balancing
//
// A class also contains how the slots of its list are selected, according to
// [dataplane.ServiceSpec].Scheduler. The maps are the same for all of them:
//
//	map services { elements = { 10.96.0.2 . tcp . 80 : 800:2, 10.96.0.3 . tcp . 80 : 400:400 } }
//	chain class-2-turn-0 {         # dataplane.RoundRobin
//	    meta priority set numgen inc mod 2 offset 4196204544 jump translate
//	    …
//	}
//	chain class-1024-hash {        # dataplane.SourceHash
//	    meta priority set jhash ip saddr mod 1024 seed 0xfa1d offset 4196204544 jump translate
//	    …
//	}
//
// The kernel's counter for numgen inc belongs to the rule. Services of one class would take turns with
// each other, and a client that uses two of them in step would always reach the same endpoint of
// each. So a class with round robin contains one of 30 numbers, and the Dataplane gives each
// Service a number that no other Service with the rest of the class has. With a source hash, a list
// always has 1,024 slots. Each has the endpoint with the highest weight, a hash of the slot and
// the endpoint. docs/design/0017-balancing.md has the reasons.
//
// # Shared lists
//
// If a Service has 8 or more frontends of one [dataplane.Kind], one element for each frontend
// and endpoint would be too many. These frontends share a list:
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
// The class of such a frontend has size 1 if it has endpoints, so adding or removing an
// endpoint changes the list only. A list ID is a priority of fa18:1 or higher. Frontends with
// session affinity do not share lists. docs/design/shared-endpoint-lists.md has the reasons.
//
// # Invalid packets
//
// The kernel does not translate a TCP packet that connection tracking classifies as invalid.
// An invalid packet from an endpoint would arrive at the client, or at this node if the
// client is masqueraded, with the endpoint's own address. No socket matches it there, so the
// receiver answers with a reset, and the endpoint aborts a working connection. The chain
// invalid drops these packets, and the counter dropped-invalid counts them. An invalid packet
// belongs to no connection, so the rules recognize the packets of Services by their headers:
//
//   - The packet has ACK but not SYN, FIN or RST. Without a connection, it would have started
//     one, so a connection exists that the packet does not fit. Where the node sees only the
//     packets of the server, SYN-ACK, FIN and RST are invalid as well because the node sees
//     them first; they pass. A reset does no harm.
//   - The source port is the port of an endpoint. Where the node sees no packets of the
//     server, every packet of the client is invalid.
//   - The source or the destination is a pod, if [dataplane.Node] identifies pods. If it does
//     not, packets to the node itself pass.
//
// Some packets to the node itself pass, for example from an endpoint on another node. If no
// socket matches, the kernel answers with a reset without ACK, which is invalid as well.
// The output chains drop these resets if an endpoint has the destination port. Resets of the
// node's own connections are not invalid.
//
// From Linux 6.1, a packet does not fit its connection if the segment is beyond the receiver's
// window or acknowledges data that the node has not seen. For earlier kernels, late segments
// that are already acknowledged do not fit either, and these are common
// (nf_conntrack_proto_tcp.c, tcp_in_window, "ignore overly delayed tcp packets").
// With the sysctl net.netfilter.nf_conntrack_tcp_be_liberal, which kube-proxy's flag
// --conntrack-tcp-be-liberal sets, none of these packets is invalid: the kernel translates
// everything except resets, whatever the sequence numbers. With nf_conntrack_tcp_loose off
// (the default is on), no connection starts in its middle. Then the replies of a server to a
// client whose packets do not pass this node are invalid, and the rules drop them if an
// endpoint has the source port. A server on such a port does not learn that the node has
// lost a connection.
//
// # Pings
//
// With Node.PingServiceIPs, the node answers ICMP echo requests to the addresses of Services.
// A rule behind the rules for Services translates new echo requests to an address of the node,
// if the client's set contains the Service address. The set is ping-external for clients that
// get local endpoints if the policy is Local, and ping-internal for all other clients.
// Connection tracking restores the Service address in the reply. Without the option, both sets
// are empty and the rules do not exist. To the kernel, all requests of a running ping are one
// connection. For each of these requests, the chain pinged checks whether a cluster IP still
// has an endpoint. At other addresses, a running ping gets answers until it pauses for
// net.netfilter.nf_conntrack_icmp_timeout (30 s). The same applies to all addresses after the
// option is switched off.
//
// # Node ports at loopback addresses
//
// nat-output rejects the node's own connections to a node port at 127.0.0.0/8 or ::1, except
// TCP with Node.LocalhostNodePorts. It looks up services as for other node ports. Only the
// first packet of a connection to a loopback address passes this lookup; connections to other
// addresses pass one comparison. Nothing is translated: the kernel sends no packet from a
// loopback address to another host.
//
// # Packets to loopback addresses
//
// With the sysctl route_localnet of an interface, which kube-proxy's iptables mode sets and
// does not reset, the kernel accepts packets to 127.0.0.0/8 from other hosts. With
// Node.ProtectLoopback, the chain loopback-from-network drops them, and the counter
// dropped-loopback counts them:
//
//	chain filter-input {
//	    ct state invalid …                  # see above
//	    ip daddr 127.0.0.0/8 iifname != "lo" goto loopback-from-network
//	}
//	chain loopback-from-network {
//	    ct direction reply return
//	    ct status dnat return
//	    counter name "dropped-loopback" drop
//	}
//
// Other packets to the node itself pass one comparison of a byte. Forwarded packets do not pass
// the chain. It sees translated addresses, so it accepts packets that another program translates
// to a loopback address, such as kube-proxy's node ports on localhost or a service mesh.
//
// # Translators
//
// With [Options].Translator, another mechanism selects the endpoints. The tables decide which
// connections are accepted and masqueraded, and refuse the rest. Each endpoint list is a
// virtual server: classes have size 0 or 1, slot 0 contains the address of the virtual server,
// and the maps of session affinity do not exist. A pass-through class has no slot: its
// connections keep the frontend's own address.
//
//	map services { elements = { 10.96.0.10 . tcp . 80 : 100:1, 203.0.113.3 . tcp . 443 : 0:1 } }
//	map endpoints-3 { elements = { 203.0.113.3 . tcp . 443 . fa1d:0 : 250.29.0.1 . 443 } }
//	chain class-1-through {
//	    meta priority set none dnat to ip daddr
//	}
//	chain filter-prerouting-post-dnat {     # because the Translator may bind cluster IPs to the node
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
// bound-ips contains the addresses that the Translator binds to the node; see
// [BoundAddressService]. The rules refuse connections to them that match no frontend. The
// kernel looks up a new route for packets that the node sends to a bound address and that the
// Translator sends to one of the node's own addresses:
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
// endpoint-ports and hairpin contain the real endpoints, as without a Translator. The node's
// own pass-through connections must be translated before filter-output, which rejects
// connections to cluster IPs.
//
// # Design
//
// Services and endpoints are elements of data maps because the kernel adds and removes these
// in time that does not depend on the size of the map. A verdict map with one goto per element
// would be simpler. But for a new goto, the kernel walks all elements of all verdict maps at
// commit (nf_tables_api.c, nft_table_validate): 17 ms per update at 50,000 Services. For a
// similar reason, no class chain refers to endpoints; see table.translateChains.
//
// The packet's priority carries the class, and then the slot, from one map to the next,
// because `nft` cannot print a rule that looks up the result of one lookup in another map. NAT
// chains see only the first packet of a connection. The rule that translates it resets the
// priority to none after its lookup, although nft prints the two in the other order.
//
// Every connection of the node passes the base chains, so these are few and short, and rules that
// not every node needs exist only where a setting needs them. With [dataplane.Node].AheadOfOthers,
// nat-prerouting-ahead and nat-output-ahead exist at dstnat - 1 and start with != @ahead return,
// and the chains at dstnat + 1 start with @ahead return. filter-prerouting-post-dnat and
// filter-output-post-dnat exist for pings and Translators. With one or two
// networks in [dataplane.Node].PodCIDRs or ServiceCIDRs, rules compare addresses with them instead
// of looking them up. TestFirstPacketCost limits the number of expressions;
// docs/design/0020-first-packet.md has the measurements.
//
// The slots of a list are 0 to N-1 without gaps. When an endpoint is removed, the endpoint in
// the last slot takes its slot, so at most three elements change.
//
// The NAT chains also refuse connections that no endpoint can accept, with the same lookup
// that translates the others.
//
// # Concurrent packets and commits
//
// A commit is atomic. But a packet reads several maps, and a commit can happen between two
// reads. In tests, the second of these cases has lost connections:
//
//   - A packet has the old class, and its slot does not exist any more. The second rule of the
//     class chain sends it to slot 0, which exists while the Service has endpoints. Without
//     endpoints, the packet is dropped, and the client's retry sees the new state.
//   - A packet reads a class whose chain the commit has created, or the next commit removes.
//     The kernel decides on entry which generation of rules a packet sees (nf_tables_core.c,
//     nft_do_chain), so a chain that is newer than the packet's entry is empty for the packet.
//     Therefore, a new class is committed before the first Service that uses it, and removed
//     some time after the last one.
package nft
