package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/kube-proxy/config/v1alpha1"

	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
)

// flagsOf returns what the flags of `fairlead run` are set to.
func flagsOf(t *testing.T, args ...string) given {
	t.Helper()
	cmd := runCommand(ignoreClientLogger)
	cmd.ResetFlags()
	flags := addFlags(cmd)
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return flags
}

const configHeader = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

// configPath writes a configuration file.
func configPath(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// usual is the configuration without any flag but --hostname-override=node.
func usual() config {
	return config{
		static: static{
			mode: modeNFT, clusterDomain: "cluster.local", healthz: "0.0.0.0:10256", metrics: "127.0.0.1:10249", logFormat: "text",
			api:          apiConfig{label: "--kubeconfig", qps: 5, burst: 10, batchPeriod: 50 * time.Millisecond, massRemovalDelay: time.Minute},
			giveWayAfter: time.Minute,
		},
		tracker: kube.Options{
			ProtectLoopback: true,
			NodeName:        "node", DetectLocal: kube.DetectLocal{Mode: kube.DetectByClusterCIDR},
		},
	}
}

func diffConfigs(want, got config) string {
	return cmp.Diff(want, got, cmp.AllowUnexported(config{}, static{}, apiConfig{}, note{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }))
}

func TestFlags(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		args []string
		want func(*config)
	}{
		{"defaults", nil, func(*config) {}},
		{
			"empty values", []string{
				"--kubeconfig=", "--master=", "--kube-api-qps=", "--kube-api-burst=", "--kube-api-content-type=", "--cluster-cidr=",
				"--detect-local-mode=", "--masquerade-all=", "--nodeport-addresses=", "--bind-address=", "--healthz-bind-address=",
				"--healthz-port=", "--metrics-bind-address=", "--metrics-port=", "--bind-address-hard-fail=", "--profiling=",
				"--mode=", "--proxy-mode=", "--config=", "--manifests=", "--service-cidr=", "--dns-listen=", "--cluster-domain=",
				"--log-level=", "--log-format=", "--v=", "--conntrack-min=", "--oom-score-adj=", "--init-only=", "--batch-period=",
			}, func(*config) {},
		},
		{
			"API server",
			[]string{"--kubeconfig=k", "--master=https://m", "--kube-api-qps=7.5", "--kube-api-burst=20", "--kube-api-content-type=application/json"},
			func(c *config) {
				c.api = apiConfig{
					kubeconfig: "k", master: "https://m", label: "--kubeconfig", qps: 7.5, burst: 20, contentType: "application/json",
					batchPeriod: c.api.batchPeriod, massRemovalDelay: c.api.massRemovalDelay,
				}
			},
		},
		{"batches", []string{"--batch-period=1s"}, func(c *config) { c.api.batchPeriod = time.Second }},
		{"give way at once", []string{"--give-way-after=0"}, func(c *config) { c.giveWayAfter = 0 }},
		{"own tables", []string{"--nft-own-table"}, func(c *config) { c.ownTables = true }},
		{"removals at once", []string{"--mass-removal-delay=0"}, func(c *config) { c.api.massRemovalDelay = 0 }},
		{"no batches", []string{"--batch-period=0"}, func(c *config) { c.api.batchPeriod = 0 }},
		{
			"batches of a folder",
			[]string{"--manifests=m", "--batch-period=10ms"},
			func(c *config) {
				c.manifests, c.tracker.NodePortAddresses, c.api.batchPeriod = "m", kube.NodePortAddresses{All: true}, 10*time.Millisecond
				c.notes = []note{{"--batch-period", "it is about an API server, and --manifests is set", false}}
			},
		},
		{
			"pods by address",
			[]string{"--cluster-cidr=10.244.0.0/16,fd00::/56", "--masquerade-all", "--bind-address=192.0.2.1"},
			func(c *config) {
				c.tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00::/56")}
				c.tracker.MasqueradeAll = true
				c.tracker.BindAddress = netip.MustParseAddr("192.0.2.1")
			},
		},
		{
			"pods by the Node",
			[]string{"--detect-local-mode=NodeCIDR"},
			func(c *config) { c.tracker.DetectLocal.Mode = kube.DetectByNodeCIDR },
		},
		{
			"pods by bridge",
			[]string{"--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"},
			func(c *config) {
				c.tracker.DetectLocal = kube.DetectLocal{Mode: kube.DetectByBridgeInterface, Interface: "cni0"}
			},
		},
		{
			"pods by prefix",
			[]string{"--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=veth"},
			func(c *config) {
				c.tracker.DetectLocal = kube.DetectLocal{Mode: kube.DetectByInterfaceNamePrefix, InterfacePrefix: "veth"}
			},
		},
		{
			"node port addresses",
			[]string{"--nodeport-addresses=10.0.0.1/8,localhost", "--nodeport-addresses=primary"},
			func(c *config) {
				c.tracker.NodePortAddresses = kube.NodePortAddresses{Primary: true, Localhost: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
			},
		},
		{"pings", []string{"--ping-service-ips"}, func(c *config) { c.tracker.PingServiceIPs = true }},
		{"the mode ipvs", []string{"--mode=ipvs"}, func(c *config) { c.mode, c.ipvs.Scheduler = modeIPVS, "rr" }},
		{"the mode ipvs by kube-proxy's name", []string{"--proxy-mode=ipvs"}, func(c *config) { c.mode, c.ipvs.Scheduler = modeIPVS, "rr" }},
		{
			"all settings of IPVS",
			[]string{
				"--mode=ipvs", "--ipvs-scheduler=mh", "--ipvs-exclude-cidrs=192.0.2.1/24,2001:db8::/64", "--ipvs-exclude-cidrs=10.0.0.0/8",
				"--ipvs-strict-arp", "--ipvs-tcp-timeout=15m", "--ipvs-tcpfin-timeout=30s", "--ipvs-udp-timeout=1m30s",
			},
			func(c *config) {
				c.mode = modeIPVS
				c.ipvs = ipvs.Options{
					Scheduler: "mh", StrictARP: true, TCPTimeout: 15 * time.Minute, TCPFinTimeout: 30 * time.Second, UDPTimeout: 90 * time.Second,
					ExcludeCIDRs: []netip.Prefix{
						netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/64"), netip.MustParsePrefix("10.0.0.0/8"),
					},
				}
			},
		},
		{
			"the longest timeout of IPVS, and none",
			[]string{"--mode=ipvs", "--ipvs-tcp-timeout=2147483s", "--ipvs-udp-timeout=0"},
			func(c *config) {
				c.mode = modeIPVS
				c.ipvs = ipvs.Options{Scheduler: "rr", TCPTimeout: 2147483 * time.Second}
			},
		},
		{
			"periods of kube-proxy's ipvs mode",
			[]string{"--mode=ipvs", "--ipvs-sync-period=30s", "--ipvs-min-sync-period=0s"},
			func(c *config) {
				c.mode, c.ipvs.Scheduler = modeIPVS, "rr"
				c.notes = []note{{"--ipvs-min-sync-period", idleSync, false}, {"--ipvs-sync-period", idleSync, false}}
			},
		},
		{
			"settings of IPVS in another mode",
			[]string{"--ipvs-scheduler=lc", "--ipvs-strict-arp"},
			func(c *config) {
				c.notes = []note{{"--ipvs-scheduler", idleIPVS, false}, {"--ipvs-strict-arp", idleIPVS, false}}
			},
		},
		{
			"kube-proxy's switch for localhost",
			[]string{"--iptables-localhost-nodeports=false"},
			func(c *config) { c.notes = []note{{"--iptables-localhost-nodeports", idleLocalhost, false}} },
		},
		{
			"underscores",
			[]string{"--cluster_cidr=10.0.0.0/8", "--kube_api-burst=3"},
			func(c *config) {
				c.tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
				c.api.burst = 3
			},
		},
		{
			"a folder",
			[]string{"--manifests=m"},
			func(c *config) { c.manifests, c.tracker.NodePortAddresses = "m", kube.NodePortAddresses{All: true} },
		},
		{
			"IPv6 node",
			[]string{"--bind-address=::"},
			func(c *config) {
				c.healthz, c.metrics, c.tracker.BindAddress = "[::]:10256", "[::1]:10249", netip.IPv6Unspecified()
			},
		},
		{
			"addresses",
			[]string{"--healthz-bind-address=[fd00::1]:1", "--metrics-bind-address=192.0.2.1", "--bind-address-hard-fail", "--profiling"},
			func(c *config) {
				c.healthz, c.metrics, c.hardFail, c.profiling = "[fd00::1]:1", "192.0.2.1:10249", true, true
				c.tracker.ProtectLoopback = false // nothing listens there
			},
		},
		{
			"deprecated ports",
			[]string{"--healthz-port=0", "--metrics-port=9999"},
			func(c *config) {
				c.healthz, c.metrics = "", "127.0.0.1:9999"
				c.notes = []note{
					{"--healthz-port", "use --healthz-bind-address", true},
					{"--metrics-port", "use --metrics-bind-address", true},
				}
			},
		},
		{
			"port for an address without one",
			[]string{"--healthz-port=1", "--healthz-bind-address=192.0.2.1"},
			func(c *config) {
				c.healthz = "192.0.2.1:1"
				c.notes = []note{{"--healthz-port", "use --healthz-bind-address", true}}
			},
		},
		{
			"address with a port of its own",
			[]string{"--healthz-port=1", "--healthz-bind-address=192.0.2.1:2"},
			func(c *config) {
				c.healthz = "192.0.2.1:2"
				c.notes = []note{{"--healthz-port", "use --healthz-bind-address", true}}
			},
		},
		{
			"logging",
			[]string{"--v=4", "--logging-format=json"},
			func(c *config) { c.logLevel, c.logFormat = slog.LevelDebug, "json" },
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, _, err := load(flagsOf(t, append(test.args, "--hostname-override=Node ")...))
			if err != nil {
				t.Fatal(err)
			}
			want := usual()
			test.want(&want)
			if diff := diffConfigs(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// kubeadmConfig is what kubeadm 1.37 writes into the ConfigMap kube-proxy.
const kubeadmConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
`

func TestConfigFile(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, file string
		args       []string
		want       func(*config)
	}{
		{"nothing but its kind", configHeader, nil, func(*config) {}},
		{
			"kubeadm's", kubeadmConfig, nil,
			func(c *config) {
				c.api.kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf"
				c.tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
				c.tracker.BindAddress = netip.IPv4Unspecified()
			},
		},
		{
			"every field that has a meaning", configHeader + `
clientConnection: {kubeconfig: k, acceptContentTypes: a, contentType: c, qps: 2.5, burst: 3}
logging: {format: json, verbosity: 6}
bindAddress: 192.0.2.1
healthzBindAddress: 192.0.2.1:1
metricsBindAddress: 192.0.2.1:2
bindAddressHardFail: true
enableProfiling: true
mode: nftables
nftables: {masqueradeAll: true}
detectLocalMode: BridgeInterface
detectLocal: {bridgeInterface: cni0}
clusterCIDR: 10.244.0.0/16,fd00::/56
nodePortAddresses: [primary, 10.0.0.0/8]
`, nil,
			func(c *config) {
				c.api = apiConfig{kubeconfig: "k", acceptContentTypes: "a", contentType: "c", qps: 2.5, burst: 3, batchPeriod: c.api.batchPeriod, massRemovalDelay: c.api.massRemovalDelay}
				c.logFormat, c.logLevel = "json", slog.LevelDebug
				c.healthz, c.metrics, c.hardFail, c.profiling = "192.0.2.1:1", "192.0.2.1:2", true, true
				c.tracker = kube.Options{
					NodeName: "node", BindAddress: netip.MustParseAddr("192.0.2.1"), MasqueradeAll: true,
					DetectLocal: kube.DetectLocal{
						Mode: kube.DetectByBridgeInterface, Interface: "cni0",
						ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00::/56")},
					},
					NodePortAddresses: kube.NodePortAddresses{Primary: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
				}
			},
		},
		{
			"masqueradeAll of the mode that is left", configHeader + "iptables: {masqueradeAll: true}\n", nil,
			func(c *config) { c.tracker.MasqueradeAll = true },
		},
		{
			"masqueradeAll of another mode", configHeader + "mode: nftables\niptables: {masqueradeAll: true}\n", nil,
			func(c *config) { c.notes = []note{{"--config: iptables.masqueradeAll", idleIPTables, false}} },
		},
		{
			"fields without effect",
			configHeader + "conntrack: {min: 5, udpTimeout: 10s}\nipvs: {scheduler: lc, syncPeriod: 5s}\nnftables: {masqueradeBit: 3}\nfeatureGates: {A: true}\n",
			nil,
			func(c *config) {
				c.notes = []note{
					{"--config: conntrack.min", idleConntrack, false},
					{"--config: conntrack.udpTimeout", idleConntrack, false},
					{"--config: featureGates.A", idleGates, false},
					{"--config: ipvs.syncPeriod", idleSync, false},
					{"--config: nftables.masqueradeBit", "Fairlead marks no packets", false},
					{"--config: ipvs.scheduler", idleIPVS, false},
				}
			},
		},
		{
			"the mode ipvs", configHeader + `
mode: ipvs
iptables: {masqueradeAll: true}
nftables: {masqueradeAll: true}
ipvs: {scheduler: lc, excludeCIDRs: [10.0.0.0/8], strictARP: true, tcpTimeout: 15m0s, tcpFinTimeout: 30s, udpTimeout: 1m0s, syncPeriod: 30s}
`, nil,
			func(c *config) {
				c.mode, c.tracker.MasqueradeAll = modeIPVS, true
				c.ipvs = ipvs.Options{
					Scheduler: "lc", ExcludeCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, StrictARP: true,
					TCPTimeout: 15 * time.Minute, TCPFinTimeout: 30 * time.Second, UDPTimeout: time.Minute,
				}
				c.notes = []note{{"--config: ipvs.syncPeriod", idleSync, false}, {"--config: nftables.masqueradeAll", idleNFTables, false}}
			},
		},
		{
			"the mode by a flag, as kubeadm's file leaves it out", configHeader + "mode: ''\nipvs: {scheduler: sh}\n",
			[]string{"--mode=ipvs", "--ipvs-scheduler=lc"},
			func(c *config) {
				c.mode, c.ipvs.Scheduler = modeIPVS, "sh"
				c.notes = []note{{"--ipvs-scheduler", "--config is set: write it into the file", false}}
			},
		},
		{
			"localhost as the iptables mode had it", configHeader + "iptables: {localhostNodePorts: true}\n", nil,
			func(c *config) { c.notes = []note{{"--config: iptables.localhostNodePorts", idleLocalhost, false}} },
		},
		{
			"a flag that kube-proxy does not have", configHeader,
			[]string{"--ping-service-ips"},
			func(c *config) { c.tracker.PingServiceIPs = true },
		},
		{
			"batches", configHeader,
			[]string{"--batch-period=0s"},
			func(c *config) { c.api.batchPeriod = 0 },
		},
		{
			"flags that go before the file", configHeader + "hostnameOverride: other\nlogging: {verbosity: 9}\nmode: nftables\n",
			[]string{"--v=1", "--master=https://m", "--mode=nft"},
			func(c *config) { c.api.master = "https://m" },
		},
		{
			"flags that the file takes the place of", configHeader + "clusterCIDR: 10.244.0.0/16\n",
			[]string{"--cluster-cidr=10.0.0.0/8", "--masquerade-all", "--healthz-port=0"},
			func(c *config) {
				c.tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
				const why = "--config is set: write it into the file"
				c.notes = []note{{"--cluster-cidr", why, false}, {"--masquerade-all", why, false}, {"--healthz-port", why, false}}
			},
		},
		{
			"a folder", configHeader,
			[]string{"--manifests=m", "--service-cidr=10.0.0.0/16"},
			func(c *config) {
				c.manifests, c.tracker.NodePortAddresses = "m", kube.NodePortAddresses{All: true}
				c.serviceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}
			},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, content, err := load(flagsOf(t, append(test.args, "--config="+configPath(t, test.file), "--hostname-override=node")...))
			if err != nil {
				t.Fatal(err)
			}
			want := usual()
			test.want(&want)
			want.api.label = "--config: clientConnection.kubeconfig"
			if diff := diffConfigs(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if string(content) != test.file {
				t.Errorf("content %q, want that of the file", content)
			}
		})
	}
}

func TestWrongConfigFile(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, file, want string }{
		{"empty", "", "--config: FILE: apiVersion: nothing is not known: write kubeproxy.config.k8s.io/v1alpha1"},
		{"another kind", "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: Kubelet\n", `--config: FILE: kind: "Kubelet" is not known: write KubeProxyConfiguration`},
		{"no YAML", "a: [", "--config: FILE: yaml: line 1: did not find expected node content"},
		{"two documents", configHeader + "---\n" + configHeader, "--config: FILE: more than one document: leave only the KubeProxyConfiguration"},
		{"unknown field", configHeader + "conntrack: {max: 5}\n", `--config: FILE: unknown field "conntrack.max"`},
		{"wrong case", configHeader + "clusterCidr: 10.0.0.0/8\n", `--config: FILE: unknown field "clusterCidr"`},
		{"twice", configHeader + "mode: nftables\nmode: nftables\n", `--config: FILE: yaml: unmarshal errors: line 4: mapping key "mode" already defined at line 3`},
		{
			"wrong type", configHeader + "masqueradeAll: 1\noomScoreAdj: much\n",
			"--config: FILE: json: cannot unmarshal string into Go struct field KubeProxyConfiguration.oomScoreAdj of type int32",
		},
		{
			"wrong values", configHeader + "clusterCIDR: pods\nmode: iptables\nhealthzBindAddress: here\n",
			`--config: mode: unknown mode "iptables": use nftables or ipvs` +
				` --config: clusterCIDR: "pods" is not a network: write it as 10.96.0.0/12 or fd00:96::/112` +
				` --config: healthzBindAddress: "here" is not an address with a port: write 127.0.0.1:10256 or [::1]:10256`,
		},
		{
			"wrong settings of IPVS", configHeader + "mode: ipvs\nipvs: {scheduler: least, excludeCIDRs: [pods], tcpTimeout: -1s, udpTimeout: 1.5s}\n",
			`--config: ipvs.scheduler: "least" is not a scheduler: use one of dh, fo, lblc, lblcr, lc, mh, nq, ovf, rr, sed, sh, twos, wlc, wrr` +
				` --config: ipvs.excludeCIDRs: "pods" is not a network: write it as 10.96.0.0/12 or fd00:96::/112` +
				` --config: ipvs.tcpTimeout: "-1s" is not a number of whole seconds up to 596h31m23s: write it as 15m or 90s, or 0 to leave the kernel's` +
				` --config: ipvs.udpTimeout: "1.5s" is not a number of whole seconds up to 596h31m23s: write it as 15m or 90s, or 0 to leave the kernel's`,
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			path := configPath(t, test.file)
			_, _, err := load(flagsOf(t, "--config="+path, "--hostname-override=node"))
			if err == nil {
				t.Fatal("no error")
			}
			got := strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), path, "FILE")), " ")
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	_, _, err := load(given{"config": "/does/not/exist", "mode": "x"})
	want := "--config: open /does/not/exist: no such file or directory\n--mode: unknown mode \"x\": use nft or ipvs"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

// Every field of kube-proxy's configuration either has a flag here or a reason
// why it has no effect.
func TestConfigFields(t *testing.T) {
	t.Parallel()
	flags, known := fieldFlags(), map[string]bool{}
	for _, s := range settings() {
		known[s.name] = true
	}
	seen := map[string]bool{}
	var walk func(path string, of reflect.Type)
	walk = func(path string, of reflect.Type) {
		for field := range of.Fields() {
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			if name == "" { // TypeMeta
				continue
			}
			if path != "" {
				name = path + "." + name
			}
			if field.Type.Kind() == reflect.Struct && strings.HasSuffix(field.Type.Name(), "Configuration") {
				walk(name, field.Type)
				continue
			}
			seen[name] = true
			flag, ok := flags[name]
			switch {
			case ok && !known[flag] && flag != acceptContentTypes:
				t.Errorf("%s: no flag --%s", name, flag)
			case !ok && strings.Contains(whyIdle(name), "does not know"):
				t.Errorf("%s: neither a flag nor a reason", name)
			}
		}
	}
	walk("", reflect.TypeFor[v1alpha1.KubeProxyConfiguration]())
	for field := range flags {
		if !seen[field] {
			t.Errorf("%s is no field of kube-proxy's", field)
		}
	}
}

// A changed file changes the running program; a broken one does not.
func TestConfigReload(t *testing.T) {
	t.Parallel()
	n := newNode(t, "a")
	n.put("backend.yaml", serviceYAML("backend", 10, 80))
	n.putPods("backend", "a")
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
	n.awaitAnswers(vips(10, 80), "a")
	// seen waits until the pod sees the client with this address.
	seen := func(want netip.Addr) {
		t.Helper()
		eventually(t, func() error {
			answer, err := connect(t.Context(), n.client, "tcp", vips(10, 80)[0])
			if err == nil && answer.Source.Addr() != want {
				err = fmt.Errorf("the pod saw %s, want %s", answer.Source.Addr(), want)
			}
			return err
		})
	}
	stop := n.keepConnecting(vips(10, 80))
	seen(n.Node.IPv4)
	write(pods)
	seen(n.client.IPv4)

	write("clusterCIDR: here\n")
	n.program.await(func(r record) bool {
		return r.Level == "ERROR" && strings.Contains(r.Error, `clusterCIDR: "here" is not a network`)
	})
	n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK, "fairlead_config_valid 0\n")
	seen(n.client.IPv4)

	write(others + "metricsBindAddress: 127.0.0.1:9999\n")
	n.program.await(func(r record) bool { return r.Level == "WARN" && r.What == "the address of /metrics" })
	seen(n.Node.IPv4)
	n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK, "fairlead_config_valid 1\n")
	n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK, `fairlead_config_reloads_total{result="success"} 2`)
	stop()
	n.stop()
}

