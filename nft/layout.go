package nft

import (
	"fmt"
	"net/netip"
	"slices"

	"fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// TableName is the name of the backend's table in the ip and the ip6 family.
const TableName = "fairlead"

// class names how connections to a Service are treated: with how many slots.
// The kernel sees it as a packet priority (a tc class ID, major:minor); the
// number of slots is the minor, and the major is left to treatments.
type class uint32

// chainName is where `nft list` shows the class's rules.
func (c class) chainName() string { return fmt.Sprintf("class-%d", uint32(c)) }

// table is one IP family's table: its sets and how elements look in it.
type table struct {
	family  dataplane.Family
	nf      *nftables.Table
	addrLen int

	services    *nftables.Set
	endpoints   [shards]*nftables.Set
	classes     *nftables.Set
	noEndpoints *nftables.Set
	hairpin     *nftables.Set
	podCIDRs    *nftables.Set
}

// chain is a chain with the rules it must have.
type chain struct {
	*nftables.Chain
	rules []rule
}

type rule struct {
	comment string
	exprs   []expr.Any
}

func newTable(family dataplane.Family) *table {
	t := &table{family: family}
	addr := nftables.TypeIPAddr
	t.nf = &nftables.Table{Name: TableName, Family: nftables.TableFamilyIPv4}
	t.addrLen = 4
	if family == dataplane.IPv6 {
		addr = nftables.TypeIP6Addr
		t.nf.Family = nftables.TableFamilyIPv6
		t.addrLen = 16
	}
	frontend := []nftables.SetDatatype{addr, nftables.TypeInetProto, nftables.TypeInetService}
	concat := nftables.MustConcatSetType
	t.services = &nftables.Set{
		Table: t.nf, Name: "services", IsMap: true,
		KeyType: concat(frontend...), DataType: nftables.TypeClassID,
	}
	for i := range t.endpoints {
		t.endpoints[i] = &nftables.Set{
			// The slot is a class ID because it travels as the packet's priority.
			Table: t.nf, Name: fmt.Sprintf("endpoints-%x", i), IsMap: true,
			KeyType:  concat(append(slices.Clone(frontend), nftables.TypeClassID)...),
			DataType: concat(addr, nftables.TypeInetService),
		}
	}
	t.classes = &nftables.Set{
		Table: t.nf, Name: "classes", IsMap: true,
		KeyType: nftables.TypeClassID, DataType: nftables.TypeVerdict, KeyByteOrder: binaryutil.BigEndian,
	}
	t.noEndpoints = &nftables.Set{Table: t.nf, Name: "no-endpoints", KeyType: concat(frontend...)}
	t.hairpin = &nftables.Set{
		Table: t.nf, Name: "hairpin",
		KeyType: concat(append([]nftables.SetDatatype{addr, addr}, frontend...)...),
	}
	t.podCIDRs = &nftables.Set{Table: t.nf, Name: "pod-cidrs", KeyType: addr, Interval: true}
	return t
}

// sets returns all sets of the table, in the order in which they are made.
func (t *table) sets() []*nftables.Set {
	return append(t.rowSets(), t.classes, t.podCIDRs)
}

// rowSets returns the sets that rows have elements in, by the indices that
// edit uses.
func (t *table) rowSets() []*nftables.Set {
	return append([]*nftables.Set{inServices: t.services, inNoEndpoints: t.noEndpoints, inHairpin: t.hairpin}, t.endpoints[:]...)
}

// shards is the number of maps that endpoints are spread over, by the last hex
// digit of the frontend's address. To the packet and to an update it makes no
// difference, but the kernel takes quadratic time to list a map (see dumpSize):
// with one map reading 100,000 Services took 47 s.
const shards = 16

func shardOf(f dataplane.Frontend) int {
	b := f.Addr.Addr().AsSlice()
	return int(b[len(b)-1] % shards)
}

// podCIDRsOf returns the node's pod networks of the table's family, without
// those that lie within another, in order.
func (t *table) podCIDRsOf(node dataplane.Node) []netip.Prefix {
	var all []netip.Prefix
	for _, p := range node.PodCIDRs {
		if dataplane.FamilyOf(p.Addr()) == t.family {
			all = append(all, p.Masked())
		}
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int { return a.Compare(b) })
	var merged []netip.Prefix
	for _, p := range all {
		if n := len(merged); n > 0 && merged[n-1].Contains(p.Addr()) {
			continue
		}
		merged = append(merged, p)
	}
	return merged
}

// chains returns the chains that do not depend on Services, callees first.
func (t *table) chains(node dataplane.Node) []chain {
	// Rejecting happens before translating and again after it, for a commit may
	// come while a packet is between the two. One that has missed the frontend
	// among those without endpoints, as it had some, and then finds it without
	// any, is caught behind; one that the second check would let through, as
	// the Service has just got its first endpoint, has met the first.
	//
	// Prerouting rather than input and forward, so that clients are told even
	// where the node has no route to the address. (Kernel 5.9, netfilter:
	// nf_tables: add "reject" to prerouting.)
	reject := rule{
		comment: "connections to Services without endpoints",
		exprs:   slices.Concat(ctStateNew(), t.frontendKey(), []expr.Any{lookup(t.noEndpoints), gotoChain("reject")}),
	}
	unmark := rule{
		comment: "the slot has done its work",
		exprs: slices.Concat(
			[]expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)}},
			[]expr.Any{
				&expr.Bitwise{
					SourceRegister: reg(0), DestRegister: reg(0), Len: 4,
					Mask: binaryutil.NativeEndian.PutUint32(slotMask), Xor: []byte{0, 0, 0, 0},
				},
				&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: binaryutil.NativeEndian.PutUint32(slotBase)},
			},
			resetPriority(),
		),
	}
	dispatch := rule{exprs: slices.Concat(
		t.frontendKey(),
		[]expr.Any{mapLookup(t.services, reg(0)), setPriority(reg(0))},
		[]expr.Any{
			&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(0)},
			verdictLookup(t.classes),
		},
	)}
	icmp := &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3} // port unreachable (RFC 792)
	if t.family == dataplane.IPv6 {
		icmp.Code = 4 // port unreachable (RFC 4443)
	}
	postrouting := []rule{{
		comment: "pods that reach themselves through a Service",
		exprs: slices.Concat(ctStatusDNAT(),
			[]expr.Any{t.saddr(0), t.daddr(t.addrLen / 4)},
			t.originalFrontendKey(2*t.addrLen/4),
			[]expr.Any{lookup(t.hairpin), masquerade()}),
	}}
	if len(t.podCIDRsOf(node)) > 0 {
		notAPod := lookup(t.podCIDRs)
		notAPod.Invert = true
		postrouting = append(postrouting, rule{
			comment: "clients outside the pod networks",
			exprs: slices.Concat(ctStatusDNAT(),
				[]expr.Any{t.saddr(0), notAPod},
				// The lookup in a map is there to see whether the connection is
				// a Service's at all: others translate addresses, too.
				t.originalFrontendKey(0),
				[]expr.Any{mapLookup(t.services, reg(0)), setPriority(reg(0))},
				resetPriority(),
				[]expr.Any{masquerade()}),
		})
	}
	accept := nftables.ChainPolicyAccept
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority, rules ...rule) chain {
		return chain{rules: rules, Chain: &nftables.Chain{
			Name: name, Table: t.nf, Type: typ, Hooknum: hook, Priority: &prio, Policy: &accept,
		}}
	}
	dstnat := *nftables.ChainPriorityNATDest
	return []chain{
		{Chain: &nftables.Chain{Name: "reject", Table: t.nf}, rules: []rule{
			{exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
				&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{byte(dataplane.TCP)}},
				&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
			}},
			{exprs: []expr.Any{icmp}},
		}},
		t.translate(),
		base("filter-prerouting-pre-dnat", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, dstnat-10, reject),
		base("filter-output-pre-dnat", nftables.ChainTypeFilter, nftables.ChainHookOutput, dstnat-10, reject),
		base("nat-prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, dstnat, dispatch),
		base("nat-output", nftables.ChainTypeNAT, nftables.ChainHookOutput, dstnat, dispatch),
		base("filter-prerouting-post-dnat", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, dstnat+10, unmark, reject),
		base("filter-output-post-dnat", nftables.ChainTypeFilter, nftables.ChainHookOutput, dstnat+10, unmark, reject),
		base("nat-postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource, postrouting...),
	}
}

