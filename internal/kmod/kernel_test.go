//go:build ipvs

// These tests need a kernel with IPVS and its schedulers as modules that are not loaded, and
// do not unload them again. They therefore have the build tag ipvs and run in the virtual
// machines of test/vm. There -modprobe=false prevents other loads. The modules of 6.1 are not
// compressed, those of 6.12 are (.ko.xz).

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

// TestLoadIntoKernel is one test with ordered subtests, because modules are never unloaded.
func TestLoadIntoKernel(t *testing.T) {
	modules := []string{"ip_vs", "ip_vs_rr", "ip_vs_mh", "dummy numdummies=0"}
	for _, m := range modules {
		name, _, _ := strings.Cut(m, " ")
		if _, err := os.Stat(filepath.Join("/sys/module", name)); err == nil {
			t.Fatalf("module %s is loaded before the test", name)
		}
	}

	t.Run("error without CAP_SYS_MODULE", func(t *testing.T) {
		err := unprivileged(t, func() error { return Load(modules...) })
		if !errors.Is(err, unix.EPERM) {
			t.Fatalf("error %v, want %v", err, unix.EPERM)
		}
		if want := "CAP_SYS_MODULE is required; alternatively, load them on the host: modprobe -a ip_vs ip_vs_rr ip_vs_mh dummy"; !strings.HasSuffix(err.Error(), want) {
			t.Errorf("error %q, want the suffix %q", err, want)
		}
	})
	t.Run("unknown module", func(t *testing.T) {
		if err := Load("ip_vs_none"); err == nil || !strings.Contains(err.Error(), "load kernel module ip_vs_none: not found in /") {
			t.Errorf("error %v, want that the module is not found", err)
		}
	})
	t.Run("invalid parameters", func(t *testing.T) {
		if err := Load("dummy numdummies=many"); !errors.Is(err, unix.EINVAL) {
			t.Errorf("error %v, want %v", err, unix.EINVAL)
		}
	})
	t.Run("files read by the kernel", func(t *testing.T) {
		l := loader{root: "/", syscalls: withoutInitModule{}, release: kernelRelease(t)}
		if err := l.load([]string{"nf_conntrack"}); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("concurrent loads", func(t *testing.T) {
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
	t.Run("files read by the process", func(t *testing.T) {
		l := loader{root: "/", syscalls: withoutFinitModule{}, release: kernelRelease(t)}
		if err := l.load([]string{"ip_vs_mh", "dummy numdummies=0"}); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("all loaded", func(t *testing.T) {
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
			t.Errorf("numdummies=0, but %s exists", link.Attrs().Name)
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
	t.Run("loaded modules need no privilege", func(t *testing.T) {
		if err := unprivileged(t, func() error { return Load(modules...) }); err != nil {
			t.Error(err)
		}
	})
	t.Run("built-in modules need no privilege", func(t *testing.T) {
		// On both kernels, the first is visible in /sys/module, the second only in
		// modules.builtin.
		if err := unprivileged(t, func() error { return Load("tcp_cubic", "crc32c_generic") }); err != nil {
			t.Error(err)
		}
	})
}

// withoutFinitModule is the running kernel without finit_module(2).
type withoutFinitModule struct{ linuxSyscalls }

func (withoutFinitModule) finitModule(int, string, int) error { return unix.ENOSYS }

// withoutInitModule is the running kernel without init_module(2).
type withoutInitModule struct{ linuxSyscalls }

func (withoutInitModule) initModule([]byte, string) error { return unix.ENOSYS }

// unprivileged calls f on a thread without CAP_SYS_MODULE.
func unprivileged(t *testing.T, f func() error) error {
	t.Helper()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
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
