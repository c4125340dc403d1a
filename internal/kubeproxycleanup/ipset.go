package kubeproxycleanup

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nlconn"
)

// Constants of include/uapi/linux/netfilter/ipset/ip_set.h.
const (
	ipsetProtocol = 6
	ipsetDestroy  = 3 // IPSET_CMD_DESTROY
	ipsetList     = 7 // IPSET_CMD_LIST

	ipsetAttrProtocol = 1
	ipsetAttrSetName  = 2
	ipsetAttrPort     = 4 // in data
	ipsetAttrData     = 7
	ipsetAttrADT      = 8
)

// ipsetMessage returns a request about a set.
func ipsetMessage(command netlink.HeaderType, set string) netlink.Message {
	data := nlconn.AppendBytes([]byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}, ipsetAttrProtocol, []byte{ipsetProtocol})
	return netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_IPSET<<8 | command}, Data: nlconn.AppendString(data, ipsetAttrSetName, set),
	}
}

// dialIPSets connects to ip_set. It returns nil if the kernel has not loaded ip_set, because a
// request would load it.
func dialIPSets() (*nlconn.Conn, error) {
	if _, err := os.Stat("/sys/module/ip_set"); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return nlconn.Dial(unix.NETLINK_NETFILTER, 0)
}

// removeIPSets destroys kube-proxy's sets, which no rule may use any more.
func removeIPSets(ctx context.Context, report func(string)) error {
	conn, err := dialIPSets()
	if conn == nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // the kernel has answered
	names := ipSets()
	requests := make([]netlink.Message, len(names))
	for i, name := range names {
		requests[i] = ipsetMessage(ipsetDestroy, name)
		requests[i].Header.Flags = netlink.Excl // an error if the set does not exist
	}
	answers, err := conn.Batch(ctx, requests)
	if err != nil {
		return fmt.Errorf("destroy ipsets: %w", err)
	}
	var errs []error
	for i, answer := range answers {
		switch {
		case answer == nil:
			report("ipset " + names[i])
		case errors.Is(answer, unix.ENOENT), errors.Is(answer, unix.EINVAL): // EINVAL: the kernel has no ip_set
		default:
			errs = append(errs, fmt.Errorf("ipset %s remains: %w; if no rule uses it, run: ipset destroy %[1]s", names[i], answer))
		}
	}
	return errors.Join(errs...)
}

// addNodePorts adds the ports in a set of node ports, if the set exists.
func addNodePorts(ctx context.Context, set string, ports map[uint16]bool) error {
	conn, err := dialIPSets()
	if conn == nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	_, err = conn.Dump(ctx, ipsetMessage(ipsetList, set), func(data []byte) error {
		const header = 4 // struct nfgenmsg
		entries, _ := nlconn.Attribute(data[min(header, len(data)):], ipsetAttrADT)
		for typ, entry := range nlconn.Attributes(entries) {
			if typ == ipsetAttrData {
				port, _ := nlconn.Attribute(entry, ipsetAttrPort)
				ports[nlconn.Uint16(port, binary.BigEndian)] = true
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("list ipset %s: %w", set, err)
	}
	return nil
}
