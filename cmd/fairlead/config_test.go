package main

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

const configHeader = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

// writeConfigFile writes a configuration file and returns its path.
func writeConfigFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// kubeadmConfig returns the configuration that kubeadm 1.37 writes to the kube-proxy ConfigMap.
func kubeadmConfig(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../internal/config/testdata/kubeadm.conf")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestConfigReload checks that a running process applies a changed file and ignores an invalid one.
func TestConfigReload(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	path := filepath.Join(t.TempDir(), "config.conf")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(configHeader+text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	pods := "clusterCIDR: " + n.PodCIDRs[0].String() + "," + n.PodCIDRs[1].String() + "\nmode: nftables\n"
	const others = "clusterCIDR: 203.0.113.0/24,2001:db8:99::/64\n"
	write(others)
	n.program = n.start(nil, "run", "--manifests="+n.folder, "--config="+path, "--log-format=json")
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	// awaitSource waits until the pod sees this source address.
	awaitSource := func(want netip.Addr) {
		t.Helper()
		agenttest.Eventually(t, func() error {
			answer, err := connect(t.Context(), n.client, "tcp", agenttest.ServiceAddrs(10, 80)[0])
			if err == nil && answer.Source.Addr() != want {
				err = fmt.Errorf("source address %s, want %s", answer.Source.Addr(), want)
			}
			return err
		})
	}
	stop := n.keepConnecting(agenttest.ServiceAddrs(10, 80))
	awaitSource(n.Node.IPv4)
	write(pods)
	awaitSource(n.client.IPv4)

	write("clusterCIDR: here\n")
	n.program.awaitLog(func(r record) bool {
		return r.Level == "ERROR" && strings.Contains(r.Error, `clusterCIDR: "here" is not a network`)
	})
	n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK, "fairlead_config_valid 0\n")
	awaitSource(n.client.IPv4)

	write(others + "metricsBindAddress: 127.0.0.1:9999\n")
	n.program.awaitLog(func(r record) bool { return r.Level == "WARN" && r.What == "the address of /metrics" })
	awaitSource(n.Node.IPv4)
	n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK, "fairlead_config_valid 1\n")
	n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK, `fairlead_config_reloads_total{result="success"} 2`)
	stop()
	n.stop()
}

// TestInvalidKubeconfig checks that errors name the setting to fix, which is a flag or a field of
// the configuration file.
func TestInvalidKubeconfig(t *testing.T) {
	t.Parallel()
	good := filepath.Join(t.TempDir(), "kubeconfig")
	text := "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c}}], clusters: [{name: c, cluster: {server: https://192.0.2.1}}]}"
	if err := os.WriteFile(good, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	const none = "/does/not/exist"
	tests := []struct {
		name, file string // an empty file means no --config
		args       []string
		want       string
	}{
		{"flag", "", []string{"--kubeconfig=" + none}, "--kubeconfig: kubeconfig " + none + ": "},
		{"flag and server", "", []string{"--kubeconfig=" + none, "--master=https://192.0.2.1"}, "--kubeconfig: kubeconfig " + none + ": "},
		{"neither", "", nil, "--kubeconfig: no kubeconfig is given"},
		{"server", "", []string{"--master=http://a b"}, "--master: API server http://a b: "},
		{"server and valid flag", "", []string{"--master=http://a b", "--kubeconfig=" + good}, "--master: "},
		{"kubeadm file", kubeadmConfig(t), nil, "--config: clientConnection.kubeconfig: kubeconfig /var/lib/kube-proxy/kubeconfig.conf: "},
		{"file without kubeconfig", configHeader, nil, "--config: clientConnection.kubeconfig: no kubeconfig is given"},
		{"server and file without kubeconfig", configHeader, []string{"--master=http://a b"}, "--master: API server http://a b: "},
		{
			"missing field in the file", configHeader + "detectLocalMode: BridgeInterface\n", nil,
			"--config: detectLocalMode: BridgeInterface requires --config: detectLocal.bridgeInterface: ",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"run", "--hostname-override=node"}, test.args...)
			if test.file != "" {
				args = append(args, "--config="+writeConfigFile(t, test.file))
			}
			code, _, stderr := invoke(t, args...)
			if lines := strings.Split(strings.TrimSpace(stderr), "\n"); code != 1 || !strings.HasPrefix(lines[len(lines)-1], "fairlead: "+test.want) {
				t.Errorf("exit code %d, stderr %q, want 1 and %q", code, stderr, test.want)
			}
		})
	}
}
