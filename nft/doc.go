// Package nft is the nftables backend: a [dataplane.Dataplane] whose rules are
// constant and whose Services are elements of maps.
//
// It owns two tables, `ip fairlead` and `ip6 fairlead`, and touches nothing
// else. For IPv4 the table reads like this (IPv6 is the same with ip6):
//
//	map services {                 # frontend : class
//	    type ipv4_addr . inet_proto . inet_service : classid
//	    elements = { 10.96.0.10 . tcp . 80 comment "default/backend:http" : 0:3 }
//	}
//	map endpoints-a {              # frontend . slot : endpoint; 0 to f, by the address's last digit
//	    type ipv4_addr . inet_proto . inet_service . classid : ipv4_addr . inet_service
//	    elements = { 10.96.0.10 . tcp . 80 . fa1d:0 : 10.244.1.5 . 8080, … }
//	}
//	map classes {                  # class : chain
//	    type classid : verdict
//	    elements = { 0:3 : goto class-3 }
//	}
//	set no-endpoints { … }         # frontends without endpoints: rejected
//	set hairpin { … }              # endpoint . endpoint . frontend, for pods of this node
//	set pod-cidrs { … }            # clients outside are masqueraded
//
//	chain nat-prerouting {         # and nat-output: the same for the node's own connections
//	    type nat hook prerouting priority dstnat
//	    meta priority set ip daddr . meta l4proto . th dport map @services meta priority vmap @classes
//	}
//	chain class-3 {                # draws a slot
//	    meta priority set numgen random mod 3 offset 4196204544 goto translate
//	}
//	chain translate {
//	    ip daddr & 0.0.0.15 == 0.0.0.10 dnat to ip daddr . meta l4proto . th dport . meta priority map @endpoints-a
//	    …
//	    ip daddr & 0.0.0.15 == 0.0.0.10 dnat to ip daddr . meta l4proto . th dport . numgen random mod 1 offset 4196204544 map @endpoints-a
//	    …
//	}
//	chain filter-prerouting-pre-dnat {     # and output
//	    type filter hook prerouting priority dstnat - 10
//	    ct state new ip daddr . meta l4proto . th dport @no-endpoints goto reject
//	}
//	chain filter-prerouting-post-dnat {    # and output
//	    type filter hook prerouting priority dstnat + 10
//	    meta priority & ffff:0 == fa1d:0 meta priority set none
//	    ct state new ip daddr . meta l4proto . th dport @no-endpoints goto reject
//	}
//
// # Why it is built like this
//
// A class is the number of endpoints. Chains exist for classes in use, so the
// number of rules depends on how many different sizes of Services there are,
// not on how many Services. Services and endpoints are elements of data maps,
// and these the kernel adds and removes in time that does not depend on the
// size of the map. A verdict map with a goto an element would be simpler, but
// a new goto makes the kernel walk all elements of all verdict maps at commit
// (nf_tables_api.c, nft_table_validate): 17 ms an update at 50,000 Services.
// For a like reason only one chain refers to endpoints: see table.translate.
//
// The class, and then the slot, travel from one map to the next in the packet's
// priority, because `nft` cannot print a rule that looks one lookup's result
// up in another map. NAT chains see the first packet of a connection only, and
// the chain behind puts the priority back to none.
//
// The slots of a Service are 0 to N-1 without a hole. An endpoint that leaves is
// replaced by the one in the last slot, so that at most three elements change.
//
// # A packet and a commit at the same time
//
// A commit is atomic, but a packet reads several maps, and a commit can come
// between two reads. The second of these has been seen to lose connections:
//
//   - A packet holds the old class and finds its slot gone. The second half of
//     translate sends it to slot 0, which a Service with endpoints always has.
//   - A packet reads a class whose chain the commit has made, or the next one
//     removes. The kernel decides on entry which generation of rules a packet
//     sees (nf_tables_core.c, nft_do_chain), so a chain that is newer than the
//     packet's entry is empty for it. So a new class is committed before the
//     first Service that is in it, and removed a while after the last.
//   - A Service gets its first endpoint, or loses its last, between the check
//     for such Services and the translation. So the check is on both sides.
package nft
