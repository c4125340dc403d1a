package nft

import (
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables/expr"
)

// The kernel does not translate a packet that connection tracking classifies as invalid. An
// invalid packet from an endpoint arrives at the client, or at this node if the client is
// masqueraded, with the endpoint's own address. The TCP stack there knows no such
// connection and answers with a reset. The endpoint takes the reset for its client's.

// invalidFromEndpointRule returns the rule for invalid TCP packets from endpoints.
//
// The rule matches packets that have ACK but not SYN, FIN or RST. Without a connection,
// such a packet starts one (nf_conntrack_proto_tcp.c, tcp_new, and sysctl
// nf_conntrack_tcp_loose). So it is invalid only if it belongs to a connection and does not
// fit. Where the node sees only the replies of a server, packets with other flags are
// invalid because they come first. Packets of connections that start with a reply are never
// invalid because of their window.
//
// The rule matches source ports of endpoints, because the node may also see only the
// packets of clients. These are all invalid until the node sees a SYN-ACK.
//
//	ct state invalid tcp flags & (fin | syn | rst | ack) == ack tcp sport @endpoint-ports goto invalid
func (t *table) invalidFromEndpointRule() rule {
	return rule{exprs: slices.Concat(matchCtStateInvalid(), t.matchTCP(tcpACK, sourcePortOffset), []expr.Any{gotoChain("invalid")})}
}

// resetToEndpointRule returns the rule for the node's own answers to invalid packets: if no
// socket matches, the kernel sends a reset without ACK. This reset belongs to no
// connection. A reset that ends a connection of the node does belong to one.
//
//	tcp flags & (fin | syn | rst | ack) == rst tcp dport @endpoint-ports counter name "dropped-invalid" drop
func (t *table) resetToEndpointRule() rule {
	return rule{exprs: append(t.matchTCP(tcpRST, destinationPortOffset), counterRef(droppedInvalid), drop())}
}

// The offsets of the ports in the TCP header (RFC 9293).
const sourcePortOffset, destinationPortOffset = 0, 2

// TCP flags (RFC 9293).
const tcpFIN, tcpSYN, tcpRST, tcpACK = 1, 2, 4, 16

// matchTCP matches TCP packets that have, of FIN, SYN, RST and ACK, exactly these flags, and an
// endpoint's port at this offset.
func (t *table) matchTCP(flags byte, port uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{byte(dataplane.TCP)}},
		&expr.Payload{DestRegister: reg(0), Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: 1, Mask: []byte{tcpFIN | tcpSYN | tcpRST | tcpACK}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{flags}},
		&expr.Payload{DestRegister: reg(0), Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
		lookup(t.endpointPorts),
	}
}

// identifiesPods reports whether the node identifies pods of the table's family.
func (t *table) identifiesPods(node dataplane.Node) bool {
	return podInterfaceData(node) != nil || len(t.mergeNetworks(node.PodCIDRs)) > 0
}

// invalidChain returns the chain that drops invalid packets from or to a pod. If the node
// does not identify pods, the chain drops all packets, and filter-input does not go to it.
//
//	chain invalid {
//		ip saddr @pod-cidrs counter name "dropped-invalid" drop
//		ip daddr @pod-cidrs counter name "dropped-invalid" drop
//	}
func (t *table) invalidChain(node dataplane.Node) chain {
	dropped := []expr.Any{counterRef(droppedInvalid), drop()}
	dropIf := func(condition ...expr.Any) rule { return rule{exprs: append(condition, dropped...)} }
	if name := podInterfaceData(node); name != nil {
		is := &expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: name}
		return t.newChain("invalid",
			dropIf(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg(0)}, is),
			dropIf(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg(0)}, is))
	}
	if t.identifiesPods(node) {
		return t.newChain("invalid", dropIf(t.saddr(0), lookup(t.podCIDRs)), dropIf(t.daddr(0), lookup(t.podCIDRs)))
	}
	return t.newChain("invalid", dropIf())
}
