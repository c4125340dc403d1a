package main

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"fairlead.io/fairlead/internal/nettest"
)

const (
	waitTimeout = 3 * time.Minute
	servicePort = 80
	podPort     = 8080
)

// container is an image that runc runs on a node of its own.
type container struct {
	t    *testing.T
	net  *nettest.Network
	pod  *nettest.Host
	dir  string
	args []string // runc's options
	id   string
	cmd  *exec.Cmd
	done chan struct{}
	log  string
}

// extract writes the file system of an image to dir.
func extract(t *testing.T, files io.Reader, dir string) {
	t.Helper()
	for r := tar.NewReader(files); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, h.FileInfo().Mode())
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, path)
		case tar.TypeReg:
			var f *os.File
			if f, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, h.FileInfo().Mode()); err == nil {
				_, err = io.Copy(f, r)
				err = errors.Join(err, f.Close())
			}
		default:
			err = fmt.Errorf("%s has the type %c", h.Name, h.Typeflag)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// spec returns the configuration that containerd gives the container of deploy/daemonset.yaml: a
// read-only root, only CAP_NET_ADMIN, no new privileges, and the default seccomp profile.
func (c *container) spec(command []string) *specs.Spec {
	c.t.Helper()
	capabilities := []string{"CAP_NET_ADMIN"}
	s := &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: "rootfs", Readonly: true},
		Process: &specs.Process{
			Args: command, Cwd: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			NoNewPrivileges: true,
			Capabilities:    &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/manifests", Type: "bind", Source: filepath.Join(c.dir, "manifests"), Options: []string{"rbind", "ro"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
				{Type: specs.NetworkNamespace, Path: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), c.net.Node.Fd())},
			},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
	profile, err := seccomp.GetDefaultProfile(s)
	if err != nil {
		c.t.Fatal(err)
	}
	s.Linux.Seccomp = profile
	return s
}

// unitSeccomp returns the system call filter that systemd makes from the unit of the Debian package.
func unitSeccomp(t *testing.T) *specs.LinuxSeccomp {
	t.Helper()
	denied := uint(syscall.EPERM)
	filter := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: &denied}
	names := systemCalls(t, unitSetting(t, "SystemCallFilter"))
	names = slices.DeleteFunc(names, func(name string) bool { return name == "socket" })
	filter.Syscalls = []specs.LinuxSyscall{{Names: names, Action: specs.ActAllow}}
	families := map[string]uint64{"AF_UNIX": syscall.AF_UNIX, "AF_NETLINK": syscall.AF_NETLINK, "AF_INET": syscall.AF_INET, "AF_INET6": syscall.AF_INET6}
	for name := range strings.FieldsSeq(unitSetting(t, "RestrictAddressFamilies")) {
		family, known := families[name]
		if !known {
			t.Fatalf("address family %s is unknown to the test", name)
		}
		filter.Syscalls = append(filter.Syscalls, specs.LinuxSyscall{
			Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: family, Op: specs.OpEqualTo}},
		})
	}
	return filter
}

// manifests are a Service and its pod, which the program reads instead of an API server's.
func manifests(pod *nettest.Host) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:10:96::a"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
    - {name: tcp, protocol: TCP, port: %[1]d, targetPort: %[2]d}
    - {name: udp, protocol: UDP, port: %[1]d, targetPort: %[2]d}
---
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: web}}
spec: {containers: [{name: main, image: example}]}
status:
  podIPs: [{ip: %[3]s}, {ip: "%[4]s"}]
  conditions: [{type: Ready, status: "True"}]
