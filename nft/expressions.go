package nft

import (
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// reg returns the register at an offset in 32-bit words. It uses the number that the kernel
// uses when it lists rules: the old 128-bit register if one starts at this offset
// (nf_tables_api.c, nft_dump_register).
func reg(word int) uint32 {
	if word%4 == 0 {
		return unix.NFT_REG_1 + uint32(word/4)
	}
	return unix.NFT_REG32_00 + uint32(word)
}

// saddr loads `ip saddr`.
func (t *table) saddr(word int) expr.Any {
	if t.family == dataplane.IPv6 {
		return networkHeader(word, 8, 16)
	}
	return networkHeader(word, 12, 4)
}

// daddr loads `ip daddr`.
func (t *table) daddr(word int) expr.Any {
	if t.family == dataplane.IPv6 {
		return networkHeader(word, 24, 16)
	}
	return networkHeader(word, 16, 4)
}

func networkHeader(word int, offset, length uint32) expr.Any {
	return &expr.Payload{
		DestRegister: reg(word), Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length,
	}
}

// dport loads `th dport`, the destination port. It is in bytes 2 and 3 of the TCP, UDP and
// SCTP headers.
func dport(word int) expr.Any {
	return &expr.Payload{DestRegister: reg(word), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
}

// frontendKey loads `ip daddr . meta l4proto . th dport`.
func (t *table) frontendKey(by addressing, word int) []expr.Any {
	n := t.addrLen / 4
	return slices.Concat(
		t.frontendAddress(by, t.daddr(word), word),
		[]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(word + n)}, dport(word + n + 1)},
	)
}

// frontendAddress loads an address as it appears in the keys of frontends: unchanged, or
// `ip daddr & 0.0.0.0` for a node port.
func (t *table) frontendAddress(by addressing, load expr.Any, word int) []expr.Any {
	if by == byAddress {
		return []expr.Any{load}
	}
	return []expr.Any{load, &expr.Bitwise{
		SourceRegister: reg(word), DestRegister: reg(word), Len: uint32(t.addrLen),
		Mask: make([]byte, t.addrLen), Xor: make([]byte, t.addrLen),
	}}
}

// clientKey loads the client's address and the frontend:
// `ip saddr . ip daddr . meta l4proto . th dport`.
func (t *table) clientKey(by addressing) []expr.Any {
	return append([]expr.Any{t.saddr(0)}, t.frontendKey(by, t.addrLen/4)...)
}

// originalFrontendKey loads the frontend that the client connected to before translation:
// `ct original ip daddr . meta l4proto . ct original proto-dst`.
func (t *table) originalFrontendKey(by addressing, word int) []expr.Any {
	n := t.addrLen / 4
	return slices.Concat(
		t.frontendAddress(by, t.originalDaddr(word), word),
		[]expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(word + n)},
			original(expr.CtKeyPROTODST, word+n+1),
		},
	)
}

// originalDaddr loads `ct original ip daddr`.
func (t *table) originalDaddr(word int) expr.Any {
	if t.family == dataplane.IPv6 {
		return original(expr.CtKeyDSTIP6, word)
	}
	return original(expr.CtKeyDSTIP, word)
}

func original(k expr.CtKey, word int) expr.Any {
	return &expr.Ct{Key: k, Register: reg(word), Direction: expr.CtDirOriginal, OptDirection: true}
}

// matchShard matches the frontends of a shard: `ip daddr & 0.0.0.15 == 0.0.0.3`.
func (t *table) matchShard(by addressing, shard int) []expr.Any {
	return t.matchShards(by, shard, numShards-1)
}

// matchShards matches the frontends of the shards that have, of these bits, the same as shard.
func (t *table) matchShards(by addressing, shard int, bits byte) []expr.Any {
	n, field := t.addrLen, t.daddr(0)
	if by == byNodePort {
		n, field = 2, dport(0)
	}
	mask, value, none := make([]byte, n), make([]byte, n), make([]byte, n)
	mask[n-1], value[n-1] = bits, byte(shard)
	return []expr.Any{
		field,
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(n), Mask: mask, Xor: none},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: value},
	}
}

