package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"fairlead.io/fairlead/test/debian"
)

//go:embed init.sh
var initScript string

// kernels are the kernels there are: what they are called, and the Debian
// release that they come from.
func kernels() map[string]string {
	return map[string]string{"6.1": "bookworm", "6.12": "trixie"}
}

// busyboxSuite is the Debian release that busybox comes from.
const busyboxSuite = "trixie"

// architecture is the one that QEMU emulates.
const architecture = "amd64"

const (
	kernelPackage  = "linux-image-cloud-amd64" // depends on the current kernel's
	busyboxPackage = "busybox-static"
)

// guestPrograms are those of this machine that tests, the demo and people use in the
// virtual machine. Those that are not installed are left out.
func guestPrograms() []string {
	return []string{
		"sh", "bash", "ip", "ss", "nft", "ipvsadm", "redis-server", "redis-cli", "curl",
		// What kube-proxy runs, and plugins below.
		"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore", "ipset",
	}
}

// iptablesPlugins are where this machine has those of iptables.
const iptablesPlugins = "/usr/lib/*/xtables"

// cache is the folder with what is downloaded, and what is made of it.
type cache struct {
	dir string // .cache/vm
}

// kernel returns the kernel's image and the cpio archive of its modules, which
// it downloads if they are not there.
func (c cache) kernel(ctx context.Context, version string) (image, modules string, err error) {
	suite := kernels()[version]
	// A kernel that is there is used as long as it was made by the same rules.
	dir := filepath.Join(c.dir, fmt.Sprintf("linux-%s-%s", version, digest(kernelPackage, moduleRules, suite)))
	image, modules = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "modules.cpio")
	return image, modules, c.ensure(dir, func(work string) error {
		root := filepath.Join(work, "root")
		if err := debian.Unpack(ctx, architecture, suite, root, kernelPackage+"/"); err != nil {
			return err
		}
		found, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
		if err != nil || len(found) != 1 {
			return fmt.Errorf("want one kernel in the package, have %q (%w)", found, err)
		}
		release := strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
		if !strings.HasPrefix(release, version+".") {
			return fmt.Errorf("want Linux %s, Debian %s has %s", version, suite, release)
		}
		if err := os.Rename(found[0], filepath.Join(work, "vmlinuz")); err != nil {
			return err
		}
		if err := packModules(ctx, root, release, filepath.Join(work, "modules.cpio")); err != nil {
			return err
		}
		return os.RemoveAll(root)
	})
}

// busybox returns the path of a statically linked busybox.
func (c cache) busybox(ctx context.Context) (string, error) {
	dir := filepath.Join(c.dir, "busybox-"+digest(busyboxPackage, busyboxSuite))
	err := c.ensure(dir, func(work string) error {
		root := filepath.Join(work, "root")
		if err := debian.Unpack(ctx, architecture, busyboxSuite, root, busyboxPackage); err != nil {
			return err
		}
		for _, at := range []string{"usr/bin/busybox", "bin/busybox"} {
			if err := os.Rename(filepath.Join(root, at), filepath.Join(work, "busybox")); !errors.Is(err, fs.ErrNotExist) {
				return errors.Join(err, os.RemoveAll(root))
			}
		}
		return errors.New("no busybox in the package")
	})
	return filepath.Join(dir, "busybox"), err
}

// ensure makes dir by filling a new folder, unless it is there. Others of the same
// kind stay: another checkout that shares the cache may be using them.
func (c cache) ensure(dir string, fill func(work string) error) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return err
	}
	// One at a time: several packages' tests start at once, and checkouts share caches.
	lock, err := os.OpenFile(filepath.Join(c.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close() //nolint:errcheck // nothing is written; closing gives the lock back
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	work := dir + ".new"
	// One that was killed may have left something.
	if err := errors.Join(os.RemoveAll(work), os.MkdirAll(work, 0o755)); err != nil {
		return err
	}
	if err := fill(work); err != nil {
		return errors.Join(fmt.Errorf("make %s: %w", dir, err), os.RemoveAll(work))
	}
	return os.Rename(work, dir)
}

func digest(texts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(texts, "\x00")))
	return hex.EncodeToString(sum[:6])
}

// moduleRules says which of Debian's modules are in the virtual machine: those of
// the network, and what they are made of. It is part of the cache's key.
const moduleRules = "kernel/net kernel/lib kernel/crypto kernel/arch kernel/drivers/net -kernel/drivers/net/ethernet " +
	"-kernel/drivers/net/wireless -kernel/drivers/net/xen-netback -kernel/drivers/net/wwan v2"

// includeModule reports whether moduleRules want the module at path.
func includeModule(path string) bool {
	want := false
	for rule := range strings.FieldsSeq(moduleRules) {
		below, not := strings.CutPrefix(rule, "-")
		if strings.HasPrefix(path, below+"/") {
			want = !not
		}
	}
	return want
}

