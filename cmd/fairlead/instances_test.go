package main

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// startStandby starts another instance on the node and waits until it is on standby.
func (n *testNode) startStandby(args ...string) *process {
	n.t.Helper()
	p := n.start(nil, append(n.runArgs(), args...)...)
	p.awaitLog(func(r record) bool { return strings.HasPrefix(r.Msg, "another Fairlead programs this node") })
	return p
}

// awaitMetric waits until the metrics server on the address returns this line.
func (n *testNode) awaitMetric(address, line string) {
	n.t.Helper()
	n.awaitGet(n.Node, address, "/metrics", http.StatusOK, "\n"+line+"\n")
}

// TestStandby checks that a second instance does not program the kernel while the first one runs,
// and that it takes over with all changes when the first one has exited or was killed.
func TestStandby(t *testing.T) {
	t.Parallel()
	const ownMetrics = "127.0.0.1:20249"
	for name, test := range map[string]struct {
		signal syscall.Signal
		args   []string // of the second instance
	}{
		"stopped": {syscall.SIGTERM, []string{"--metrics-bind-address=" + ownMetrics}},
		"killed":  {syscall.SIGKILL, []string{"--bind-address-hard-fail"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t, "a", "b")
			n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
			n.writePods("backend", "a")
			n.run()
			n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
			established := n.openConns(agenttest.ServiceAddrs(10, 80))
			stop := n.keepConnecting(agenttest.ServiceAddrs(10, 80))
			generation := n.generation()
			first, second := n.program, n.startStandby(test.args...)
			n.awaitMetric("127.0.0.1:10249", "fairlead_standby 0")
			n.awaitMetric("127.0.0.1:10249", "fairlead_waiting_instances 1")
			metrics := "127.0.0.1:10249"
			if name == "stopped" {
				metrics = ownMetrics
				n.awaitMetric(metrics, "fairlead_standby 1")
			}
			time.Sleep(200 * time.Millisecond) // time for an unwanted commit
			if got := n.generation(); got != generation {
				t.Errorf("%d commits to the ruleset after the second instance started, want none", got-generation)
			}

			// Both instances watch the files, and only the first one programs changes.
			n.writePods("backend", "b")
			n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a", "b")
			if err := first.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			n.removeFile("pod-a.yaml")
			time.Sleep(100 * time.Millisecond)
			began := time.Now()
			if err := errors.Join(first.cmd.Process.Signal(test.signal), first.cmd.Process.Signal(syscall.SIGCONT)); err != nil {
				t.Fatal(err)
			}
			n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "b")
			t.Logf("time from the signal until the second instance's change took effect: %s", time.Since(began))
			first.wait()
			second.awaitLog(func(r record) bool { return strings.HasPrefix(r.Msg, "the other Fairlead has exited") })
			second.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
			n.awaitMetric(metrics, "fairlead_standby 0")
			n.awaitGet(n.Node, "127.0.0.1:10256", "/livez", http.StatusOK, "")
			agenttest.Eventually(t, func() error {
				_, err := n.lookup("ip4", "backend")
				return err
			})
			stop()
			established.checkOpen(t)
			n.program = second
			n.stop()
		})
	}
}

// TestConsecutiveTakeovers checks that clients can always connect while one instance after the other
// takes over.
func TestConsecutiveTakeovers(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a", "b")
	n.run()
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a", "b")
	stop := n.keepConnecting(agenttest.ServiceAddrs(10, 80))
	ruleset := n.ruleset()
	for i := range 6 {
		next := n.startStandby()
		signal := []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}[i%2]
		if err := n.program.cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		next.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
		n.program = next
	}
	stop()
	if got := n.ruleset(); !slices.Equal(got, ruleset) {
		t.Error("the ruleset differs from the first instance's")
	}
}
