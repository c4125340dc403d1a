package nft

import (
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// pingRule returns the rule for new echo requests with dataplane.Node.PingServiceIPs. It
// comes after the rules of Services, which handle connections that match a frontend.
//
//	icmp type echo-request goto ping
func (t *table) pingRule() rule {
	return rule{exprs: append(t.matchEchoRequest(), gotoChain("ping"))}
}

// pingChains returns the chains for echo requests. The rules translate a request to one of
// the node's addresses, so the node answers it, and the kernel restores the Service address
// in the reply. If the Node has no address of the family, the rules use `redirect`. It
// translates to an address of the interface on which the request arrived, and drops the
// request if the interface has none.
//
//	chain answer-ping {
//		dnat to 192.0.2.1
//	}
//	chain ping-external {
//		ip daddr @ping-external goto answer-ping
//	}
//	chain ping {
//		ip saddr != @local-pods fib saddr type != local goto ping-external comment "not this node nor its pods"
//		ip daddr @ping-internal goto answer-ping
//	}
//	chain pinged {
//		ct original ip daddr @ping-internal return
//		ct original ip daddr @cluster-ips counter name "rejected-undeclared-port" goto reject
//		ct original ip daddr @service-cidrs counter name "dropped-no-service" drop
//	}
func (t *table) pingChains(node dataplane.Node) []chain {
	answer := []expr.Any{&expr.Redir{}}
	if i := slices.IndexFunc(node.PrimaryAddrs, func(a netip.Addr) bool { return dataplane.FamilyOf(a) == t.family }); i >= 0 {
		answer = []expr.Any{
			&expr.Immediate{Register: reg(0), Data: node.PrimaryAddrs[i].AsSlice()},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(t.nf.Family), RegAddrMin: reg(0), RegAddrMax: reg(0)},
		}
	}
	return []chain{
		t.newChain("answer-ping", rule{exprs: answer}),
		t.newChain("ping-external", rule{exprs: []expr.Any{t.daddr(0), lookup(t.addrSets[pingExternalAddrs]), gotoChain("answer-ping")}}),
		t.newChain("ping",
			rule{comment: externalClientsComment, exprs: append(t.matchExternalClients(node), gotoChain("ping-external"))},
			rule{exprs: []expr.Any{t.daddr(0), lookup(t.addrSets[pingInternalAddrs]), gotoChain("answer-ping")}},
		),
		t.newChain("pinged",
			rule{exprs: []expr.Any{t.originalDaddr(0), lookup(t.addrSets[pingInternalAddrs]), &expr.Verdict{Kind: expr.VerdictReturn}}},
			rule{exprs: []expr.Any{
				t.originalDaddr(0), lookup(t.addrSets[clusterIPAddrs]), counterRef(rejectedUndeclaredPort), gotoChain("reject"),
			}},
			rule{exprs: []expr.Any{t.originalDaddr(0), lookup(t.serviceCIDRs), counterRef(droppedNoService), drop()}},
		),
	}
}

// answeredPingRule returns the rule for all translated echo requests. To the kernel, all
// requests of a running ping are one connection, so the rules must check each request for
// remaining endpoints.
//
//	icmp type echo-request ct status dnat goto pinged
func (t *table) answeredPingRule() rule {
	return rule{exprs: slices.Concat(t.matchEchoRequest(), matchCtStatusDNAT(), []expr.Any{gotoChain("pinged")})}
}

// matchEchoRequest returns `icmp type echo-request`.
func (t *table) matchEchoRequest() []expr.Any {
	protocol, typ := byte(unix.IPPROTO_ICMP), byte(8) // RFC 792
	if t.family == dataplane.IPv6 {
		protocol, typ = unix.IPPROTO_ICMPV6, 128 // RFC 4443
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{protocol}},
		&expr.Payload{DestRegister: reg(0), Base: expr.PayloadBaseTransportHeader, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{typ}},
	}
}
