package nft

import (
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

// The chains for the packets that filter-forward and filter-output examine.
const (
	newOrInvalidName       = "new-or-invalid"
	newOrInvalidOutputName = "new-or-invalid-output"
)

// newOrInvalidRule returns the only rule of filter-forward and of filter-output. So a packet of
// an established connection passes three expressions.
//
//	ct state invalid,new goto new-or-invalid
func (t *table) newOrInvalidRule(chain string) rule {
	return rule{exprs: append(matchNewOrInvalid(), gotoChain(chain))}
}

// newOrInvalidChains returns the chains for packets that start a connection and for invalid
// packets.
//
//	chain invalid-tcp {
//		tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid
//	}
//	chain new-or-invalid {
//		ct state invalid goto invalid-tcp
//		ip daddr @cluster-ips counter name "rejected-undeclared-port" goto reject
//		ip daddr 10.96.0.0/16 counter name "dropped-no-service" drop
//	}
//	chain invalid-tcp-output {
//		tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid
//		tcp flags & (fin | syn | rst | ack) == rst tcp dport @endpoint-ports counter name "dropped-invalid" drop
//	}
//	chain new-or-invalid-output {
//		…
//	}
func (t *table) newOrInvalidChains(node dataplane.Node) []chain {
	withInvalid := func(chain string) []rule {
		return append([]rule{{exprs: append(matchCtStateInvalid(), gotoChain(chain))}}, t.noServiceRules(node)...)
	}
	fromEndpoint := rule{exprs: append(t.matchTCP(tcpACK, sourcePortOffset), gotoChain("invalid"))}
	return []chain{
		t.newChain("invalid-tcp", fromEndpoint),
		t.newChain("invalid-tcp-output", fromEndpoint, t.resetToEndpointRule()),
		t.newChain(newOrInvalidName, withInvalid("invalid-tcp")...),
		t.newChain(newOrInvalidOutputName, withInvalid("invalid-tcp-output")...),
	}
}

// noServiceRules returns the rules for connections to cluster IPs and service CIDRs that
// belong to no Service. They are behind filter-forward and filter-output. There, they do not
// affect addresses of the node itself, such as the address of a DNS cache, or addresses
// that another program translates.
//
//	ip daddr @cluster-ips counter name "rejected-undeclared-port" goto reject
//	ip daddr 10.96.0.0/16 counter name "dropped-no-service" drop
func (t *table) noServiceRules(node dataplane.Node) []rule {
	rules := []rule{{exprs: []expr.Any{
		t.daddr(0), lookup(t.addrSets[clusterIPAddrs]), counterRef(rejectedUndeclaredPort), gotoChain("reject"),
	}}}
	dropped := []expr.Any{counterRef(droppedNoService), drop()}
	networks := t.mergeNetworks(node.ServiceCIDRs)
	if !areComparable(networks) {
		return append(rules, rule{exprs: append([]expr.Any{t.daddr(0), lookup(t.serviceCIDRs)}, dropped...)})
	}
	for _, p := range networks {
		rules = append(rules, rule{exprs: append(t.compareNetwork(t.daddr(0), p, expr.CmpOpEq), dropped...)})
	}
	return rules
}
