package nft

import (
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// rejectChain returns the chain that rejects packets with a TCP reset or an ICMP port
// unreachable. Prerouting chains go to it, so the client gets an answer even if the node
// has no route to the address. Input and forward would be too late for that. (Kernel 5.9,
// netfilter: nf_tables: add "reject" to prerouting.)
//
//	chain reject {
//		reject with tcp reset
//		reject
//	}
func (t *table) rejectChain() chain {
	icmp := &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3} // port unreachable (RFC 792)
	if t.family == dataplane.IPv6 {
		icmp.Code = 4 // port unreachable (RFC 4443)
	}
	return t.newChain("reject",
		rule{exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{byte(dataplane.TCP)}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
		}},
		rule{exprs: []expr.Any{icmp}},
	)
}

// resetPriorityRules returns the rules that reset a priority that contains a slot, a list
// ID or an endpoint ID.
//
//	meta priority & fff8:0 == fa18:0 meta priority set none
//	meta priority & ffff:0 == fafa:0 meta priority set none
func (t *table) resetPriorityRules() []rule {
	var rules []rule
	for _, match := range t.renderer.priorityMatches() {
		rules = append(rules, rule{exprs: append(match, resetPriority()...)})
	}
	return rules
}

// noServiceRules returns the rules for connections to cluster IPs and service CIDRs that
// belong to no Service. They are in filter-forward and filter-output. There, they do not
// affect addresses of the node itself, such as the address of a DNS cache, or addresses
// that another program translates.
//
//	ct state new ip daddr @cluster-ips counter name "rejected-undeclared-port" goto reject
//	ct state new ip daddr @service-cidrs counter name "dropped-no-service" drop
func (t *table) noServiceRules() []rule {
	return []rule{
		{exprs: slices.Concat(matchCtStateNew(), []expr.Any{
			t.daddr(0), lookup(t.addrSets[clusterIPAddrs]), counterRef(rejectedUndeclaredPort), gotoChain("reject"),
		})},
		{exprs: slices.Concat(matchCtStateNew(), []expr.Any{
			t.daddr(0), lookup(t.serviceCIDRs), counterRef(droppedNoService), drop(),
		})},
	}
}
