package nft

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Translator selects the endpoints instead of the tables' maps, as IPVS does. To the
// tables, each endpoint list is a virtual server: an address that they send connections to,
// or the frontend's own address.
type Translator interface {
	// VirtualServers returns the addresses to which the tables send connections, instead of
	// the Service's Endpoints (cluster) and LocalEndpoints (local). The tables send no
	// connections to the address of an empty list.
	//
	// The zero AddrPort for cluster means pass-through: the frontends' own addresses are
	// virtual servers, and the tables do not translate the connections. Pass-through
	// requires frontends with an address, so it is not possible for node ports. local is
	// always valid for a Service with ExternalTrafficPolicyLocal.
	//
	// The result for a Service must not change while it is programmed; Apply calls
	// VirtualServers again when the Service is deleted.
	VirtualServers(s *dataplane.Service) (cluster, local netip.AddrPort)
}

// boundAddressKind is the Kind of the Services that BoundAddressService returns.
const boundAddressKind = dataplane.Kind(0xff)

// BoundAddressService returns a Service that represents an address that a Translator binds
// to the node, so that virtual servers at the address get its packets. While the Service is
// programmed, connections to the address that match no frontend reach neither a virtual
// server nor a program of the node. The rules reject them if the address is a cluster IP,
// and drop them otherwise. The kernel routes packets from the node to the address again if
// the Translator sends them to an address of the node.
//
// Program the Service before the address is bound, and delete it after the address is
// unbound.
func BoundAddressService(addr netip.Addr) *dataplane.Service {
	return &dataplane.Service{
		Key:       dataplane.Key{Name: addr.String(), Family: dataplane.FamilyOf(addr), Kind: boundAddressKind},
		Frontends: []dataplane.Frontend{{Addr: netip.AddrPortFrom(addr, 0)}},
	}
}

// BoundAddressOf returns the address of a BoundAddressService with this key. It returns
// false for all other keys.
func BoundAddressOf(k dataplane.Key) (netip.Addr, bool) {
	if k.Kind != boundAddressKind {
		return netip.Addr{}, false
	}
	addr, err := netip.ParseAddr(k.Name)
	return addr, err == nil
}

// VirtualBinding is the state of one frontend in tables with a Translator. Index 0 of its
// arrays is for Endpoints, index 1 for LocalEndpoints.
type VirtualBinding struct {
	// Binding is set except for Endpoints, LocalEndpoints, Affinity and Scheduler.
	dataplane.Binding
	// Served reports whether connections go to a virtual server. If not, they are refused.
	Served [2]bool
	// Virtual is the virtual server of the list, even if connections to it are refused. It
	// is zero for pass-through.
	Virtual [2]netip.AddrPort
	// Local contains the sorted addresses of the endpoints of both lists that are local, so
	// that they can connect to themselves through the frontend.
	Local []netip.Addr
}

// Equal reports whether r and o handle connections in the same way. It ignores the name of
// the Service.
func (r VirtualBinding) Equal(o VirtualBinding) bool {
	return r.Binding.Equal(o.Binding) && r.Served == o.Served && r.Virtual == o.Virtual && slices.Equal(r.Local, o.Local)
}

// String returns the binding in one line.
func (r VirtualBinding) String() string {
	return fmt.Sprintf("%s served=%v virtual=%v local=%v", r.ServiceSpec, r.Served, r.Virtual, r.Local)
}

// ReadVirtualBindings returns the current state of the kernel for a Dataplane with a
// Translator. It changes nothing.
func (d *Dataplane) ReadVirtualBindings(ctx context.Context) (map[dataplane.Frontend]VirtualBinding, error) {
	rules := map[dataplane.Frontend]VirtualBinding{}
	if err := d.forEachFrontend(ctx, func(f dataplane.Frontend, r *frontendElements) { rules[f] = r.virtualBinding() }); err != nil {
		return nil, err
	}
	return rules, nil
}

