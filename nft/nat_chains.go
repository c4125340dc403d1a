package nft

import (
	"fmt"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// dispatchRules returns the first rules for a connection: one for frontends with an
// address, and one or two for node ports. Frontends with an address take precedence.
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

// destination is a set of addresses at which the frontends of an addressing answer. A nil
// set means all addresses.
type destination struct {
	addressing addressing
	addrs      *nftables.Set
}

// destinations returns the destinations in the order in which rules match them.
func (t *table) destinations(node dataplane.Node) []destination {
	all := []destination{{addressing: byAddress}, {byNodePort, t.nodePortAddrs}}
	if len(t.mergeNodePortNetworks(node)) > 0 {
		all = append(all, destination{byNodePort, t.nodePortNetworks})
	}
	return all
}

// match matches packets to the destination. address is the expression that loads their
// address.
func (d destination) match(address expr.Any) []expr.Any {
	if d.addrs == nil {
		return nil
	}
	return []expr.Any{address, lookup(d.addrs)}
}

// sourceRangesChain returns the chain that drops packets of clients outside the frontend's
// source ranges, and returns for other clients.
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

// externalChain returns the chain that sends clients other than this node and its pods to
// the class of the local list.
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

// matchExternalClients matches clients other than this node and its pods:
// `ip saddr != @local-pods fib saddr type != local`.
func (t *table) matchExternalClients(node dataplane.Node) []expr.Any {
	var conditions []expr.Any
	if len(t.mergeNetworks(node.PodCIDRs, node.LocalPodCIDRs)) > 0 {
		conditions = append(conditions, t.saddr(0), lookupInverted(t.localPods))
	}
	return slices.Concat(conditions, matchNotFromPods(node), matchSourceLocal(expr.CmpOpNeq))
}

// translateChains returns the chains that send a connection to the endpoint in the slot that
// the packet's priority contains, if the slot exists. All classes share them. For
// each new chain with a rule that refers to a map, the kernel walks the map
// (nf_tables_api.c, nf_tables_bind_set). If each class had rules of its own, a new class
// would take 0.5 s at 100,000 Services.
//
//	chain translate-0 {
//		ip daddr & 0.0.0.15 == 0.0.0.0 meta priority set none dnat ip to ip daddr . meta l4proto . th dport . meta priority map @endpoints-0
//		…
//	}
//	chain translate {
//		ip daddr & 0.0.0.12 == 0.0.0.0 goto translate-0
//		ip daddr & 0.0.0.12 == 0.0.0.4 goto translate-4
//		…
//	}
//	chain translate-4-node-port {
//		th dport & 15 == 4 meta priority set none dnat ip to ip daddr & 0.0.0.0 . meta l4proto . th dport . meta priority map @endpoints-4
//		…
//	}
func (t *table) translateChains(by addressing) []chain {
	const shardsPerChain, groupBits = 4, 12 // a packet passes 2 to 8 rules instead of 1 to 16
	slot := t.addrLen/4 + 2
	var chains []chain
	var groups []rule
	for group := 0; group < numShards; group += shardsPerChain {
		var rules []rule
		for shard := group; shard < group+shardsPerChain; shard++ {
			rules = append(rules, rule{exprs: slices.Concat(t.matchShard(by, shard),
				t.frontendKey(by, 0), []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(slot)}},
				t.dnatFromMap(t.endpoints[shard]))})
		}
		name := by.chainName(fmt.Sprintf("translate-%x", group))
		chains = append(chains, t.newChain(name, rules...))
		groups = append(groups, rule{exprs: append(t.matchShards(by, group, groupBits), gotoChain(name))})
	}
	return append(chains, t.newChain(by.chainName("translate"), groups...))
}

// translateStickyChain returns the chain that sends a connection to the endpoint whose ID
// the packet's priority contains, if the endpoint exists.
//
//	chain translate-sticky {
//		ip daddr & 0.0.0.15 == 0.0.0.0 meta priority set none dnat ip to ip daddr . meta l4proto . th dport . meta priority map @sticky-endpoints-0
//		…
//	}
func (t *table) translateStickyChain(by addressing) chain {
	rules := make([]rule, 0, numShards)
	for shard, set := range t.stickyEndpoints {
		rules = append(rules, rule{exprs: slices.Concat(t.matchShard(by, shard),
			t.frontendKey(by, 0), []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(t.addrLen/4 + 2)}},
			t.dnatFromMap(set),
		)})
	}
	return t.newChain(by.chainName("translate-sticky"), rules...)
}

// dnatFromMap returns `meta priority set none dnat ip to … map @endpoints-a` for a key in the
// registers from 0. The key can contain the priority: the lookup comes first, although nft
// prints it last. The rules need the priority if the map has no such element. No packet
// leaves the NAT chains with a slot, list ID or endpoint ID as its priority, so no other chain
// has to examine each packet's priority.
func (t *table) dnatFromMap(endpoints *nftables.Set) []expr.Any {
	behindResult := t.addrLen/4 + 1
	return slices.Concat([]expr.Any{mapLookup(endpoints, reg(0))}, resetPriorityWith(behindResult), []expr.Any{
		&expr.NAT{
			Type: expr.NATTypeDestNAT, Family: uint32(t.nf.Family),
			// The kernel lists these maxima for a rule without maxima.
			RegAddrMin: reg(0), RegAddrMax: reg(0),
			RegProtoMin: reg(t.addrLen / 4), RegProtoMax: reg(t.addrLen / 4), Specified: true,
		},
	})
}

