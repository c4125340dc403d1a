package ipvs

import (
	"errors"
	"fmt"

	"fairlead.io/fairlead/internal/kmod"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNotSupported is wrapped by the error of [Open] on a kernel that lacks IPVS or
// dummy interfaces and cannot load them. The error says which is missing and what
// to do.
var ErrNotSupported = errors.New("the kernel cannot run the ipvs mode")

// openIPVS connects to IPVS. If the kernel has none, its module is loaded.
func openIPVS(netns int) (*ipvsConn, error) {
	k, err := dialIPVS(netns)
	if !errors.Is(err, unix.ENOENT) {
		return k, err
	}
	if loadErr := kmod.Load("ip_vs"); loadErr != nil {
		return nil, fmt.Errorf("%w: it has no IPVS (CONFIG_IP_VS, module ip_vs): %w", ErrNotSupported, loadErr)
	}
	return dialIPVS(netns)
}

// ensureDummyLink makes sure that the kernel has dummy interfaces, loading their module. It
// makes one in passing where ours is not there yet.
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
			return fmt.Errorf("%w: it has no dummy interfaces (CONFIG_DUMMY, module dummy): %w", ErrNotSupported, loadErr)
		}
		err = try()
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make the dummy interface %s: %w", LinkName, explain(err))
	}
	return nil
}

func explain(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	}
	return err
}
