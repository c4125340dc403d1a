package config

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// distribution is kube-proxy's configuration in a Kubernetes distribution: the settings that it
// writes, as facts, without names and addresses of a real cluster.
type distribution struct {
	name, file string
	args       []string
	proxyMode  string
	// ignored and noEffect are the expected log lines, empty for none.
	ignored, noEffect string
}

const syncNote = " (" + ignoredSync + ")"

func distributions(t *testing.T) []distribution {
	t.Helper()
	return []distribution{
		{name: "kubeadm", file: kubeadmConfig(t), proxyMode: "iptables"},
		{
			name: "kind", proxyMode: "iptables",
			file: configHeader + "mode: iptables\niptables: {minSyncPeriod: 1s}\nconntrack: {maxPerCore: 0}\nclusterCIDR: 10.244.0.0/16\n" +
				"clientConnection: {kubeconfig: /var/lib/kube-proxy/kubeconfig.conf}\n",
			args:     []string{"--hostname-override=node-a"},
			noEffect: "--config: iptables.minSyncPeriod" + syncNote,
		},
		{
			name: "EKS, older", proxyMode: "iptables",
			file: configHeader + `bindAddress: 0.0.0.0
clientConnection: {acceptContentTypes: "", burst: 10, contentType: application/vnd.kubernetes.protobuf, kubeconfig: /var/lib/kube-proxy/kubeconfig, qps: 5}
clusterCIDR: ""
configSyncPeriod: 15m0s
conntrack: {maxPerCore: 32768, min: 131072, tcpCloseWaitTimeout: 1h0m0s, tcpEstablishedTimeout: 24h0m0s}
enableProfiling: false
healthzBindAddress: 0.0.0.0:10256
hostnameOverride: ""
iptables: {masqueradeAll: false, masqueradeBit: 14, minSyncPeriod: 0s, syncPeriod: 30s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", syncPeriod: 30s}
metricsBindAddress: 0.0.0.0:10249
mode: "iptables"
nodePortAddresses: null
oomScoreAdj: -998
portRange: ""
udpIdleTimeout: 250ms
`,
			args:    []string{"--v=2", "--hostname-override=node-a"},
			ignored: "udpIdleTimeout (unknown field)",
			noEffect: "--config: configSyncPeriod (" + ignoredConfigSync + "); " +
				"--config: iptables.masqueradeBit (" + ignoredIPTables + "); --config: iptables.syncPeriod, --config: ipvs.syncPeriod" + syncNote +
				"; --config: oomScoreAdj (" + ignoredOOM + ")",
		},
		{
			name: "EKS, nftables", proxyMode: "nftables",
			file: configHeader + "bindAddress: 0.0.0.0\nmode: nftables\nnftables: {masqueradeAll: false, masqueradeBit: 14, minSyncPeriod: 1s, syncPeriod: 30s}\n" +
				"conntrack: {maxPerCore: 32768, min: 131072}\nclientConnection: {kubeconfig: /var/lib/kube-proxy/kubeconfig}\n",
			args:     []string{"--v=2", "--hostname-override=node-a"},
			noEffect: "--config: nftables.masqueradeBit (Fairlead does not mark packets); --config: nftables.minSyncPeriod, --config: nftables.syncPeriod" + syncNote,
		},
		{
			name: "k3s and RKE2", proxyMode: "iptables",
			args: []string{
				"--cluster-cidr=10.42.0.0/16", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-close-wait=0s",
				"--conntrack-tcp-timeout-established=0s", "--healthz-bind-address=127.0.0.1", "--hostname-override=node-a",
				"--kubeconfig=/var/lib/agent/kubeproxy.kubeconfig", "--proxy-mode=iptables",
			},
		},
		{
			name: "GCE", proxyMode: "iptables",
			args: []string{
				"", "--master=https://192.0.2.1", "--kubeconfig=/var/lib/kube-proxy/kubeconfig", "--cluster-cidr=10.64.0.0/14", "--oom-score-adj=-998", "--v=2",
				"--iptables-sync-period=1m", "--iptables-min-sync-period=10s", "--ipvs-sync-period=1m", "--ipvs-min-sync-period=10s", "--proxy-mode=iptables",
				"--hostname-override=node-a",
			},
			noEffect: "--iptables-min-sync-period, --iptables-sync-period, --ipvs-min-sync-period, --ipvs-sync-period" + syncNote + "; --oom-score-adj (" + ignoredOOM + ")",
		},
		{
			name: "AKS", proxyMode: "iptables",
			args: []string{
				"--conntrack-max-per-core=0", "--metrics-bind-address=0.0.0.0:10249", "--kubeconfig=/var/lib/kubelet/kubeconfig",
				"--cluster-cidr=10.244.0.0/16", "--detect-local-mode=ClusterCIDR", "--pod-interface-name-prefix=", "--v=3", "--kube-proxy-defaults",
				"--hostname-override=node-a",
			},
		},
		{
			name: "Talos", proxyMode: "nftables",
			args: []string{
				"--cluster-cidr=10.244.0.0/16", "--conntrack-max-per-core=0", "--hostname-override=node-a", "--kubeconfig=/etc/kubernetes/kubeconfig",
				"--proxy-mode=nftables",
			},
		},
		{
			name: "k0s", proxyMode: "iptables",
			file: configHeader + `bindAddress: 0.0.0.0
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
mode: "iptables"
conntrack: {maxPerCore: 0, min: null, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null}
detectLocalMode: ""
enableProfiling: false
featureGates: {}
healthzBindAddress: ""
hostnameOverride: ""
iptables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {minSyncPeriod: 0s, scheduler: "", strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}
metricsBindAddress: 0.0.0.0:10249
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
udpIdleTimeout: 0s
winkernel: {enableDSR: false, networkName: "", sourceVip: ""}
`,
			args:    []string{"--hostname-override=node-a"},
			ignored: "udpIdleTimeout (unknown field)",
		},
		{
			name: "kOps", proxyMode: "iptables",
			args: []string{
				"--cluster-cidr=100.96.0.0/11", "--conntrack-max-per-core=131072", "--hostname-override=node-a", "--kubeconfig=/var/lib/kube-proxy/kubeconfig",
				"--master=https://127.0.0.1", "--oom-score-adj=-998", "--v=2", "--kube-proxy-defaults",
			},
			noEffect: "--oom-score-adj (" + ignoredOOM + ")",
		},
		{
			name: "BOSH", proxyMode: "nftables",
			file: configHeader + "clientConnection: {kubeconfig: kubeconfig}\nhostnameOverride: node-a\nmode: nftables\nconntrack: {max: 0, maxPerCore: 32768}\n" +
				"resourceContainer: /kube-proxy\nportRange: \"\"\nudpIdleTimeout: 250ms\n",
			ignored: "conntrack.max, resourceContainer, udpIdleTimeout (unknown field)",
		},
	}
}

// TestDistributions checks the mode and the warnings for the configurations of real distributions.
func TestDistributions(t *testing.T) {
	t.Parallel()
	for _, d := range distributions(t) {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"--hostname-override=node-a"}, d.args...)
			if d.file != "" {
				args = append(args, "--config="+writeConfigFile(t, d.file))
			}
			c, _, err := Load(parseFlags(t, args...))
			if err != nil {
				t.Fatal(err)
			}
			// Other tests check the connection-tracking settings.
			c.Warnings = slices.DeleteFunc(c.Warnings, func(w Warning) bool {
				return w.Kind == NoEffect && strings.Contains(w.Setting, "conntrack")
			})
			type result struct{ ProxyMode, Ignored, NoEffect, Deprecated string }
			want := result{d.proxyMode, d.ignored, d.noEffect, ""}
			got := result{c.ProxyMode, c.warningText(IgnoredField), c.warningText(NoEffect), c.warningText(Deprecated)}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
