package flowoffload

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
)

// maxHooks is the maximum number of devices in one request. The kernel's limit is 255, and its
// notification of the request must fit into one page (nf_tables_api.c, NFT_NETDEVICE_MAX,
// nf_tables_flowtable_notify).
const maxHooks = 100

// hooks adds devices to the flowtable and removes them. github.com/google/nftables cannot remove single
// devices. It also omits the null byte behind a device's name, without which Linux 6.16 takes the name
// for a prefix (nf_tables_api.c, nft_netdev_hook_alloc).
type hooks struct{ conn *netlink.Conn }

func openHooks(netns int) (hooks, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return hooks{}, fmt.Errorf("open netlink socket for the devices of the flowtable: %w", err)
	}
	return hooks{conn}, nil
}

// add adds devices. It has no effect on devices that the flowtable already has (Linux 5.8,
// nft_flowtable_update). If one fails, none is added.
func (h hooks) add(names ...string) error { return h.request(unix.NFT_MSG_NEWFLOWTABLE, names) }

// remove removes devices. If one is missing, none is removed and the error wraps ENOENT.
func (h hooks) remove(names ...string) error { return h.request(unix.NFT_MSG_DELFLOWTABLE, names) }

func (h hooks) request(typ uint16, names []string) error {
	edge := func(typ netlink.HeaderType) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: typ, Flags: netlink.Request},
			Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	_, err := h.conn.SendMessages([]netlink.Message{
		edge(unix.NFNL_MSG_BATCH_BEGIN),
		{
			Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ), Flags: netlink.Request | netlink.Acknowledge},
			Data:   flowtableRequest(names),
		},
		edge(unix.NFNL_MSG_BATCH_END),
	})
	if err != nil {
		return fmt.Errorf("send the devices of the flowtable: %w", err)
	}
	_, err = h.conn.Receive()
	return err
}

// flowtableRequest encodes a request about devices of the flowtable.
func flowtableRequest(names []string) []byte {
	b := []byte{byte(nftables.TableFamilyINet), unix.NFNETLINK_V0, 0, 0}
	b = nlconn.AppendString(b, nftables.NFTA_FLOWTABLE_TABLE, TableName)
	b = nlconn.AppendString(b, nftables.NFTA_FLOWTABLE_NAME, flowtableName)
	return nlconn.AppendNested(b, nftables.NFTA_FLOWTABLE_HOOK, func(b []byte) []byte {
		// Kernels before 5.12 require hook and priority.
		b = nlconn.AppendBytes(b, nftables.NFTA_FLOWTABLE_HOOK_NUM, []byte{0, 0, 0, unix.NF_NETDEV_INGRESS})
		b = nlconn.AppendBytes(b, nftables.NFTA_FLOWTABLE_PRIORITY, []byte{0, 0, 0, ingressPriority})
		return nlconn.AppendNested(b, nftables.NFTA_FLOWTABLE_DEVS, func(b []byte) []byte {
			for _, name := range names {
				b = nlconn.AppendString(b, nftables.NFTA_DEVICE_NAME, name)
			}
			return b
		})
	})
}

// isMissing reports whether an error says that a device, or the flowtable, does not exist.
func isMissing(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) }

func (h hooks) close() error { return h.conn.Close() }
