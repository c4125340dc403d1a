package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// diff runs fairlead diff on the node and expects an exit code.
func (n *testNode) diff(wantCode int, args ...string) string {
	n.t.Helper()
	code, out := n.runOnce(nil, append([]string{diffName}, args...)...)
	if code != wantCode {
		n.t.Errorf("fairlead diff %s: exit code %d, want %d; output:\n%s", strings.Join(args, " "), code, wantCode, out)
	}
	return out
}

// wantLines fails the test unless the output has all lines, in this order.
func wantLines(t *testing.T, out string, lines ...string) {
	t.Helper()
	rest := slices.Collect(strings.Lines(out))
	for _, want := range lines {
		i := slices.IndexFunc(rest, func(line string) bool { return strings.HasPrefix(line, want) })
		if i < 0 {
			t.Errorf("no line %q, or not in this order, in:\n%s", want, out)
			return
		}
		rest = rest[i+1:]
	}
}

// TestDiff compares a node with the settings of the running Fairlead, and after Fairlead has ended.
func TestDiff(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	if out := n.diff(exitDiffFailed); !strings.Contains(out, "pass the flags of `fairlead run`") {
		t.Errorf("without flags and without Fairlead:\n%s", out)
	}
	n.run()
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	if out := n.diff(0); out != "" {
		t.Errorf("programmed: differences:\n%s", out)
	}
	n.stop()

	args := n.runArgs()[1:]
	if out := n.diff(0, args...); out != "" {
		t.Errorf("after Fairlead has ended: differences:\n%s", out)
	}
	set, key, _ := n.endpointElement("10.96.0.10", "a")
	n.nft("delete element ip fairlead " + set + " { " + key + " }; add chain ip fairlead mine; " +
		"flush set ip fairlead pod-cidrs; add element ip fairlead services { 10.96.7.7 . tcp . 80 : 0:0 }")
	out := n.diff(exitDifferences, args...)
	addr := n.pods["a"].IPv4.String()
	wantLines(t, out,
		"Service (unknown): unexpected", "-   10.96.7.7:80/TCP",
		"Service default/backend:tcp: different", "    10.96.0.10:80/TCP", "+     endpoints: "+addr+":8080 local  # EndpointSlice backend-",
		"chain mine in table ip fairlead: unexpected", "set pod-cidrs in table ip fairlead: different", "+   "+n.PodCIDRs[0].String())

	n.writePods("backend", "b")
	n.writeFile("pod-a.yaml", n.podYAML("backend", "a", false))
	out = n.diff(exitDifferences, append(args, "-o", "json")...)
	var report diffReport
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("%v in:\n%s", err, out)
	}
	found := false
	for _, s := range report.Services {
		for _, f := range s.Fields {
			for _, v := range f.Have {
				found = found || s.Service == "default/backend:udp" && v.Value == addr+":8080 local" && strings.Contains(v.Reason, "conditions.ready is false")
			}
		}
	}
	if !found {
		t.Errorf("no endpoint %s with its reason in:\n%s", addr, out)
	}
	n.diff(exitDiffFailed, "--manifests="+filepath.Join(n.folder, "missing"))
	n.diff(exitDiffFailed, "--unknown")
}