// classChain returns the chain of a class: it draws a slot.
func (t *table) classChain(c class) chain {
	return chain{
		Chain: &nftables.Chain{Name: c.chainName(), Table: t.nf},
		rules: []rule{{exprs: []expr.Any{randomSlot(uint32(c), reg(0)), setPriority(reg(0)), gotoChain("translate")}}},
	}
}

// translate returns the chain that all classes go to with a slot. It is one
// chain for all because the kernel walks a map of any kind for each new chain
// in which a rule refers to it (nf_tables_api.c, nf_tables_bind_set): 0.5 s
// for a new class at 100,000 Services, if each class had a rule of its own.
func (t *table) translate() chain {
	slot := t.addrLen/4 + 2
	// in matches frontends of a shard: `ip daddr & 0.0.0.15 == 0.0.0.3`.
	in := func(shard int) []expr.Any {
		mask, value, none := make([]byte, t.addrLen), make([]byte, t.addrLen), make([]byte, t.addrLen)
		mask[t.addrLen-1], value[t.addrLen-1] = shards-1, byte(shard)
		return []expr.Any{
			t.daddr(0),
			&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(t.addrLen), Mask: mask, Xor: none},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: value},
		}
	}
	dnat := func(shard int) []expr.Any {
		return []expr.Any{
			mapLookup(t.endpoints[shard], reg(0)),
			&expr.NAT{
				Type: expr.NATTypeDestNAT, Family: uint32(t.nf.Family),
				// The maxima are what the kernel makes of leaving them out.
				RegAddrMin: reg(0), RegAddrMax: reg(0),
				RegProtoMin: reg(t.addrLen / 4), RegProtoMax: reg(t.addrLen / 4), Specified: true,
			},
		}
	}
	drawn := &expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg(slot)}
	var rules, fallback []rule
	for i := range shards {
		rules = append(rules, rule{exprs: slices.Concat(in(i), t.frontendKey(), []expr.Any{drawn}, dnat(i))})
		fallback = append(fallback, rule{
			comment: "the slot went while the packet was on its way here",
			exprs:   slices.Concat(in(i), t.frontendKey(), []expr.Any{randomSlot(1, reg(slot))}, dnat(i)),
		})
	}
	return chain{Chain: &nftables.Chain{Name: "translate", Table: t.nf}, rules: append(rules, fallback...)}
}

