package nft

import (
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// dispatchRules are the rules that a connection starts with: one for frontends with
// an address of their own, which go first, and one or two for node ports.
//
//	meta priority set ip daddr . meta l4proto . th dport map @services meta priority vmap @classes
//	ip daddr @node-port-addrs meta priority set ip daddr & 0.0.0.0 . meta l4proto . th dport map @services meta priority vmap @classes
//	ip daddr @node-port-networks meta priority set ip daddr & 0.0.0.0 . meta l4proto . th dport map @services meta priority vmap @classes
func (t *table) dispatchRules(node dataplane.Node) []rule {
	var rules []rule
	for _, to := range t.destinations(node) {
		rules = append(rules, rule{exprs: slices.Concat(
			to.match(t.daddr(0)),
			t.frontendKey(to.addressing, 0),
			[]expr.Any{mapLookup(t.services, reg(0)), setPriority(reg(0))},
			t.priorityVmap(vmapClasses),
		)})
	}
	return rules
}

// destination is a set of addresses that frontends of an addressing answer at, and
// nil if all do.
type destination struct {
	addressing addressing
	addrs      *nftables.Set
}

// destinations returns the destinations that rules look for, in this order.
func (t *table) destinations(node dataplane.Node) []destination {
	all := []destination{{addressing: byAddress}, {byNodePort, t.nodePortAddrs}}
	if len(t.mergeNodePortNetworks(node)) > 0 {
		all = append(all, destination{byNodePort, t.nodePortNetworks})
	}
	return all
}

// match matches packets to the destination, given what loads their address.
func (d destination) match(address expr.Any) []expr.Any {
	if d.addrs == nil {
		return nil
	}
	return []expr.Any{address, lookup(d.addrs)}
}

// sourceRangesChain returns from frontends whose source ranges the client is in.
//
//	chain source-ranges {
//		ip daddr . meta l4proto . th dport . ip saddr & 255.255.255.0 @source-ranges-24 return
//		…
//		counter name "dropped-source-ranges" drop
//	}
func (t *table) sourceRangesChain(by addressing, bits []int) chain {
	var rules []rule
	for _, n := range bits {
		client := t.addrLen/4 + 2
		mask, none := make([]byte, t.addrLen), make([]byte, t.addrLen)
		setLeadingBits(mask, n)
		rules = append(rules, rule{exprs: slices.Concat(
			t.frontendKey(by, 0),
			[]expr.Any{
				t.saddr(client),
				&expr.Bitwise{SourceRegister: reg(client), DestRegister: reg(client), Len: uint32(t.addrLen), Mask: mask, Xor: none},
				lookup(t.sourceRangeSet(n)),
				&expr.Verdict{Kind: expr.VerdictReturn},
			})})
	}
	return t.newChain(by.chainName("source-ranges"), append(rules, rule{exprs: []expr.Any{counterRef(droppedSourceRanges), drop()}})...)
}

// externalChain sends clients that are not this node nor its pods to the class
// of the local endpoints.
//
//	chain external {
//		ip saddr != @local-pods fib saddr type != local meta priority set ip daddr . meta l4proto . th dport map @external meta priority vmap @local-classes comment "not this node nor its pods"
//	}
func (t *table) externalChain(by addressing, node dataplane.Node) chain {
	return t.newChain(by.chainName("external"), rule{
		comment: externalClientsComment,
		exprs: slices.Concat(t.matchExternalClients(node),
			t.frontendKey(by, 0),
			[]expr.Any{mapLookup(t.external, reg(0)), setPriority(reg(0))},
			t.priorityVmap(vmapLocalClasses),
		),
	})
}

const externalClientsComment = "not this node nor its pods"

// matchExternalClients matches clients that are not this node nor its pods:
// `ip saddr != @local-pods fib saddr type != local`.
func (t *table) matchExternalClients(node dataplane.Node) []expr.Any {
	var others []expr.Any
	if len(t.mergeNetworks(node.PodCIDRs, node.LocalPodCIDRs)) > 0 {
		others = append(others, t.saddr(0), lookupInverted(t.localPods))
	}
	return slices.Concat(others, matchNotFromPods(node), matchSourceLocal(expr.CmpOpNeq))
}

// translateChain returns the chain that sends a connection to the endpoint in the
// slot that is the packet's priority, if there is one. It is one chain for all
// classes because the kernel walks a map of any kind for each new chain in
// which a rule refers to it (nf_tables_api.c, nf_tables_bind_set): 0.5 s for a
// new class at 100,000 Services, if each class had rules of its own.
//
//	chain translate {
//		ip daddr & 0.0.0.15 == 0.0.0.0 dnat ip to ip daddr . meta l4proto . th dport . meta priority map @endpoints-0
//		…
//		ip daddr & 0.0.0.15 == 0.0.0.15 dnat ip to ip daddr . meta l4proto . th dport . meta priority map @endpoints-f
//	}
//	chain translate-node-port {
//		th dport & 15 == 0 dnat ip to ip daddr & 0.0.0.0 . meta l4proto . th dport . meta priority map @endpoints-0
//		…
//	}
func (t *table) translateChain(by addressing) chain {
	slot := t.addrLen/4 + 2
	var rules []rule
	for i := range numShards {
		rules = append(rules, rule{exprs: slices.Concat(t.matchShard(by, i),
			t.frontendKey(by, 0), []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(slot)}},
			t.dnatFromMap(t.endpoints[i]))})
	}
	return t.newChain(by.chainName("translate"), rules...)
}

