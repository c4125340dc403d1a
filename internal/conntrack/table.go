package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"
)

// Constants of include/uapi/linux/netfilter/nfnetlink_conntrack.h and, for filter flags,
// net/netfilter/nf_internals.h. x/sys/unix lacks them.
const (
	msgGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1 // IPCTNL_MSG_CT_GET
	msgDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaID         = 12
	ctaZone       = 18
	ctaFilter     = 25
	ctaStatusMask = 26

	statusSeenReply = 1 << 1 // IPS_SEEN_REPLY

	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaTupleZone  = 3

	ctaIPv4Src = 1
	ctaIPv4Dst = 2
	ctaIPv6Src = 3
	ctaIPv6Dst = 4

	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaFilterOrigFlags = 1
	filterIPDst        = 1 << 1
	filterProtoNum     = 1 << 3
	filterProtoDstPort = 1 << 5
)

// entry is a dumped entry.
type entry struct {
	flow
	family dataplane.Family
	// tuple is the kernel's encoding of the original direction. id distinguishes the entry
	// from a later one with the same tuple.
	tuple []byte
	id    []byte
}

// table is the kernel's connection-tracking table.
type table interface {
	// dump calls visit with the entries in the default zone that q selects, and returns those
	// for which visit returns true. narrowed is false if the kernel has ignored the filter.
	dump(ctx context.Context, q query, visit func(flow) bool) (entries []entry, narrowed bool, err error)
	// delete deletes entries and returns how many still existed. After an error, some entries
	// may remain.
	delete(ctx context.Context, entries []entry) (int, error)
	// listen starts to receive the flows of new entries. They do not depend on close.
	listen() (flowEvents, error)
	close() error
}

// netlinkTable is the table of a network namespace.
type netlinkTable struct {
	conn  *nlconn.Conn
	netns int
}

var _ table = (*netlinkTable)(nil)

// ErrUnavailable is wrapped by errors of a kernel that cannot dump and delete entries.
var ErrUnavailable = errors.New("the kernel does not support connection tracking over netlink (CONFIG_NF_CT_NETLINK, module nf_conntrack_netlink)")

var errInterrupted = errors.New("the table changed during the dump")

func openNetlinkTable(netns int) (table, error) {
	conn, err := nlconn.Dial(unix.NETLINK_NETFILTER, netns)
	if err != nil {
		return nil, explain(err)
	}
	return &netlinkTable{conn: conn, netns: netns}, nil
}

func (t *netlinkTable) close() error { return t.conn.Close() }

// explain adds the meaning of a kernel error.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		// nfnetlink answers EINVAL for an unknown subsystem.
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func (t *netlinkTable) dump(ctx context.Context, q query, visit func(flow) bool) (entries []entry, narrowed bool, err error) {
	narrowing, err := encodeFilter(q)
	if err != nil {
		return nil, false, err
	}
	entries, narrowed, err = t.dumpFiltered(ctx, q, narrowing, visit)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		// The kernel does not support the filter. If it has no connection tracking at all, the
		// second dump fails too.
		entries, narrowed, err = t.dumpFiltered(ctx, q, nil, visit)
	}
	if err != nil {
		return entries, narrowed, fmt.Errorf("dump %s connection-tracking entries: %w", q.family, explain(err))
	}
	return entries, narrowed, nil
}

// dumpFiltered dumps the entries that match the filter, or more if the kernel ignores the
// filter.
func (t *netlinkTable) dumpFiltered(ctx context.Context, q query, filter []byte, visit func(flow) bool) (entries []entry, narrowed bool, err error) {
	request := netlink.Message{Header: netlink.Header{Type: msgGet}, Data: append(nfHeader(q.family), filter...)}
	narrowed = true
	interrupted, err := t.conn.Dump(ctx, request, func(data []byte) error {
		if len(data) < 4 {
			return nil
		}
		e, ok := parseEntry(data[4:], q.family)
		narrowed = narrowed && q.matches(e.flow)
		if ok && visit(e.flow) {
			// The data are valid only during the visit.
			e.tuple, e.id = slices.Clone(e.tuple), slices.Clone(e.id)
			entries = append(entries, e)
		}
		return nil
	})
	if err == nil && interrupted {
		err = errInterrupted
	}
	return entries, narrowed, err
}

func (t *netlinkTable) delete(ctx context.Context, entries []entry) (deleted int, err error) {
	for batch := range slices.Chunk(entries, nlconn.BatchSize) {
		n, err := t.deleteBatch(ctx, batch)
		deleted += n
		if err != nil {
			return deleted, fmt.Errorf("delete connection-tracking entries: %w", explain(err))
		}
	}
	return deleted, nil
}

