//go:build ipvs

// These tests need a kernel that has IPVS and its schedulers as modules, of which
// none is loaded, and load them for good. So they are behind the build tag ipvs and for
// the virtual machines of test/vm, where -modprobe=false sees to it that nobody else
// loads modules, and where 6.1 has them plain and 6.12 compressed (.ko.xz).

package kmod

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestLoadIntoKernel is one test with an order, since nothing unloads modules again.
func TestLoadIntoKernel(t *testing.T) {
	modules := []string{"ip_vs", "ip_vs_rr", "ip_vs_mh", "dummy numdummies=0"}
	for _, m := range modules {
		name, _, _ := strings.Cut(m, " ")
		if _, err := os.Stat(filepath.Join("/sys/module", name)); err == nil {
			t.Fatalf("module %s is loaded before the test", name)
		}
	}

	t.Run("without CAP_SYS_MODULE, the error says so", func(t *testing.T) {
		err := unprivileged(t, func() error { return Load(modules...) })
		if !errors.Is(err, unix.EPERM) {
			t.Fatalf("error %v, want %v", err, unix.EPERM)
		}
		if want := "this needs CAP_SYS_MODULE; or load them on the host: modprobe -a ip_vs ip_vs_rr ip_vs_mh dummy"; !strings.HasSuffix(err.Error(), want) {
			t.Errorf("error %q, want one that ends in %q", err, want)
		}
	})
	t.Run("a module that there is not", func(t *testing.T) {
		if err := Load("ip_vs_none"); err == nil || !strings.Contains(err.Error(), "load kernel module ip_vs_none: it is not in /") {
			t.Errorf("error %v, want that it is not in the folder", err)
		}
	})
	t.Run("parameters that the module does not take", func(t *testing.T) {
		if err := Load("dummy numdummies=many"); !errors.Is(err, unix.EINVAL) {
			t.Errorf("error %v, want %v", err, unix.EINVAL)
		}
	})
	t.Run("the kernel reads the files", func(t *testing.T) {
		l := loader{root: "/", syscalls: withoutInitModule{}, release: kernelRelease(t)}
		if err := l.load([]string{"nf_conntrack"}); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("several load the same", func(t *testing.T) {
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() {
				if err := Load("ip_vs", "ip_vs_rr"); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	})
	t.Run("this program reads the files", func(t *testing.T) {
		l := loader{root: "/", syscalls: withoutFinitModule{}, release: kernelRelease(t)}
		if err := l.load([]string{"ip_vs_mh", "dummy numdummies=0"}); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("all are there", func(t *testing.T) {
		for _, name := range []string{"ip_vs", "ip_vs_rr", "ip_vs_mh", "dummy", "nf_conntrack"} {
			state, err := os.ReadFile(filepath.Join("/sys/module", name, "initstate"))
			if err != nil || string(state) != "live\n" {
				t.Errorf("module %s: state %q, %v; want live", name, state, err)
			}
		}
		if _, err := os.Stat("/proc/net/ip_vs"); err != nil {
			t.Error(err)
		}
		if link, err := netlink.LinkByName("dummy0"); err == nil {
			t.Errorf("numdummies=0, but there is %s", link.Attrs().Name)
		}
		attributes := netlink.NewLinkAttrs()
		attributes.Name = "kmod-test"
		dummy := &netlink.Dummy{LinkAttrs: attributes}
		if err := netlink.LinkAdd(dummy); err != nil {
			t.Fatalf("add a dummy interface: %v", err)
		}
		if err := netlink.LinkDel(dummy); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("what is loaded needs no privilege", func(t *testing.T) {
		if err := unprivileged(t, func() error { return Load(modules...) }); err != nil {
			t.Error(err)
		}
	})
	t.Run("what is built in needs no privilege", func(t *testing.T) {
		// On both kernels: the kernel shows the first in /sys/module, the second only
		// the list of what is built in.
		if err := unprivileged(t, func() error { return Load("tcp_cubic", "crc32c_generic") }); err != nil {
			t.Error(err)
		}
	})
}

// withoutFinitModule is the running kernel as if it did not know finit_module(2).
type withoutFinitModule struct{ linuxSyscalls }

func (withoutFinitModule) finitModule(int, string, int) error { return unix.ENOSYS }

// withoutInitModule is the running kernel as if it did not know init_module(2).
type withoutInitModule struct{ linuxSyscalls }

func (withoutInitModule) initModule([]byte, string) error { return unix.ENOSYS }

// unprivileged calls f in a thread without CAP_SYS_MODULE.
func unprivileged(t *testing.T, f func() error) error {
	t.Helper()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var sets [2]unix.CapUserData
		if err := unix.Capget(&header, &sets[0]); err != nil {
			t.Error(err)
		}
		sets[0].Effective &^= 1 << unix.CAP_SYS_MODULE
		if err := unix.Capset(&header, &sets[0]); err != nil {
			t.Error(err)
		}
		result <- f()
	}()
	return <-result
}

func kernelRelease(t *testing.T) string {
	t.Helper()
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(release))
}
