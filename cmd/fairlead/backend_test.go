package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/ipvs"
)

// createIPVSTables is what an ended program of the mode ipvs leaves in nftables, as far as
// its name goes.
const createIPVSTables = "add table ip " + ipvs.TableName + "; add table ip6 " + ipvs.TableName

// The mode nft removes the other's tables once it has programmed its own, and
// `fairlead cleanup` removes both, on a kernel without IPVS as well.
func TestNFTRemovesIPVSTables(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.nft(createIPVSTables)
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.program.awaitLog(func(r record) bool { return r.Msg == "nothing that another mode has programmed is left" })
	if listing := n.nft("list", "tables"); strings.Contains(listing, ipvs.TableName) || !strings.Contains(listing, "table ip fairlead\n") {
		t.Errorf("the tables are:\n%s", listing)
	}
	n.awaitAnswers(serviceAddrs(10, 80), "a")
	n.stop()
	n.nft(createIPVSTables)
	if code, stderr := n.runOnce(nil, "cleanup"); code != 0 || stderr != "" {
		t.Errorf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
	}
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("cleanup left:\n%s", listing)
	}
}

// The mode ipvs either programs the kernel, or ends at once and says what the
// kernel lacks.
func TestModeIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	args := append(n.runArgs(), "--mode=ipvs")
	n.program = n.start(nil, args...)
	has := false
	eventually(t, func() error {
		has = slices.ContainsFunc(n.program.log.records(), func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
		select {
		case <-n.program.ended:
			return nil
		default:
		}
		if !has {
			return errors.New("neither")
		}
		return nil
	})
	if has {
		n.awaitAnswers(serviceAddrs(10, 80), "a")
		n.awaitGet(n.Node, "127.0.0.1:10249", "/proxyMode", 200, "ipvs")
		n.stop()
		return
	}
	lacks := func(code int, stderr string) {
		t.Helper()
		last := stderr[strings.LastIndex(strings.TrimSpace(stderr), "\n")+1:]
		if code != 1 || !strings.HasPrefix(last, "fairlead: --mode=ipvs: the kernel does not support mode ipvs: ") ||
			!strings.Contains(last, "ip_vs") && !strings.Contains(last, "dummy") {
			t.Errorf("exit code %d, output %q; want 1, and which module is missing", code, stderr)
		}
	}
	lacks(n.program.wait(), n.program.log.String())
	lacks(n.runOnce(nil, append(args, "--init-only")...))
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("the ruleset has:\n%s", listing)
	}
}

// An annotation that the mode can't follow is told of, and the Service is served.
func TestSchedulerWithoutIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", strings.Replace(serviceYAML("backend", 10, 80), "name: backend\n",
		"name: backend\n  annotations: {fairlead.io/ipvs-scheduler: lc}\n", 1))
	n.writePods("backend", "a")
	n.run()
	n.program.awaitLog(func(r record) bool { return r.Msg == "Service can't be carried out as written" && r.Level == "WARN" })
	n.awaitAnswers(serviceAddrs(10, 80), "a")
}
