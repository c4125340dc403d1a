package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// conntrackSysctls returns the settings of connection tracking of the node's namespace.
func (n *testNode) conntrackSysctls() map[string]string {
	n.t.Helper()
	values := map[string]string{}
	for _, name := range []string{"tcp_timeout_established", "tcp_timeout_close_wait", "tcp_be_liberal", "udp_timeout", "udp_timeout_stream"} {
		// Do runs the function on a thread of the namespace, which the file depends on.
		if err := n.Node.Do(func() error {
			text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_" + name)
			values[name] = strings.TrimSpace(string(text))
			return err
		}); err != nil {
			n.t.Fatal(err)
		}
	}
	return values
}

// awaitConntrackSysctls waits for these values and the kernel's defaults of the other settings.
func (n *testNode) awaitConntrackSysctls(want map[string]string) {
	n.t.Helper()
	all := map[string]string{
		"tcp_timeout_established": "432000", "tcp_timeout_close_wait": "60", "tcp_be_liberal": "0", "udp_timeout": "30", "udp_timeout_stream": "120",
	}
	maps.Copy(all, want)
	agenttest.Eventually(n.t, func() error {
		if diff := cmp.Diff(all, n.conntrackSysctls()); diff != "" {
			return fmt.Errorf("sysctls (-want +got):\n%s", diff)
		}
		return nil
	})
}

// TestConntrackSettings checks that the program applies the settings at the start and after a change
// of the configuration file.
func TestConntrackSettings(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.awaitConntrackSysctls(nil)
	path := filepath.Join(t.TempDir(), "config.conf")
	write := func(conntrack string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(configHeader+"conntrack: {maxPerCore: 0"+conntrack+"}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	n.program = n.start(nil, "run", "--manifests="+n.folder, "--config="+path, "--log-format=json")
	n.awaitConntrackSysctls(map[string]string{"tcp_timeout_established": "86400", "tcp_timeout_close_wait": "3600"})
	write(", tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 90s, tcpBeLiberal: true, udpTimeout: 40s, udpStreamTimeout: 3m")
	n.awaitConntrackSysctls(map[string]string{
		"tcp_timeout_established": "86400", "tcp_timeout_close_wait": "90", "tcp_be_liberal": "1", "udp_timeout": "40", "udp_timeout_stream": "180",
	})
	write(", tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 91s")
	n.awaitConntrackSysctls(map[string]string{
		"tcp_timeout_established": "86400", "tcp_timeout_close_wait": "91", "tcp_be_liberal": "1", "udp_timeout": "40", "udp_timeout_stream": "180",
	})
}

// TestConntrackSettingsDenied checks that without the privileges, one warning names the settings and
// Services work.
func TestConntrackSettingsDenied(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	// The maximum belongs to the host, so writing it fails in every other namespace.
	n.program = n.start(nil, append(n.runArgs(), "--conntrack-max-per-core=1000000", "--conntrack-tcp-timeout-established=0")...)
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	n.awaitConntrackSysctls(map[string]string{"tcp_timeout_close_wait": "3600"})
	const msg = "connection-tracking settings were not applied"
	n.program.awaitLog(func(r record) bool { return r.Msg == msg })
	n.stop()
	log := n.program.log.String()
	for _, want := range []string{"net.netfilter.nf_conntrack_max=", "--init-only"} {
		if !strings.Contains(log, want) {
			t.Errorf("no %q in the log", want)
		}
	}
	if count := strings.Count(log, msg); count != 1 {
		t.Errorf("%d warnings, want 1", count)
	}
}

// TestInitOnly checks that --init-only applies the settings of connection tracking, programs nothing
// and fails if it cannot apply a setting.
func TestInitOnly(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	code, stderr := n.runOnce(asNobody(), append(n.runArgs(), "--init-only")...)
	if code != 1 || !strings.Contains(stderr, "fairlead: connection-tracking settings: cannot set net.netfilter.nf_conntrack_tcp_timeout_established=86400 (is 432000): ") ||
		!strings.Contains(stderr, "nf_conntrack_tcp_timeout_close_wait=3600 (is 60): ") {
		t.Errorf("without privileges: exit code %d, output %q", code, stderr)
	}
	code, stderr = n.runOnce(asNobody(), append(n.runArgs(), "--init-only", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")...)
	if code != 0 || !strings.Contains(stderr, "the mode needs no initialization") {
		t.Errorf("nothing to do: exit code %d, output %q", code, stderr)
	}
	n.awaitConntrackSysctls(nil)
	code, stderr = n.runOnce(nil, append(n.runArgs(), "--init-only")...)
	if code != 0 || !strings.Contains(stderr, "connection-tracking settings applied") {
		t.Errorf("exit code %d, output %q", code, stderr)
	}
	n.awaitConntrackSysctls(map[string]string{"tcp_timeout_established": "86400", "tcp_timeout_close_wait": "3600"})
	if code, stderr := n.runOnce(asNobody(), append(n.runArgs(), "--init-only")...); code != 0 {
		t.Errorf("settings already correct: exit code %d, output %q", code, stderr)
	}
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("ruleset after --init-only:\n%s", listing)
	}
}

// TestCloseWaitTimeout checks with a connection through a Service that the kernel uses the timeout of
// TCP connections in the state CLOSE_WAIT, as Kubernetes' end-to-end test does.
func TestCloseWaitTimeout(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	pod := n.PodT(t, "a")
	server := pod.ServeT(t, nettest.TCP, podPort)
	n.pods["a"] = pod
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 81))
	n.writePods("backend", "a")
	n.run()
	addrs := agenttest.ServiceAddrs(10, 81)
	for _, addr := range addrs {
		agenttest.Eventually(t, func() error {
			conn, err := n.client.Open(t.Context(), nettest.TCP, addr)
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = conn.Close() })
			_, err = conn.Ask(t.Context())
			return err
		})
	}
	// The server's end closes, the client's end stays open.
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	agenttest.Eventually(t, func() error {
		var entries string
		if err := n.Node.Do(func() error {
			text, err := os.ReadFile("/proc/thread-self/net/nf_conntrack")
			entries = string(text)
			return err
		}); err != nil {
			return err
		}
		closeWait := 0
		for line := range strings.Lines(entries) {
			// ipv4 2 tcp 6 3599 CLOSE_WAIT src=10.244.0.2 dst=10.96.0.10 sport=43210 dport=81 ...
			fields := strings.Fields(line)
			if len(fields) < 6 || fields[5] != "CLOSE_WAIT" || !strings.Contains(line, " dport=81 ") {
				continue
			}
			closeWait++
			if seconds, err := strconv.Atoi(fields[4]); err != nil || seconds < 3000 || seconds > 3600 {
				return fmt.Errorf("timeout of %s s, want 3600 s: %s", fields[4], line)
			}
		}
		if closeWait < len(addrs) {
			return fmt.Errorf("%d entries in the state CLOSE_WAIT, want %d:\n%s", closeWait, len(addrs), entries)
		}
		return nil
	})
}
