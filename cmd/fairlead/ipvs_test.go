//go:build ipvs

package main

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/ipvs"
)

// runIPVS starts the program in the mode ipvs and waits until it has programmed the
// node and taken over.
func (n *testNode) runIPVS(args ...string) {
	n.t.Helper()
	n.program = n.start(nil, slices.Concat(n.runArgs(), []string{"--mode=ipvs"}, args)...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "nothing that another mode has programmed is left" })
}

// From one mode to the other and back: connections succeed all the time, and nothing
// of the mode before is left.
func TestSwitchModes(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a", "b")
	n.run()
	n.awaitAnswers(serviceAddrs(10, 80), "a", "b")
	stop := n.keepConnecting(serviceAddrs(10, 80))
	n.stop()

	n.runIPVS()
	n.awaitAnswers(serviceAddrs(10, 80), "a", "b")
	if listing := n.nft("list", "tables"); strings.Contains(listing, "fairlead\n") || !strings.Contains(listing, ipvs.TableName) {
		t.Errorf("tables in the mode ipvs:\n%s", listing)
	}
	n.awaitGet(n.Node, "127.0.0.1:10249", "/proxyMode", http.StatusOK, "ipvs")
	n.stop()

	n.run()
	n.program.awaitLog(func(r record) bool { return r.Msg == "nothing that another mode has programmed is left" })
	n.awaitAnswers(serviceAddrs(10, 80), "a", "b")
	stop()
	if listing := n.nft("list", "tables"); strings.Contains(listing, ipvs.TableName) || !strings.Contains(listing, "fairlead\n") {
		t.Errorf("tables in the mode nft:\n%s", listing)
	}
	if listing := n.command("ipvsadm", "-Ln"); strings.Contains(listing, "10.96.0.10") {
		t.Errorf("virtual servers in the mode nft:\n%s", listing)
	}
	if listing := n.command("ip", "link"); strings.Contains(listing, ipvs.LinkName) {
		t.Errorf("interfaces in the mode nft:\n%s", listing)
	}
}

// The schedulers are that of the flag, and for a Service that of its annotation, as
// soon as it says so.
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
		for _, addr := range serviceAddrs(10, 80) {
			eventually(t, func() error {
				if listing := n.command("ipvsadm", "-Ln"); !strings.Contains(listing, fmt.Sprintf("TCP  %s %s", addr, scheduler)) {
					return fmt.Errorf("%s has not the scheduler %s:\n%s", addr, scheduler, listing)
				}
				return nil
			})
		}
		n.awaitAnswers(serviceAddrs(10, 80), "a")
	}
	await("wrr")
	n.writeFile("backend.yaml", service("fairlead.io/ipvs-scheduler: lc"))
	await("lc")
	n.writeFile("backend.yaml", service("fairlead.io/ipvs-scheduler: least"))
	await("wrr")
	n.program.awaitLog(func(r record) bool { return r.Level == "WARN" && r.Msg == "Service can't be carried out as written" })
}

// --init-only sets up what takes more rights, so that CAP_NET_ADMIN is enough from
// then on.
func TestInitOnlyIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.makeFolderReadable()
	if code, stderr := n.runOnce(nil, append(n.runArgs(), "--mode=ipvs", "--init-only")...); code != 0 || !strings.Contains(stderr, "the kernel is set up") {
		t.Fatalf("exit code %d, output %q", code, stderr)
	}
	if listing := n.nft("list", "ruleset"); listing != "" {
		t.Errorf("the ruleset has:\n%s", listing)
	}
	n.program = n.start(asNobody(unix.CAP_NET_ADMIN, unix.CAP_NET_BIND_SERVICE), append(n.runArgs(), "--mode=ipvs")...)
	n.awaitAnswers(serviceAddrs(10, 80), "a")
	n.stop()
}