// stickyChain returns the chain that sends packets to the chain of the frontend's affinity
// timeout.
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

// pickChain returns the chain that selects an endpoint: first a slot, then the ID of the
// endpoint in the slot.
//
//	chain pick {
//		meta priority set ip daddr . meta l4proto . th dport map @services meta priority vmap @draws
//		ip daddr & 0.0.0.15 == 0.0.0.0 meta priority set ip daddr . meta l4proto . th dport . meta priority map @slots-0
//		…
//		meta priority & fffe:0 != fa1c:0 return
//		ip daddr & 0.0.0.15 == 0.0.0.0 meta priority set ip daddr . meta l4proto . th dport . numgen random mod 1 offset 4196204544 map @slots-0 comment "the slot went while the packet was on its way"
//		…
//	}
func (t *table) pickChain(by addressing, l endpointList) chain {
	sizes := t.services
	if l == localEndpoints {
		sizes = t.external
	}
	slot := t.addrLen/4 + 2
	in := func(comment string, slotIs expr.Any) []rule {
		rules := make([]rule, 0, numShards)
		for shard, set := range t.slots {
			rules = append(rules, rule{comment: comment, exprs: slices.Concat(t.matchShard(by, shard),
				t.frontendKey(by, 0), []expr.Any{slotIs, mapLookup(set, reg(0)), setPriority(reg(0))})})
		}
		return rules
	}
	return t.newChain(by.chainName(l.chainName("pick")), slices.Concat(
		[]rule{{exprs: slices.Concat(
			t.frontendKey(by, 0),
			[]expr.Any{mapLookup(sizes, reg(0)), setPriority(reg(0))},
			t.priorityVmap(vmapDraws),
		)}},
		in("", &expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(slot)}),
		[]rule{{exprs: append(matchNoSlot(), &expr.Verdict{Kind: expr.VerdictReturn})}},
		in("the slot went while the packet was on its way", firstSlot(l, reg(slot))),
	)...)
}

// postroutingRules returns the rules that find connections to masquerade.
//
//	ct status dnat goto masquerading
func (t *table) postroutingRules() []rule {
	return []rule{{exprs: append(matchCtStatusDNAT(), gotoChain("masquerading"))}}
}

// masqueradingChain returns the chain that decides whether to masquerade a translated
// connection. Another program may have translated it, so the chain looks up the frontend.
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

// masqueradeChains returns the chains that handle the connections of Services after
// masqueradingChain. They reset the priority, which contains the class.
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
//		ip saddr != 10.1.0.0/16 goto masquerade comment "clients that are no pods"
//		meta priority set none
//	}
func (t *table) masqueradeChains(node dataplane.Node) []chain {
	name := func(m dataplane.Masquerade) string { return masqueradeChainName(m, false) }
	resetOnly := rule{exprs: resetPriority()}
	masquerade := gotoChain("masquerade")
	offCluster := []rule{resetOnly}
	if conditions, ok := t.matchOffCluster(node); ok {
		offCluster = []rule{
			{comment: "clients that are no pods", exprs: append(conditions, masquerade)},
			resetOnly,
		}
	}
	chains := []chain{
		t.newChain("masquerade", rule{exprs: append(resetPriority(), &expr.Masq{FullyRandom: true})}),
		t.newChain(name(dataplane.MasqueradeAlways), rule{exprs: []expr.Any{masquerade}}),
		t.newChain(name(dataplane.MasqueradeFromNode),
			rule{comment: "this node's own connections", exprs: append(matchSourceLocal(expr.CmpOpEq), masquerade)},
			resetOnly,
		),
		t.newChain(name(dataplane.MasqueradeOffCluster), offCluster...),
	}
	for _, m := range []dataplane.Masquerade{dataplane.MasqueradeFromNode, dataplane.MasqueradeOffCluster} {
		chains = append(chains, t.sharedMasqueradeChain(m))
	}
	return chains
}

// matchOffCluster matches the clients of dataplane.MasqueradeOffCluster:
// `ip saddr != 10.1.0.0/16`, or the condition of matchNotFromPods. ok is false if no client
// matches.
func (t *table) matchOffCluster(node dataplane.Node) (conditions []expr.Any, ok bool) {
	switch {
	case node.MasqueradeAll:
		return nil, true
	case node.PodInterface != "" || node.PodInterfacePrefix != "":
		return matchNotFromPods(node), true
	}
	networks := t.mergeNetworks(node.PodCIDRs)
	switch {
	case len(networks) == 0:
		return nil, false
	case !areComparable(networks):
		return []expr.Any{t.saddr(0), lookupInverted(t.podCIDRs)}, true
	}
	for _, p := range networks {
		conditions = append(conditions, t.compareNetwork(t.saddr(0), p, expr.CmpOpNeq)...)
	}
	return conditions, true
}