func (t *netlinkTable) deleteBatch(ctx context.Context, entries []entry) (deleted int, err error) {
	requests := make([]netlink.Message, len(entries))
	for i, e := range entries {
		data, err := nlconn.Encode(nfHeader(e.family), func(enc *netlink.AttributeEncoder) {
			enc.Bytes(netlink.Nested|ctaTupleOrig, e.tuple)
			enc.Bytes(ctaID, e.id)
		})
		if err != nil {
			return 0, err
		}
		requests[i] = netlink.Message{Header: netlink.Header{Type: msgDelete}, Data: data}
	}
	answers, err := t.conn.Batch(ctx, requests)
	if err != nil {
		return 0, err
	}
	var failure error
	for _, answer := range answers {
		switch {
		case answer == nil:
			deleted++
		case errors.Is(answer, unix.ENOENT): // expired meanwhile
		default: // EBUSY: the entry is offloaded to a flowtable (IPS_OFFLOAD) until it has been idle
			failure = answer
		}
	}
	return deleted, failure
}

// nfHeaderLen is the size of a struct nfgenmsg.
const nfHeaderLen = 4

// nfHeader returns a struct nfgenmsg.
func nfHeader(f dataplane.Family) []byte {
	family := byte(unix.AF_INET)
	if f == dataplane.IPv6 {
		family = unix.AF_INET6
	}
	return []byte{family, unix.NFNETLINK_V0, 0, 0}
}

// encodeFilter encodes the filter attributes of a dump (ctnetlink_alloc_filter).
func encodeFilter(q query) ([]byte, error) {
	flags := uint32(filterProtoNum)
	if q.port != 0 {
		flags |= filterProtoDstPort
	}
	if q.addr.IsValid() {
		flags |= filterIPDst
	}
	return nlconn.Encode(nil, func(e *netlink.AttributeEncoder) {
		e.Nested(ctaTupleOrig, func(e *netlink.AttributeEncoder) error {
			if q.addr.IsValid() {
				e.Nested(ctaTupleIP, func(e *netlink.AttributeEncoder) error {
					e.Bytes(ctaIPv4Dst, q.addr.AsSlice())
					return nil
				})
			}
			e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
				e.Uint8(ctaProtoNum, byte(q.protocol))
				if q.port != 0 {
					e.Bytes(ctaProtoDstPort, binary.BigEndian.AppendUint16(nil, q.port))
				}
				return nil
			})
			return nil
		})
		e.Nested(ctaFilter, func(e *netlink.AttributeEncoder) error {
			e.Uint32(ctaFilterOrigFlags, flags)
			return nil
		})
		if q.unreplied {
			e.Bytes(ctaStatus, make([]byte, 4))
			e.Bytes(ctaStatusMask, binary.BigEndian.AppendUint32(nil, statusSeenReply))
		}
	})
}

// parseEntry decodes an entry, whose slices share memory with b. It reports false for an
// invalid entry or one outside the default zone. Other zones belong to virtual switches, which
// see packets before or after their translation by Services.
func parseEntry(b []byte, family dataplane.Family) (entry, bool) {
	e := entry{family: family}
	zone := false
	for typ, value := range nlconn.Attributes(b) {
		switch typ {
		case ctaTupleOrig:
			t := parseTuple(value)
			e.protocol, zone = dataplane.Protocol(t.protocol), zone || t.zone
			e.tuple, e.destination = value, t.destination
		case ctaTupleReply:
			t := parseTuple(value)
			zone = zone || t.zone
			e.endpoint = t.source
		case ctaStatus:
			e.replied = len(value) == 4 && binary.BigEndian.Uint32(value)&statusSeenReply != 0
		case ctaID:
			e.id = value
		case ctaZone:
			zone = true
		}
	}
	return e, !zone && len(e.id) == 4 && e.destination.IsValid() && e.endpoint.IsValid()
}

// tuple is one direction of an entry.
type tuple struct {
	source, destination netip.AddrPort
	protocol            byte
	zone                bool // not the default zone
}

func parseTuple(b []byte) tuple {
	var t tuple
	var source, destination netip.Addr
	var sourcePort, destinationPort uint16
	for typ, value := range nlconn.Attributes(b) {
		switch typ {
		case ctaTupleIP:
			for typ, value := range nlconn.Attributes(value) {
				switch typ {
				case ctaIPv4Src, ctaIPv6Src:
					source, _ = netip.AddrFromSlice(value)
				case ctaIPv4Dst, ctaIPv6Dst:
					destination, _ = netip.AddrFromSlice(value)
				}
			}
		case ctaTupleProto:
			for typ, value := range nlconn.Attributes(value) {
				switch {
				case typ == ctaProtoNum && len(value) == 1:
					t.protocol = value[0]
				case typ == ctaProtoSrcPort && len(value) == 2:
					sourcePort = binary.BigEndian.Uint16(value)
				case typ == ctaProtoDstPort && len(value) == 2:
					destinationPort = binary.BigEndian.Uint16(value)
				}
			}
		case ctaTupleZone:
			t.zone = true
		}
	}
	t.source = netip.AddrPortFrom(source, sourcePort)
	t.destination = netip.AddrPortFrom(destination, destinationPort)
	return t
}
