package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/ipvs"
)

// createIPVSTables are nft commands that create the tables that ipvs mode leaves behind, without
// their content.
const createIPVSTables = "add table ip " + ipvs.TableName + "; add table ip6 " + ipvs.TableName

// TestNFTRemovesIPVSTables checks that nft mode removes the tables of ipvs mode once it has
// programmed its own, and that `fairlead cleanup` removes both. It needs no IPVS in the kernel.
func TestNFTRemovesIPVSTables(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.nft(createIPVSTables)
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.program.awaitLog(func(r record) bool { return r.Msg == "no kernel state of another mode remains" })
	if listing := n.nft("list", "tables"); strings.Contains(listing, ipvs.TableName) || !strings.Contains(listing, "table ip fairlead\n") {
		t.Errorf("tables:\n%s", listing)
	}
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	n.stop()
	n.nft(createIPVSTables)
	if code, stderr := n.runOnce(nil, "cleanup", "--force"); code != 0 || stderr != "" {
		t.Errorf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
	}
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("cleanup left:\n%s", listing)
	}
}

// TestModeIPVS checks that ipvs mode either programs the kernel, or exits at once and names the
// missing kernel module.
func TestModeIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	args := append(n.runArgs(), "--mode=ipvs")
	n.program = n.start(nil, args...)
	supported := false
	agenttest.Eventually(t, func() error {
		supported = slices.ContainsFunc(n.program.log.records(), func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
		select {
		case <-n.program.ended:
			return nil
		default:
		}
		if !supported {
			return errors.New("the process has neither committed nor exited")
		}
		return nil
	})
	if supported {
		n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
		n.awaitGet(n.Node, "127.0.0.1:10249", "/proxyMode", 200, "ipvs")
		n.stop()
		return
	}
	checkUnsupported := func(code int, stderr string) {
		t.Helper()
		last := stderr[strings.LastIndex(strings.TrimSpace(stderr), "\n")+1:]
		if code != 1 || !strings.HasPrefix(last, "fairlead: --mode=ipvs: the kernel does not support mode ipvs: ") ||
			!strings.Contains(last, "ip_vs") && !strings.Contains(last, "dummy") {
			t.Errorf("exit code %d, output %q; want 1 and the missing module", code, stderr)
		}
	}
	checkUnsupported(n.program.wait(), n.program.log.String())
	checkUnsupported(n.runOnce(nil, append(args, "--init-only")...))
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("ruleset in an unsupported mode:\n%s", listing)
	}
}

// TestSchedulerWithoutIPVS checks that nft mode logs a warning for a scheduler annotation and
// programs the Service.
func TestSchedulerWithoutIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", strings.Replace(serviceYAML("backend", 10, 80), "name: backend\n",
		"name: backend\n  annotations: {fairlead.io/ipvs-scheduler: lc}\n", 1))
	n.writePods("backend", "a")
	n.run()
	n.program.awaitLog(func(r record) bool { return r.Msg == "Service cannot be programmed as written" && r.Level == "WARN" })
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
}

// TestBalancing checks that a change of a Service's annotation takes effect in nft mode, that an
// impossible value is logged, and that a restart and `fairlead diff` find nothing to change.
func TestBalancing(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	write := func(value string) {
		n.writeFile("backend.yaml", strings.Replace(serviceYAML("backend", 10, 80), "name: backend\n",
			"name: backend\n  annotations: {fairlead.io/balancing: "+value+"}\n", 1))
	}
	await := func(rule string, answers ...string) {
		t.Helper()
		agenttest.Eventually(t, func() error {
			if listing := n.nft("list", "ruleset"); !strings.Contains(listing, rule) {
				return fmt.Errorf("the ruleset does not contain %q", rule)
			}
			return nil
		})
		if len(answers) > 0 { // a source hash selects one endpoint for the client
			n.awaitAnswers(agenttest.ServiceAddrs(10, 80), answers...)
		}
		if out := n.diff(0); out != "" {
			t.Errorf("%s: differences:\n%s", rule, out)
		}
	}
	write("round-robin")
	n.writePods("backend", "a", "b")
	n.run()
	await("numgen inc mod 2", "a", "b")
	write("source-hash")
	await("jhash ip6 saddr mod 1024")
	n.stop()
	n.run()
	await("jhash ip saddr mod 1024")
	write("least-connections")
	n.program.awaitLog(func(r record) bool { return r.Msg == "Service cannot be programmed as written" && r.Level == "WARN" })
	await("numgen random mod 2", "a", "b")
}
