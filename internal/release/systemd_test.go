package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/nettest"
)

// systemdPackages are systemd and the libraries that it needs, besides those of dpkg.
func systemdPackages() []string {
	return []string{
		"systemd", "libsystemd-shared", "libsystemd0", "libapparmor1", "libaudit1", "libcap2", "libcap-ng0", "libcryptsetup12", "libfdisk1",
		"libip4tc2", "libkmod2", "liblz4-1", "libmount1", "libblkid1", "libpam0g", "libseccomp2", "libssl3", "libgcrypt20", "libgpg-error0", "libuuid1",
		"libdevmapper1.02.1", "libargon2-1", "libjson-c5", "libcrypt1", "libudev1", "libtinfo6", "mount", "util-linux", "libsmartcols1", "libp11-kit0",
	}
}

// systemdRoot is a Debian system whose first process is systemd.
type systemdRoot struct {
	*debianRoot
	pid int // of systemd
}

// bootSystemd boots the system and waits until systemd has started the basic services.
func bootSystemd(t *testing.T, r *debianRoot) *systemdRoot {
	t.Helper()
	for _, dir := range []string{"sys", "run", "mnt", "etc/systemd/system"} {
		if err := os.MkdirAll(filepath.Join(r.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.writeFile("etc/machine-id", "0123456789abcdef0123456789abcdef\n") // not a first boot, which would enable all units
	cgroup := newCgroup(t)
	var out bytes.Buffer
	cmd := exec.Command("bash", "testdata/boot-systemd.sh", cgroup, r.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := r.host.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // the signal
	})
	s := &systemdRoot{debianRoot: r}
	eventually(t, func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", cmd.Process.Pid))
		if err == nil {
			_, err = fmt.Sscan(string(children), &s.pid)
		}
		if err != nil {
			return fmt.Errorf("systemd has not started: %w\n%s", err, &out)
		}
		state, err := s.tryRun("systemctl", "is-active", "basic.target")
		if err != nil {
			return fmt.Errorf("basic.target is %q: %w\n%s", state, err, &out)
		}
		return nil
	})
	return s
}

// newCgroup creates a cgroup of the v2 hierarchy. It removes it when the test ends, with the
// cgroups below it.
func newCgroup(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[2] != "cgroup2" {
			continue
		}
		dir, err := os.MkdirTemp(fields[1], "fairlead-test-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			eventually(t, func() error { // killed processes end some time later
				var dirs []string
				err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
					if err == nil && entry.IsDir() {
						dirs = append(dirs, path)
					}
					return err
				})
				for _, d := range slices.Backward(dirs) {
					if err == nil {
						err = syscall.Rmdir(d)
					}
				}
				return err
			})
		})
		return dir
	}
	t.Fatal("the cgroup v2 hierarchy is not mounted")
	return ""
}

// tryRun runs a command in the system and returns its output.
func (s *systemdRoot) tryRun(name string, args ...string) (string, error) {
	args = append([]string{"--target", fmt.Sprint(s.pid), "--all", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "SYSTEMD_PAGER=", name}, args...)
	out, err := exec.Command("nsenter", args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (s *systemdRoot) run(name string, args ...string) string {
	s.t.Helper()
	out, err := s.tryRun(name, args...)
	if err != nil {
		log, _ := s.tryRun("journalctl", "--no-pager", "--lines=50")
		s.t.Fatalf("%s %s: %v\n%s\njournal:\n%s", name, strings.Join(args, " "), err, out, log)
	}
	return out
}

// eventually calls check until it returns nil.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	err := check()
	for deadline := time.Now().Add(waitTimeout); err != nil && time.Now().Before(deadline); err = check() {
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		t.Fatalf("not within %s: %v", waitTimeout, err)
	}
}

// TestSystemd installs the package in a system that systemd has booted, and starts, stops and
// removes the service, with the restrictions of the unit.
func TestSystemd(t *testing.T) {
	t.Parallel()
	network := nettest.NewT(t, nettest.Options{})
	pod := network.PodT(t, "a")
	pod.ServeT(t, nettest.TCP, podPort)
	connect := func() error {
		_, err := network.Outside.Connect(t.Context(), nettest.TCP, netip.AddrPortFrom(netip.MustParseAddr("10.96.0.10"), servicePort))
		return err
	}
	const service = "fairlead.service"
	r := newDebianRoot(t, network.Node, "systemd-", systemdPackages()...)
	s := bootSystemd(t, r)

	deb, err := os.ReadFile(buildPackage(t, hostProgram, "v1.2.3"))
	if err != nil {
		t.Fatal(err)
	}
	r.writeFile("fairlead.deb", string(deb))
	s.run("dpkg", "--install", "/fairlead.deb")
	if state, err := s.tryRun("systemctl", "is-active", service); err == nil {
		t.Errorf("the installation has started the service: %s", state)
	}
	r.writeFile("etc/fairlead/config.yaml", r.readFile("etc/fairlead/config.yaml")+"conntrack: {maxPerCore: 0}\n") // the maximum belongs to the host
	r.writeFile("manifests/web.yaml", manifests(pod))
	if err := os.MkdirAll(filepath.Join(r.dir, "etc/systemd/system/fairlead.service.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	// The program reads manifests instead of an API server's objects.
	r.writeFile("etc/systemd/system/fairlead.service.d/manifests.conf", "[Service]\nExecStart=\n"+
		"ExecStart=/usr/bin/fairlead run --config=/etc/fairlead/config.yaml --manifests=/manifests --service-cidr=10.96.0.0/16,fd00:10:96::/112 --hostname-override=node\n")
	s.run("systemctl", "daemon-reload")
	if out := s.run("systemd-analyze", "verify", "--man=no", "--recursive-errors=one", service); out != "" {
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
	// The exposure of the service as loaded, on a scale from 0 to 10, is at most 2.5.
	if out := s.run("systemd-analyze", "security", "--no-pager", service); !strings.Contains(out, "Overall exposure level for fairlead.service: 1.") &&
		!strings.Contains(out, "Overall exposure level for fairlead.service: 2.") {
		t.Errorf("systemd-analyze security:\n%s", out)
	}

	s.run("systemctl", "enable", "--now", service)
	eventually(t, connect)
	status := s.run("cat", "/proc/"+s.run("systemctl", "show", "--property=MainPID", "--value", service)+"/status")
	// CAP_NET_ADMIN is bit 12. Seccomp mode 2 is a filter.
	for _, want := range []string{"Name:\tfairlead", "CapEff:\t0000000000001000", "CapBnd:\t0000000000001000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, want+"\n") {
			t.Errorf("no %q in the status of the process:\n%s", want, status)
		}
	}
	s.run("systemctl", "stop", service)
	if got := s.run("systemctl", "show", "--property=ActiveState,Result,ExecMainStatus", "--value", service); got != "success\n0\ninactive" {
		t.Errorf("after the stop: result, status and state are %q", got)
	}
	if err := connect(); err != nil {
		t.Errorf("after the stop: %v", err)
	}

	s.run("systemctl", "start", service)
	s.run("dpkg", "--remove", "fairlead")
	if state, err := s.tryRun("systemctl", "is-active", service); err == nil {
		t.Errorf("after the removal the service is %s", state)
	}
	if err := connect(); err != nil {
		t.Errorf("after the removal: %v", err)
	}
	s.run("dpkg", "--purge", "fairlead")
	if err := connect(); err == nil {
		t.Error("after the purge, the Service still answers")
	}
}
