package conntrack

import (
	"context"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"
)

// Constants of include/uapi/linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_tcp.h.
const (
	ctaProtoInfo         = 4
	ctaProtoInfoTCP      = 1
	ctaProtoInfoTCPState = 1

	tcpStateEstablished = 3 // TCP_CONNTRACK_ESTABLISHED
)

// Translated counts flows with a translated destination and a reply: established TCP connections,
// and flows of other protocols that have not timed out.
type Translated struct{ TCP, Other int }

// CountTranslated counts the flows of a family in the network namespace of the calling thread. The
// result is approximate while the table changes.
func CountTranslated(ctx context.Context, family dataplane.Family) (count Translated, err error) {
	conn, err := nlconn.Dial(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return count, explain(err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	request := netlink.Message{Header: netlink.Header{Type: msgGet}, Data: nfHeader(family)}
	_, err = conn.Dump(ctx, request, func(data []byte) error {
		if len(data) < nfHeaderLen {
			return nil
		}
		e, ok := parseEntry(data[nfHeaderLen:], family)
		switch {
		case !ok || !e.replied || e.endpoint == e.destination:
		case e.protocol != dataplane.TCP:
			count.Other++
		case tcpState(data[nfHeaderLen:]) == tcpStateEstablished:
			count.TCP++
		}
		return nil
	})
	if err != nil {
		return count, fmt.Errorf("count %s connections: %w", family, explain(err))
	}
	return count, nil
}

// tcpState returns the state of a TCP entry, or 0.
func tcpState(attributes []byte) byte {
	for _, typ := range []uint16{ctaProtoInfo, ctaProtoInfoTCP, ctaProtoInfoTCPState} {
		attributes, _ = nlconn.Attribute(attributes, typ)
	}
	if len(attributes) != 1 {
		return 0
	}
	return attributes[0]
}