// Who is told that the API server can't be reached as configured learns where to
// write it, which with a file is no flag.
func TestWrongKubeconfig(t *testing.T) {
	t.Parallel()
	good := filepath.Join(t.TempDir(), "kubeconfig")
	text := "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c}}], clusters: [{name: c, cluster: {server: https://192.0.2.1}}]}"
	if err := os.WriteFile(good, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	const none = "/does/not/exist"
	tests := []struct {
		name, file string // no file if it is empty
		args       []string
		want       string
	}{
		{"flag", "", []string{"--kubeconfig=" + none}, "--kubeconfig: kubeconfig " + none + ": "},
		{"flag, and a server", "", []string{"--kubeconfig=" + none, "--master=https://192.0.2.1"}, "--kubeconfig: kubeconfig " + none + ": "},
		{"neither", "", nil, "--kubeconfig: no kubeconfig is given"},
		{"server", "", []string{"--master=http://a b"}, "--master: API server http://a b: "},
		{"server, and a good flag", "", []string{"--master=http://a b", "--kubeconfig=" + good}, "--master: "},
		{"kubeadm's file", kubeadmConfig, nil, "--config: clientConnection.kubeconfig: kubeconfig /var/lib/kube-proxy/kubeconfig.conf: "},
		{"file without one", configHeader, nil, "--config: clientConnection.kubeconfig: no kubeconfig is given"},
		{"server, and a file without one", configHeader, []string{"--master=http://a b"}, "--master: API server http://a b: "},
		{
			"what belongs to another field", configHeader + "detectLocalMode: BridgeInterface\n", nil,
			"--config: detectLocalMode: BridgeInterface needs --config: detectLocal.bridgeInterface: ",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"run", "--hostname-override=node"}, test.args...)
			if test.file != "" {
				args = append(args, "--config="+configPath(t, test.file))
			}
			code, _, stderr := invoke(t, args...)
			if lines := strings.Split(strings.TrimSpace(stderr), "\n"); code != 1 || !strings.HasPrefix(lines[len(lines)-1], "fairlead: "+test.want) {
				t.Errorf("exit code %d, stderr %q, want 1 and %q", code, stderr, test.want)
			}
		})
	}
}