// slotBase is what slots count from: a tc class ID whose major nobody else
// uses, so that a priority that is left on a packet can be told for ours.
const (
	slotBase = 0xfa1d_0000
	slotMask = 0xffff_0000
)

// randomSlot is `numgen random mod n offset slotBase`.
func randomSlot(n, register uint32) expr.Any {
	return &expr.Numgen{Register: register, Modulus: n, Type: unix.NFT_NG_RANDOM, Offset: slotBase}
}

// reg returns the register at a 32-bit offset, by the name that the kernel
// gives it when it lists rules: the old 128-bit name where there is one
// (nf_tables_api.c, nft_dump_register).
func reg(word int) uint32 {
	if word%4 == 0 {
		return unix.NFT_REG_1 + uint32(word/4)
	}
	return unix.NFT_REG32_00 + uint32(word)
}

func (t *table) saddr(word int) expr.Any {
	if t.family == dataplane.IPv6 {
		return networkHeader(word, 8, 16)
	}
	return networkHeader(word, 12, 4)
}

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

// frontendKey loads `ip daddr . meta l4proto . th dport`.
func (t *table) frontendKey() []expr.Any {
	n := t.addrLen / 4
	return []expr.Any{
		t.daddr(0),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(n)},
		// TCP, UDP and SCTP all have the destination port in bytes 2 and 3.
		&expr.Payload{DestRegister: reg(n + 1), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

// originalFrontendKey loads what the client asked for before it was
// translated, in the same form.
func (t *table) originalFrontendKey(word int) []expr.Any {
	key := expr.CtKeyDSTIP
	if t.family == dataplane.IPv6 {
		key = expr.CtKeyDSTIP6
	}
	n := t.addrLen / 4
	original := func(k expr.CtKey, word int) expr.Any {
		return &expr.Ct{Key: k, Register: reg(word), Direction: expr.CtDirOriginal, OptDirection: true}
	}
	return []expr.Any{
		original(key, word),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(word + n)},
		original(expr.CtKeyPROTODST, word+n+1),
	}
}

func lookup(s *nftables.Set) *expr.Lookup {
	return &expr.Lookup{SourceRegister: reg(0), SetName: s.Name}
}

func mapLookup(s *nftables.Set, dest uint32) expr.Any {
	return &expr.Lookup{SourceRegister: reg(0), DestRegister: dest, IsDestRegSet: true, SetName: s.Name}
}

func verdictLookup(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: reg(0), DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: s.Name}
}

func setPriority(source uint32) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: source}
}

// resetPriority is `meta priority set none`.
func resetPriority() []expr.Any {
	return []expr.Any{&expr.Immediate{Register: reg(0), Data: []byte{0, 0, 0, 0}}, setPriority(reg(0))}
}

func gotoChain(name string) expr.Any {
	return &expr.Verdict{Kind: expr.VerdictGoto, Chain: name}
}

func masquerade() expr.Any { return &expr.Masq{FullyRandom: true} }

func ctStateNew() []expr.Any { return ctBits(expr.CtKeySTATE, expr.CtStateBitNEW) }

func ctStatusDNAT() []expr.Any {
	const dstNAT = 1 << 5 // IPS_DST_NAT, linux/netfilter/nf_conntrack_common.h
	return ctBits(expr.CtKeySTATUS, dstNAT)
}

func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: reg(0)},
		&expr.Bitwise{
			SourceRegister: reg(0), DestRegister: reg(0), Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: []byte{0, 0, 0, 0},
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: []byte{0, 0, 0, 0}},
	}
}

func (r rule) userData() []byte {
	if r.comment == "" {
		return nil
	}
	return userdata.AppendString(nil, userdata.TypeComment, r.comment)
}
