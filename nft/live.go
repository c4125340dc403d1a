package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// FollowOptions select the connections that [Follow] follows.
type FollowOptions struct {
	// NetNS is a file descriptor of the network namespace, 0 for the namespace of the calling
	// thread.
	NetNS int
	// Source is the client's address. Destination and Protocol are those of the first packet.
	Source      netip.Addr
	Destination netip.AddrPort
	Protocol    dataplane.Protocol
	// Started, if not nil, is called when packets are followed.
	Started func()
}

// TraceEvent reports that a packet has passed a rule, or the end of a base chain.
type TraceEvent struct {
	// Packet identifies the packet.
	Packet uint32 `json:"packet"`
	// Table is the table's name in nft syntax, without the family. Rule counts from 1; it is 0
	// at the end of a chain.
	Table   string `json:"table"`
	Chain   string `json:"chain"`
	Rule    int    `json:"rule,omitempty"`
	Comment string `json:"comment,omitempty"`
	// Verdict is the verdict in nft syntax: "goto class-3".
	Verdict string `json:"verdict"`
	// Source and Destination are the addresses in the packet at this point. The kernel reports
	// them once in each hook; they are zero in all other events.
	Source      netip.AddrPort `json:"source,omitzero"`
	Destination netip.AddrPort `json:"destination,omitzero"`
}

// followTable is the name of the table that marks the packets to follow.
const followTable = "fairlead-trace"

// Follow calls handle with each step of new connections through the rules of all tables, until ctx
// is done or handle returns false. It adds a table with a rule that marks the packets. The table
// belongs to the socket, so the kernel deletes it when the process ends for any reason. Follow
// requires CAP_NET_ADMIN.
func Follow(ctx context.Context, o FollowOptions, handle func(TraceEvent) bool) (err error) {
	events, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: o.NetNS, Groups: 1 << (unix.NFNLGRP_NFTRACE - 1)})
	if err != nil {
		return fmt.Errorf("subscribe to traced packets: %w", explainError(err))
	}
	defer func() { err = errors.Join(err, events.Close()) }()
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(o.NetNS))
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", explainError(err))
	}
	defer func() { err = errors.Join(err, conn.CloseLasting()) }() // deletes the table
	if err := markPackets(conn, o); err != nil {
		return err
	}
	if o.Started != nil {
		o.Started()
	}
	stop := context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Now()) })
	defer stop()
	rules := traceRules{conn: conn, known: map[string][]*nftables.Rule{}}
	for {
		messages, err := events.Receive()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive traced packets: %w", err)
		}
		for _, m := range messages {
			if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_TRACE || len(m.Data) < 4 {
				continue
			}
			e := rules.event(nftables.TableFamily(m.Data[0]), m.Data[4:])
			if e.Table != followTable && !handle(e) {
				return nil
			}
		}
	}
}

// markPackets adds the table that marks the packets. Its chains run behind connection tracking and
// before address translation.
//
//	table ip fairlead-trace {
//		chain prerouting {
//			type filter hook prerouting priority mangle; policy accept;
//			ct state new ip saddr 10.244.1.5 ip daddr 10.96.0.10 meta l4proto 6 th dport 80 meta nftrace set 1
func markPackets(conn *nftables.Conn, o FollowOptions) error {
	t := newTable(dataplane.FamilyOf(o.Destination.Addr()))
	t.nf.Name, t.nf.Flags = followTable, nftables.TableFlagOwner
	conn.AddTable(t.nf)
	equal := func(load expr.Any, data []byte) []expr.Any {
		return []expr.Any{load, &expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: data}}
	}
	accept := nftables.ChainPolicyAccept
	for name, hook := range map[string]*nftables.ChainHook{"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput} {
		chain := conn.AddChain(&nftables.Chain{
			Name: name, Table: t.nf, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityMangle, Policy: &accept,
		})
		exprs := matchCtStateNew()
		exprs = append(exprs, equal(t.saddr(0), o.Source.AsSlice())...)
		exprs = append(exprs, equal(t.daddr(0), o.Destination.Addr().AsSlice())...)
		exprs = append(exprs, equal(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)}, []byte{byte(o.Protocol)})...)
		exprs = append(exprs, equal(dport(0), binary.BigEndian.AppendUint16(nil, o.Destination.Port()))...)
		exprs = append(exprs,
			&expr.Immediate{Register: reg(0), Data: []byte{1}},
			&expr.Meta{Key: expr.MetaKeyNFTRACE, SourceRegister: true, Register: reg(0)})
		conn.AddRule(&nftables.Rule{Table: t.nf, Chain: chain, Exprs: exprs})
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("add the table %s, which marks packets: %w", followTable, explainError(err))
	}
	return nil
}

