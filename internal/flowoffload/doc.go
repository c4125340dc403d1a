// Package flowoffload puts established connections to Services into a flowtable of the kernel. Their
// packets then skip the netfilter hooks, the route lookup and connection tracking: the ingress hook of
// a device translates them and sends them on
// (https://docs.kernel.org/networking/nf_flowtable.html).
//
// It has an nftables table of its own, `inet fairlead-flows`. The tables of the backend do not change.
//
//	flowtable flows {              # flags offload with [Hardware]
//		hook ingress priority 100
//		devices = { eth0, vethc0ffee }
//		counter
//	}
//	set devices {                  # the same devices
//		type iface_index
//		elements = { "eth0", "vethc0ffee" }
//	}
//	set frontends-ipv4 {           # and frontends-ipv6
//		type ipv4_addr . inet_proto . inet_service
//		elements = { 10.96.0.10 . tcp . 80, 0.0.0.0 . tcp . 30080 }
//	}
//	counter offloaded
//	chain forward {
//		type filter hook forward priority 200
//		ct status dnat ct state established iif @devices oif @devices ct packets > 20 goto offload
//	}
//	chain offload {
//		ct original ip daddr . meta l4proto . ct original proto-dst @frontends-ipv4 flow add @flows counter name "offloaded" return
//		ct original ip daddr & 0.0.0.0 . … # the same for node ports, and both for IPv6
//	}
//
// The chain forward runs behind the filter chains of Fairlead and of other programs, so a packet that
// one of them drops offloads nothing. The flowtable's hook runs behind the ingress chains of other
// programs.
//
// # The end of a flow
//
// The kernel returns a connection to the normal path when a TCP packet has FIN or RST, when no packet
// has passed for net.netfilter.nf_flowtable_tcp_timeout or nf_flowtable_udp_timeout (30 s), when its
// route changes, when a device goes away, and when its conntrack entry is deleted
// (nf_flow_table_core.c). The last one is how a UDP flow leaves a removed endpoint: see package
// conntrack. Kernels before 6.4 refuse to delete the entry of an offloaded flow (EBUSY), so only TCP
// connections are offloaded there. Newer kernels keep a TCP connection that ends until the timeout, or
// until a SYN (nf_flow_table_ip.c, NF_FLOW_CLOSING).
//
// The rule `ct packets` switches on net.netfilter.nf_conntrack_acct. Connections that started before
// it have no counter and are never offloaded.
package flowoffload
