// Package servicecounters counts the new connections of selected Services and of their endpoints in
// the kernel, for metrics.
//
// It has nftables tables of its own, `ip fairlead-counters` and `ip6 fairlead-counters`, which exist
// only if Services are selected. The tables of the backends do not change, in any mode:
//
//	set endpoints {                # frontend . endpoint
//		type ipv4_addr . inet_proto . inet_service . ipv4_addr . inet_service
//		counter
//		elements = { 10.96.0.10 . tcp . 80 . 10.244.1.5 . 8080 counter packets 7 bytes 420 comment "default/web:http ClusterIP", … }
//	}
//	set frontends { … }            # frontend
//	chain postrouting {            # and input, for endpoints on the node itself
//		type nat hook postrouting priority 99
//		goto count
//	}
//	chain count {
//		ct original ip daddr . meta l4proto . ct original proto-dst . ip daddr . th dport @endpoints \
//			ct original ip daddr . meta l4proto . ct original proto-dst @frontends return
//		ct original ip daddr & 0.0.0.0 . … # the same for node ports
//	}
//
// The kernel evaluates a NAT chain for the first packet of an entry of the connection-tracking table,
// and a lookup that finds an element adds the packet to the element's counter (nft_lookup.c). So a
// counter contains the number of TCP and SCTP connections, and of UDP flows, whose first packet has
// passed the rules and left for an endpoint. Connections that are refused, or that go to localhost
// node ports, do not count.
//
// An element is identified by frontend and endpoint, not by the endpoint's slot. It keeps its count
// while other endpoints change, and while no agent runs.
//
// [Dataplane] adds the elements of new endpoints before the backend programs them, and removes
// elements after the backend has removed the endpoints, so that no connection is missed.
package servicecounters