// TestDryRun checks that a dry run describes a start and changes neither the ruleset, nor sysctls, nor
// connections.
func TestDryRun(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	// Rules of kube-proxy, and a flow that a start deletes.
	n.nft("add table ip kube-proxy; add chain ip kube-proxy nat { type nat hook prerouting priority -100; }; " +
		"add rule ip kube-proxy nat udp dport 80 dnat to 192.0.2.77:80")
	_, _ = connect(t.Context(), n.client, nettest.UDP, agenttest.ServiceAddrs(10, 80)[0]) // the endpoint does not exist
	const timeout = "net/netfilter/nf_conntrack_tcp_timeout_close_wait"
	before := struct {
		generation         uint32
		sysctls, conntrack string
	}{n.generation(), n.sysctls(), n.flows()}
	if !strings.Contains(before.conntrack, "10.96.0.10") {
		t.Fatalf("no flow to the Service in:\n%s", before.conntrack)
	}
	args := append(n.runArgs(), "--dry-run", "--conntrack-tcp-timeout-close-wait=1234s")
	code, out := n.runOnce(nil, args...)
	if code != 0 {
		t.Fatalf("exit code %d; output:\n%s", code, out)
	}
	wantLines(t, out,
		"Service default/backend:tcp: missing", "+   10.96.0.10:80/TCP", "+     endpoints: "+n.pods["a"].IPv4.String(),
		"table ip fairlead: missing", "sysctl "+strings.ReplaceAll(timeout, "/", "."), "+   1234",
		"dry run: nothing was written", "mode nft, 2 Service ports with 4 frontends: 2 to add, 0 to change, 0 to remove",
		"elements: ", "sysctls: ", "rules of another Service proxy: kube-proxy's mode nftables")
	if after := n.generation(); after != before.generation {
		t.Errorf("the dry run has changed the ruleset from generation %d to %d", before.generation, after)
	}
	if after := n.sysctls(); after != before.sysctls {
		t.Errorf("the dry run has changed sysctls: before:\n%s\nafter:\n%s", before.sysctls, after)
	}
	if after := n.flows(); after != before.conntrack {
		t.Errorf("the dry run has changed connections: before:\n%s\nafter:\n%s", before.conntrack, after)
	}
	for _, flag := range []string{"--init-only", "--cleanup", "--write-config-to=/nonexistent/file"} {
		if code, out := n.runOnce(nil, append(n.runArgs(), "--dry-run", flag)...); code != 1 || !strings.Contains(out, "cannot be combined") {
			t.Errorf("--dry-run %s: exit code %d, output:\n%s", flag, code, out)
		}
	}
}

// flows returns the UDP entries of the node's connection tracking without their timeouts.
func (n *testNode) flows() string {
	n.t.Helper()
	var content []byte
	if err := n.Node.Do(func() (err error) {
		content, err = os.ReadFile("/proc/thread-self/net/nf_conntrack")
		return err
	}); err != nil {
		n.t.Fatal(err)
	}
	var flows []string
	for line := range strings.Lines(string(content)) {
		if _, flow, ok := strings.Cut(line, " src="); ok && strings.Contains(line, " udp ") {
			flows = append(flows, flow)
		}
	}
	slices.Sort(flows)
	return strings.Join(flows, "")
}

// sysctls returns the sysctls of the network namespace that Fairlead or kube-proxy set.
func (n *testNode) sysctls() string {
	n.t.Helper()
	return n.command("sysctl", "-a", "-r", `^net\.(netfilter\.nf_conntrack_(max|tcp|udp|buckets)|ipv4\.(ip_forward|vs)|ipv4\.conf\.(all|default)\.)`)
}

// TestDiffWatch checks that --watch prints differences when they appear and when they are gone.
func TestDiffWatch(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.run()
	n.stop()
	watch := n.start(nil, append([]string{diffName, "--watch"}, n.runArgs()[1:]...)...)
	await := func(lines ...string) {
		t.Helper()
		agenttest.Eventually(t, func() error {
			rest := watch.log.String()
			for _, line := range lines {
				_, after, found := strings.Cut(rest, line)
				if !found {
					return fmt.Errorf("no %q, or not in this order, in:\n%s", line, watch.log.String())
				}
				rest = after
			}
			return nil
		})
	}
	await(": no differences\n")
	n.writePods("backend", "a")
	await(": no differences\n", ": differences in 2 Service ports and ", "Service default/backend:tcp: different\n")
	n.removeFile("pod-a.yaml")
	await(": no differences\n", ": differences in 2 Service ports and ", ": no differences\n")
	if err := watch.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := watch.wait(); code != 0 {
		t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
}
