package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// builtKubeProxy is the binary that `make kube-proxy` builds.
const builtKubeProxy = "../../.cache/kube-proxy/kube-proxy"

// writeConfig runs --write-config-to and returns the written file.
func writeConfig(t *testing.T, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "written.yaml")
	code, _, stderr := invoke(t, commandArgs(append([]string{"kube-proxy", "--write-config-to=" + path}, args...))...)
	if code != 0 {
		t.Fatalf("exit code %d, stderr %s", code, stderr)
	}
	return readFile(t, path)
}

// writeKubeProxyConfig runs the real kube-proxy with --write-config-to and returns the written file.
func writeKubeProxyConfig(t *testing.T, args ...string) string {
	t.Helper()
	if _, err := os.Stat(builtKubeProxy); err != nil {
		t.Skip("run make kube-proxy first")
	}
	path := filepath.Join(t.TempDir(), "written.yaml")
	cmd := exec.CommandContext(t.Context(), builtKubeProxy, append([]string{"--write-config-to=" + path}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("kube-proxy: %v\n%s", err, out)
	}
	return readFile(t, path)
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestWriteConfig checks that --write-config-to writes the same file as kube-proxy.
func TestWriteConfig(t *testing.T) {
	t.Parallel()
	const all = `clientConnection: {kubeconfig: k, acceptContentTypes: a, contentType: c, qps: 2.5, burst: 3}
hostnameOverride: node-b
bindAddress: "::"
bindAddressHardFail: true
enableProfiling: true
featureGates: {KubeProxyIPVS: true}
logging: {format: text, verbosity: 2, flushFrequency: 7s}
iptables: {masqueradeAll: true, localhostNodePorts: false, masqueradeBit: 0, syncPeriod: 9s, minSyncPeriod: 2s}
ipvs: {scheduler: lc, excludeCIDRs: [10.0.0.0/8, 192.0.2.0/24], strictARP: true, tcpTimeout: 15m, syncPeriod: 8s, minSyncPeriod: 3s}
nftables: {masqueradeAll: true, masqueradeBit: 3, syncPeriod: 6s, minSyncPeriod: 4s}
conntrack: {maxPerCore: 0, min: null, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: null, tcpBeLiberal: true, udpTimeout: 5s}
detectLocalMode: BridgeInterface
detectLocal: {bridgeInterface: cni0}
nodePortAddresses: [primary, 10.0.0.0/8]
oomScoreAdj: 0
unknown: 1
`
	for _, test := range []struct {
		name, file string
		args       []string
	}{
		{"no flags", "", nil},
		{"flags", "", []string{
			"--proxy-mode=ipvs", "--masquerade-all", "--ipvs-sync-period=7s", "--cluster-cidr=10.0.0.0/8", "--conntrack-max-per-core=0",
			"--nodeport-addresses=primary,192.0.2.0/24", "--hostname-override=Node-C", "--oom-score-adj=5", "--v=3",
		}},
		{"nftables by flag", "", []string{"--proxy-mode=nftables", "--iptables-sync-period=7s", "--iptables-localhost-nodeports=false"}},
		{"kubeadm", kubeadmConfig(t), nil},
		// Values that kube-proxy's parsers accept although they look wrong.
		{"unusual numbers and addresses", "", []string{
			"", "--kube-api-burst=0x10", "--kube-api-qps=-1", "--conntrack-min=1_000", "--cluster-cidr=10.1.0.0/16", "--cluster-cidr=010.0.0.1/8,fd00::1/8",
			"--bind-address=010.0.0.1", "--healthz-bind-address=127.000.000.001:5", "--nodeport-addresses=010.0.0.0/8,::ffff:10.0.0.0/104",
			"--healthz-port=70000", "--metrics-port=-1", "--hostname-override=$(NODE_NAME)", "--vmodule=", "--feature-gates=",
			"--show-hidden-metrics-for-version=1.36", "--log_flush_frequency=7s",
		}},
		{"invalid values of other modes", "", []string{
			"--proxy-mode=nftables", "--ipvs-tcp-timeout=-1s", "--ipvs-scheduler=none", "--ipvs-exclude-cidrs=pods", "--detect-local-mode=NodeCIDR",
			"--cluster-cidr=pods", "--pod-bridge-interface=a/name-that-is-too-long", "--iptables-localhost-nodeports=F",
		}},
		{"unusual values for ipvs", "", []string{
			"--proxy-mode=ipvs", "--ipvs-tcp-timeout=1500ms", "--ipvs-udp-timeout=999999h", "--ipvs-exclude-cidrs=010.0.0.1/8", "--ipvs-strict-arp=T",
		}},
		{"unusual values in a file", configHeader + `mode: ipvs
bindAddress: 010.0.0.1
healthzBindAddress: 010.0.0.2
metricsBindAddress: "::1"
hostnameOverride: node_b
ipvs: {tcpTimeout: 1500ms, excludeCIDRs: [010.0.0.1/8]}
detectLocalMode: NodeCIDR
clusterCIDR: pods
nodePortAddresses: [010.0.0.0/8]
conntrack: {maxPerCore: 0x10}
`, nil},
		{"iptables", configHeader + all, nil},
		{"nftables", configHeader + all + "mode: nftables\n", nil},
		{"ipvs", configHeader + all + "mode: ipvs\n", []string{"--hostname-override=Node-C"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			args := test.args
			if test.file != "" {
				args = append(args, "--config="+writeConfigFile(t, test.file))
			}
			if diff := cmp.Diff(writeKubeProxyConfig(t, args...), writeConfig(t, args...)); diff != "" {
				t.Errorf("(-kube-proxy +fairlead):\n%s", diff)
			}
		})
	}
}
