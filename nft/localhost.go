package nft

import (
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
)

// toLocalhostRule returns the rule for the node's own connections to loopback addresses. It
// is the first rule of its chain, so these connections pass only this rule and the chain
// localhost, and no frontend lookup.
//
//	ip daddr 127.0.0.0/8 goto localhost
//	ip6 daddr ::1 goto localhost
func (t *table) toLocalhostRule() rule {
	// nft compiles 127.0.0.0/8 to a comparison of the first byte.
	address, value := networkHeader(0, 16, 1), []byte{127}
	if t.family == dataplane.IPv6 {
		address, value = t.daddr(0), netip.IPv6Loopback().AsSlice()
	}
	return rule{exprs: []expr.Any{
		address, &expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: value}, gotoChain("localhost"),
	}}
}

// localhostChain returns the chain that rejects connections to node ports. No rule resets
// the priority, because the packet ends here.
//
//	chain localhost {
//		meta priority set ip daddr & 0.0.0.0 . meta l4proto . tcp dport map @services counter name "rejected-localhost-tcp" goto reject
//		meta priority set ip daddr & 0.0.0.0 . meta l4proto . udp dport map @services counter name "rejected-localhost-udp" goto reject
//		meta priority set ip daddr & 0.0.0.0 . meta l4proto . sctp dport map @services counter name "rejected-localhost-sctp" goto reject
//	}
func (t *table) localhostChain(node dataplane.Node) chain {
	var rules []rule
	for _, p := range protocols() {
		if p == dataplane.TCP && node.LocalhostNodePorts {
			continue
		}
		rules = append(rules, rule{exprs: slices.Concat(
			[]expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
				&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{byte(p)}},
			},
			t.frontendKey(byNodePort, 0),
			[]expr.Any{mapLookup(t.services, reg(0)), setPriority(reg(0)), counterRef(rejectedLocalhostCounter(p)), gotoChain("reject")},
		)})
	}
	return t.newChain("localhost", rules...)
}