func (r *frontendElements) virtualBinding() VirtualBinding {
	b := VirtualBinding{Binding: r.bindingExceptEndpoints(), Local: r.hairpins}
	slots := [numEndpointLists][]netip.AddrPort{r.slots[clusterEndpoints].endpoints, r.slots[localEndpoints].endpoints}
	if r.class.has(classSharedList) && r.sharedList != nil {
		b.Local, slots = r.sharedList.hairpins, r.sharedList.slots
	}
	classes := [numEndpointLists]serviceClass{clusterEndpoints: r.class}
	if b.ExternalTrafficPolicyLocal && r.inExternal {
		classes[localEndpoints] = r.externalClass
	}
	for l, c := range classes {
		if len(slots[l]) > 0 && !c.has(classPassThrough) {
			b.Virtual[l] = slots[l][0]
		}
		b.Served[l] = c.size() > 0 && (c.has(classPassThrough) || b.Virtual[l].IsValid()) &&
			(!c.has(classSharedList) || r.sharedList != nil && r.sharedList.sizeClasses[l] != 0)
	}
	return b
}

// virtualNetworkRules returns the rules that drop direct connections to the networks of
// virtual servers. Such connections would bypass source ranges, traffic policies and
// masquerading. The rules come before the rules that translate connections to these
// networks.
//
//	ip daddr & 255.0.0.0 == 250.0.0.0 drop
func (t *table) virtualNetworkRules() []rule {
	var rules []rule
	for _, p := range t.virtualNetworks {
		mask, none := make([]byte, t.addrLen), make([]byte, t.addrLen)
		setLeadingBits(mask, p.Bits())
		rules = append(rules, rule{exprs: []expr.Any{
			t.daddr(0),
			&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(t.addrLen), Mask: mask, Xor: none},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: p.Addr().AsSlice()},
			drop(),
		}})
	}
	return rules
}

// ownClusterIPRule returns the rule for connections to cluster IPs that the node may accept
// although no interface has the address, because of the Translator's routes. These
// connections do not pass the forward hook, and the input hook cannot reject them. For a
// packet to the node itself, the kernel sends an IPv4 ICMP error from the packet's
// destination address (net/ipv4/icmp.c, __icmp_send). It sends none if no interface has the
// address. After dstnat, no other program's rules translate the connections any more.
//
//	ct state new ip daddr @cluster-ips fib daddr type != local goto undeclared
func (t *table) ownClusterIPRule() rule {
	return rule{exprs: slices.Concat(matchCtStateNew(),
		[]expr.Any{t.daddr(0), lookup(t.addrSets[clusterIPAddrs])},
		matchAddrType(&expr.Fib{FlagDADDR: true}, expr.CmpOpNeq),
		[]expr.Any{gotoChain("undeclared")},
	)}
}

// undeclaredChain returns the chain that rejects connections to cluster IPs that match no
// frontend.
//
//	chain undeclared {
//		meta priority set ip daddr . meta l4proto . th dport map @services meta priority set none return comment "a frontend: the translator takes it"
//		counter name "rejected-undeclared-port" goto reject
//	}
func (t *table) undeclaredChain() chain {
	return t.newChain("undeclared",
		rule{
			comment: "a frontend: the translator takes it",
			exprs: slices.Concat(
				t.frontendKey(byAddress, 0),
				[]expr.Any{mapLookup(t.services, reg(0)), setPriority(reg(0))},
				resetPriority(),
				[]expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}},
			),
		},
		rule{exprs: []expr.Any{counterRef(rejectedUndeclaredPort), gotoChain("reject")}},
	)
}

// dnatToOriginal returns `dnat to ip daddr`. It translates a connection to its own
// destination, so that no other program's NAT rules translate it. The kernel does the same
// at the end for a connection that no rule translates (nf_nat_core.c,
// nf_nat_alloc_null_binding).
func (t *table) dnatToOriginal() []expr.Any {
	return []expr.Any{t.daddr(0), &expr.NAT{
		Type: expr.NATTypeDestNAT, Family: uint32(t.nf.Family), RegAddrMin: reg(0), RegAddrMax: reg(0),
	}}
}

