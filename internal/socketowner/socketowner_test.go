package socketowner_test

import (
	"errors"
	"os"
	"testing"

	"fairlead.io/fairlead/internal/socketowner"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

func TestByNetlinkPort(t *testing.T) {
	t.Parallel()
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var port uint32
	if err := raw.Control(func(fd uintptr) {
		if address, err := unix.Getsockname(int(fd)); err == nil {
			port = address.(*unix.SockaddrNetlink).Pid
		}
	}); err != nil || port == 0 {
		t.Fatalf("read the socket's port ID: %d, error %v", port, err)
	}
	got, err := socketowner.ByNetlinkPort(unix.NETLINK_ROUTE, port)
	if err != nil || got.PID != os.Getpid() || got.Command == "" {
		t.Errorf("open socket: %v, error %v; want this process", got, err)
	}
	if _, err := socketowner.ByNetlinkPort(unix.NETLINK_NETFILTER, port); !errors.Is(err, socketowner.ErrUnknown) {
		t.Errorf("same port ID in another protocol: error %v, want ErrUnknown", err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := socketowner.ByNetlinkPort(unix.NETLINK_ROUTE, port); !errors.Is(err, socketowner.ErrUnknown) {
		t.Errorf("closed socket: %v, error %v; want ErrUnknown", got, err)
	}
}
