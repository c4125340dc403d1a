package flowoffload

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// encodeIndex encodes the index of a device as an element of the set of devices.
func encodeIndex(index uint32) []byte { return binary.NativeEndian.AppendUint32(nil, index) }

// ErrUnsupported is wrapped by errors of a kernel without flowtables.
var ErrUnsupported = errors.New("the kernel does not support flowtables (CONFIG_NFT_FLOW_OFFLOAD, modules nft_flow_offload and nf_flow_table_inet)")

// explain adds the meaning of a kernel error from the creation of the table.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}

// Check creates the table without devices in a network namespace, or in the namespace of the calling
// thread if netns is 0, and removes it. The namespace must not be one that a Dataplane programs. The
// error wraps [ErrUnsupported] if the kernel has no flowtables.
func Check(netns int) error {
	conn, err := nftables.New(nftables.WithNetNSFd(netns))
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	if err := newTable(DefaultThreshold, false, true).build(conn); err != nil {
		return fmt.Errorf("create a flowtable: %w", explain(err))
	}
	return Remove(netns)
}

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