// boundIPRule returns the rule for connections to bound addresses that match no frontend;
// it comes after the rules for frontends. In nat-output, it comes before IPVS, so that the
// node's own connections do not reach a virtual server without destinations, or with
// destinations of weight 0 only.
//
//	ip daddr @bound-ips fib daddr type != local goto bound
func (t *table) boundIPRule() rule {
	return rule{exprs: slices.Concat(
		[]expr.Any{t.daddr(0), lookup(t.addrSets[boundIPAddrs])},
		matchAddrType(&expr.Fib{FlagDADDR: true}, expr.CmpOpNeq),
		[]expr.Any{gotoChain("bound")},
	)}
}

// boundChain returns the chain that refuses connections to bound addresses, as
// filter-forward and filter-output refuse connections to other addresses of Services.
//
//	chain bound {
//		ip daddr @cluster-ips counter name "rejected-undeclared-port" goto reject
//		counter name "dropped-no-service" drop
//	}
func (t *table) boundChain() chain {
	return t.newChain("bound",
		rule{exprs: []expr.Any{
			t.daddr(0), lookup(t.addrSets[clusterIPAddrs]), counterRef(rejectedUndeclaredPort), gotoChain("reject"),
		}},
		rule{exprs: []expr.Any{counterRef(droppedNoService), drop()}},
	)
}

const (
	// routeOffset is the priority of the chain route-output relative to dstnat: behind IPVS
	// (net/netfilter/ipvs/ip_vs_core.c, ip_vs_ops), and immediately before
	// filter-output-post-dnat.
	routeOffset = 9
	// routeMark is the bit of a packet's mark that the rules flip to make the kernel route
	// the packet again, and flip back afterwards.
	routeMark = 1 << 31
)

// rerouteRule returns the rule that makes the kernel route packets from the node again if
// the Translator sends them from a bound address to an address of the node. IPVS keeps the
// packet's route to the bound address (net/netfilter/ipvs/ip_vs_xmit.c,
// __ip_vs_get_out_rt), which leads out of the node. The rule flips a bit of the packet's
// mark. In a chain of type route, a changed mark makes the kernel look up the route again
// (net/netfilter/nft_chain_route.c). The same rule in the next chain flips the bit back.
//
//	oifname != "lo" ct original ip daddr @bound-ips fib daddr type local meta mark set meta mark ^ 0x80000000 comment "an endpoint of this node: route again"
func (t *table) rerouteRule() rule {
	loopback := make([]byte, unix.IFNAMSIZ)
	copy(loopback, "lo")
	flip := binaryutil.NativeEndian.PutUint32(routeMark)
	return rule{
		comment: "an endpoint of this node: route again",
		exprs: slices.Concat(
			[]expr.Any{
				&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg(0)},
				&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: loopback},
				t.originalDaddr(0), lookup(t.addrSets[boundIPAddrs]),
			},
			matchAddrType(&expr.Fib{FlagDADDR: true}, expr.CmpOpEq),
			[]expr.Any{
				&expr.Meta{Key: expr.MetaKeyMARK, Register: reg(0)},
				&expr.Bitwise{
					SourceRegister: reg(0), DestRegister: reg(0), Len: 4,
					Mask: binaryutil.NativeEndian.PutUint32(^uint32(0)), Xor: flip,
				},
				&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg(0)},
			},
		),
	}
}

// passedThroughRule returns the rule for pass-through connections. The kernel's NAT does
// not translate them, so `ct status dnat` does not match.
//
//	ct original ip daddr @cluster-ips goto masquerading
func (t *table) passedThroughRule() rule {
	return rule{exprs: []expr.Any{t.originalDaddr(0), lookup(t.addrSets[clusterIPAddrs]), gotoChain("masquerading")}}
}
