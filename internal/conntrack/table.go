package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
)

// What include/uapi/linux/netfilter/nfnetlink_conntrack.h and, for the flags of
// filters, net/netfilter/nf_internals.h define and x/sys/unix lacks.
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

const (
	// receiveSize is the buffer that dumps are read with: the kernel fills up to
	// as much as its reader has shown to take, and at most 32 KiB
	// (net/netlink/af_netlink.c, netlink_dump).
	receiveSize = 32 << 10
	// deleteBatch is how many entries are deleted by one system call. The answers
	// wait in the socket's receive buffer, which has room for several times as
	// many.
	deleteBatch = 64
)

// entry is an entry as it was listed.
type entry struct {
	flow
	family dataplane.Family
	// tuple is the original direction, as the kernel wrote it, and id tells the
	// entry from a later one with the same tuple in other memory.
	tuple []byte
	id    []byte
}

// table is the kernel's connection-tracking table.
type table interface {
	// list calls visit with the entries in the default zone that q is for. It reports false if the kernel has listed others as well.
	list(ctx context.Context, q query, visit func(flow) bool) (entries []entry, narrowed bool, err error)
	// delete deletes entries and returns how many were still there. After an
	// error others may be there still.
	delete(ctx context.Context, entries []entry) (int, error)
	close() error
}

// kernel is the table of a network namespace.
type kernel struct{ conn *netlink.Conn }

var _ table = (*kernel)(nil)

// ErrUnavailable is wrapped by errors of a kernel that does not let its entries
// be listed and deleted.
var ErrUnavailable = errors.New("the kernel has no access to connection tracking by netlink (CONFIG_NF_CT_NETLINK, module nf_conntrack_netlink)")

var errInterrupted = errors.New("the kernel has changed the table during the dump")

func openKernel(netns int) (table, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns, MessageBufferSize: receiveSize})
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", explain(err))
	}
	return &kernel{conn}, nil
}

func (k *kernel) close() error { return k.conn.Close() }

// explain adds what the kernel means by an error.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		// nfnetlink answers EINVAL for a subsystem that it does not have.
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

// until makes calls fail when ctx ends, and returns what ends that.
func (k *kernel) until(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = k.conn.SetDeadline(time.Unix(1, 0)) })
}

func (k *kernel) list(ctx context.Context, q query, visit func(flow) bool) (entries []entry, narrowed bool, err error) {
	defer k.until(ctx)()
	entries, narrowed, err = k.dump(q, filter(q), visit)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		// Such filters are not for this kernel. If it has no connection tracking
		// at all, it says so once more.
		entries, narrowed, err = k.dump(q, nil, visit)
	}
	if err != nil {
		return entries, narrowed, fmt.Errorf("list entries of %s: %w", q.family, explain(err))
	}
	return entries, narrowed, nil
}

// dump lists the entries that pass the filter, or more where the kernel does not
// know the filter.
func (k *kernel) dump(q query, filter []byte, visit func(flow) bool) (entries []entry, narrowed bool, err error) {
	_, err = k.conn.Send(netlink.Message{
		Header: netlink.Header{Type: msgGet, Flags: netlink.Request | netlink.Dump},
		Data:   append(header(q.family), filter...),
	})
	if err != nil {
		return nil, true, err
	}
	narrowed = true
	interrupted := false
	for m, err := range k.conn.ReceiveIter() {
		if err != nil {
			return entries, narrowed, err
		}
		interrupted = interrupted || m.Header.Flags&netlink.DumpInterrupted != 0
		if len(m.Data) < 4 {
			continue
		}
		e, ok := parseEntry(m.Data[4:], q.family)
		narrowed = narrowed && q.covers(e.flow)
		if ok && visit(e.flow) {
			e.tuple, e.id = slices.Clone(e.tuple), slices.Clone(e.id)
			entries = append(entries, e)
		}
	}
	if interrupted {
		return entries, narrowed, errInterrupted
	}
	return entries, narrowed, nil
}

func (k *kernel) delete(ctx context.Context, entries []entry) (deleted int, err error) {
	defer k.until(ctx)()
	for batch := range slices.Chunk(entries, deleteBatch) {
		n, err := k.deleteBatch(batch)
		deleted += n
		if err != nil {
			return deleted, fmt.Errorf("delete entries: %w", explain(err))
		}
	}
	return deleted, nil
}

