// Package ipvs is the IPVS backend: a [dataplane.Dataplane] whose Services are
// virtual servers of the kernel. nftables says who is served, and IPVS picks the
// endpoint.
//
// # Where the virtual servers are
//
// That of a cluster IP is at its address and port, so that `ipvsadm -Ln` reads as
// the Services do:
//
//	TCP  10.96.0.10:80 rr
//	  -> 10.244.1.5:8080              Masq    1      0          0
//
// The address is bound to the node by a local route through the dummy interface
// fairlead0, in a routing table of its own which a rule looks up for packets that
// arrive:
//
//	20:     not from all iif lo lookup 64029
//	local 10.96.0.10 dev fairlead0 table 64029 proto 250 scope host
//
// Routes are added in the same time however many there are; addresses are not. And
// what the node itself sends is not looked up there, so it keeps the source address
// that it would have anyway, and is taken by IPVS on its way out.
//
// All other frontends are addresses that the node has for other purposes (node
// ports), or that are not its own at all (external addresses, load balancers).
// Their virtual servers are at addresses in 250.29.0.0/16 and fdfa:1d00::/64, which
// are the node's own affair, and nftables translates to these as the nft backend does
// to an endpoint, and drops who connects there otherwise. So other ports at external addresses, and ARP for them, are
// left alone; and with externalTrafficPolicy: Local the local endpoints are a virtual
// server of their own. No packet mark is used for any of this.
//
// # The rules
//
// The tables `ip fairlead-ipvs` and `ip6 fairlead-ipvs` are those of package nft with
// a [nft.Translator]: connections that no endpoint can take, or that are out of the
// source ranges, are refused or dropped there before IPVS sees them, ports of cluster
// IPs that no Service has never reach the node's own programs, and who is masqueraded
// is decided behind IPVS, which makes its connections known to connection tracking
// (sysctl net.ipv4.vs.conntrack).
//
// # The order of a change
//
// IPVS takes one change after the other, so their order is what clients see:
//
//  1. Addresses to bind get a rule first that drops connections which no frontend
//     takes ([nft.BoundAddressService]). It stays as long as the address is bound.
//  2. Addresses are bound, virtual servers and destinations are added, weights are
//     set to 1. A virtual server that had destinations has at least those that stay.
//  3. The rules change, in one transaction: new Services are opened, those that have
//     lost their last endpoint refuse, connections to Services that go are dropped.
//  4. Destinations that are not wanted get weight 0, also those of virtual servers
//     that no Service has any more. Virtual servers without destinations are
//     deleted, then their addresses, then the rules for these.
//
// Where nothing of it is to be done, a step takes no request. A change of endpoints
// is one send to IPVS, and one to nftables if it is about pods of this node.
//
// So no address is ever reachable without its destinations. A program that ends in
// between leaves nothing behind that the next one does not find: a virtual server is
// taken for one of ours if its address is bound in our routing table, or internal.
// Others are never touched, nor are those by firewall mark, or in networks that are
// excluded.
//
// # Endpoints that leave
//
// A destination with weight 0 takes no new connections, not even of clients that
// stick to it, and keeps those that it has. It is deleted when the kernel counts none
// any more, which for a closed connection of TCP is after two minutes, or after
// [Options.DrainLimit]; one of UDP a moment after it serves no more, and its flows
// move to another. An endpoint that comes back meanwhile gets weight 1. The weight is
// in the kernel, so that all of this goes on after a restart.
//
// When a Service is deleted, its endpoints leave in the same way, and its virtual
// servers are deleted after the last endpoint. Until then its cluster IP stays bound,
// and the rule for bound addresses drops new connections. A new Service at the same
// frontend takes the virtual server over. Replace finds the virtual servers of Services
// that were deleted while no Dataplane was running.
//
// # Netlink
//
// Package nlconn sends virtual servers, destinations and routes by the hundred: the kernel
// handles the requests of one sendmsg(2) in order, and answers only the last one and those that
// fail. github.com/moby/ipvs waits for an answer to each request: 10,000 virtual servers with 10
// destinations took 7.0 s with it and 2.0 s together (BenchmarkLoad).
//
// The tests use that library to see what other programs see. The backend does not read by
// it, for these reasons:
//
//   - It asks for the number of the family once for the life of the process. After the
//     module was loaded again, all its calls fail (TestModuleReload).
//   - It takes 344 ms and 32 MB to read 1,000 virtual servers with 10 destinations each; this
//     package takes 217 ms and 9 MB at most (BenchmarkRead).
//   - It runs modprobe by os/exec, and logs by logrus that an image without programs lacks it.
//   - It reads half of the 32 bits of a weight, and waits for lost answers without end.
//
// # What IPVS does not have
//
// No event tells of changes, so what others have changed is looked for every five
// seconds, and destinations all within a minute. Session affinity is IPVS's
// persistence: docs/ipvs.md says in what it differs.
package ipvs