// maxComparedNetworks is the maximum number of networks that rules compare an address with. With
// more networks, rules look up an interval set, which takes as long as several comparisons.
const maxComparedNetworks = 2

// areComparable reports whether rules compare an address with these networks.
func areComparable(networks []netip.Prefix) bool {
	return len(networks) <= maxComparedNetworks && !slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Bits() == 0 })
}

// compareNetwork compares an address, which the expression loads into the first register, with a
// network: `ip saddr 10.0.0.0/8`. As nft does, it loads no more than the bytes of the prefix.
func (t *table) compareNetwork(address expr.Any, network netip.Prefix, op expr.CmpOp) []expr.Any {
	const bitsPerByte = 8
	n := (network.Bits() + bitsPerByte - 1) / bitsPerByte
	value := network.Masked().Addr().AsSlice()
	load := *address.(*expr.Payload)
	if network.Bits()%bitsPerByte == 0 {
		load.Len = uint32(n) //nolint:gosec // at most 16
		return []expr.Any{&load, &expr.Cmp{Op: op, Register: reg(0), Data: value[:n]}}
	}
	mask := make([]byte, t.addrLen)
	setLeadingBits(mask, network.Bits())
	return []expr.Any{
		&load,
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(t.addrLen), Mask: mask, Xor: make([]byte, t.addrLen)}, //nolint:gosec // 16
		&expr.Cmp{Op: op, Register: reg(0), Data: value},
	}
}

// lookup returns `@name`.
func lookup(s *nftables.Set) *expr.Lookup {
	return &expr.Lookup{SourceRegister: reg(0), SetName: s.Name}
}

// lookupInverted returns `!= @name`.
func lookupInverted(s *nftables.Set) expr.Any {
	l := lookup(s)
	l.Invert = true
	return l
}

// mapLookup returns `map @name`.
func mapLookup(s *nftables.Set, dest uint32) expr.Any {
	return &expr.Lookup{SourceRegister: reg(0), DestRegister: dest, IsDestRegSet: true, SetName: s.Name}
}

// verdictLookup returns `vmap @name`.
func verdictLookup(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: reg(0), DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: s.Name}
}

// priorityVmap returns `meta priority vmap @…`.
func (t *table) priorityVmap(m verdictMap) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)}, verdictLookup(t.verdicts[m])}
}

// randomSlot returns `numgen random mod n offset slotBase`.
func randomSlot(n int, l endpointList, register uint32) expr.Any {
	return &expr.Numgen{Register: register, Modulus: uint32(n), Type: unix.NFT_NG_RANDOM, Offset: l.slotBase()} //nolint:gosec // a size
}

// slotInTurn returns `numgen inc mod n offset slotBase`.
func slotInTurn(n int, l endpointList, register uint32) expr.Any {
	return &expr.Numgen{Register: register, Modulus: uint32(n), Type: unix.NFT_NG_INCREMENTAL, Offset: l.slotBase()} //nolint:gosec // a size
}

// firstSlot returns slot 0 as `numgen random mod 1`, because nft cannot print a constant in
// a concatenation.
func firstSlot(l endpointList, register uint32) expr.Any { return randomSlot(1, l, register) }

// setPriority returns `meta priority set …`.
func setPriority(source uint32) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: source}
}

// resetPriority returns `meta priority set none`.
func resetPriority() []expr.Any { return resetPriorityWith(0) }

// resetPriorityWith is resetPriority with another register than the first one.
func resetPriorityWith(word int) []expr.Any {
	return []expr.Any{&expr.Immediate{Register: reg(word), Data: []byte{0, 0, 0, 0}}, setPriority(reg(word))}
}

// matchSlot matches priorities that are slots: `meta priority & fffe:0 == fa1c:0`.
func matchSlot() []expr.Any {
	return matchPriority(binaryutil.NativeEndian.PutUint32(slotMask), binaryutil.NativeEndian.PutUint32(slotMajor))
}

