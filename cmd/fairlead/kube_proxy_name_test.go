package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// linkKubeProxy makes the node start the program with the name kube-proxy.
func (n *testNode) linkKubeProxy() {
	n.t.Helper()
	program, err := os.Executable()
	if err != nil {
		n.t.Fatal(err)
	}
	n.executable = filepath.Join(n.t.TempDir(), "kube-proxy")
	if err := os.Symlink(program, n.executable); err != nil {
		n.t.Fatal(err)
	}
}

// TestKubeProxyName checks that a program with the name kube-proxy takes kube-proxy's arguments,
// programs a Service, and serves its node port where kube-proxy's mode does.
func TestKubeProxyName(t *testing.T) {
	t.Parallel()
	const kind = configHeader + "mode: iptables\niptables: {minSyncPeriod: 1s}\nconntrack: {maxPerCore: 0}\nclusterCIDR: 10.244.0.0/16\n" +
		"clientConnection: {kubeconfig: /var/lib/kube-proxy/kubeconfig.conf}\nudpIdleTimeout: 250ms\n---\n"
	for _, test := range []struct {
		name, file string
		args       []string
		localhost  bool
		logs       []string
	}{
		{
			"kubeadm", kubeadmConfig(t), nil, true,
			[]string{"kube-proxy's mode iptables is replaced", "no mode is set, which means iptables"},
		},
		{
			"kind", kind, []string{""}, true,
			[]string{"kube-proxy's mode iptables is replaced", "settings have no effect", "udpIdleTimeout (unknown field)"},
		},
		{"arguments", "", []string{"--cluster-cidr=10.42.0.0/16", "--conntrack-max-per-core=0"}, true, []string{"no mode is set, which means iptables"}},
		{"nftables", configHeader + "mode: nftables\n", nil, false, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t, "a")
			n.linkKubeProxy()
			service := strings.Replace(serviceYAML("backend", 10, 80), "spec:\n", "spec:\n  type: NodePort\n", 1)
			n.writeFile("backend.yaml", strings.Replace(service, "targetPort: web", "targetPort: web, nodePort: 30080", 1))
			n.writePods("backend", "a")
			args := append([]string{
				"--manifests=" + n.folder, "--service-cidr=10.96.0.0/16,fd00:10:96::/112", "--hostname-override=node", "--log-format=json", "--init-only=false",
			}, test.args...)
			if test.file != "" {
				args = append(args, "--config="+writeConfigFile(t, test.file))
			}
			n.program = n.start(nil, args...)
			n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
			n.awaitTCP(agenttest.ServiceAddrs(10, 80), "a")
			n.awaitTCP([]netip.AddrPort{netip.AddrPortFrom(n.Node.IPv4, 30080), netip.AddrPortFrom(n.Node.IPv6, 30080)}, "a")
			loopback := loopbackAddrs(30080)
			if test.localhost {
				agenttest.Eventually(t, func() error { return checkAnswers(t.Context(), n.Node, "tcp", loopback[0], "a") })
			} else {
				n.awaitRefusedFromNode("tcp", loopback[0])
			}
			n.awaitRefusedFromNode("tcp", loopback[1])
			for _, text := range test.logs {
				if !strings.Contains(n.program.log.String(), text) {
					t.Errorf("no %q in the log", text)
				}
			}
			n.stop()
			if code, log := n.runOnce(nil, "--cleanup", "--kubeconfig=/does/not/exist"); code != 0 {
				t.Errorf("--cleanup: exit code %d, log:\n%s", code, log)
			}
			if rules := n.nft("list", "tables"); strings.Contains(rules, "fairlead") {
				t.Errorf("after --cleanup:\n%s", rules)
			}
		})
	}
}
