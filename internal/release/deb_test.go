package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/test/debian"
)

// unit is the path of the systemd unit.
const unit = repository + "/deploy/debian/fairlead.service"

// buildPackage builds a Debian package of a program for this machine. pages is the folder with man
// pages, or missing.
func buildPackage(t *testing.T, program, version string, pages ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "fairlead.deb")
	args := append([]string{program, runtime.GOARCH, version, file}, pages...)
	cmd := exec.CommandContext(t.Context(), repository+"/deploy/debian/build.sh", args...)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build.sh: %v\n%s", err, out)
	}
	return file
}

// smallProgram returns a program for packages whose program no test runs.
func smallProgram(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "fairlead")
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestPackageReproducible(t *testing.T) {
	t.Parallel()
	var content [2][]byte
	for i := range content {
		var err error
		if content[i], err = os.ReadFile(buildPackage(t, smallProgram(t), "v1.2.3")); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(content[0], content[1]) {
		t.Error("two packages with the same content differ")
	}
}

// TestPackageVersion checks that dpkg orders builds as git describes them.
func TestPackageVersion(t *testing.T) {
	t.Parallel()
	previous := ""
	for _, test := range []struct{ describe, version string }{
		{"0123456", "0~20231114221320.0123456"},
		{"v1.2.0-rc.1", "1.2.0~rc.1"},
		{"v1.2.0-rc.1-14-g0123456", "1.2.0~rc.1+14.g0123456"},
		{"v1.2.0", "1.2.0"},
		{"v1.2.0-3-gabcdef0-dirty", "1.2.0+3.gabcdef0+dirty"},
	} {
		got := command(t, "dpkg-deb", "--field", buildPackage(t, smallProgram(t), test.describe), "Version")
		if got != test.version {
			t.Errorf("%s: got version %s, want %s", test.describe, got, test.version)
		}
		if previous != "" {
			command(t, "dpkg", "--compare-versions", previous, "lt", got)
		}
		previous = got
	}
}

// TestPackagePages checks that a package contains the man pages and the completions of shells.
func TestPackagePages(t *testing.T) {
	t.Parallel()
	pages, root := t.TempDir(), t.TempDir()
	for name, text := range map[string]string{
		"man8/fairlead.8": ".TH fairlead", "man8/fairlead-get.8": ".TH fairlead-get",
		"completion/fairlead": "bash", "completion/_fairlead": "zsh", "completion/fairlead.fish": "fish",
	} {
		path := filepath.Join(pages, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	command(t, "dpkg-deb", "--extract", buildPackage(t, smallProgram(t), "v1.2.3", pages), root)
	if got := command(t, "zcat", filepath.Join(root, "usr/share/man/man8/fairlead-get.8.gz")); got != ".TH fairlead-get" {
		t.Errorf("man page %q", got)
	}
	for path, want := range map[string]string{
		"bash-completion/completions/fairlead": "bash", "zsh/vendor-completions/_fairlead": "zsh", "fish/vendor_completions.d/fairlead.fish": "fish",
	} {
		if got, err := os.ReadFile(filepath.Join(root, "usr/share", path)); err != nil || string(got) != want {
			t.Errorf("%s: %q, error %v; want %q", path, got, err, want)
		}
	}
}

// TestUnit checks the systemd unit and its exposure, on systemd's scale from 0 to 10.
func TestUnit(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	command(t, "dpkg-deb", "--extract", buildPackage(t, smallProgram(t), "v1.2.3"), root)
	// The unit names targets of systemd.
	if err := os.CopyFS(filepath.Join(root, "usr/lib/systemd/system"), os.DirFS("/lib/systemd/system")); err != nil {
		t.Fatal(err)
	}
	if out := command(t, "systemd-analyze", "verify", "--man=no", "--recursive-errors=one", "--root="+root, "fairlead.service"); out != "" {
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
	command(t, "systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", unit)
}

// debianRoot is a directory with dpkg and the programs that package scripts use, as a root for
// programs in a network namespace.
type debianRoot struct {
	t    *testing.T
	dir  string
	host *nettest.Host
}

// newDebianRoot unpacks Debian 12 with additional packages. The packages stay in .cache, in a
// directory with the name of the additional ones.
func newDebianRoot(t *testing.T, host *nettest.Host, name string, packages ...string) *debianRoot {
	t.Helper()
	base, err := filepath.Abs(filepath.Join(repository, ".cache", "debian-12-"+name+runtime.GOARCH))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(base); err != nil {
		err := debian.Unpack(t.Context(), command(t, "dpkg", "--print-architecture"), "bookworm", base,
			append(packages, "dpkg", "tar", "dash", "coreutils", "sed", "grep", "diffutils", "findutils", "libc6", "libc-bin", "libselinux1", "libpcre2-8-0",
				"zlib1g", "liblzma5", "libbz2-1.0", "libzstd1", "libmd0", "libacl1", "libattr1", "libgmp10")...)
		if err != nil {
			t.Fatal(err)
		}
	}
	r := &debianRoot{t: t, dir: filepath.Join(t.TempDir(), "root"), host: host}
	command(t, "cp", "-a", base, r.dir)
	for _, dir := range []string{"dev", "proc", "tmp", "manifests", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "var/log"} {
		if err := os.MkdirAll(filepath.Join(r.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"var/lib/dpkg/status", "var/lib/dpkg/available"} {
		r.writeFile(file, "")
	}
	const null = 1<<8 | 3
	if err := syscall.Mknod(filepath.Join(r.dir, "dev/null"), syscall.S_IFCHR|0o666, null); err != nil {
		t.Fatal(err)
	}
	proc := filepath.Join(r.dir, "proc")
	if err := syscall.Mount("proc", proc, "proc", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(proc, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *debianRoot) writeFile(path, content string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, path), []byte(content), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

func (r *debianRoot) readFile(path string) string {
	r.t.Helper()
	data, err := os.ReadFile(filepath.Join(r.dir, path))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(data)
}

// expectFiles checks which of the package's files exist.
func (r *debianRoot) expectFiles(when string, want map[string]bool) {
	r.t.Helper()
	for path, want := range want {
		if _, err := os.Lstat(filepath.Join(r.dir, path)); (err == nil) != want {
			r.t.Errorf("%s: %s exists: %t, want %t", when, path, err == nil, want)
		}
	}
}

// command returns a command that runs in the root and in the network namespace.
func (r *debianRoot) command(name string, args ...string) (*exec.Cmd, *bytes.Buffer) {
	var out bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: r.dir, Pdeathsig: syscall.SIGKILL}
	cmd.Stdout, cmd.Stderr = &out, &out
	return cmd, &out
}

func (r *debianRoot) run(name string, args ...string) string {
	r.t.Helper()
	cmd, out := r.command(name, args...)
	err := r.host.Do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		r.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out.String()
}

// install installs a package file with dpkg.
func (r *debianRoot) install(file string) {
	r.t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		r.t.Fatal(err)
	}
	r.writeFile("tmp/fairlead.deb", string(data))
	r.run("/usr/bin/dpkg", "--install", "/tmp/fairlead.deb")
}

// TestPackage installs the package in a Debian system, upgrades, removes and purges it. The rules
// of the program stay until the purge.
func TestPackage(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	pod := network.PodT(t, "a")
	pod.ServeT(t, nettest.TCP, podPort)
	service := netip.AddrPortFrom(netip.MustParseAddr("10.96.0.10"), servicePort)
	connect := func() error {
		_, err := network.Outside.Connect(t.Context(), nettest.TCP, service)
		return err
	}
	const (
		programFile = "usr/bin/fairlead"
		configFile  = "etc/fairlead/config.yaml"
		copyFile    = "var/lib/fairlead/fairlead"
	)
	r := newDebianRoot(t, network.Node, "")
	r.install(buildPackage(t, hostProgram, "v1.2.3"))
	if got := r.run("/usr/bin/fairlead", "version"); !strings.Contains(got, "v1.2.3") {
		t.Errorf("fairlead version prints %q, want v1.2.3", got)
	}

	edited := r.readFile(configFile) + "conntrack: {maxPerCore: 0}\n" // the maximum belongs to the host
	r.writeFile(configFile, edited)
	r.install(buildPackage(t, hostProgram, "v1.2.4"))
	if got := r.readFile(configFile); got != edited {
		t.Errorf("the upgrade has changed the configuration:\n%s", got)
	}

	r.writeFile("manifests/web.yaml", manifests(pod))
	program, log := r.command("/usr/bin/fairlead", "run", "--config=/"+configFile, "--manifests=/manifests", "--service-cidr=10.96.0.0/16,fd00:10:96::/112",
		"--hostname-override=node")
	if err := network.Node.Do(program.Start); err != nil {
		t.Fatal(err)
	}
	err := connect()
	for deadline := time.Now().Add(waitTimeout); err != nil && time.Now().Before(deadline); err = connect() {
		time.Sleep(50 * time.Millisecond)
	}
	if stopErr := program.Process.Signal(syscall.SIGTERM); stopErr != nil {
		t.Error(stopErr)
	}
	if waitErr := program.Wait(); err != nil || waitErr != nil {
		t.Fatalf("connect: %v; exit: %v; log:\n%s", err, waitErr, log)
	}

	r.run("/usr/bin/dpkg", "--remove", "fairlead")
	r.expectFiles("removed", map[string]bool{programFile: false, configFile: true, copyFile: true, "lib/systemd/system/fairlead.service": false})
	if err := connect(); err != nil {
		t.Errorf("after the removal: %v", err)
	}

	r.install(buildPackage(t, hostProgram, "v1.2.4"))
	r.expectFiles("installed again", map[string]bool{programFile: true, configFile: true, copyFile: false})
	r.run("/usr/bin/dpkg", "--purge", "fairlead")
	r.expectFiles("purged", map[string]bool{programFile: false, "etc/fairlead": false, "var/lib/fairlead": false})
	tables := exec.CommandContext(t.Context(), "nft", "list", "tables")
	var out bytes.Buffer
	tables.Stdout, tables.Stderr = &out, &out
	err = network.Node.Do(tables.Start)
	if err == nil {
		err = tables.Wait()
	}
	if err != nil || strings.Contains(out.String(), "fairlead") {
		t.Errorf("after the purge: tables %s, error %v", &out, err)
	}
	if got := r.readFile("var/lib/dpkg/status"); strings.Contains(got, "Package: fairlead") {
		t.Errorf("status of dpkg after the purge:\n%s", got)
	}
}

// systemCalls returns the system calls of a group of systemd, such as @system-service.
func systemCalls(t *testing.T, group string) []string {
	t.Helper()
	var names []string
	for line := range strings.Lines(command(t, "systemd-analyze", "syscall-filter", "--no-pager", group)) {
		switch name := strings.TrimSpace(line); {
		case name == "" || name == group || strings.HasPrefix(name, "#"):
		case strings.HasPrefix(name, "@"):
			names = append(names, systemCalls(t, name)...)
		default:
			names = append(names, name)
		}
	}
	return names
}

// unitSetting returns the value of a setting of the unit.
func unitSetting(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if key, value, found := strings.Cut(line, "="); found && key == name {
			return strings.TrimSpace(value)
		}
	}
	t.Fatal(fmt.Errorf("%s: no %s", unit, name))
	return ""
}
