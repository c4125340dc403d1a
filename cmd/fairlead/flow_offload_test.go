package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/flowoffload"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/preflight"
)

// TestFlowOffload checks that connections are offloaded while --flow-offload is set, that another
// program cannot end this, and that a start without the flag and cleanup end it. Connections must
// continue. On a kernel without flowtables, Services must work, and the metrics must report it.
func TestFlowOffload(t *testing.T) {
	t.Parallel()
	const metrics = "127.0.0.1:10249"
	n := newTestNode(t, "a")
	backend := agenttest.ServiceAddrs(10, 80)
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	run := func(args ...string) {
		t.Helper()
		n.program = n.start(nil, append(n.runArgs(), args...)...)
		n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	}
	run("--flow-offload=software", "--flow-offload-threshold=10")
	n.awaitAnswers(backend, "a")
	established := n.openConns(backend)
	if err := flowoffload.Check(nettest.NamespaceT(t).Fd()); errors.Is(err, flowoffload.ErrUnsupported) {
		n.awaitMetric(metrics, "fairlead_flow_offload_ready 0")
		n.program.awaitLog(func(r record) bool { return strings.Contains(r.Msg, "Services are not affected") })
		established.checkOpen(t)
		return
	} else if err != nil {
		t.Fatal(err)
	}
	n.awaitMetric(metrics, "fairlead_flow_offload_ready 1")
	offload := func(connections int) {
		t.Helper()
		for range 20 {
			established.checkOpen(t)
		}
		n.awaitMetric(metrics, fmt.Sprintf("fairlead_flow_offload_connections_total %d", connections))
	}
	awaitTable := func(exists bool) {
		t.Helper()
		agenttest.Eventually(t, func() error {
			if tables := n.nft("list", "tables"); strings.Contains(tables, flowoffload.TableName) != exists {
				return fmt.Errorf("table exists: %t, want %t: %s", !exists, exists, tables)
			}
			return nil
		})
	}
	offload(len(backend))
	n.awaitMetric(metrics, fmt.Sprintf("fairlead_flow_offload_active_connections %d", len(backend)))
	n.nft("flush", "ruleset")
	awaitTable(true)
	n.awaitAnswers(backend, "a")
	established = append(established, n.openConns(backend)...)
	for range 20 {
		established.checkOpen(t)
	}
	n.stop()
	awaitTable(true)
	run()
	awaitTable(false)
	established.checkOpen(t)
	n.stop()
	run("--flow-offload=software", "--flow-offload-threshold=10")
	offload(len(established))
	n.stop()
	if code, stderr := n.runOnce(nil, "cleanup", "--force"); code != 0 || stderr != "" {
		t.Errorf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
	}
	awaitTable(false)
}

// TestInitOnlyFlowOffload checks that --init-only prepares flowtables without a change of the node's
// rules, and that a kernel without flowtables does not keep the node from starting.
func TestInitOnlyFlowOffload(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	want := "the kernel supports flowtables"
	if err := flowoffload.Check(nettest.NamespaceT(t).Fd()); errors.Is(err, flowoffload.ErrUnsupported) {
		want = "connections will not be offloaded to a flowtable; Services are not affected"
	} else if err != nil {
		t.Fatal(err)
	}
	code, stderr := n.runOnce(nil, append(n.runArgs(), "--init-only", "--flow-offload=software")...)
	if code != 0 || !strings.Contains(stderr, want) {
		t.Errorf("exit code %d, output %q, want %q", code, stderr, want)
	}
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("ruleset after --init-only:\n%s", listing)
	}
}

// TestCheckFlowOffload checks what `fairlead check` says about kernels without flowtables, and about kernels
// that do not offload UDP.
func TestCheckFlowOffload(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	r := n.check("--flow-offload=software")
	err := flowoffload.Check(nettest.NamespaceT(t).Fd())
	udp, udpErr := flowoffload.OffloadsUDP()
	if udpErr != nil {
		t.Fatal(udpErr)
	}
	switch {
	case errors.Is(err, flowoffload.ErrUnsupported):
		r.expect("flow-offload", preflight.Warning, "would not be offloaded", "remove --flow-offload")
	case err != nil:
		t.Fatal(err)
	default:
		r.expect("flow-offload", preflight.OK, "a flowtable was created")
	}
	tcpOnly := slices.ContainsFunc(r.Findings, func(f preflight.Finding) bool {
		return f.Check == "flow-offload" && f.Status == preflight.Info && strings.Contains(f.Message, "only TCP")
	})
	if want := err == nil && !udp; tcpOnly != want {
		t.Errorf("the check says that only TCP is offloaded: %t, want %t; findings %+v", tcpOnly, want, r.Findings)
	}
}
