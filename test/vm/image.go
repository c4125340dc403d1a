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

const busyboxPackage = "busybox-static"

// guestPrograms returns the programs of this machine that tests, the demo and people use in
// the virtual machine. Missing programs are ignored.
func guestPrograms() []string {
	return []string{
		"sh", "bash", "ip", "ss", "nft", "ipvsadm", "redis-server", "redis-cli", "curl",
		// For kube-proxy, with the plugins in iptablesPlugins.
		"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore", "ipset",
		"iptables-nft", "ip6tables-nft", "xtables-nft-multi", "xtables-legacy-multi",
		"iptables-legacy", "ip6tables-legacy", "iptables-legacy-save", "ip6tables-legacy-save",
	}
}

// iptablesPlugins is a pattern for the directories of iptables plugins on this machine.
const iptablesPlugins = "/usr/lib/*/xtables"

// cache is the directory of downloaded files and of files made from them.
type cache struct {
	dir      string // .cache/vm
	platform platform
}

// name returns the name of a directory for the platform. It contains a digest of the inputs,
// so changed inputs lead to a new directory.
func (c cache) name(kind string, inputs ...string) string {
	if c.platform.debian != "amd64" {
		kind += "-" + c.platform.debian
	}
	return filepath.Join(c.dir, kind+"-"+digest(inputs...))
}

// kernel returns the paths of a kernel image and of the cpio archive of its modules. It
// downloads them if necessary.
func (c cache) kernel(ctx context.Context, version string) (image, modules string, err error) {
	p := c.platform
	suite := p.kernels[version]
	rules := strings.TrimSpace(moduleRules + " " + p.modules)
	dir := c.name("linux-"+version, p.kernelPackage, rules, suite)
	image, modules = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "modules.cpio")
	return image, modules, c.ensure(dir, func(work string) error {
		root := filepath.Join(work, "root")
		if err := debian.Unpack(ctx, p.debian, suite, root, p.kernelPackage+"/"); err != nil {
			return err
		}
		// vmlinuz on most architectures, vmlinux on ppc64le.
		images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinu[xz]-*"))
		if err != nil || len(images) != 1 {
			return fmt.Errorf("want one kernel in the package, got %q (%w)", images, err)
		}
		release := filepath.Base(images[0])[len("vmlinuz-"):]
		if !strings.HasPrefix(release, version+".") {
			return fmt.Errorf("want Linux %s, but Debian %s has %s", version, suite, release)
		}
		if err := os.Rename(images[0], filepath.Join(work, "vmlinuz")); err != nil {
			return err
		}
		if err := packModules(ctx, root, release, rules, filepath.Join(work, "modules.cpio")); err != nil {
			return err
		}
		return os.RemoveAll(root)
	})
}

// busybox returns the path of a statically linked busybox. It downloads it if necessary.
func (c cache) busybox(ctx context.Context) (string, error) {
	suite := c.platform.suite
	dir := c.name("busybox", busyboxPackage, suite)
	err := c.ensure(dir, func(work string) error {
		root := filepath.Join(work, "root")
		if err := debian.Unpack(ctx, c.platform.debian, suite, root, busyboxPackage); err != nil {
			return err
		}
		for _, at := range []string{"usr/bin/busybox", "bin/busybox"} {
			if err := os.Rename(filepath.Join(root, at), filepath.Join(work, "busybox")); !errors.Is(err, fs.ErrNotExist) {
				return errors.Join(err, os.RemoveAll(root))
			}
		}
		return errors.New("the package has no busybox")
	})
	return filepath.Join(dir, "busybox"), err
}