// packModules writes the modules below root that are wanted into an archive,
// with the indexes that modprobe and others look them up in.
func packModules(ctx context.Context, root, release, into string) error {
	// Debian 12 has them in /lib, Debian 13 in /usr/lib; depmod looks in /lib.
	folder := filepath.Join(root, "lib/modules", release)
	if _, err := os.Stat(folder); errors.Is(err, fs.ErrNotExist) {
		if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil {
			return err
		}
	}
	err := filepath.WalkDir(filepath.Join(folder, "kernel"), func(at string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		rel, err := filepath.Rel(folder, at)
		if err != nil || includeModule(rel) {
			return err
		}
		return os.Remove(at)
	})
	if err != nil {
		return err
	}
	depmod, err := lookPath("depmod")
	if err != nil {
		return fmt.Errorf("%w: install kmod (make deps)", err)
	}
	if out, err := exec.CommandContext(ctx, depmod, "--basedir", root, release).CombinedOutput(); err != nil {
		return fmt.Errorf("depmod: %w\n%s", err, out)
	}
	f, err := os.Create(into)
	if err != nil {
		return err
	}
	a := newArchive(f)
	return errors.Join(a.addTree("/usr/lib/modules/"+release, folder, nil), a.close(), f.Close())
}

// lookPath finds a program also where only root's PATH looks.
func lookPath(name string) (string, error) {
	if at, err := exec.LookPath(name); err == nil {
		return filepath.Abs(at)
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if at, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return at, nil
		}
	}
	return "", fmt.Errorf("no program %s", name)
}

// addBase adds what every virtual machine has: busybox, the first process, programs
// of this machine, and the few files of /etc that they read.
func addBase(ctx context.Context, a *archive, busybox string) error {
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := a.addSymlink("/"+dir, "usr/"+dir); err != nil {
			return err
		}
	}
	for _, dir := range []string{
		"/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/usr/local/bin",
		"/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/var/log", "/var/lib", "/mnt",
	} {
		if err := a.addDir(dir); err != nil {
			return err
		}
	}
	if err := errors.Join(
		a.addSymlink("/var/run", "/run"),
		a.addFile("/usr/bin/busybox", busybox),
		a.addText("/init", 0o755, initScript),
		a.addText("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
		a.addText("/etc/group", 0o644, "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
		a.addText("/etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n"),
		a.addText("/etc/nsswitch.conf", 0o644, "hosts: files dns\n"),
	); err != nil {
		return err
	}
	for _, name := range []string{"protocols", "services", "ethertypes"} {
		if err := a.addFile("/etc/"+name, "/etc/"+name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, name := range guestPrograms() {
		at, err := lookPath(name)
		if err != nil {
			continue
		}
		if err := addProgram(ctx, a, "/usr/bin/"+name, at); err != nil {
			return fmt.Errorf("add the program %s: %w", at, err)
		}
	}
	folders, err := filepath.Glob(iptablesPlugins)
	if err != nil {
		return err
	}
	for _, folder := range folders {
		if err := a.addTree(folder, folder, nil); err != nil {
			return fmt.Errorf("add the plugins of iptables: %w", err)
		}
	}
	return nil
}

// addProgram adds a program and the shared libraries that it is linked with.
func addProgram(ctx context.Context, a *archive, name, host string) error {
	libraries, err := sharedLibraries(ctx, host)
	if err != nil {
		return err
	}
	for _, l := range libraries {
		if err := a.addFile(l, l); err != nil {
			return err
		}
	}
	return a.addFile(name, host)
}

// sharedLibraries returns the paths of the loader and of the shared libraries
// that a program is linked with, as ldd(1) has them; none for a static one.
func sharedLibraries(ctx context.Context, program string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "ldd", program).CombinedOutput()
	if err != nil {
		// ldd's exit status says no more than this.
		if strings.Contains(string(out), "not a dynamic executable") {
			return nil, nil
		}
		return nil, fmt.Errorf("ldd %s: %w: %s", program, err, out)
	}
	return parseLdd(string(out)), nil
}

// parseLdd returns the absolute paths in what ldd prints:
//
//	linux-vdso.so.1 (0x00007ffd)
//	libmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f4c)
//	/lib64/ld-linux-x86-64.so.2 (0x00007f4d)
func parseLdd(out string) []string {
	var paths []string
	for line := range strings.Lines(out) {
		for word := range strings.FieldsSeq(line) {
			if filepath.IsAbs(word) {
				paths = append(paths, word)
				break
			}
		}
	}
	slices.Sort(paths)
	return paths
}

// addCheckout adds the checkout at root under the same path as here, so that
// tests find what they read: all files but git's and the caches; of those, the
// nft releases.
func addCheckout(a *archive, root string) error {
	err := a.addTree(root, root, func(rel string) bool { return rel == ".git" || rel == ".cache" })
	if err != nil {
		return err
	}
	// In a worktree .cache may be a link into another one.
	nft, err := filepath.EvalSymlinks(filepath.Join(root, ".cache", "nftables"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return a.addTree(filepath.Join(root, ".cache", "nftables"), nft, nil)
}

// appendFile appends the file at from.
func appendFile(w io.Writer, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read from
	_, err = io.Copy(w, f)
	return err
}
