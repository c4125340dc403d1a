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

// Translator is who picks the endpoints in place of the tables' maps, as IPVS does.
// Each list of endpoints is a virtual server to the tables: an address that
// connections are sent to, or the frontends' own address.
type Translator interface {
	// VirtualServers returns where connections go instead of to one of the
	// Service's Endpoints (cluster) and LocalEndpoints (local). While a list is empty
	// no connection goes there.
	//
	// The zero AddrPort for cluster means that the frontends' own addresses are
	// virtual servers: such connections are let through untranslated. It is for
	// frontends that have an address of their own, so not for node ports. For local
	// there is an address wherever the policy is Local.
	//
	// The answer for a Service must stay the same for as long as it is programmed;
	// Apply asks again when it goes.
	VirtualServers(s *dataplane.Service) (cluster, local netip.AddrPort)
}

// boundAddressKind is the Kind of the Services that BoundAddressService returns.
const boundAddressKind = dataplane.Kind(0xff)

// BoundAddressService returns a Service that represents an address which a Translator binds to
// the node, so that virtual servers at the address get its packets. While the Service
// is programmed, connections to the address that no frontend takes reach neither a
// virtual server nor a program of the node: they are rejected if the address is a
// cluster IP, and dropped otherwise. Packets that the node sends to the address are
// routed again if the Translator sends them to an address of the node.
//
// Program it before the address is bound, and remove it afterwards.
func BoundAddressService(addr netip.Addr) *dataplane.Service {
	return &dataplane.Service{
		Key:       dataplane.Key{Name: addr.String(), Family: dataplane.FamilyOf(addr), Kind: boundAddressKind},
		Frontends: []dataplane.Frontend{{Addr: netip.AddrPortFrom(addr, 0)}},
	}
}

// BoundAddressOf returns the address that a Service of BoundAddressService with this key
// represents. It returns false for all other keys.
func BoundAddressOf(k dataplane.Key) (netip.Addr, bool) {
	if k.Kind != boundAddressKind {
		return netip.Addr{}, false
	}
	addr, err := netip.ParseAddr(k.Name)
	return addr, err == nil
}

// VirtualBinding is what the tables hold for one frontend when there is a Translator. Its
// pairs are of the lists Endpoints and LocalEndpoints, in this order.
type VirtualBinding struct {
	// Binding has all but Endpoints, LocalEndpoints and Affinity.
	dataplane.Binding
	// Served says whether connections go to a virtual server. Those to others are
	// rejected or dropped.
	Served [2]bool
	// Virtual is the virtual server that connections are sent to, also while they
	// are not served. It is zero where they are let through.
	Virtual [2]netip.AddrPort
	// Local are the addresses of endpoints that can reach themselves through the
	// frontend, sorted: those of both lists that are local.
	Local []netip.Addr
}

// Equal reports whether r and o treat connections alike. The name of the Service
// takes no part.
func (r VirtualBinding) Equal(o VirtualBinding) bool {
	return r.Binding.Equal(o.Binding) && r.Served == o.Served && r.Virtual == o.Virtual && slices.Equal(r.Local, o.Local)
}

// String returns the rule in one line.
func (r VirtualBinding) String() string {
	return fmt.Sprintf("%s served=%v virtual=%v local=%v", r.ServiceSpec, r.Served, r.Virtual, r.Local)
}

// ReadVirtualBindings returns what the kernel holds now, for a Dataplane with a Translator. It
// changes nothing.
func (d *Dataplane) ReadVirtualBindings(ctx context.Context) (map[dataplane.Frontend]VirtualBinding, error) {
	rules := map[dataplane.Frontend]VirtualBinding{}
	if err := d.forEachFrontend(ctx, func(f dataplane.Frontend, r *frontendElements) { rules[f] = r.virtualBinding() }); err != nil {
		return nil, err
	}
	return rules, nil
}

