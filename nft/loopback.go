package nft

import (
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// loopbackFromNetworkRules returns the rule that sends packets to 127.0.0.0/8 from other
// hosts and pods to the chain loopback-from-network. Without the sysctl route_localnet, the
// kernel drops these packets. It always drops packets to ::1 (net/ipv6/ip6_input.c,
// ip6_rcv_core), so IPv6 needs no rule. With it, the kernel delivers them to the node itself, so the
// rule is in filter-input and forwarded packets do not pass it.
//
//	ip daddr 127.0.0.0/8 iifname != "lo" goto loopback-from-network
func (t *table) loopbackFromNetworkRules(node dataplane.Node) []rule {
	if !t.protectsLoopback(node) {
		return nil
	}
	lo := make([]byte, unix.IFNAMSIZ)
	copy(lo, "lo")
	return []rule{{exprs: []expr.Any{
		networkHeader(0, 16, 1), // nft compiles 127.0.0.0/8 to a comparison of the first byte
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{127}},
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: lo},
		gotoChain(loopbackChainName),
	}}}
}

const loopbackChainName = "loopback-from-network"

func (t *table) protectsLoopback(node dataplane.Node) bool {
	return t.family == dataplane.IPv4 && node.ProtectLoopback
}

// dropLoopbackChain returns the chain that drops packets that were sent to a loopback
// address. When the rules run, connection tracking may already have replaced another
// address by a loopback address. This happens in replies to a process of the node that uses
// one, and if another program's rules translate to one. These packets pass.
//
//	chain loopback-from-network {
//		ct direction reply return comment "replies to processes of the node"
//		ct status dnat return comment "translated by another program"
//		counter name "dropped-loopback" drop
//	}
func (t *table) dropLoopbackChain() chain {
	pass := &expr.Verdict{Kind: expr.VerdictReturn}
	return t.newChain(loopbackChainName,
		rule{comment: "replies to processes of the node", exprs: []expr.Any{
			&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{1}}, // IP_CT_DIR_REPLY
			pass,
		}},
		rule{comment: "translated by another program", exprs: slices.Concat(matchCtStatusDNAT(), []expr.Any{pass})},
		rule{exprs: []expr.Any{counterRef(droppedLoopback), drop()}},
	)
}