// programs returns a directory with the files of foreignPackages. It downloads them if
// necessary.
func (c cache) programs(ctx context.Context) (string, error) {
	packages := foreignPackages()
	dir := c.name("programs", append([]string{c.platform.suite}, packages...)...)
	return dir, c.ensure(dir, func(work string) error {
		root := filepath.Join(work, "root")
		if err := debian.Unpack(ctx, c.platform.debian, c.platform.suite, root, packages...); err != nil {
			return err
		}
		for _, unused := range []string{"usr/share", "usr/lib/*/gconv", "lib/*/gconv"} {
			found, err := filepath.Glob(filepath.Join(root, unused))
			if err != nil {
				return err
			}
			for _, f := range found {
				if err := os.RemoveAll(f); err != nil {
					return err
				}
			}
		}
		for _, top := range []string{"usr", "lib", "lib64"} {
			if err := os.Rename(filepath.Join(root, top), filepath.Join(work, top)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return os.RemoveAll(root)
	})
}

// ensure creates dir with the files that fill writes, unless it exists. It keeps older
// directories of the same kind, because another checkout that shares the cache may use them.
func (c cache) ensure(dir string, fill func(work string) error) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return err
	}
	// Several tests may start at once, also in checkouts that share the cache.
	lock, err := os.OpenFile(filepath.Join(c.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close() //nolint:errcheck // no data to lose; closing releases the lock
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	work := dir + ".new"
	// A killed process may have left files.
	if err := errors.Join(os.RemoveAll(work), os.MkdirAll(work, 0o755)); err != nil {
		return err
	}
	if err := fill(work); err != nil {
		return errors.Join(fmt.Errorf("create %s: %w", dir, err), os.RemoveAll(work))
	}
	return os.Rename(work, dir)
}

func digest(texts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(texts, "\x00")))
	return hex.EncodeToString(sum[:6])
}

// moduleRules selects the modules of the Debian kernel for the virtual machine: networking
// and its dependencies. The cache's directory names depend on it.
const moduleRules = "kernel/net kernel/lib kernel/crypto kernel/arch kernel/drivers/net -kernel/drivers/net/ethernet " +
	"-kernel/drivers/net/wireless -kernel/drivers/net/xen-netback -kernel/drivers/net/wwan v2"

// includeModule reports whether rules select the module at path.
func includeModule(rules, path string) bool {
	include := false
	for rule := range strings.FieldsSeq(rules) {
		dir, exclude := strings.CutPrefix(rule, "-")
		if strings.HasPrefix(path, dir+"/") {
			include = !exclude
		}
	}
	return include
}

// packModules writes the modules below root that the rules select into an archive, with the indexes that
// modprobe uses.
func packModules(ctx context.Context, root, release, rules, into string) error {
	// Debian 12 has modules in /lib, Debian 13 in /usr/lib; depmod reads /lib.
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
		if err != nil || includeModule(rules, rel) {
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

// lookPath finds a program in PATH and in the directories of root's PATH.
func lookPath(name string) (string, error) {
	if at, err := exec.LookPath(name); err == nil {
		return filepath.Abs(at)
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if at, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return at, nil
		}
	}
	return "", fmt.Errorf("program %s not found", name)
}

// addBase adds the common part of every virtual machine: busybox, the init script, and the
// files in /etc that programs read.
func addBase(a *archive, busybox string) error {
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
	return nil
}

// addHostPrograms adds programs of this machine.
func addHostPrograms(ctx context.Context, a *archive) error {
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

// addProgram adds a program and its shared libraries.
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

// sharedLibraries returns the paths of the loader and the shared libraries of a program,
// according to ldd(1). A static program has none.
func sharedLibraries(ctx context.Context, program string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "ldd", program).CombinedOutput()
	if err != nil {
		// The exit status does not distinguish this case.
		if strings.Contains(string(out), "not a dynamic executable") {
			return nil, nil
		}
		return nil, fmt.Errorf("ldd %s: %w: %s", program, err, out)
	}
	return parseLdd(string(out)), nil
}

// parseLdd returns the absolute paths in the output of ldd:
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

// addCheckout adds the checkout at root under the same path, so that tests find the files
// they read. It omits .git and the files of clusters, which are large and change while a cluster
// runs. Of .cache it adds only the nft releases.
func addCheckout(a *archive, root string) error {
	err := a.addTree(root, root, func(rel string) bool {
		return rel == ".git" || rel == ".cache" || rel == "bin/conformance" || strings.HasPrefix(rel, "bin/cluster-")
	})
	if err != nil {
		return err
	}
	// In a worktree, .cache may be a link to another checkout's.
	nft, err := filepath.EvalSymlinks(filepath.Join(root, ".cache", "nftables"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return a.addTree(filepath.Join(root, ".cache", "nftables"), nft, nil)
}

// appendFile appends the content of a file to w.
func appendFile(w io.Writer, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // read-only
	_, err = io.Copy(w, f)
	return err
}