// translateStickyChain sends a connection to the endpoint whose ID is the packet's
// priority, if it is there.
//
//	chain translate-sticky {
//		dnat ip to ip daddr . meta l4proto . th dport . meta priority map @sticky-endpoints
//	}
func (t *table) translateStickyChain(by addressing) chain {
	return t.newChain(by.chainName("translate-sticky"), rule{exprs: slices.Concat(
		t.frontendKey(by, 0), []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(t.addrLen/4 + 2)}},
		t.dnatFromMap(t.stickyEndpoints),
	)})
}

// dnatFromMap returns `dnat ip to … map @endpoints-a`, given a key in the registers from 0.
func (t *table) dnatFromMap(endpoints *nftables.Set) []expr.Any {
	return []expr.Any{
		mapLookup(endpoints, reg(0)),
		&expr.NAT{
			Type: expr.NATTypeDestNAT, Family: uint32(t.nf.Family),
			// The maxima are what the kernel makes of leaving them out.
			RegAddrMin: reg(0), RegAddrMax: reg(0),
			RegProtoMin: reg(t.addrLen / 4), RegProtoMax: reg(t.addrLen / 4), Specified: true,
		},
	}
}

// stickyChain branches off to the affinity of a frontend.
//
//	chain sticky {
//		meta priority set ip daddr . meta l4proto . th dport map @timeouts meta priority vmap @affinities
//		drop comment "it has just changed: the client will try again"
//	}
func (t *table) stickyChain(by addressing, l endpointList) chain {
	m := vmapAffinities
	if l == localEndpoints {
		m = vmapLocalAffinities
	}
	return t.newChain(by.chainName(l.chainName("sticky")),
		rule{exprs: slices.Concat(
			t.frontendKey(by, 0),
			[]expr.Any{mapLookup(t.timeouts, reg(0)), setPriority(reg(0))},
			t.priorityVmap(m),
		)},
		rule{comment: "it has just changed: the client will try again", exprs: []expr.Any{drop()}},
	)
}

// pickChain draws an endpoint: a slot, and then the ID of the endpoint in it.
//
//	chain pick {
//		meta priority set ip daddr . meta l4proto . th dport map @services meta priority vmap @draws
//		meta priority set ip daddr . meta l4proto . th dport . meta priority map @slots
//		meta priority & fffe:0 == fa1c:0 meta priority set ip daddr . meta l4proto . th dport . numgen random mod 1 offset 4196204544 map @slots comment "the slot went while the packet was on its way"
//	}
func (t *table) pickChain(by addressing, l endpointList) chain {
	sizes := t.services
	if l == localEndpoints {
		sizes = t.external
	}
	slot := t.addrLen/4 + 2
	in := func(slotIs ...expr.Any) []expr.Any {
		return slices.Concat(t.frontendKey(by, 0), slotIs, []expr.Any{mapLookup(t.slots, reg(0)), setPriority(reg(0))})
	}
	return t.newChain(by.chainName(l.chainName("pick")),
		rule{exprs: slices.Concat(
			t.frontendKey(by, 0),
			[]expr.Any{mapLookup(sizes, reg(0)), setPriority(reg(0))},
			t.priorityVmap(vmapDraws),
		)},
		rule{exprs: in(&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(slot)})},
		rule{
			comment: "the slot went while the packet was on its way",
			exprs:   slices.Concat(matchSlot(), in(firstSlot(l, reg(slot)))),
		},
	)
}

