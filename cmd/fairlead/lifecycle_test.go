package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// connections holds established connections.
type connections []*nettest.Conn

// openConns opens a TCP connection to each address.
func (n *testNode) openConns(addrs []netip.AddrPort) connections {
	n.t.Helper()
	var conns connections
	for _, addr := range addrs {
		c, err := n.client.Open(n.t.Context(), nettest.TCP, addr)
		if err != nil {
			n.t.Fatal(err)
		}
		n.t.Cleanup(func() { _ = c.Close() })
		conns = append(conns, c)
	}
	return conns
}

// checkOpen fails the test if one of the connections no longer works.
func (conns connections) checkOpen(t *testing.T) {
	t.Helper()
	for _, c := range conns {
		if _, err := c.Ask(t.Context()); err != nil {
			t.Errorf("established connection: %v", err)
		}
	}
}

// TestWarmRestart checks that stopping and starting the program does not interrupt connections and
// does not change the ruleset.
func TestWarmRestart(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	backend := agenttest.ServiceAddrs(10, 80)
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writeFile("empty.yaml", serviceYAML("empty", 11, 80))
	n.writeFile("automatic.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: automatic}\nspec: {selector: {app: backend}, ports: [{port: 80, targetPort: web}]}\n")
	n.writePods("backend", "a", "b")
	n.run()
	n.awaitAnswers(backend, "a", "b")
	established := n.openConns(backend)
	stop := n.keepConnecting(backend)
	ruleset, generation := n.ruleset(), n.generation()

	n.stop()
	if diff := cmp.Diff(ruleset, n.ruleset()); diff != "" {
		t.Errorf("ruleset after SIGTERM (-before +after):\n%s", diff)
	}
	n.awaitAnswers(backend, "a", "b")
	n.awaitRefused(agenttest.ServiceAddrs(11, 80))
	established.checkOpen(t)

	n.run()
	if diff := cmp.Diff(ruleset, n.ruleset()); diff != "" {
		t.Errorf("ruleset after the restart (-before +after):\n%s", diff)
	}
	if got := n.generation(); got != generation {
		t.Errorf("%d commits to the ruleset during the restart, want none", got-generation)
	}
	established.checkOpen(t)
	n.awaitAnswers(backend, "a", "b")
	stop()

	// Changes are programmed again.
	n.removeFile("pod-a.yaml")
	n.awaitAnswers(backend, "b")
	established.checkOpen(t) // connections to a removed endpoint stay as long as the pod
}

// TestWarmRestartWithChangedFiles checks that a restart programs the changes made while the program
// was stopped.
func TestRestartWithChangedFiles(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b", "c")
	n.writeFile("stays.yaml", serviceYAML("stays", 1, 80))
	n.writeFile("goes.yaml", strings.Replace(serviceYAML("goes", 2, 80), "app: goes", "app: stays", 1))
	n.writeFile("changes.yaml", serviceYAML("changes", 3, 80))
	n.writePods("stays", "a")
	n.writePods("changes", "b")
	n.run()
	n.awaitAnswers(agenttest.ServiceAddrs(1, 80), "a")
	n.awaitAnswers(agenttest.ServiceAddrs(3, 80), "b")
	stop := n.keepConnecting(slices.Concat(agenttest.ServiceAddrs(1, 80), agenttest.ServiceAddrs(3, 80)))

	n.stop()
	n.removeFile("goes.yaml")
	n.removeFile("pod-b.yaml")
	n.writePods("changes", "c")
	n.writeFile("comes.yaml", strings.Replace(serviceYAML("comes", 4, 80), "app: comes", "app: stays", 1))
	// Another program changes the table as well.
	n.nft("delete element ip fairlead services { 10.96.0.2 . udp . 80 }")

	n.run()
	n.awaitAnswers(agenttest.ServiceAddrs(1, 80), "a")
	n.awaitGone(agenttest.ServiceAddrs(2, 80))
	n.awaitAnswers(agenttest.ServiceAddrs(3, 80), "c")
	n.awaitAnswers(agenttest.ServiceAddrs(4, 80), "a")
	stop()

	// Nothing of the deleted Service remains.
	if listing := n.nft("list", "ruleset"); strings.Contains(listing, "10.96.0.2 ") || strings.Contains(listing, "fd00:10:96::2 ") {
		t.Errorf("ruleset with the deleted Service:\n%s", listing)
	}
}

// TestStopEarly checks SIGTERM before the first commit.
func TestStopEarly(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.program = n.start(nil, n.runArgs()...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "running" })
	n.stop()
	// The next start programs everything, whether or not the first process got to its commit.
	n.run()
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	n.stop()
	for _, r := range n.program.log.records() {
		if r.Level != "INFO" {
			t.Errorf("logged: %+v, want only INFO", r)
		}
	}
}

func TestCleanup(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.nft(agenttest.OtherTables)
	others := n.nft("list", "ruleset")
	cleanup := func(args ...string) {
		t.Helper()
		if code, stderr := n.runOnce(nil, append([]string{"cleanup"}, args...)...); code != 0 || stderr != "" {
			t.Fatalf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
		}
	}
	checkClean := func() {
		t.Helper()
		if diff := cmp.Diff(others, n.nft("list", "ruleset")); diff != "" {
			t.Errorf("ruleset after cleanup (-want +got):\n%s", diff)
		}
	}

	// Nothing to remove.
	cleanup()
	checkClean()

	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")

	// With a running instance, which programs everything again after a forced cleanup.
	before, generation := n.ruleset(), n.generation()
	code, stderr := n.runOnce(nil, "cleanup")
	want := fmt.Sprintf("fairlead: another Fairlead programs this node (PID %d, fairlead %s in mode nft on ", n.program.cmd.Process.Pid, version)
	if code != 1 || !strings.HasPrefix(stderr, want) || !strings.Contains(stderr, "--force") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("cleanup with a running instance: exit code %d, output %q; want 1 and %q", code, stderr, want)
	}
	if got := n.generation(); got != generation {
		t.Errorf("%d commits by the rejected cleanup, want none", got-generation)
	}
	cleanup("--force")
	agenttest.Eventually(t, func() error {
		if !slices.Equal(n.ruleset(), before) {
			return fmt.Errorf("ruleset differs from before:\n%s", n.nft("list", "ruleset"))
		}
		return nil
	})
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")

	n.stop()
	cleanup("--force") // the connections above were UDP flows, too
	checkClean()
	n.awaitGone(agenttest.ServiceAddrs(10, 80))

	// A second cleanup has nothing to remove.
	generation = n.generation()
	cleanup()
	checkClean()
	if got := n.generation(); got != generation {
		t.Errorf("%d commits by the second cleanup, want none", got-generation)
	}
}

// TestExitCodes checks the exit code after each signal that ends the program, and that the rules stay
// in place.
func TestExitCodes(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	// A handler in the test makes the program start with the default action.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP)
	defer signal.Stop(signals)
	for s, want := range map[syscall.Signal]int{syscall.SIGTERM: 0, syscall.SIGINT: 0, syscall.SIGHUP: 129} {
		n.run()
		if err := n.program.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		if code := n.program.wait(); code != want {
			t.Errorf("exit code %d after %s, want %d", code, s, want)
		}
		if n.nft("list", "tables") == "" {
			t.Errorf("no tables after %s", s)
		}
	}
}