// traceRules finds the rules of events.
type traceRules struct {
	conn  *nftables.Conn
	known map[string][]*nftables.Rule // by family, table and chain
}

// find returns the number and the comment of a rule, or 0.
func (r traceRules) find(family nftables.TableFamily, table, chain string, handle uint64) (int, string) {
	key := fmt.Sprintf("%d %s %s", family, table, chain)
	rules, ok := r.known[key]
	if !ok {
		t := &nftables.Table{Name: table, Family: family}
		rules, _ = r.conn.GetRules(t, &nftables.Chain{Name: chain, Table: t}) // the chain may be gone
		r.known[key] = rules
	}
	for i, rule := range rules {
		if rule.Handle == handle {
			comment, _ := userdata.GetString(rule.UserData, userdata.TypeComment)
			return i + 1, comment
		}
	}
	return 0, ""
}

// Attributes of a trace message (linux/netfilter/nf_tables.h, nft_trace_attributes).
const (
	traceTable           = 1
	traceChain           = 2
	traceRuleHandle      = 3
	traceVerdict         = 5
	traceID              = 6
	traceNetworkHeader   = 8
	traceTransportHeader = 9
	tracePolicy          = 16
)

// event decodes the attributes of a trace message.
func (r traceRules) event(family nftables.TableFamily, attrs []byte) TraceEvent {
	var e TraceEvent
	text := func(typ uint16) string {
		v, _ := nlconn.Attribute(attrs, typ)
		return strings.TrimRight(string(v), "\x00")
	}
	e.Table, e.Chain = text(traceTable), text(traceChain)
	if v, ok := nlconn.Attribute(attrs, traceID); ok && len(v) == 4 {
		e.Packet = binary.BigEndian.Uint32(v)
	}
	if v, ok := nlconn.Attribute(attrs, traceRuleHandle); ok && len(v) == 8 {
		e.Rule, e.Comment = r.find(family, e.Table, e.Chain, binary.BigEndian.Uint64(v))
	}
	if v, ok := nlconn.Attribute(attrs, traceVerdict); ok {
		e.Verdict = verdictText(v)
	}
	if v, ok := nlconn.Attribute(attrs, tracePolicy); ok && len(v) == 4 {
		e.Verdict = "policy " + verdictName(int32(binary.BigEndian.Uint32(v))) //nolint:gosec // a code
	}
	network, _ := nlconn.Attribute(attrs, traceNetworkHeader)
	transport, _ := nlconn.Attribute(attrs, traceTransportHeader)
	e.Source, e.Destination = parseHeaders(network, transport)
	return e
}

func verdictText(attrs []byte) string {
	v, err := parseVerdict(attrs)
	if err != nil {
		return "unknown"
	}
	if v.Chain != "" {
		return verdictName(int32(v.Kind)) + " " + v.Chain //nolint:gosec // a code
	}
	return verdictName(int32(v.Kind)) //nolint:gosec // a code
}

func verdictName(code int32) string {
	switch code {
	case unix.NFT_CONTINUE:
		return "continue"
	case unix.NFT_RETURN:
		return "return"
	case unix.NFT_JUMP:
		return "jump"
	case unix.NFT_GOTO:
		return "goto"
	case 0:
		return "drop"
	case 1:
		return "accept"
	case 2:
		return "stolen"
	default:
		return fmt.Sprintf("verdict %d", code)
	}
}

// parseHeaders returns the addresses and ports in the headers of a packet.
func parseHeaders(network, transport []byte) (source, destination netip.AddrPort) {
	if len(network) < 20 || len(transport) < 4 {
		return source, destination
	}
	from, to := network[12:16], network[16:20]
	if network[0]>>4 == 6 {
		if len(network) < 40 {
			return source, destination
		}
		from, to = network[8:24], network[24:40]
	}
	a, _ := netip.AddrFromSlice(from)
	b, _ := netip.AddrFromSlice(to)
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(transport)), netip.AddrPortFrom(b, binary.BigEndian.Uint16(transport[2:]))
}
