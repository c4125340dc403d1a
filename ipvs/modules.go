package ipvs

import (
	"errors"
	"fmt"

	"fairlead.io/fairlead/internal/kmod"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNotSupported is wrapped by errors of [Open] on a kernel that lacks IPVS or dummy
// interfaces and cannot load their modules. The error names the missing feature and the fix.
var ErrNotSupported = errors.New("the kernel does not support mode ipvs")

// openIPVS connects to IPVS and loads its module if necessary.
func openIPVS(netns int) (*ipvsConn, error) {
	c, err := dialIPVS(netns)
	if !errors.Is(err, unix.ENOENT) {
		return c, err
	}
	if loadErr := kmod.Load("ip_vs"); loadErr != nil {
		return nil, fmt.Errorf("%w: IPVS is missing (CONFIG_IP_VS, module ip_vs): %w", ErrNotSupported, loadErr)
	}
	return dialIPVS(netns)
}

// ensureDummyLink checks that the kernel supports dummy interfaces, and loads their module if
// necessary. It creates the interface LinkName if that does not exist.
func ensureDummyLink(h *host) error {
	if _, err := h.handle.LinkByName(LinkName); err == nil {
		return nil
	}
	try := func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = LinkName
		return h.handle.LinkAdd(&netlink.Dummy{LinkAttrs: attrs})
	}
	err := try()
	if errors.Is(err, unix.EOPNOTSUPP) {
		if loadErr := kmod.Load("dummy numdummies=0"); loadErr != nil {
			return fmt.Errorf("%w: dummy interfaces are missing (CONFIG_DUMMY, module dummy): %w", ErrNotSupported, loadErr)
		}
		err = try()
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("create dummy interface %s: %w", LinkName, explain(err))
	}
	return nil
}

func explain(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	}
	return err
}
