// Package ipvs is the IPVS backend. Its [Dataplane] implements [dataplane.Dataplane]: every
// Service becomes one or more IPVS virtual servers. nftables decides which connections are
// served, and IPVS selects the endpoint.
//
// # Addresses of virtual servers
//
// The virtual server of a cluster IP listens on the cluster IP and port, so that `ipvsadm -Ln`
// shows the Services:
//
//	TCP  10.96.0.10:80 rr
//	  -> 10.244.1.5:8080              Masq    1      0          0
//
// A local route through the dummy interface fairlead0 binds the address to the node. The route
// is in a dedicated routing table, which a rule looks up for incoming packets only:
//
//	20:     not from all iif lo lookup 64029
//	local 10.96.0.10 dev fairlead0 table 64029 proto 250 scope host
//
// The time to add a route does not depend on the number of routes. By contrast, adding an
// address to an interface takes longer the more addresses it has. Packets that the node sends
// do not use this table, so they keep their usual source address, and IPVS handles them on
// output.
//
// All other frontends use addresses that the node needs for other purposes (node ports) or
// does not own (external IPs, load balancer IPs). Their virtual servers listen on internal
// addresses: addresses in 250.29.0.0/16 and fdfa:1d00::/64 that are valid only within the
// node. nftables translates connections from a frontend to its internal address, as the nft
// backend translates them to an endpoint, and drops all other connections to internal
// addresses. Other ports of an external IP, and ARP for it, are therefore not affected. With
// externalTrafficPolicy: Local, the local endpoints have a virtual server at another internal
// address. None of this uses packet marks.
//
// # nftables
//
// Package nft programs the tables `ip fairlead-ipvs` and `ip6 fairlead-ipvs` with a
// [nft.Translator]. These tables have three purposes:
//
//   - They reject or drop connections that have no endpoint or come from outside the source
//     ranges, before IPVS sees them.
//   - They keep connections to unused ports of cluster IPs away from programs of the node.
//   - They masquerade connections after IPVS has translated them. IPVS adds its connections to
//     connection tracking for this purpose (sysctl net.ipv4.vs.conntrack).
//
// # Order of changes
//
// IPVS has no transactions, so clients see each step of a change. The steps are:
//
//  1. Add an nftables rule for each address that will be bound. This drop rule drops
//     connections that match no frontend ([nft.BoundAddressService]). It remains while the
//     address is bound.
//  2. Bind addresses, add virtual servers and destinations, set weights to 1. Existing
//     destinations stay.
//  3. Change the nftables rules in one transaction: open new Services, refuse connections to
//     Services that lost their last endpoint, drop connections to deleted Services.
//  4. Set the weight of undesired destinations to 0, including all destinations of deleted
//     Services. Delete virtual servers without destinations, then unbind their addresses, then
//     delete the drop rules of these addresses.
//
// A step that has nothing to change sends nothing. A change of endpoints takes one send to
// IPVS, and one to nftables if the endpoints are pods of this node.
//
// With this order, no address is reachable while its virtual server lacks destinations. Every
// change is also safe to interrupt, because the next process finds the remaining objects: a
// virtual server is managed by Fairlead if its address is bound in the routing table above or
// is internal. Fairlead never changes other virtual servers, virtual servers identified by a
// firewall mark, and virtual servers in excluded networks.
//
// # Draining
//
// A removed endpoint drains: its destination gets weight 0. This destination accepts no new
// connections, not even from clients with session affinity, and keeps its existing ones.
// Fairlead deletes it when the kernel counts no more connections or when [Options.DrainLimit]
// expires. The kernel counts a closed TCP connection for two more minutes. A UDP destination
// is deleted shortly after its endpoint stops serving, and its flows move to another
// destination. An endpoint that is added again gets weight 1. The kernel stores the weight, so
// draining continues after a restart.
//
// The endpoints of a deleted Service drain in the same way, and its virtual servers are
// deleted after the last endpoint. Until then the cluster IP remains bound, and its drop rule
// drops new connections. A new Service at the same frontend reuses the virtual server. Replace
// finds the virtual servers of Services that were deleted while Fairlead was not running.
//
// # Netlink
//
// Package nlconn sends hundreds of requests for virtual servers, destinations or routes in one
// system call: the kernel handles the requests of one sendmsg(2) in order, and answers only
// the last one and the ones with an error. github.com/moby/ipvs waits for an answer to each
// request. Loading 10,000 virtual servers with 10 destinations each took 7.0 s with it and 2.0
// s with nlconn (BenchmarkLoad).
//
// IPv4 virtual servers and destinations are read through the socket options that IPVS had before
// netlink, see optionReader.
//
// The tests use github.com/moby/ipvs to see the state as other programs see it. The backend
// does not use it to read state, for these reasons:
//
//   - It resolves the number of the generic netlink family once per process. After the module
//     is reloaded, all its calls fail (TestModuleReload in ipvs/reloadtest).
//   - It takes 349 ms and 32 MB to read 1,000 virtual servers with 10 destinations each; this
//     package takes 191 ms and 2 MB (BenchmarkRead).
//   - It runs modprobe through os/exec, and logs a failure through logrus if the image does
//     not contain modprobe.
//   - It decodes only 16 of the 32 bits of a weight, and waits forever for a lost answer.
//
// # Limitations of IPVS
//
// The kernel sends no notifications for IPVS. The backend notices a changed number of virtual
// servers within 100 ms. It compares the virtual servers and their numbers of destinations with the
// programmed state every five seconds, and all destinations and addresses within a minute, with
// pauses in between. docs/design/0022 has the reasons. IPVS persistence
// implements session affinity; docs/ipvs.md lists the differences.
package ipvs
