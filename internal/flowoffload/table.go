package flowoffload

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
)

// TableName is the name of the table.
const TableName = "fairlead-flows"

const (
	flowtableName = "flows"
	counterName   = "offloaded"
	forwardChain  = "forward"
	offloadChain  = "offload"

	// ingressPriority is behind other programs' ingress chains, and forwardPriority behind their
	// filter chains.
	ingressPriority = 100
	forwardPriority = 200
	// batchSize is the maximum number of elements in one commit.
	batchSize = 2048
)

// Bits of a conntrack entry (linux/netfilter/nf_conntrack_common.h).
const (
	statusDNAT       = 1 << 5 // IPS_DST_NAT
	stateEstablished = 1 << 1 // NF_CT_STATE_BIT(IP_CT_ESTABLISHED)
)

// table describes the table.
type table struct {
	nf                              *nftables.Table
	devices, frontends4, frontends6 *nftables.Set
	threshold                       uint64
	hardware, withUDP               bool
	forward, offload                *nftables.Chain
}

func newTable(threshold uint32, hardware, withUDP bool) *table {
	nf := &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}
	frontends := func(name string, addr nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{
			Table: nf, Name: name, Concatenation: true,
			KeyType: nftables.MustConcatSetType(addr, nftables.TypeInetProto, nftables.TypeInetService),
		}
	}
	accept := nftables.ChainPolicyAccept
	return &table{
		nf: nf, threshold: uint64(threshold), hardware: hardware, withUDP: withUDP,
		devices:    &nftables.Set{Table: nf, Name: "devices", KeyType: nftables.TypeIFIndex, KeyByteOrder: binaryutil.NativeEndian},
		frontends4: frontends("frontends-ipv4", nftables.TypeIPAddr),
		frontends6: frontends("frontends-ipv6", nftables.TypeIP6Addr),
		forward: &nftables.Chain{
			Table: nf, Name: forwardChain, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward,
			Priority: new(nftables.ChainPriority(forwardPriority)), Policy: &accept,
		},
		offload: &nftables.Chain{Table: nf, Name: offloadChain},
	}
}

// frontendsOf returns the set that contains a frontend.
func (t *table) frontendsOf(f dataplane.Frontend) *nftables.Set {
	if f.Addr.Addr().Is4() {
		return t.frontends4
	}
	return t.frontends6
}

// build replaces the table by one without devices and frontends, in one commit.
func (t *table) build(conn *nftables.Conn) error {
	conn.AddTable(t.nf) // so that there is one to delete
	conn.DelTable(t.nf)
	conn.AddTable(t.nf)
	for _, s := range []*nftables.Set{t.devices, t.frontends4, t.frontends6} {
		_ = conn.AddSet(s, nil) // the library keeps the error for Flush
	}
	flags := nftables.FlowtableFlagsCounter
	if t.hardware {
		flags |= nftables.FlowtableFlagsHWOffload
	}
	conn.AddFlowtable(&nftables.Flowtable{
		Table: t.nf, Name: flowtableName, Flags: flags, Priority: nftables.FlowtablePriorityRef(ingressPriority),
	})
	conn.AddObj(&nftables.CounterObj{Table: t.nf, Name: counterName})
	conn.AddChain(t.offload)
	conn.AddChain(t.forward)
	for _, frontends := range []*nftables.Set{t.frontends4, t.frontends6} {
		for _, nodePort := range []bool{false, true} {
			conn.AddRule(&nftables.Rule{Table: t.nf, Chain: t.offload, Exprs: t.offloadRule(frontends, nodePort)})
		}
	}
	conn.AddRule(&nftables.Rule{
		Table: t.nf, Chain: t.forward, Exprs: t.forwardRule(), UserData: userdata.AppendString(nil, userdata.TypeComment, t.description()),
	})
	return conn.Flush()
}

// description identifies the rules and their settings. It is the comment of the rule in chain forward,
// so that a restart finds out whether the table is the one that it would build.
func (t *table) description() string {
	return fmt.Sprintf("version 1, threshold %d, hardware %t, UDP %t", t.threshold, t.hardware, t.withUDP)
}

// reg returns the register at an offset in 32-bit words, as the kernel numbers it in a listing.
func reg(word int) uint32 {
	if word%4 == 0 {
		return unix.NFT_REG_1 + uint32(word/4) //nolint:gosec // at most 15
	}
	return unix.NFT_REG32_00 + uint32(word) //nolint:gosec // at most 15
}

// forwardRule selects the connections that are old enough, and whose devices are in the flowtable.
func (t *table) forwardRule() []expr.Any {
	exprs := slices.Concat(matchBit(expr.CtKeySTATUS, statusDNAT), matchBit(expr.CtKeySTATE, stateEstablished))
	if !t.withUDP {
		exprs = append(exprs,
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{byte(dataplane.TCP)}})
	}
	for _, key := range []expr.MetaKey{expr.MetaKeyIIF, expr.MetaKeyOIF} {
		exprs = append(exprs, &expr.Meta{Key: key, Register: reg(0)}, &expr.Lookup{SourceRegister: reg(0), SetName: t.devices.Name})
	}
	return append(exprs,
		&expr.Ct{Key: expr.CtKeyPKTS, Register: reg(0)},
		&expr.Byteorder{SourceRegister: reg(0), DestRegister: reg(0), Op: expr.ByteorderHton, Len: 8, Size: 8},
		&expr.Cmp{Op: expr.CmpOpGt, Register: reg(0), Data: binary.BigEndian.AppendUint64(nil, t.threshold)},
		&expr.Verdict{Kind: expr.VerdictGoto, Chain: offloadChain},
	)
}