func (r *frontendElements) virtualBinding() VirtualBinding {
	rule := VirtualBinding{Binding: r.bindingExceptEndpoints(), Local: r.hairpins}
	slotsOf := [numEndpointLists][]netip.AddrPort{r.slots[clusterEndpoints].endpoints, r.slots[localEndpoints].endpoints}
	if r.class.has(classSharedList) && r.sharedList != nil {
		rule.Local, slotsOf = r.sharedList.hairpins, r.sharedList.slots
	}
	of := [numEndpointLists]serviceClass{clusterEndpoints: r.class}
	if rule.ExternalTrafficPolicyLocal && r.inExternal {
		of[localEndpoints] = r.externalClass
	}
	for l, c := range of {
		if slots := slotsOf[l]; len(slots) > 0 && !c.has(classPassThrough) {
			rule.Virtual[l] = slots[0]
		}
		rule.Served[l] = c.size() > 0 && (c.has(classPassThrough) || rule.Virtual[l].IsValid()) &&
			(!c.has(classSharedList) || r.sharedList != nil && r.sharedList.sizeClasses[l] != 0)
	}
	return rule
}

// virtualNetworkRules are rules for connections to where virtual servers are, before
// others are translated to these: they would go round source ranges, policies and
// masquerading.
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

// ownClusterIPRule is the rule for connections to cluster IPs that the node may take for
// itself, although no interface has the address, as a translator's routes make it.
// They do not come by forward, and in input they could not be rejected: for a packet
// that is the node's own the kernel sends an ICMP error of IPv4 from the address
// that it was for (net/ipv4/icmp.c, __icmp_send), or, where that is no interface's,
// none. Behind dstnat nobody's rules translate them any more.
//
//	ct state new ip daddr @cluster-ips fib daddr type != local goto undeclared
func (t *table) ownClusterIPRule() rule {
	return rule{exprs: slices.Concat(matchCtStateNew(),
		[]expr.Any{t.daddr(0), lookup(t.addrSets[clusterIPAddrs])},
		matchAddrType(&expr.Fib{FlagDADDR: true}, expr.CmpOpNeq),
		[]expr.Any{gotoChain("undeclared")},
	)}
}

// undeclaredChain rejects what is for no frontend.
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

// dnatToOriginal is `dnat to ip daddr`. It translates a connection to the address that it is
// for, which settles that no other program's NAT rules translate it. A connection that
// nobody translates gets the same from the kernel in the end (nf_nat_core.c,
// nf_nat_alloc_null_binding).
func (t *table) dnatToOriginal() []expr.Any {
	return []expr.Any{t.daddr(0), &expr.NAT{
		Type: expr.NATTypeDestNAT, Family: uint32(t.nf.Family), RegAddrMin: reg(0), RegAddrMax: reg(0),
	}}
}

// boundIPRule matches connections to bound addresses, behind the rules for frontends. In
// nat-output it comes before IPVS, so that the node's own connections do not reach a
// virtual server which has no destinations yet, or only those with weight 0.
//
//	ip daddr @bound-ips fib daddr type != local goto bound
func (t *table) boundIPRule() rule {
	return rule{exprs: slices.Concat(
		[]expr.Any{t.daddr(0), lookup(t.addrSets[boundIPAddrs])},
		matchAddrType(&expr.Fib{FlagDADDR: true}, expr.CmpOpNeq),
		[]expr.Any{gotoChain("bound")},
	)}
}

// boundChain refuses connections to bound addresses as filter-forward and filter-output
// refuse those to other addresses of Services.
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
	// routeOffset is how far the chain route-output is behind dstnat: behind IPVS
	// (net/netfilter/ipvs/ip_vs_core.c, ip_vs_ops), and right before
	// filter-output-post-dnat.
	routeOffset = 9
	// routeMark is the bit of a packet's mark that is flipped to have it routed
	// again, and flipped back afterwards.
	routeMark = 1 << 31
)

// rerouteRule flips a bit in the mark of packets that the node sends to a bound
// address and the Translator to an address of the node. IPVS keeps the packet's route
// to the bound address (net/netfilter/ipvs/ip_vs_xmit.c, __ip_vs_get_out_rt), which
// leads out of the node. A chain of type route makes the kernel look up the route again
// if the mark changes (net/netfilter/nft_chain_route.c). The same rule in the next
// chain flips the bit back.
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

// passedThroughRule is the rule for connections that were let through to the translator,
// whose translation is none to the kernel's NAT.
//
//	ct original ip daddr @cluster-ips goto masquerading
func (t *table) passedThroughRule() rule {
	return rule{exprs: []expr.Any{t.originalDaddr(0), lookup(t.addrSets[clusterIPAddrs]), gotoChain("masquerading")}}
}
