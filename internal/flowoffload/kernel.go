package flowoffload

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/kmod"
)

// encodeIndex encodes the index of a device as an element of the set of devices.
func encodeIndex(index uint32) []byte { return binary.NativeEndian.AppendUint32(nil, index) }

// ErrUnsupported is wrapped by errors of a kernel without flowtables.
var ErrUnsupported = errors.New("the kernel does not support flowtables (CONFIG_NFT_FLOW_OFFLOAD, modules nft_flow_offload and nf_flow_table_inet)")

// modules returns the kernel modules of flowtables. The kernel loads them on demand on hosts with
// modprobe, also for a process in a container.
func modules() []string { return []string{"nf_flow_table_inet", "nft_flow_offload"} }

// lacksFlowtables reports whether an error from the creation of the table means that the kernel has no
// flowtables.
func lacksFlowtables(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)
}

// create calls [table.build]. If the kernel lacks flowtables, it loads their modules and tries again.
func (t *table) create(conn *nftables.Conn, load func(...string) error) error {
	err := t.build(conn)
	if lacksFlowtables(err) {
		if loadErr := load(modules()...); loadErr != nil {
			return fmt.Errorf("%w: %w", ErrUnsupported, loadErr)
		}
		err = t.build(conn)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	case lacksFlowtables(err):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}

// Check creates the table without devices in a network namespace, or in the namespace of the calling
// thread if netns is 0, and removes it. The namespace must not be one that a Dataplane programs. Check
// loads the kernel's modules of flowtables if necessary, which needs CAP_SYS_MODULE. The error wraps
// [ErrUnsupported] if the kernel has no flowtables.
func Check(netns int) error {
	conn, err := nftables.New(nftables.WithNetNSFd(netns))
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	if err := newTable(DefaultThreshold, false, true).create(conn, kmod.Load); err != nil {
		return fmt.Errorf("create a flowtable: %w", err)
	}
	return Remove(netns)
}

// OffloadsUDP reports whether a Dataplane offloads UDP flows on this kernel. It always offloads TCP.
func OffloadsUDP() (bool, error) { return deletesOffloadedFlows() }

// deletesOffloadedFlows reports whether the kernel deletes the conntrack entry of an offloaded flow on
// request, which Linux 6.4 and newer do (nf_conntrack_netlink.c, ctnetlink_del_conntrack).
func deletesOffloadedFlows() (bool, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return false, fmt.Errorf("read the kernel's release: %w", err)
	}
	return releaseDeletesOffloadedFlows(unix.ByteSliceToString(name.Release[:])), nil
}

func releaseDeletesOffloadedFlows(release string) bool {
	var major, minor int
	if n, err := fmt.Sscanf(release, "%d.%d", &major, &minor); n < 2 || err != nil {
		return false
	}
	return major > 6 || major == 6 && minor >= 4
}