func matchBit(key expr.CtKey, bit uint32) []expr.Any {
	zero := make([]byte, 4)
	return []expr.Any{
		&expr.Ct{Key: key, Register: reg(0)},
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bit), Xor: zero},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg(0), Data: zero},
	}
}

// offloadRule offloads the connections to frontends of one family. The statement `flow add` ends the
// rule if it fails, for example while TCP is not established (nft_flow_offload.c), so the counter
// counts offloaded connections.
func (t *table) offloadRule(frontends *nftables.Set, nodePort bool) []expr.Any {
	original := func(k expr.CtKey, word int) expr.Any {
		return &expr.Ct{Key: k, Register: reg(word), Direction: expr.CtDirOriginal, OptDirection: true}
	}
	key, addrLen, proto := expr.CtKeyDSTIP, 4, byte(unix.NFPROTO_IPV4)
	if frontends == t.frontends6 {
		key, addrLen, proto = expr.CtKeyDSTIP6, 16, unix.NFPROTO_IPV6
	}
	exprs := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{proto}},
		original(key, 0),
	}
	if nodePort {
		zero := make([]byte, addrLen)
		exprs = append(exprs, &expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: uint32(addrLen), Mask: zero, Xor: zero}) //nolint:gosec // 4 or 16
	}
	return append(exprs,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(addrLen / 4)}, original(expr.CtKeyPROTODST, addrLen/4+1),
		&expr.Lookup{SourceRegister: reg(0), SetName: frontends.Name},
		&expr.FlowOffload{Name: flowtableName},
		&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counterName},
		&expr.Verdict{Kind: expr.VerdictReturn},
	)
}

// frontendKey encodes a frontend like a packet: address, protocol and port, each padded to 32 bits.
func frontendKey(f dataplane.Frontend) []byte {
	b := append(f.Addr.Addr().AsSlice(), byte(f.Protocol), 0, 0, 0)
	return append(binary.BigEndian.AppendUint16(b, f.Addr.Port()), 0, 0)
}

// parseFrontend decodes a key. It reports false for a key of another length.
func parseFrontend(b []byte) (dataplane.Frontend, bool) {
	addrLen := len(b) - 8
	if addrLen != 4 && addrLen != 16 {
		return dataplane.Frontend{}, false
	}
	addr, _ := netip.AddrFromSlice(b[:addrLen])
	return dataplane.Frontend{
		Protocol: dataplane.Protocol(b[addrLen]), Addr: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[addrLen+4:])),
	}, true
}

// content is the content of the table in the kernel.
type content struct {
	// hooks contains the names of the flowtable's devices.
	hooks     map[string]struct{}
	devices   map[uint32]struct{}
	frontends map[dataplane.Frontend]struct{}
}

// read returns the devices and, if all is set, the frontends. It returns nil if the table does not
// exist, lacks a part, or was built with other settings.
func (t *table) read(conn *nftables.Conn, all bool) (*content, error) {
	c := &content{hooks: map[string]struct{}{}, devices: map[uint32]struct{}{}, frontends: map[dataplane.Frontend]struct{}{}}
	hooks, complete, err := t.readStructure(conn)
	if err != nil || !complete {
		return nil, err
	}
	for _, name := range hooks {
		c.hooks[name] = struct{}{}
	}
	sets := []*nftables.Set{t.devices}
	if all {
		sets = append(sets, t.frontends4, t.frontends6)
	}
	for _, s := range sets {
		elements, err := conn.GetSetElements(s)
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list set %s of table inet %s: %w", s.Name, TableName, err)
		}
		for _, e := range elements {
			if s == t.devices && len(e.Key) == 4 {
				c.devices[binary.NativeEndian.Uint32(e.Key)] = struct{}{}
			} else if f, ok := parseFrontend(e.Key); ok {
				c.frontends[f] = struct{}{}
			}
		}
	}
	return c, nil
}

// readStructure returns the names of the flowtable's devices, and whether flowtable and rules exist.
func (t *table) readStructure(conn *nftables.Conn) (hooks []string, complete bool, err error) {
	flowtables, err := conn.ListFlowtables(t.nf)
	if errors.Is(err, unix.ENOENT) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("list the flowtables of table inet %s: %w", TableName, err)
	}
	i := slices.IndexFunc(flowtables, func(f *nftables.Flowtable) bool { return f.Name == flowtableName })
	if i < 0 {
		return nil, false, nil
	}
	var rules []*nftables.Rule
	for _, chain := range []*nftables.Chain{t.forward, t.offload} {
		of, err := conn.GetRules(t.nf, chain)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, false, fmt.Errorf("list chain %s of table inet %s: %w", chain.Name, TableName, err)
		}
		rules = append(rules, of...)
	}
	const ruleCount = 5
	if len(rules) != ruleCount {
		return nil, false, nil
	}
	comment, _ := userdata.GetString(rules[0].UserData, userdata.TypeComment)
	return flowtables[i].Devices, comment == t.description(), nil
}

// Remove removes the table from the network namespace of a file descriptor, or of the calling thread
// if netns is 0. The offloaded connections continue on the normal path.
func Remove(netns int) error {
	conn, err := nftables.New(nftables.WithNetNSFd(netns))
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName }) {
		return nil
	}
	conn.DelTable(&nftables.Table{Name: TableName, Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove the flowtable: %w", err)
	}
	return nil
}
