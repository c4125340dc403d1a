package nft

import (
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// rejectChain rejects with a TCP reset or an ICMP port unreachable. Chains go here
// from prerouting, rather than from input and forward, so that clients are told
// even where the node has no route to the address. (Kernel 5.9, netfilter:
// nf_tables: add "reject" to prerouting.)
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

// resetPriorityRules puts back the priority of a packet in which a slot, or the ID of a list or
// an endpoint, has done its work.
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

// noServiceRules are rules for connections to the networks of cluster IPs that are for
// no Service. They are in forward and output, not before, so that an address
// that is the node's own, as that of a DNS cache may be, or that somebody else
// translates, is left alone.
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
