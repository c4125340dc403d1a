//go:build ipvs

package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/nfhooks"
	"fairlead.io/fairlead/internal/preflight"
	"fairlead.io/fairlead/ipvs"
)

// runIPVS starts the program in ipvs mode and waits until it has programmed the node and removed
// the kernel state of nft mode.
func (n *testNode) runIPVS(args ...string) {
	n.t.Helper()
	n.program = n.start(nil, slices.Concat(n.runArgs(), []string{"--mode=ipvs"}, args)...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "no kernel state of another mode remains" })
}

// TestSwitchModes switches to ipvs mode and back. New connections always succeed, and established
// ones survive. Connections through IPVS keep their virtual servers until they are closed. Then no
// kernel state of the previous mode remains.
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
	n.awaitAnswers(addrs, "a", "b")
	before.checkOpen("the switch to nft mode")
	ofIPVS.checkOpen("the switch to nft mode")
	if code, stderr := n.runOnce(nil, "cleanup", "--force=false"); code != 1 || !strings.Contains(stderr, "another Fairlead programs this node") {
		t.Errorf("cleanup: exit code %d, output %q", code, stderr)
	}
	n.stop() // the next process continues to keep the connections
	if code, stderr := n.runOnce(nil, "cleanup"); code != 1 || !strings.Contains(stderr, "TCP connections") {
		t.Errorf("cleanup: exit code %d, output %q; want a refusal", code, stderr)
	}
	n.run()
	before.checkOpen("a restart")
	ofIPVS.checkOpen("a restart")
	stop()

	ofIPVS.closeTCP()
	n.awaitDrained()
	before.checkOpen("the end of IPVS")
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

// awaitDrained waits until the program has removed the virtual servers of ipvs mode. The kernel
// counts a closed TCP connection for two minutes.
func (n *testNode) awaitDrained() {
	n.t.Helper()
	deadline := time.Now().Add(4 * time.Minute)
	for !slices.ContainsFunc(n.program.log.records(), func(r record) bool { return r.Msg == "no kernel state of another mode remains" }) {
		if time.Now().After(deadline) {
			n.t.Fatalf("virtual servers remain:\n%s", n.command("ipvsadm", "-Lnc"))
		}
		time.Sleep(time.Second)
	}
}

// TestConnectAfterLostIPVS is TestConnectAfterLostTables in ipvs mode.
func TestConnectAfterLostIPVS(t *testing.T) {
	t.Parallel()
	newTestNode(t, "a").checkConnectAfterLoss("nft flush ruleset; ipvsadm -C; ip link delete "+ipvs.LinkName, "--mode=ipvs")
}

// TestCheckIPVS checks that fairlead check reports where IPVS follows NAT rules.
func TestCheckIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.runIPVS()
	r := n.check()
	listsFunctions := true
	if err := n.Node.Do(func() error {
		c, err := nfhooks.Dial()
		if err != nil {
			return err
		}
		_, err = c.Functions("ip", nfhooks.Input)
		listsFunctions = !errors.Is(err, nfhooks.ErrUnsupported)
		return c.Close()
	}); err != nil {
		t.Fatal(err)
	}
	for _, family := range []string{"ip", "ip6"} {
		table := "chain " + family + " " + ipvs.TableName
		r.expect("translation-order", preflight.Info, family+" prerouting: "+table+" nat-prerouting (priority -99)")
		if !listsFunctions { // Debian's kernel 6.1
			continue
		}
		r.expect("translation-order", preflight.Info, family+" input: ip_vs_in_hook of module ip_vs (priority 99)")
		r.expect("translation-order", preflight.Info, family+" output: ", ", then ip_vs_in_hook of module ip_vs (priority -98)")
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

// TestDiffIPVS compares virtual servers and sysctls with the settings of the running Fairlead, and
// after Fairlead has ended.
func TestDiffIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a", "b")
	n.runIPVS()
	if out := n.diff(0); out != "" {
		t.Errorf("programmed: differences:\n%s", out)
	}
	n.stop()
	args := slices.Concat(n.runArgs()[1:], []string{"--mode=ipvs"})
	n.command("ipvsadm", "-d", "-t", "10.96.0.10:80", "-r", n.pods["a"].IPv4.String()+":8080")
	n.command("sysctl", "-w", "net.ipv4.vs.conntrack=0")
	wantLines(t, n.diff(exitDifferences, args...),
		"Service default/backend:tcp: different", "    10.96.0.10:80/TCP", "+     endpoints: "+n.pods["a"].IPv4.String()+":8080 local",
		"sysctl net.ipv4.vs.conntrack: different", "-   0", "+   1")
	if listing := n.command("ipvsadm", "-Ln", "-t", "10.96.0.10:80"); strings.Contains(listing, n.pods["a"].IPv4.String()) {
		t.Errorf("the comparison has repaired the virtual server:\n%s", listing)
	}
}

// TestTraceLiveIPVS follows a connection to the virtual server and to the endpoint that IPVS
// selects, while the client opens more connections.
func TestTraceLiveIPVS(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	cluster, external := agenttest.ServiceAddrs(10, 80)[0], netip.MustParseAddrPort("192.0.2.10:80")
	n.writeFile("backend.yaml", strings.Replace(serviceYAML("backend", 10, 80), "  ports:\n", "  externalIPs: [192.0.2.10]\n  ports:\n", 1))
	n.writePods("backend", "a")
	n.runIPVS()
	for _, test := range []struct {
		frontend netip.AddrPort
		server   string
	}{
		{cluster, cluster.String()},
		{external, ""}, // an internal address
	} {
		p := n.start(nil, slices.Concat([]string{"trace", n.client.IPv4.String(), test.frontend.String(), "--live"}, n.runArgs()[1:])...)
		deadline := time.Now().Add(2 * time.Minute)
		for ended := false; !ended; {
			if _, err := connect(t.Context(), n.client, nettest.TCP, test.frontend); err != nil {
				t.Fatal(err)
			}
			select {
			case <-p.ended:
				ended = true
			case <-time.After(100 * time.Millisecond):
				if time.Now().After(deadline) {
					t.Fatal("fairlead trace does not end")
				}
			}
		}
		wantLines(t, p.log.String(), "    packet from "+n.client.IPv4.String(), "    IPVS: the virtual server "+test.server,
			fmt.Sprintf("Result: endpoint %s:%d, by the virtual server %s", n.pods["a"].IPv4, podPort, test.server))
	}
}
