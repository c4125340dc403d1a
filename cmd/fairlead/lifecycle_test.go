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

// opened are connections that are established.
type opened []*nettest.Conn

// open opens a TCP connection to each of the addresses.
func (n *node) open(addrs []netip.AddrPort) opened {
	n.t.Helper()
	var conns opened
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

// check fails the test if one of the connections does not work any more.
func (conns opened) check(t *testing.T) {
	t.Helper()
	for _, c := range conns {
		if _, err := c.Ask(t.Context()); err != nil {
			t.Errorf("an established connection: %v", err)
		}
	}
}

// A node loses nothing while the program is stopped, and nothing when it
// starts again.
func TestRestart(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a", "b")
	backend := vips(10, 80)
	n.put("backend.yaml", serviceYAML("backend", 10, 80))
	n.put("empty.yaml", serviceYAML("empty", 11, 80))
	n.put("automatic.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: automatic}\nspec: {selector: {app: backend}, ports: [{port: 80, targetPort: web}]}\n")
	n.putPods("backend", "a", "b")
	n.run()
	n.awaitAnswers(backend, "a", "b")
	established := n.open(backend)
	stop := n.keepConnecting(backend)
	ruleset, generation := n.ruleset(), n.generation()

	n.stop()
	if diff := cmp.Diff(ruleset, n.ruleset()); diff != "" {
		t.Errorf("the ruleset after SIGTERM (-before +after):\n%s", diff)
	}
	n.awaitAnswers(backend, "a", "b")
	n.awaitRefused(vips(11, 80))
	established.check(t)

	n.run()
	if diff := cmp.Diff(ruleset, n.ruleset()); diff != "" {
		t.Errorf("the ruleset after the restart (-before +after):\n%s", diff)
	}
	if got := n.generation(); got != generation {
		t.Errorf("the ruleset saw %d commits while the program stopped and started, want none", got-generation)
	}
	established.check(t)
	n.awaitAnswers(backend, "a", "b")
	stop()

	// It is in charge again.
	n.drop("pod-a.yaml")
	n.awaitAnswers(backend, "b")
	established.check(t) // a removed Pod's connections end when it does
}

// What changed while the program was down is made up for, and only that.
func TestRestartWithOtherFiles(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a", "b", "c")
	n.put("stays.yaml", serviceYAML("stays", 1, 80))
	n.put("goes.yaml", strings.Replace(serviceYAML("goes", 2, 80), "app: goes", "app: stays", 1))
	n.put("changes.yaml", serviceYAML("changes", 3, 80))
	n.putPods("stays", "a")
	n.putPods("changes", "b")
	n.run()
	n.awaitAnswers(vips(1, 80), "a")
	n.awaitAnswers(vips(3, 80), "b")
	stop := n.keepConnecting(slices.Concat(vips(1, 80), vips(3, 80)))

	n.stop()
	n.drop("goes.yaml")
	n.drop("pod-b.yaml")
	n.putPods("changes", "c")
	n.put("comes.yaml", strings.Replace(serviceYAML("comes", 4, 80), "app: comes", "app: stays", 1))
	// Nobody watches; and somebody else has been at it.
	n.nft("delete element ip fairlead services { 10.96.0.2 . udp . 80 }")

	n.run()
	n.awaitAnswers(vips(1, 80), "a")
	n.awaitGone(vips(2, 80))
	n.awaitAnswers(vips(3, 80), "c")
	n.awaitAnswers(vips(4, 80), "a")
	stop()

	// A Service that is gone leaves nothing.
	if listing := n.nft("list", "ruleset"); strings.Contains(listing, "10.96.0.2 ") || strings.Contains(listing, "fd00:10:96::2 ") {
		t.Errorf("the ruleset still has the deleted Service:\n%s", listing)
	}
}

// SIGTERM comes at any time, also before the program has come to anything.
func TestStopEarly(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a")
	n.put("backend.yaml", serviceYAML("backend", 10, 80))
	n.putPods("backend", "a")
	n.program = n.start(nil, n.runArgs()...)
	n.program.await(func(r record) bool { return r.Msg == "running" })
	n.stop()
	// Whether it came to program anything or not, another one makes it whole.
	n.run()
	n.awaitAnswers(vips(10, 80), "a")
	n.stop()
	for _, r := range n.program.log.records() {
		if r.Level != "INFO" {
			t.Errorf("a quiet life, but logged: %+v", r)
		}
	}
}

func TestCleanup(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a")
	n.nft(foreignTables)
	foreign := n.nft("list", "ruleset")
	cleanup := func(args ...string) {
		t.Helper()
		if code, stderr := n.once(nil, append([]string{"cleanup"}, args...)...); code != 0 || stderr != "" {
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

	n.put("backend.yaml", serviceYAML("backend", 10, 80))
	n.putPods("backend", "a")
	n.run()
	n.awaitAnswers(vips(10, 80), "a")

	// Under a program that runs: it would put everything back, and does.
	before, generation := n.ruleset(), n.generation()
	code, stderr := n.once(nil, "cleanup")
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
	n.awaitAnswers(vips(10, 80), "a")

	n.stop()
	cleanup()
	isForeign()
	n.awaitGone(vips(10, 80))

	// Again, with nothing to remove.
	generation = n.generation()
	cleanup()
	isForeign()
	if got := n.generation(); got != generation {
		t.Errorf("the second cleanup made %d commits, want none", got-generation)
	}
}
