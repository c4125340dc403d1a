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
		t.Fatalf("the socket has port %d: %v", port, err)
	}
	got, err := socketowner.ByNetlinkPort(unix.NETLINK_ROUTE, port)
	if err != nil || got.PID != os.Getpid() || got.Command == "" {
		t.Errorf("the owner of an open socket: %v, %v", got, err)
	}
	if _, err := socketowner.ByNetlinkPort(unix.NETLINK_NETFILTER, port); !errors.Is(err, socketowner.ErrUnknown) {
		t.Errorf("the same port of another protocol: %v", err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := socketowner.ByNetlinkPort(unix.NETLINK_ROUTE, port); !errors.Is(err, socketowner.ErrUnknown) {
		t.Errorf("the owner of a closed socket: %v, %v", got, err)
	}
}