// postroutingRules returns the rules that find connections to masquerade.
//
//	ct status dnat goto masquerading
func (t *table) postroutingRules() []rule {
	return []rule{{exprs: append(matchCtStatusDNAT(), gotoChain("masquerading"))}}
}

// masqueradingChain decides on connections that were translated, by us or by others,
// which is why it looks their frontend up.
//
//	chain masquerading {
//		ip saddr . ip daddr . ct original ip daddr . meta l4proto . ct original proto-dst @hairpin goto masquerade comment "pods that reach themselves through a Service"
//		meta priority set ct original ip daddr . meta l4proto . ct original proto-dst map @services meta priority vmap @masquerades
//		ct original ip daddr @node-port-addrs ip saddr . ip daddr . ct original ip daddr & 0.0.0.0 . meta l4proto . ct original proto-dst @hairpin goto masquerade comment "pods that reach themselves through a Service"
//		ct original ip daddr @node-port-addrs meta priority set ct original ip daddr & 0.0.0.0 . meta l4proto . ct original proto-dst map @services meta priority vmap @masquerades
//		…
//	}
func (t *table) masqueradingChain(node dataplane.Node) chain {
	var rules []rule
	for _, to := range t.destinations(node) {
		match := to.match(t.originalDaddr(0))
		rules = append(rules,
			rule{
				comment: "pods that reach themselves through a Service",
				exprs: slices.Concat(match,
					[]expr.Any{t.saddr(0), t.daddr(t.addrLen / 4)},
					t.originalFrontendKey(to.addressing, 2*t.addrLen/4),
					[]expr.Any{lookup(t.hairpin), gotoChain("masquerade")}),
			},
			rule{exprs: slices.Concat(match,
				t.originalFrontendKey(to.addressing, 0),
				[]expr.Any{mapLookup(t.services, reg(0)), setPriority(reg(0))},
				t.priorityVmap(vmapMasquerades))},
		)
	}
	return t.newChain("masquerading", rules...)
}

// masqueradeChains returns the chains that connections of Services may end in after
// that. They put the priority back, which has the class.
//
//	chain masquerade {
//		meta priority set none masquerade fully-random
//	}
//	chain masquerade-always {
//		goto masquerade
//	}
//	chain masquerade-node {
//		fib saddr type local goto masquerade comment "this node's own connections"
//		meta priority set none
//	}
//	chain masquerade-foreign {
//		ip saddr != @pod-cidrs goto masquerade comment "clients that are no pods"
//		meta priority set none
//	}
func (t *table) masqueradeChains(node dataplane.Node) []chain {
	name := func(m dataplane.Masquerade) string { return masqueradeChainName(m, false) }
	none := rule{exprs: resetPriority()}
	masquerade := gotoChain("masquerade")
	foreign := []rule{none}
	if conditions, some := t.matchOffCluster(node); some {
		foreign = []rule{
			{comment: "clients that are no pods", exprs: append(conditions, masquerade)},
			none,
		}
	}
	chains := []chain{
		t.newChain("masquerade", rule{exprs: append(resetPriority(), &expr.Masq{FullyRandom: true})}),
		t.newChain(name(dataplane.MasqueradeAlways), rule{exprs: []expr.Any{masquerade}}),
		t.newChain(name(dataplane.MasqueradeFromNode),
			rule{comment: "this node's own connections", exprs: append(matchSourceLocal(expr.CmpOpEq), masquerade)},
			none,
		),
		t.newChain(name(dataplane.MasqueradeOffCluster), foreign...),
	}
	for _, m := range []dataplane.Masquerade{dataplane.MasqueradeFromNode, dataplane.MasqueradeOffCluster} {
		chains = append(chains, t.sharedMasqueradeChain(m))
	}
	return chains
}

// matchOffCluster matches clients that dataplane.MasqueradeOffCluster is about, if there are
// any: `ip saddr != @pod-cidrs`, or the condition of matchNotFromPods.
func (t *table) matchOffCluster(node dataplane.Node) (conditions []expr.Any, some bool) {
	switch {
	case node.MasqueradeAll:
		return nil, true
	case node.PodInterface != "" || node.PodInterfacePrefix != "":
		return matchNotFromPods(node), true
	case len(t.mergeNetworks(node.PodCIDRs)) > 0:
		return []expr.Any{t.saddr(0), lookupInverted(t.podCIDRs)}, true
	default:
		return nil, false
	}
}
