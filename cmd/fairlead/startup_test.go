package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

const nobody = 65534

// asNobody returns attributes to run the program as an unprivileged user with these capabilities.
func asNobody(capabilities ...uintptr) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, AmbientCaps: capabilities}
}

// makeFolderReadable makes the folder and its files readable by all users.
func (n *testNode) makeFolderReadable() {
	n.t.Helper()
	for _, folder := range []string{n.folder, filepath.Dir(n.folder)} {
		if err := os.Chmod(folder, 0o755); err != nil { //nolint:gosec // that is the point
			n.t.Fatal(err)
		}
	}
	files, err := os.ReadDir(n.folder)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, file := range files {
		if err := os.Chmod(filepath.Join(n.folder, file.Name()), 0o644); err != nil { //nolint:gosec // that is the point
			n.t.Fatal(err)
		}
	}
}

func TestNotPermitted(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.makeFolderReadable()
	for _, args := range [][]string{{"run", "--manifests=" + n.folder}, {"cleanup"}} {
		code, stderr := n.runOnce(asNobody(), args...)
		const want = "operation not permitted: run as root or with CAP_NET_ADMIN\n"
		if code != 1 || !strings.HasPrefix(stderr, "fairlead: ") || !strings.HasSuffix(stderr, want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s as nobody: exit code %d, output %q; want 1 and one line that ends in %q", args[0], code, stderr, want)
		}
	}
}

// TestCapabilities checks that CAP_NET_ADMIN is sufficient to program the kernel, and
// CAP_NET_BIND_SERVICE to listen on port 53.
func TestCapabilities(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.makeFolderReadable()
	n.program = n.start(asNobody(unix.CAP_NET_ADMIN, unix.CAP_NET_BIND_SERVICE), n.runArgs()...)
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	agenttest.Eventually(t, func() error {
		_, err := n.lookup("ip4", "backend")
		return err
	})
	n.stop()
	if code, stderr := n.runOnce(asNobody(unix.CAP_NET_ADMIN), "cleanup", "--force"); code != 0 || stderr != "" {
		t.Errorf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
	}
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("cleanup left:\n%s", listing)
	}
}

func TestUnreadableFolder(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.makeFolderReadable()
	if err := os.Chmod(n.folder, 0o700); err != nil { //nolint:gosec // a folder
		t.Fatal(err)
	}
	code, stderr := n.runOnce(asNobody(unix.CAP_NET_ADMIN), "run", "--manifests="+n.folder)
	if want := "fairlead: --manifests: read folder " + n.folder + ": permission denied\n"; code != 1 || stderr != want {
		t.Errorf("exit code %d, output %q; want 1 and %q", code, stderr, want)
	}
}

// TestUnreadableFile checks that a file without read permission is reported like an invalid file.
func TestUnreadableFile(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.writeFile("secret.yaml", serviceYAML("secret", 11, 80))
	n.makeFolderReadable()
	if err := os.Chmod(filepath.Join(n.folder, "secret.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.program = n.start(asNobody(unix.CAP_NET_ADMIN), "run", "--manifests="+n.folder, "--log-format=json")
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	n.program.awaitLog(func(r record) bool {
		return r.Error == "secret.yaml:1: cannot be read: permission denied: check its permissions"
	})
}

func TestDNSAddressInUse(t *testing.T) {
	t.Parallel()
	for _, network := range []string{nettest.TCP, nettest.UDP} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t)
			var err error
			var taken interface{ Close() error }
			if network == nettest.TCP {
				taken, err = n.Node.Listen(t.Context(), network, n.dnsAddress())
			} else {
				taken, err = n.Node.ListenPacket(t.Context(), network, n.dnsAddress())
			}
			if err != nil {
				t.Fatal(err)
			}
			defer taken.Close()
			code, stderr := n.runOnce(nil, n.runArgs()...)
			want := "fairlead: --dns-listen: listen for DNS queries: listen " + network + " 192.0.2.1:53: bind: address already in use\n"
			if code != 1 || stderr != want {
				t.Errorf("exit code %d, output %q; want 1 and %q", code, stderr, want)
			}
			if listing := n.nft("list", "ruleset"); listing != "" {
				t.Errorf("ruleset after the failed start:\n%s", listing)
			}
		})
	}
}

func TestDNSAddressOfAnotherNode(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	elsewhere := netip.AddrPortFrom(n.Outside.IPv4, 53)
	code, stderr := n.runOnce(nil, "run", "--manifests="+n.folder, "--dns-listen="+elsewhere.String())
	want := "fairlead: --dns-listen: listen for DNS queries: listen tcp 192.0.2.2:53: bind: cannot assign requested address\n"
	if code != 1 || stderr != want {
		t.Errorf("exit code %d, output %q; want 1 and %q", code, stderr, want)
	}
}

// TestNoServiceCIDR checks that the error for a Service that needs an address names --service-cidr.
func TestNoServiceCIDR(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writeFile("automatic.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: automatic}\nspec: {ports: [{port: 80}]}\n")
	n.writePods("backend", "a")
	n.program = n.start(nil, "run", "--manifests="+n.folder, "--log-format=json")
	n.program.awaitLog(func(r record) bool {
		return r.File == "automatic.yaml" && strings.Contains(r.Error, "spec.clusterIP: ") && strings.Contains(r.Error, "--service-cidr")
	})
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
}
