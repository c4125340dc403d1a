package main

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// TestOwnTable checks that other processes cannot change tables that an instance owns. Connections
// must continue when an instance becomes the owner of existing tables, when it is killed, and when
// the next instance becomes the owner.
func TestOwnTable(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	backend := agenttest.ServiceAddrs(10, 80)
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a", "b")
	n.run()
	n.awaitAnswers(backend, "a", "b")
	established := n.openConns(backend)
	stop := n.keepConnecting(backend)

	n.stop()
	started := func(r record) bool { return r.Msg == "committed" && r.Reason == "start" }
	n.program = n.start(nil, append(n.runArgs(), "--nft-own-table")...)
	n.program.awaitLog(started)
	if strings.Contains(n.program.log.String(), "a setting has no effect") {
		t.Skip("this kernel is older than Linux 6.9")
	}
	n.nft("flush", "ruleset")
	code, stderr := n.runOnce(nil, "cleanup", "--force")
	want := fmt.Sprintf("table ip fairlead belongs to process %d (", n.program.cmd.Process.Pid)
	if code != 1 || !strings.Contains(stderr, want) || !strings.Contains(stderr, "stop that process first") {
		t.Errorf("cleanup --force: exit code %d, output %q; want 1 and %q", code, stderr, want)
	}

	next := n.startStandby("--nft-own-table")
	if err := n.program.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	next.awaitLog(started)
	n.program.wait()
	n.program = next
	n.nft("flush", "ruleset")
	n.removeFile("pod-a.yaml")
	n.awaitAnswers(backend, "b")

	n.stop()
	n.run()
	n.nft("insert", "rule", "ip", "fairlead", "filter-forward", "counter")
	n.awaitAnswers(backend, "b")
	established.checkOpen(t)
	stop()
	for _, r := range append(next.log.records(), n.program.log.records()...) {
		if r.Msg == "rebuilding table" || r.Msg == "dataplane call failed" {
			t.Errorf("logged: %+v", r)
		}
	}

	n.stop()
	if code, stderr := n.runOnce(nil, "cleanup", "--force"); code != 0 || stderr != "" {
		t.Errorf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
	}
	n.awaitGone(backend)
}
