package conntrack

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"
)

// Constants of include/uapi/linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_tcp.h.
const (
	msgGetStats           = unix.NFNL_SUBSYS_CTNETLINK<<8 | 5 // IPCTNL_MSG_CT_GET_STATS
	ctaStatsGlobalEntries = 1

	tcpStateTimeWait = 7 // TCP_CONNTRACK_TIME_WAIT
	tcpStateClose    = 8 // TCP_CONNTRACK_CLOSE
)

// Connection is a translated connection or flow that has not ended.
type Connection struct {
	Protocol dataplane.Protocol
	// Destination is the address that the client has connected to, Endpoint the address that
	// answers.
	Destination, Endpoint netip.AddrPort
}

// Count returns the number of connection-tracking entries of a network namespace. It takes the
// same short time for any number of entries. netns is a file descriptor, or 0 for the namespace
// of the calling thread.
func Count(ctx context.Context, netns int) (int, error) {
	conn, err := nlconn.Dial(unix.NETLINK_NETFILTER, netns)
	if err != nil {
		return 0, explain(err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	// The kernel marks the answer as a part of several messages, but sends no end
	// (nf_conntrack_netlink.c, ctnetlink_stat_ct_fill_info). The acknowledgement is the end.
	request := netlink.Message{Header: netlink.Header{Type: msgGetStats, Flags: netlink.Acknowledge}, Data: nfHeader(dataplane.IPv4)}
	entries := 0
	_, err = conn.Dump(ctx, request, func(data []byte) error {
		if value, ok := nlconn.Attribute(data[min(len(data), nfHeaderLen):], ctaStatsGlobalEntries); ok && len(value) == 4 {
			entries = int(binary.BigEndian.Uint32(value))
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("count the connection-tracking entries: %w", explain(err))
	}
	return entries, nil
}

// VisitConnections calls visit for each translated connection of both families in a network
// namespace. TCP connections that both sides have closed are left out. The kernel walks the
// whole table, which takes about 2.5 µs per entry. The result is approximate while the table
// changes.
func VisitConnections(ctx context.Context, netns int, visit func(Connection)) error {
	conn, err := nlconn.Dial(unix.NETLINK_NETFILTER, netns)
	if err != nil {
		return explain(err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		_, err := conn.Dump(ctx, netlink.Message{Header: netlink.Header{Type: msgGet}, Data: nfHeader(family)}, func(data []byte) error {
			if len(data) < nfHeaderLen {
				return nil
			}
			e, ok := parseEntry(data[nfHeaderLen:], family)
			if !ok || e.endpoint == e.destination {
				return nil
			}
			if s := tcpState(data[nfHeaderLen:]); e.protocol == dataplane.TCP && (s == tcpStateTimeWait || s == tcpStateClose) {
				return nil
			}
			visit(Connection{e.protocol, e.destination, e.endpoint})
			return nil
		})
		if err != nil {
			return fmt.Errorf("list %s connections: %w", family, explain(err))
		}
	}
	return nil
}