// matchNoSlot matches all other priorities: `meta priority & fffe:0 != fa1c:0`.
func matchNoSlot() []expr.Any {
	exprs := matchSlot()
	exprs[len(exprs)-1].(*expr.Cmp).Op = expr.CmpOpNeq //nolint:forcetypeassert // of matchPriority
	return exprs
}

// matchEndpointID matches priorities that are endpoint IDs:
// `meta priority & ffff:0 == fafa:0`.
func matchEndpointID() []expr.Any {
	return matchPriority(binaryutil.NativeEndian.PutUint32(endpointIDMask), binaryutil.NativeEndian.PutUint32(endpointIDMajor))
}

// matchEndpointIDInList matches the endpoint IDs of one list:
// `meta priority & ffff:100 == fafa:0`.
func matchEndpointIDInList(l endpointList) []expr.Any {
	lowest := endpointID(1).priority() &^ endpointIDMajor // the bit that distinguishes the lists
	return matchPriority(
		binaryutil.NativeEndian.PutUint32(endpointIDMask|lowest), binaryutil.NativeEndian.PutUint32(endpointID(l).priority()),
	)
}

func matchPriority(mask, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)},
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: value},
	}
}

// matchNotFromPods matches packets that did not arrive on a pod's interface, including the
// node's own packets: `iifname != "cni0"`.
func matchNotFromPods(node dataplane.Node) []expr.Any {
	if name := podInterfaceData(node); name != nil {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg(0)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: name},
		}
	}
	return nil
}

// podInterfaceData returns the bytes that rules compare with the interface name of a
// packet. It returns nil if the node does not identify pods by interface.
func podInterfaceData(node dataplane.Node) []byte {
	switch {
	case node.PodInterface != "":
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, node.PodInterface)
		return name
	case node.PodInterfacePrefix != "":
		return []byte(node.PodInterfacePrefix)
	default:
		return nil
	}
}

// matchSourceLocal compares the type of the source address with local:
// `fib saddr type local`.
func matchSourceLocal(op expr.CmpOp) []expr.Any {
	return matchAddrType(&expr.Fib{FlagSADDR: true}, op)
}

// matchAddrType compares the result of a fib expression with local.
func matchAddrType(fib *expr.Fib, op expr.CmpOp) []expr.Any {
	fib.Register, fib.ResultADDRTYPE = reg(0), true
	return []expr.Any{
		fib, &expr.Cmp{Op: op, Register: reg(0), Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// matchCtStateNew returns `ct state new`.
func matchCtStateNew() []expr.Any { return matchCtBits(expr.CtKeySTATE, expr.CtStateBitNEW) }

// matchNewOrInvalid returns `ct state invalid,new`.
func matchNewOrInvalid() []expr.Any {
	return matchCtBits(expr.CtKeySTATE, expr.CtStateBitINVALID|expr.CtStateBitNEW)
}

// matchCtStateInvalid returns `ct state invalid`.
func matchCtStateInvalid() []expr.Any { return matchCtBits(expr.CtKeySTATE, expr.CtStateBitINVALID) }

// matchCtStatusDNAT returns `ct status dnat`.
func matchCtStatusDNAT() []expr.Any {
	const dstNAT = 1 << 5 // IPS_DST_NAT, linux/netfilter/nf_conntrack_common.h
	return matchCtBits(expr.CtKeySTATUS, dstNAT)
}

func matchCtBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: reg(0)},
		&expr.Bitwise{
			SourceRegister: reg(0), DestRegister: reg(0), Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: []byte{0, 0, 0, 0},
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: []byte{0, 0, 0, 0}},
	}
}

// gotoChain returns `goto name`.
func gotoChain(name string) expr.Any {
	return &expr.Verdict{Kind: expr.VerdictGoto, Chain: name}
}

// jumpChain returns `jump name`.
func jumpChain(name string) expr.Any {
	return &expr.Verdict{Kind: expr.VerdictJump, Chain: name}
}

func drop() expr.Any { return &expr.Verdict{Kind: expr.VerdictDrop} }

// counterRef returns `counter name "…"`.
func counterRef(c counter) expr.Any {
	return &expr.Objref{Type: int(nftables.ObjTypeCounter), Name: string(c)}
}