`, servicePort, podPort, pod.IPv4, pod.IPv6)
}

// startContainer runs the image for this machine with a command. A nil filter means the default
// profile.
func startContainer(t *testing.T, filter *specs.LinuxSeccomp, command ...string) *container {
	t.Helper()
	if _, err := exec.LookPath("runc"); err != nil {
		t.Fatal("runc not found: run `make deps`")
	}
	c := &container{t: t, net: nettest.NewT(t, nettest.Options{}), dir: t.TempDir(), done: make(chan struct{})}
	c.pod = c.net.PodT(t, "a")
	c.pod.ServeT(t, nettest.TCP, podPort)
	c.pod.ServeT(t, nettest.UDP, podPort)
	if err := errors.Join(os.Mkdir(filepath.Join(c.dir, "manifests"), 0o755), os.Mkdir(filepath.Join(c.dir, "rootfs"), 0o755)); err != nil {
		t.Fatal(err)
	}
	images, _ := readIndex(t, hostLayout)
	files := mutate.Extract(platformImage(t, images, runtime.GOARCH))
	extract(t, files, filepath.Join(c.dir, "rootfs"))
	if err := files.Close(); err != nil {
		t.Fatal(err)
	}
	spec := c.spec(command)
	if filter != nil {
		spec.Linux.Seccomp = filter
	}
	config, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	c.log = filepath.Join(c.dir, "log")
	out, err := os.Create(c.log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := errors.Join(
		os.WriteFile(filepath.Join(c.dir, "config.json"), config, 0o600),
		os.WriteFile(filepath.Join(c.dir, "manifests", "web.yaml"), []byte(manifests(c.pod)), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	c.id = fmt.Sprintf("fairlead-test-%d-%s", os.Getpid(), filepath.Base(c.dir))
	c.args = []string{"--root", filepath.Join(c.dir, "runc")}
	c.cmd = exec.Command("runc", append(c.args, "run", "--bundle", c.dir, c.id)...)
	c.cmd.Stdout, c.cmd.Stderr = out, out
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = c.cmd.Wait() // the test checks the exit code
		close(c.done)
	}()
	t.Cleanup(func() {
		// Fails if the container has ended.
		_ = exec.Command("runc", append(c.args, "delete", "--force", c.id)...).Run()
		<-c.done
		if t.Failed() {
			text, _ := os.ReadFile(c.log)
			t.Logf("log:\n%s", text)
		}
	})
	return c
}

// awaitAnswer waits until the pod answers at the Service's addresses.
func (c *container) awaitAnswer() {
	c.t.Helper()
	for _, from := range []*nettest.Host{c.net.Node, c.net.Outside} {
		for _, network := range []string{nettest.TCP, nettest.UDP} {
			for _, addr := range []string{"10.96.0.10", "fd00:10:96::a"} {
				c.eventually(func() error {
					ctx, cancel := context.WithTimeout(c.t.Context(), time.Second)
					defer cancel()
					answer, err := from.Connect(ctx, network, netip.AddrPortFrom(netip.MustParseAddr(addr), servicePort))
					if err == nil && answer.Host != "a" {
						err = fmt.Errorf("answer from %q, want a", answer.Host)
					}
					return err
				})
			}
		}
	}
}

// eventually calls check until it returns nil.
func (c *container) eventually(check func() error) {
	c.t.Helper()
	deadline := time.Now().Add(waitTimeout)
	for {
		err := check()
		switch {
		case err == nil:
			return
		case time.Now().After(deadline):
			c.t.Fatalf("not within %s: %v", waitTimeout, err)
		}
		select {
		case <-c.done:
			c.t.Fatalf("the container has ended: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// TestImageRuns runs the image as deploy/daemonset.yaml does, under kube-proxy's name, and with the
// system calls that the systemd unit allows. It connects to a Service through each.
func TestImageRuns(t *testing.T) {
	t.Parallel()
	common := []string{"--manifests=/manifests", "--service-cidr=10.96.0.0/16,fd00:10:96::/112", "--hostname-override=node", "--conntrack-max-per-core=0"}
	for _, test := range []struct {
		name    string
		filter  *specs.LinuxSeccomp
		command []string
	}{
		{"fairlead", nil, []string{programPath, "run", "--mode=nft"}},
		{"kube-proxy", nil, []string{kubeProxyPath, "--proxy-mode=nftables"}},
		{"with the filter of the systemd unit", unitSeccomp(t), []string{programPath, "run", "--mode=nft"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := startContainer(t, test.filter, append(test.command, common...)...)
			c.awaitAnswer()
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.pid()))
			if err != nil {
				t.Fatal(err)
			}
			// CAP_NET_ADMIN is bit 12. Seccomp mode 2 is a filter.
			for _, want := range []string{"CapEff:\t0000000000001000", "CapBnd:\t0000000000001000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
				if !strings.Contains(string(status), want+"\n") {
					t.Errorf("no %q in the status of the process:\n%s", want, status)
				}
			}
			c.inspect()
			if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			select {
			case <-c.done:
			case <-time.After(waitTimeout):
				t.Fatal("SIGTERM does not end the container")
			}
			if code := c.cmd.ProcessState.ExitCode(); code != 0 {
				t.Errorf("exit code %d after SIGTERM, want 0", code)
			}
		})
	}
}

// inspect runs commands that show the Services in the container, as `kubectl exec` does.
func (c *container) inspect() {
	c.t.Helper()
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"get", "services", "web"}, "10.96.0.10:80/TCP"},
		{[]string{"get", "endpoints", "web", "-o", "json"}, `"state": "Ready"`},
		{[]string{"get", "services", "-l", "app=none"}, "No resources found"},
		{[]string{"__complete", "get", "services", "w"}, "web\n"},
	} {
		command := slices.Concat(c.args, []string{"exec", c.id, programPath}, test.args)
		out, err := exec.CommandContext(c.t.Context(), "runc", command...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), test.want) {
			c.t.Errorf("fairlead %s: error %v, output\n%s\nwant %q", strings.Join(test.args, " "), err, out, test.want)
		}
	}
}

// pid returns the process ID of the container's program on this machine.
func (c *container) pid() int {
	c.t.Helper()
	out, err := exec.CommandContext(c.t.Context(), "runc", append(c.args, "state", c.id)...).Output()
	var state specs.State
	if err == nil {
		err = json.Unmarshal(out, &state)
	}
	if err != nil {
		c.t.Fatalf("runc state: %v", err)
	}
	return state.Pid
}
