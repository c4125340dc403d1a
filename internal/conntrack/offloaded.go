package conntrack

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
)

// statusOffload is IPS_OFFLOAD (linux/netfilter/nf_conntrack_common.h). The kernel clears it when a
// connection leaves the flowtable (nf_flow_table_core.c).
const statusOffload = 1 << 14

// CountOffloaded counts the translated connections of both families that are in a flowtable. netns is a
// file descriptor of the network namespace, or 0 for the namespace of the calling thread.
//
// The kernel walks the whole table, but sends only these connections. Kernels that cannot filter by status
// send all of them.
func CountOffloaded(ctx context.Context, netns int) (count int, err error) {
	conn, err := nlconn.Dial(unix.NETLINK_NETFILTER, netns)
	if err != nil {
		return 0, explain(err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	const want = statusOffload | statusTranslated
	filter := binary.BigEndian.AppendUint32(nil, want)
	request := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}
	request = nlconn.AppendBytes(request, ctaStatus, filter)
	request = nlconn.AppendBytes(request, ctaStatusMask, filter)
	_, err = conn.Dump(ctx, netlink.Message{Header: netlink.Header{Type: msgGet}, Data: request}, func(data []byte) error {
		status, ok := nlconn.Attribute(data[min(len(data), nfHeaderLen):], ctaStatus)
		if ok && len(status) == 4 && binary.BigEndian.Uint32(status)&want == want {
			count++
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("count the connections in flowtables: %w", explain(err))
	}
	return count, nil
}
