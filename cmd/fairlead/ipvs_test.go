//go:build ipvs

package main

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/ipvs"
)

// runIPVS starts the program in ipvs mode and waits until it has programmed the node and removed
// the kernel state of nft mode.
func (n *testNode) runIPVS(args ...string) {
	n.t.Helper()
	n.program = n.start(nil, slices.Concat(n.runArgs(), []string{"--mode=ipvs"}, args)...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "no kernel state of another mode remains" })
}

// TestSwitchModes switches to ipvs mode and back. New connections must always succeed, and no kernel
// state of the previous mode may remain. Established TCP connections and UDP flows that connection
// tracking translates survive. The switch back removes the virtual servers. TCP connections through
// them continue only if nftables selects the same endpoint again, so the test does not require it.
func TestSwitchModes(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	addrs := agenttest.ServiceAddrs(10, 80)
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a", "b")
	n.run()
	n.awaitAnswers(addrs, "a", "b")
	stop := n.keepConnecting(addrs)
	before := n.establish(addrs)
	n.stop()

	n.runIPVS()
	n.awaitAnswers(addrs, "a", "b")
	if listing := n.nft("list", "tables"); strings.Contains(listing, "fairlead\n") || !strings.Contains(listing, ipvs.TableName) {
		t.Errorf("tables in ipvs mode:\n%s", listing)
	}
	n.awaitGet(n.Node, "127.0.0.1:10249", "/proxyMode", http.StatusOK, "ipvs")
	before.checkOpen("the switch to ipvs mode")
	ofIPVS := n.establish(addrs)
	n.stop()

	n.run()
	n.program.awaitLog(func(r record) bool { return r.Msg == "no kernel state of another mode remains" })
	n.awaitAnswers(addrs, "a", "b")
	stop()
	before.checkOpen("the switch to nft mode")
	t.Logf("%d of %d TCP connections through IPVS survive", ofIPVS.tcp.countOpen(t), len(ofIPVS.tcp))
	ofIPVS.tcp = nil
	ofIPVS.checkOpen("the switch to nft mode")
	if listing := n.nft("list", "tables"); strings.Contains(listing, ipvs.TableName) || !strings.Contains(listing, "fairlead\n") {
		t.Errorf("tables in nft mode:\n%s", listing)
	}
	if listing := n.command("ipvsadm", "-Ln"); strings.Contains(listing, "10.96.0.10") {
		t.Errorf("virtual servers in nft mode:\n%s", listing)
	}
	if listing := n.command("ip", "link"); strings.Contains(listing, ipvs.LinkName) {
		t.Errorf("interfaces in nft mode:\n%s", listing)
	}
}

// TestSchedulers checks that Services use the scheduler of the flag, and that a change of a Service's
// annotation takes effect.
func TestSchedulers(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	service := func(annotations string) string {
		return strings.Replace(serviceYAML("backend", 10, 80), "name: backend\n", "name: backend\n  annotations: {"+annotations+"}\n", 1)
	}
	n.writeFile("backend.yaml", service(""))
	n.writePods("backend", "a")
	n.runIPVS("--ipvs-scheduler=wrr")
	await := func(scheduler string) {
		t.Helper()
		for _, addr := range agenttest.ServiceAddrs(10, 80) {
			agenttest.Eventually(t, func() error {
				if listing := n.command("ipvsadm", "-Ln"); !strings.Contains(listing, fmt.Sprintf("TCP  %s %s", addr, scheduler)) {
					return fmt.Errorf("%s does not use scheduler %s:\n%s", addr, scheduler, listing)
				}
				return nil
			})
		}
		n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	}
	await("wrr")
	n.writeFile("backend.yaml", service("fairlead.io/ipvs-scheduler: lc"))
	await("lc")
	n.writeFile("backend.yaml", service("fairlead.io/ipvs-scheduler: least"))
	await("wrr")
	n.program.awaitLog(func(r record) bool { return r.Level == "WARN" && r.Msg == "Service cannot be programmed as written" })
}

// TestInitOnlyIPVS checks that CAP_NET_ADMIN is sufficient after --init-only.
func TestInitOnlyIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.makeFolderReadable()
	if code, stderr := n.runOnce(nil, append(n.runArgs(), "--mode=ipvs", "--init-only")...); code != 0 || !strings.Contains(stderr, "kernel initialized") {
		t.Fatalf("exit code %d, output %q", code, stderr)
	}
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("ruleset after --init-only:\n%s", listing)
	}
	n.program = n.start(asNobody(unix.CAP_NET_ADMIN, unix.CAP_NET_BIND_SERVICE), append(n.runArgs(), "--mode=ipvs")...)
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	n.stop()
}