func (k *kernel) deleteBatch(entries []entry) (deleted int, err error) {
	messages := make([]netlink.Message, len(entries))
	for i, e := range entries {
		messages[i] = netlink.Message{
			Header: netlink.Header{Type: msgDelete, Flags: netlink.Request | netlink.Acknowledge},
			Data: slices.Concat(header(e.family),
				attribute(unix.NLA_F_NESTED|ctaTupleOrig, e.tuple), attribute(ctaID, e.id)),
		}
	}
	if _, err := k.conn.SendMessages(messages); err != nil {
		return 0, err
	}
	var failure error
	for range messages {
		switch _, err := k.conn.Receive(); {
		case err == nil:
			deleted++
		case errors.Is(err, unix.ENOENT): // It has gone by itself.
		case errors.Is(err, unix.EBUSY):
			// A flowtable holds on to it (IPS_OFFLOAD) until it has been idle.
			failure = err
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
			failure = err
		default:
			return deleted, err // The socket itself, so that no more answers come.
		}
	}
	return deleted, failure
}

// header is struct nfgenmsg.
func header(f dataplane.Family) []byte {
	family := byte(unix.AF_INET)
	if f == dataplane.IPv6 {
		family = unix.AF_INET6
	}
	return []byte{family, unix.NFNETLINK_V0, 0, 0}
}

// filter returns the attributes that narrow a dump (ctnetlink_alloc_filter).
func filter(q query) []byte {
	flags := uint32(filterProtoNum)
	proto := attribute(ctaProtoNum, []byte{byte(q.protocol)})
	if q.port != 0 {
		flags |= filterProtoDstPort
		proto = append(proto, attribute(ctaProtoDstPort, binary.BigEndian.AppendUint16(nil, q.port))...)
	}
	var tuple []byte
	if q.addr.IsValid() {
		flags |= filterIPDst
		tuple = nested(ctaTupleIP, attribute(ctaIPv4Dst, q.addr.AsSlice()))
	}
	tuple = append(tuple, nested(ctaTupleProto, proto)...)
	narrowing := append(nested(ctaTupleOrig, tuple),
		nested(ctaFilter, attribute(ctaFilterOrigFlags, binary.NativeEndian.AppendUint32(nil, flags)))...)
	if q.unreplied {
		narrowing = append(narrowing, attribute(ctaStatus, make([]byte, 4))...)
		narrowing = append(narrowing, attribute(ctaStatusMask, binary.BigEndian.AppendUint32(nil, statusSeenReply))...)
	}
	return narrowing
}

func nested(typ uint16, value []byte) []byte { return attribute(unix.NLA_F_NESTED|typ, value) }

// attribute writes a netlink attribute (man 7 netlink, "nlattr").
func attribute(typ uint16, value []byte) []byte {
	b := make([]byte, 0, unix.NLA_HDRLEN+len(value)+unix.NLA_ALIGNTO)
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.NLA_HDRLEN+len(value))) //nolint:gosec // a tuple has less than 100 bytes
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, value...)
	for len(b)%unix.NLA_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

// attributes yields the attributes in b, until one is broken.
func attributes(b []byte) func(yield func(typ uint16, value []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.NLA_HDRLEN {
			length := int(binary.NativeEndian.Uint16(b))
			if length < unix.NLA_HDRLEN || length > len(b) {
				return
			}
			typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if !yield(typ, b[unix.NLA_HDRLEN:length]) {
				return
			}
			b = b[min((length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
		}
	}
}

// parseEntry reads an entry, whose lists belong to b. It reports false for what
// is not in the default zone (other zones are those of virtual
// switches, which see packets before or after their translation here), or can't
// be read.
func parseEntry(b []byte, family dataplane.Family) (entry, bool) {
	e := entry{family: family}
	zone := false
	for typ, value := range attributes(b) {
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
	zone                bool // not the default one
}

func parseTuple(b []byte) tuple {
	var t tuple
	var source, destination netip.Addr
	var sourcePort, destinationPort uint16
	for typ, value := range attributes(b) {
		switch typ {
		case ctaTupleIP:
			for typ, value := range attributes(value) {
				switch typ {
				case ctaIPv4Src, ctaIPv6Src:
					source, _ = netip.AddrFromSlice(value)
				case ctaIPv4Dst, ctaIPv6Dst:
					destination, _ = netip.AddrFromSlice(value)
				}
			}
		case ctaTupleProto:
			for typ, value := range attributes(value) {
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
