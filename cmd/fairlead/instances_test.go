package main

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startStandby starts a second instance on the node and waits until it knows of the first.
func (n *testNode) startStandby(args ...string) *process {
	n.t.Helper()
	p := n.start(nil, append(n.runArgs(), args...)...)
	p.awaitLog(func(r record) bool { return strings.HasPrefix(r.Msg, "another Fairlead programs this node") })
	return p
}

// awaitMetric waits until the instance that has the metrics' address says so.
func (n *testNode) awaitMetric(address, line string) {
	n.t.Helper()
	n.awaitGet(n.Node, address, "/metrics", http.StatusOK, "\n"+line+"\n")
}

// A second instance writes nothing while the first is there, and takes over with
// what has changed when that one has ended, however it ended.
func TestStandby(t *testing.T) {
	t.Parallel()
	const ownMetrics = "127.0.0.1:20249"
	for name, test := range map[string]struct {
		signal syscall.Signal
		args   []string // of the second
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
			n.awaitAnswers(serviceAddrs(10, 80), "a")
			established := n.openConns(serviceAddrs(10, 80))
			stop := n.keepConnecting(serviceAddrs(10, 80))
			generation := n.generation()
			first, second := n.program, n.startStandby(test.args...)
			n.awaitMetric("127.0.0.1:10249", "fairlead_standby 0")
			n.awaitMetric("127.0.0.1:10249", "fairlead_waiting_instances 1")
			metrics := "127.0.0.1:10249"
			if name == "stopped" {
				metrics = ownMetrics
				n.awaitMetric(metrics, "fairlead_standby 1")
			}
			time.Sleep(200 * time.Millisecond) // in which it would write
			if got := n.generation(); got != generation {
				t.Errorf("the ruleset saw %d commits with a second instance, want none", got-generation)
			}

			// The first follows the files and the second does too, without programming.
			n.writePods("backend", "b")
			n.awaitAnswers(serviceAddrs(10, 80), "a", "b")
			if err := first.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			n.removeFile("pod-a.yaml")
			time.Sleep(100 * time.Millisecond)
			began := time.Now()
			if err := errors.Join(first.cmd.Process.Signal(test.signal), first.cmd.Process.Signal(syscall.SIGCONT)); err != nil {
				t.Fatal(err)
			}
			n.awaitAnswers(serviceAddrs(10, 80), "b")
			t.Logf("the second instance's change was programmed and seen %s after the first one's signal", time.Since(began))
			first.wait()
			second.awaitLog(func(r record) bool { return strings.HasPrefix(r.Msg, "the other Fairlead has ended") })
			second.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
			n.awaitMetric(metrics, "fairlead_standby 0")
			n.awaitGet(n.Node, "127.0.0.1:10256", "/livez", http.StatusOK, "")
			eventually(t, func() error {
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

// One instance after the other takes over while clients connect.
func TestConsecutiveTakeovers(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a", "b")
	n.run()
	n.awaitAnswers(serviceAddrs(10, 80), "a", "b")
	stop := n.keepConnecting(serviceAddrs(10, 80))
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
		t.Error("the ruleset is not what the first instance made")
	}
}
