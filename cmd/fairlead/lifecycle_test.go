package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/nettest"
)

// connections are connections that are established.
type connections []*nettest.Conn

// openConns opens a TCP connection to each of the addresses.
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

// checkOpen fails the test if one of the connections does not work any more.
func (conns connections) checkOpen(t *testing.T) {
	t.Helper()
	for _, c := range conns {
		if _, err := c.Ask(t.Context()); err != nil {
			t.Errorf("an established connection: %v", err)
		}
	}
}

// A node loses nothing while the program is stopped, and nothing when it
// starts again.
func TestWarmRestart(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	backend := serviceAddrs(10, 80)
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
		t.Errorf("the ruleset after SIGTERM (-before +after):\n%s", diff)
	}
	n.awaitAnswers(backend, "a", "b")
	n.awaitRefused(serviceAddrs(11, 80))
	established.checkOpen(t)

	n.run()
	if diff := cmp.Diff(ruleset, n.ruleset()); diff != "" {
		t.Errorf("the ruleset after the restart (-before +after):\n%s", diff)
	}
	if got := n.generation(); got != generation {
		t.Errorf("the ruleset saw %d commits while the program stopped and started, want none", got-generation)
	}
	established.checkOpen(t)
	n.awaitAnswers(backend, "a", "b")
	stop()

	// It is in charge again.
	n.removeFile("pod-a.yaml")
	n.awaitAnswers(backend, "b")
	established.checkOpen(t) // a removed Pod's connections end when it does
}

// What changed while the program was down is made up for, and only that.
func TestRestartWithChangedFiles(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b", "c")
	n.writeFile("stays.yaml", serviceYAML("stays", 1, 80))
	n.writeFile("goes.yaml", strings.Replace(serviceYAML("goes", 2, 80), "app: goes", "app: stays", 1))
	n.writeFile("changes.yaml", serviceYAML("changes", 3, 80))
	n.writePods("stays", "a")
	n.writePods("changes", "b")
	n.run()
	n.awaitAnswers(serviceAddrs(1, 80), "a")
	n.awaitAnswers(serviceAddrs(3, 80), "b")
	stop := n.keepConnecting(slices.Concat(serviceAddrs(1, 80), serviceAddrs(3, 80)))

	n.stop()
	n.removeFile("goes.yaml")
	n.removeFile("pod-b.yaml")
	n.writePods("changes", "c")
	n.writeFile("comes.yaml", strings.Replace(serviceYAML("comes", 4, 80), "app: comes", "app: stays", 1))
	// Nobody watches; and somebody else has been at it.
	n.nft("delete element ip fairlead services { 10.96.0.2 . udp . 80 }")

	n.run()
	n.awaitAnswers(serviceAddrs(1, 80), "a")
	n.awaitGone(serviceAddrs(2, 80))
	n.awaitAnswers(serviceAddrs(3, 80), "c")
	n.awaitAnswers(serviceAddrs(4, 80), "a")
	stop()

	// A Service that is gone leaves nothing.
	if listing := n.nft("list", "ruleset"); strings.Contains(listing, "10.96.0.2 ") || strings.Contains(listing, "fd00:10:96::2 ") {
		t.Errorf("the ruleset still has the deleted Service:\n%s", listing)
	}
}

// SIGTERM comes at any time, also before the program has come to anything.
func TestStopEarly(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.program = n.start(nil, n.runArgs()...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "running" })
	n.stop()
	// Whether it came to program anything or not, another one makes it whole.
	n.run()
	n.awaitAnswers(serviceAddrs(10, 80), "a")
	n.stop()
	for _, r := range n.program.log.records() {
		if r.Level != "INFO" {
			t.Errorf("a quiet life, but logged: %+v", r)
		}
	}
}

func TestCleanup(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.nft(otherTables)
	foreign := n.nft("list", "ruleset")
	cleanup := func(args ...string) {
		t.Helper()
		if code, stderr := n.runOnce(nil, append([]string{"cleanup"}, args...)...); code != 0 || stderr != "" {
			t.Fatalf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
		}
	}
	isForeign := func() {
		t.Helper()
		if diff := cmp.Diff(foreign, n.nft("list", "ruleset")); diff != "" {
			t.Errorf("the ruleset after cleanup (-others' +now):\n%s", diff)
		}
	}

	// Before there was anything.
	cleanup()
	isForeign()

	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.awaitAnswers(serviceAddrs(10, 80), "a")

	// Under a program that runs: it would put everything back, and does.
	before, generation := n.ruleset(), n.generation()
	code, stderr := n.runOnce(nil, "cleanup")
	want := fmt.Sprintf("fairlead: another Fairlead programs this node (PID %d, fairlead %s in mode nft on ", n.program.cmd.Process.Pid, version)
	if code != 1 || !strings.HasPrefix(stderr, want) || !strings.Contains(stderr, "--force") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("cleanup beside another instance: exit code %d, output %q; want 1 and %q", code, stderr, want)
	}
	if got := n.generation(); got != generation {
		t.Errorf("it made %d commits all the same", got-generation)
	}
	cleanup("--force")
	eventually(t, func() error {
		if !slices.Equal(n.ruleset(), before) {
			return fmt.Errorf("the ruleset is:\n%s", n.nft("list", "ruleset"))
		}
		return nil
	})
	n.awaitAnswers(serviceAddrs(10, 80), "a")

	n.stop()
	cleanup()
	isForeign()
	n.awaitGone(serviceAddrs(10, 80))

	// Again, with nothing to remove.
	generation = n.generation()
	cleanup()
	isForeign()
	if got := n.generation(); got != generation {
		t.Errorf("the second cleanup made %d commits, want none", got-generation)
	}
}
