package servicecounters

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
)

// TableName is the name of the tables.
const TableName = "fairlead-counters"

// batchSize is the maximum number of elements in one commit.
const batchSize = 2048

// family describes the table of one IP family.
type family struct {
	addrLen              int
	table                *nftables.Table
	frontends, endpoints *nftables.Set
}

func newFamily(f dataplane.Family) *family {
	t := &family{addrLen: 4, table: &nftables.Table{Name: TableName, Family: nftables.TableFamilyIPv4}}
	addr := nftables.TypeIPAddr
	if f == dataplane.IPv6 {
		t.addrLen, addr, t.table.Family = 16, nftables.TypeIP6Addr, nftables.TableFamilyIPv6
	}
	frontend := []nftables.SetDatatype{addr, nftables.TypeInetProto, nftables.TypeInetService}
	set := func(name string, key ...nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t.table, Name: name, KeyType: nftables.MustConcatSetType(key...), Concatenation: true, Counter: true}
	}
	t.frontends = set("frontends", frontend...)
	t.endpoints = set("endpoints", append(slices.Clone(frontend), addr, nftables.TypeInetService)...)
	return t
}

func (t *family) setFor(e element) *nftables.Set {
	if e.endpoint.IsValid() {
		return t.endpoints
	}
	return t.frontends
}

// reg returns the register at an offset in 32-bit words, as the kernel numbers it in a listing.
func reg(word int) uint32 {
	if word%4 == 0 {
		return unix.NFT_REG_1 + uint32(word/4) //nolint:gosec // at most 15
	}
	return unix.NFT_REG32_00 + uint32(word) //nolint:gosec // at most 15
}

// frontend loads the frontend that the client connected to; see package nft.
func (t *family) frontend(nodePort bool) []expr.Any {
	original := func(k expr.CtKey, word int) expr.Any {
		return &expr.Ct{Key: k, Register: reg(word), Direction: expr.CtDirOriginal, OptDirection: true}
	}
	words := t.addrLen / 4
	key := expr.CtKeyDSTIP
	if t.addrLen == 16 {
		key = expr.CtKeyDSTIP6
	}
	all := []expr.Any{original(key, 0)}
	if nodePort {
		zero := make([]byte, t.addrLen)
		all = append(all, &expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(t.addrLen), Mask: zero, Xor: zero}) //nolint:gosec // 4 or 16
	}
	return append(all, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(words)}, original(expr.CtKeyPROTODST, words+1))
}

// endpoint loads the packet's destination after the frontend.
func (t *family) endpoint() []expr.Any {
	offset := uint32(16) // struct iphdr, daddr
	if t.addrLen == 16 {
		offset = 24 // struct ipv6hdr, daddr
	}
	word := t.addrLen/4 + 2
	return []expr.Any{
		&expr.Payload{OperationType: expr.PayloadLoad, DestRegister: reg(word), Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(t.addrLen)}, //nolint:gosec // 4 or 16
		&expr.Payload{OperationType: expr.PayloadLoad, DestRegister: reg(word + t.addrLen/4), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

// addStructure adds the missing table, sets and chains, and rewrites the rules. The
// elements stay.
func (t *family) addStructure(conn *nftables.Conn, translatedOnly bool) {
	conn.AddTable(t.table)
	for _, s := range []*nftables.Set{t.frontends, t.endpoints} {
		_ = conn.AddSet(s, nil) // the library keeps the error for Flush
	}
	count := conn.AddChain(&nftables.Chain{Table: t.table, Name: "count"})
	chains := []*nftables.Chain{count}
	for _, h := range []struct {
		name string
		hook *nftables.ChainHook
	}{{"postrouting", nftables.ChainHookPostrouting}, {"input", nftables.ChainHookInput}} {
		chains = append(chains, conn.AddChain(&nftables.Chain{
			Table: t.table, Name: h.name, Type: nftables.ChainTypeNAT, Hooknum: h.hook,
			Priority: new(*nftables.ChainPriorityNATSource - 1),
		}))
	}
	for _, c := range chains {
		conn.FlushChain(c)
	}
	for _, c := range chains[1:] {
		var exprs []expr.Any
		if translatedOnly {
			const dstNAT = 1 << 5 // IPS_DST_NAT
			exprs = []expr.Any{
				&expr.Ct{Key: expr.CtKeySTATUS, Register: reg(0)},
				&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: 4, Mask: binaryutil.NativeEndian.PutUint32(dstNAT), Xor: make([]byte, 4)},
				&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: make([]byte, 4)},
			}
		}
		conn.AddRule(&nftables.Rule{Table: t.table, Chain: c, Exprs: append(exprs, &expr.Verdict{Kind: expr.VerdictGoto, Chain: count.Name})})
	}
	for _, nodePort := range []bool{false, true} {
		conn.AddRule(&nftables.Rule{Table: t.table, Chain: count, Exprs: slices.Concat(
			t.frontend(nodePort), t.endpoint(), []expr.Any{&expr.Lookup{SourceRegister: reg(0), SetName: t.endpoints.Name}},
			t.frontend(nodePort), []expr.Any{&expr.Lookup{SourceRegister: reg(0), SetName: t.frontends.Name}},
			[]expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}},
		)})
	}
}

// counterValue is an element in the kernel.
type counterValue struct {
	comment string
	packets uint64
}

// read adds the elements of the table to values. ok is false if the table does not exist.
func (t *family) read(ctx context.Context, conn *nftables.Conn, values map[element]counterValue) (ok bool, err error) {
	for _, s := range []*nftables.Set{t.frontends, t.endpoints} {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		elements, err := conn.GetSetElements(s)
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("list the counters of Services: %w", err)
		}
		for _, e := range elements {
			if key, ok := parseElement(e.Key, t.addrLen); ok && e.Counter != nil {
				values[key] = counterValue{e.Comment, e.Counter.Packets}
			}
		}
	}
	return true, nil
}

// Remove removes the tables from the network namespace of a file descriptor, or of the calling thread
// if netns is 0.
func Remove(netns int) error {
	conn, err := nftables.New(nftables.WithNetNSFd(netns))
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	for _, f := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		t := newFamily(f)
		tables, err := conn.ListTablesOfFamily(t.table.Family)
		if err != nil {
			return fmt.Errorf("list nftables tables: %w", err)
		}
		if !slices.ContainsFunc(tables, func(o *nftables.Table) bool { return o.Name == TableName }) {
			continue
		}
		conn.DelTable(t.table)
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("remove the counters of Services: %w", err)
		}
	}
	return nil
}
