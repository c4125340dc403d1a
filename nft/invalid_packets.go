package nft

import (
	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
)

// The kernel does not translate a packet that its connection tracking calls
// invalid, so that one of an endpoint would reach the client, or where the client
// is masqueraded this node, with the endpoint's own address. A TCP that knows of
// no such connection answers with a reset, which the endpoint takes for its
// client's.

// invalidFromEndpointRule is the rule for such packets of TCP.
//
// Of the flags it wants ACK alone: without SYN, FIN and RST a packet that belongs
// to no connection known begins one (nf_conntrack_proto_tcp.c, tcp_new, and
// sysctl nf_conntrack_tcp_loose), so that it is invalid only if it belongs to one
// and does not fit. Others are, where the node sees nothing but the answers of a
// server, for the reason that they come first. Connections that were begun like
// this are never invalid on account of their windows.
//
// It wants a source port that some endpoint has, as the node may also see
// nothing but what clients send: all of that is invalid until a SYN-ACK comes by.
//
//	ct state invalid tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid
func (t *table) invalidFromEndpointRule() rule {
	const sourcePort = 0
	return rule{exprs: append(t.matchInvalidTCP(tcpACK, sourcePort), gotoChain("invalid"))}
}

// resetToEndpointRule is the rule for the node's own answers to such packets: a reset
// without ACK is what the kernel sends where there is no socket. It belongs to no
// connection either, while one that ends a connection of the node does.
//
//	ct state invalid tcp flags & (fin | syn | rst | ack) == rst tcp dport @endpoint-ports counter name "dropped-invalid" drop
func (t *table) resetToEndpointRule() rule {
	const destinationPort = 2
	return rule{exprs: append(t.matchInvalidTCP(tcpRST, destinationPort), counterRef(droppedInvalid), drop())}
}

// The flags of TCP (RFC 9293).
const tcpFIN, tcpSYN, tcpRST, tcpACK = 1, 2, 4, 16

// matchInvalidTCP matches invalid packets of TCP with these of the flags alone, and with
// an endpoint's port at this offset.
func (t *table) matchInvalidTCP(flags byte, port uint32) []expr.Any {
	return append(matchCtStateInvalid(),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{byte(dataplane.TCP)}},
		&expr.Payload{DestRegister: reg(0), Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: 1, Mask: []byte{tcpFIN | tcpSYN | tcpRST | tcpACK}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{flags}},
		&expr.Payload{DestRegister: reg(0), Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
		lookup(t.endpointPorts),
	)
}

// identifiesPods reports whether some clients of the table's family are known to be
// pods.
func (t *table) identifiesPods(node dataplane.Node) bool {
	return podInterfaceData(node) != nil || len(t.mergeNetworks(node.PodCIDRs)) > 0
}

// invalidChain drops what comes from or goes to a pod. Where no pods are told, it is
// all that the node forwards.
//
//	chain invalid {
//		ip saddr @pod-cidrs counter name "dropped-invalid" drop
//		ip daddr @pod-cidrs counter name "dropped-invalid" drop
//	}
func (t *table) invalidChain(node dataplane.Node) chain {
	dropped := []expr.Any{counterRef(droppedInvalid), drop()}
	with := func(condition ...expr.Any) rule { return rule{exprs: append(condition, dropped...)} }
	if name := podInterfaceData(node); name != nil {
		is := &expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: name}
		return t.newChain("invalid",
			with(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg(0)}, is),
			with(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg(0)}, is))
	}
	if t.identifiesPods(node) {
		return t.newChain("invalid", with(t.saddr(0), lookup(t.podCIDRs)), with(t.daddr(0), lookup(t.podCIDRs)))
	}
	return t.newChain("invalid", with())
}
