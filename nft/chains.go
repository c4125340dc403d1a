package nft

import (
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// chain is an nftables chain with the rules that it must contain.
type chain struct {
	*nftables.Chain
	rules []rule
}

type rule struct {
	comment string
	exprs   []expr.Any
}

func (r rule) userData() []byte {
	if r.comment == "" {
		return nil
	}
	return userdata.AppendString(nil, userdata.TypeComment, r.comment)
}

// addressing is how rules match frontends: by address, or, for node ports, by any address
// of the node. In sets, a node port has the unspecified address, as in a
// dataplane.Frontend, and the rules mask the address of the packet (`ip daddr & 0.0.0.0`).
type addressing bool

const (
	byAddress  addressing = false
	byNodePort addressing = true

	nodePortSuffix = "node-port"
)

func allAddressings() []addressing { return []addressing{byAddress, byNodePort} }

func (by addressing) chainName(name string) string {
	if by == byNodePort {
		return name + "-" + nodePortSuffix
	}
	return name
}

// chains returns the chains that do not depend on Services, except for the prefix lengths
// of source ranges. A chain comes after the chains it jumps to. filter-input exists if the node
// identifies pods or protects loopback addresses. filter-prerouting-post-dnat and filter-output-post-dnat, at dstnat + 10,
// exist if a setting or a Translator needs their rules.
//
//	chain filter-input {
//		type filter hook input priority filter; policy accept;
//	chain filter-forward {
//		type filter hook forward priority filter; policy accept;
//	chain filter-output {
//		type filter hook output priority filter; policy accept;
//	chain nat-postrouting {
//		type nat hook postrouting priority srcnat; policy accept;
func (t *table) chains(node dataplane.Node, rangeBits []int) []chain {
	accept := nftables.ChainPolicyAccept
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority, rules ...rule) chain {
		return chain{rules: rules, Chain: &nftables.Chain{
			Name: name, Table: t.nf, Type: typ, Hooknum: hook, Priority: &prio, Policy: &accept,
		}}
	}
	chains := []chain{t.rejectChain()}
	for _, by := range allAddressings() {
		chains = append(chains, t.sourceRangesChain(by, rangeBits))
		chains = append(chains, t.translateChains(by)...)
		chains = append(chains, t.renderer.selectionChains(t, by)...)
		chains = append(chains, t.externalChain(by, node))
	}
	chains = append(chains, t.sharedListChains(rangeBits)...)
	chains = append(chains, t.masqueradeChains(node)...)
	chains = append(chains, t.masqueradingChain(node), t.localhostChain(node), t.invalidChain(node))
	dispatch := append(t.virtualNetworkRules(), t.dispatchRules(node)...)
	var answeredPing []rule
	if node.PingServiceIPs {
		chains = append(chains, t.pingChains(node)...)
		dispatch = append(dispatch, t.pingRule())
		answeredPing = append(answeredPing, t.answeredPingRule())
	}
	natOutput := append([]rule{t.toLocalhostRule()}, dispatch...)
	chains = append(chains, t.newOrInvalidChains(node)...)
	dstnat, filter := *nftables.ChainPriorityNATDest, *nftables.ChainPriorityFilter
	if t.protectsLoopback(node) {
		chains = append(chains, t.dropLoopbackChain())
	}
	extra := t.renderer.extraRules(t, base)
	chains = append(chains, extra.chains...)
	natOutput = append(natOutput, extra.natOutput...)
	preroutingPostDNAT := slices.Concat(answeredPing, extra.filterPreroutingPostDNAT)
	outputPostDNAT := slices.Concat(answeredPing, extra.filterOutputPostDNAT)
	postrouting := append(t.postroutingRules(), extra.natPostrouting...)
	if input := t.inputRules(node); len(input) > 0 {
		chains = append(chains, base("filter-input", nftables.ChainTypeFilter, nftables.ChainHookInput, filter, input...))
	}
	chains = append(chains, t.natBaseChains(base, node, dispatch, natOutput)...)
	// Every packet pays for a base chain, even if its rules do not match.
	if len(preroutingPostDNAT) > 0 {
		chains = append(chains,
			base("filter-prerouting-post-dnat", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, dstnat+10, preroutingPostDNAT...))
	}
	if len(outputPostDNAT) > 0 {
		chains = append(chains,
			base("filter-output-post-dnat", nftables.ChainTypeFilter, nftables.ChainHookOutput, dstnat+10, outputPostDNAT...))
	}
	return append(chains,
		base("filter-forward", nftables.ChainTypeFilter, nftables.ChainHookForward, filter, t.newOrInvalidRule(newOrInvalidName)),
		base("filter-output", nftables.ChainTypeFilter, nftables.ChainHookOutput, filter, t.newOrInvalidRule(newOrInvalidOutputName)),
		base("nat-postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource, postrouting...),
	)
}

// inputRules returns the rules for packets to the node itself.
//
//	ct state invalid tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid
//	ip daddr 127.0.0.0/8 iifname != "lo" goto loopback-from-network
func (t *table) inputRules(node dataplane.Node) []rule {
	var rules []rule
	if t.identifiesPods(node) {
		rules = append(rules, t.invalidFromEndpointRule())
	}
	return append(rules, t.loopbackFromNetworkRules(node)...)
}

func (t *table) newChain(name string, rules ...rule) chain {
	return chain{Chain: &nftables.Chain{Name: name, Table: t.nf}, rules: rules}
}
