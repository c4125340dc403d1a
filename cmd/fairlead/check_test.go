package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/preflight"
)

// checkReport is the output of fairlead check -o json.
type checkReport struct {
	t        *testing.T
	code     int
	Result   preflight.Status
	Findings []preflight.Finding
}

// check runs fairlead check on the node.
func (n *testNode) check(flags ...string) checkReport {
	n.t.Helper()
	args := slices.Concat([]string{"check", "-o", "json"}, n.runArgs()[1:], flags)
	code, out := n.runOnce(nil, args...)
	r := checkReport{t: n.t, code: code}
	// A line about failed checks follows the object.
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&r); err != nil {
		n.t.Fatalf("%v; output:\n%s", err, out)
	}
	if want := map[bool]preflight.Status{true: preflight.OK, false: preflight.Failed}[code == 0]; r.Result != want {
		n.t.Errorf("result %s with exit code %d", r.Result, code)
	}
	return r
}

// expect checks that a finding has this check and status, and contains all texts in its message or
// fix.
func (r checkReport) expect(check string, status preflight.Status, texts ...string) {
	r.t.Helper()
	if !slices.ContainsFunc(r.Findings, func(f preflight.Finding) bool {
		return f.Check == check && f.Status == status && !slices.ContainsFunc(texts, func(text string) bool {
			return !strings.Contains(f.Message+"\n"+f.Fix, text)
		})
	}) {
		r.t.Errorf("no finding %s %s with %q in %+v", check, status, texts, r.Findings)
	}
}

// TestCheckCleanNode checks a node without problems, before and while Fairlead runs.
func TestCheckCleanNode(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	r := n.check()
	r.expect("instance", preflight.OK, "no Fairlead")
	r.expect("healthz-port", preflight.OK, "free")
	n.run()
	r = n.check()
	if r.code != 0 {
		t.Errorf("exit code %d, findings %+v", r.code, r.Findings)
	}
	for _, check := range []string{"kernel", "capabilities", "mode-nft", "forwarding", "other-proxy", "firewall-forward", "firewall-input", "firewall-prerouting"} {
		r.expect(check, preflight.OK)
	}
	r.expect("instance", preflight.OK, fmt.Sprintf("PID %d", n.program.cmd.Process.Pid))
	for _, check := range []string{"healthz-port", "metrics-port"} {
		r.expect(check, preflight.OK, "Fairlead listens")
	}
	r.expect("translation-order", preflight.Info, "ip prerouting", "chain ip fairlead nat-prerouting")
	r.expect("masquerading", preflight.Info, "no other program")
	if !slices.ContainsFunc(r.Findings, func(f preflight.Finding) bool { return f.Check == "mode-ipvs" }) {
		t.Error("the mode ipvs was not tried")
	}

	code, out := n.runOnce(nil, append([]string{"check"}, n.runArgs()[1:]...)...)
	if code != 0 || !strings.HasPrefix(out, "STATUS") || !strings.Contains(out, "\nok        ") && !strings.Contains(out, "\nok     ") {
		t.Errorf("exit code %d, table:\n%s", code, out)
	}
}

// TestCheckFindings causes problems one after the other and checks their findings.
func TestCheckFindings(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "theirs")
	n.command("iptables-nft", "-P", "FORWARD", "DROP")
	n.command("ip6tables-legacy", "-P", "FORWARD", "DROP")
	n.command("iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-s", "10.244.0.0/16", "-j", "MASQUERADE")
	n.nft(`table inet firewall {
		chain in { type filter hook input priority 0; iif lo accept; counter reject; }
		chain pre { type filter hook prerouting priority raw; policy drop; accept; }
	}`)
	n.addOtherProxyRules("nftables", "theirs", agenttest.ServiceAddrs(10, 80))
	taken, err := n.Node.Listen(t.Context(), "tcp", netip.MustParseAddrPort("0.0.0.0:10256"))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	self := fmt.Sprintf("process %d ", os.Getpid())

	r := n.check()
	if r.code != 0 {
		t.Errorf("exit code %d with warnings only; findings %+v", r.code, r.Findings)
	}
	r.expect("firewall-forward", preflight.Warning, "chain ip filter FORWARD: policy drop", "iptables -P FORWARD ACCEPT")
	r.expect("firewall-forward", preflight.Warning, "chain FORWARD of ip6tables-legacy: policy drop", "ip6tables-legacy -P FORWARD ACCEPT")
	r.expect("firewall-input", preflight.Warning, "chain inet firewall in: unconditional rule reject", "dport { 10256, 30000-32767 } accept")
	r.expect("firewall-prerouting", preflight.Warning, "chain inet firewall pre: policy drop")
	r.expect("masquerading", preflight.Info, "chain ip nat POSTROUTING")
	r.expect("other-proxy", preflight.Warning, "kube-proxy's mode nftables", "fairlead cleanup --kube-proxy")
	r.expect("translation-order", preflight.Info, "chain ip kube-proxy nat-prerouting (priority -100)")
	r.expect("healthz-port", preflight.Warning, self, "its pod is not ready")
	r.expect("metrics-port", preflight.OK, "free")

	// The same findings while Fairlead runs.
	n.run()
	n.awaitMetric("127.0.0.1:10249", `fairlead_server_listening{server="healthz"} 0`)
	n.awaitMetric("127.0.0.1:10249", `fairlead_server_listening{server="metrics"} 1`)
	n.awaitMetric("127.0.0.1:10249", `fairlead_node_setting_problems{setting="forward-policy"} 2`)
	r = n.check()
	if r.code != 1 {
		t.Errorf("exit code %d, want 1", r.code)
	}
	r.expect("healthz-port", preflight.Failed, self, "instead of Fairlead")
	r.expect("metrics-port", preflight.OK, "Fairlead listens")

	n.command("sysctl", "-w", "net.ipv4.ip_forward=0")
	n.check().expect("forwarding", preflight.Failed, "sysctl -w net.ipv4.ip_forward=1")
}

// TestCheckAPIServer checks the findings about an unreachable API server and a wrong kubeconfig.
func TestCheckAPIServer(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	for _, test := range []struct{ arg, want string }{
		{"--master=http://127.0.0.1:1", "http://127.0.0.1:1 does not answer"},
		{"--kubeconfig=/none", "/none"},
	} {
		code, out := n.runOnce(nil, "check", "-o", "json", "--hostname-override=node", test.arg)
		r := checkReport{t: t, code: code}
		if err := json.NewDecoder(strings.NewReader(out)).Decode(&r); err != nil {
			t.Fatalf("%v; output:\n%s", err, out)
		}
		if code != 1 {
			t.Errorf("%s: exit code %d, want 1", test.arg, code)
		}
		r.expect("api-server", preflight.Failed, test.want)
	}
}

// TestCheckWithoutPrivileges checks that the findings name the missing capability.
func TestCheckWithoutPrivileges(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.makeFolderReadable()
	code, out := n.runOnce(asNobody(), append([]string{"check", "-o", "json"}, n.runArgs()[1:]...)...)
	r := checkReport{t: t, code: code}
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&r); err != nil || code != 1 {
		t.Fatalf("exit code %d, error %v; output:\n%s", code, err, out)
	}
	r.expect("capabilities", preflight.Failed, "CAP_NET_ADMIN is missing")
	r.expect("mode-nft", preflight.Warning, "CAP_SYS_ADMIN")
}
