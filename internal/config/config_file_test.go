package config

import (
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/conntracksettings"
	"fairlead.io/fairlead/internal/servicecounters"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/kube/proxyconfig"
)

// parseFlags returns the Flags of a command line of `fairlead run`.
func parseFlags(t *testing.T, args ...string) Flags {
	t.Helper()
	cmd := &cobra.Command{}
	flags := AddFlags(cmd)
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return flags
}

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

// defaultConfig returns the configuration with only --hostname-override=node set.
func defaultConfig() Config {
	return Config{
		Mode: backend.NFT, ProxyMode: "nftables", ClusterDomain: "cluster.local", HealthzAddress: "0.0.0.0:10256", MetricsAddress: "127.0.0.1:10249", StatusAddress: "127.0.0.1:10265", LogFormat: "text",
		API:          APIServer{Label: "--kubeconfig", QPS: 5, Burst: 10, BatchPeriod: 8 * time.Millisecond, MassRemovalDelay: time.Minute},
		GiveWayAfter: time.Minute,
		FlowOffload:  FlowOffload{Threshold: 20},
		Conntrack: conntracksettings.Settings{
			MaxPerCore: 32 << 10, Min: 128 << 10, TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour,
		},
		Tracker: kube.Options{
			ProtectLoopback: true,
			NodeName:        "node", DetectLocal: kube.DetectLocal{Mode: kube.DetectByClusterCIDR},
		},
	}
}

// iptablesAddresses is the default of --nodeport-addresses in kube-proxy's iptables mode.
func iptablesAddresses() kube.NodePortAddresses {
	return kube.NodePortAddresses{All: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
}

// setFileMode changes the expected configuration from a file without a mode to one with a mode.
func setFileMode(c *Config, proxyMode string) {
	c.ProxyMode, c.ModeSetting, c.Tracker.NodePortAddresses = proxyMode, "--config: mode", kube.NodePortAddresses{}
	if proxyMode == "ipvs" {
		c.Mode = backend.IPVS
	}
}

// ipvsValues returns the default values of ipvs mode, overridden by the given values.
func ipvsValues(given backend.Values) backend.Values {
	values := backend.Values{
		"ipvs-scheduler": "rr", "ipvs-exclude-cidrs": []netip.Prefix(nil), "ipvs-strict-arp": false,
		"ipvs-tcp-timeout": time.Duration(0), "ipvs-tcpfin-timeout": time.Duration(0), "ipvs-udp-timeout": time.Duration(0),
	}
	maps.Copy(values, given)
	return values
}

func diffConfigs(want, got Config) string {
	got.Fields = nil // TestWriteConfig of cmd/fairlead checks them
	return cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }))
}

func TestFlags(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		args []string
		want func(*Config)
	}{
		{"defaults", nil, func(*Config) {}},
		{
			"empty values", []string{
				"--kubeconfig=", "--master=", "--kube-api-qps=", "--kube-api-burst=", "--kube-api-content-type=", "--cluster-cidr=",
				"--detect-local-mode=", "--masquerade-all=", "--nodeport-addresses=", "--bind-address=", "--healthz-bind-address=",
				"--healthz-port=", "--metrics-bind-address=", "--metrics-port=", "--bind-address-hard-fail=", "--profiling=",
				"--mode=", "--proxy-mode=", "--config=", "--manifests=", "--service-cidr=", "--dns-listen=", "--cluster-domain=",
				"--log-level=", "--log-format=", "--v=", "--conntrack-min=", "--oom-score-adj=", "--init-only=", "--batch-period=",
			}, func(*Config) {},
		},
		{
			"API server",
			[]string{"--kubeconfig=k", "--master=https://m", "--kube-api-qps=7.5", "--kube-api-burst=20", "--kube-api-content-type=application/json"},
			func(c *Config) {
				c.API = APIServer{
					Kubeconfig: "k", Master: "https://m", Label: "--kubeconfig", QPS: 7.5, Burst: 20, ContentType: "application/json",
					BatchPeriod: c.API.BatchPeriod, MassRemovalDelay: c.API.MassRemovalDelay,
				}
			},
		},
		{"batch period", []string{"--batch-period=1s"}, func(c *Config) { c.API.BatchPeriod = time.Second }},
		{"no precedence after exit", []string{"--give-way-after=0"}, func(c *Config) { c.GiveWayAfter = 0 }},
		{"own tables", []string{"--nft-own-table"}, func(c *Config) { c.OwnTables = true }},
		{"flow offload", []string{"--flow-offload=software", "--flow-offload-threshold=100"}, func(c *Config) { c.FlowOffload = FlowOffload{Enabled: true, Threshold: 100} }},
		{"flow offload by hardware", []string{"--flow-offload=hardware"}, func(c *Config) { c.FlowOffload.Enabled, c.FlowOffload.Hardware = true, true }},
		{"service metrics", []string{"--service-metrics=default/web, kube-system/*"}, func(c *Config) {
			c.ServiceMetrics = []servicecounters.Selector{{Namespace: "default", Name: "web"}, {Namespace: "kube-system"}}
		}},
		{"no delay of mass removals", []string{"--mass-removal-delay=0"}, func(c *Config) { c.API.MassRemovalDelay = 0 }},
		{
			"connection tracking",
			[]string{
				"--conntrack-max-per-core=1", "--conntrack-min=2", "--conntrack-tcp-timeout-established=3s", "--conntrack-tcp-timeout-close-wait=4s",
				"--conntrack-tcp-be-liberal", "--conntrack-udp-timeout=5s", "--conntrack-udp-timeout-stream=6s",
			},
			func(c *Config) {
				c.Conntrack = conntracksettings.Settings{
					MaxPerCore: 1, Min: 2, TCPEstablishedTimeout: 3 * time.Second, TCPCloseWaitTimeout: 4 * time.Second,
					TCPBeLiberal: true, UDPTimeout: 5 * time.Second, UDPStreamTimeout: 6 * time.Second,
				}
			},
		},
		{
			"connection tracking, zero",
			[]string{
				"--conntrack-max-per-core=0", "--conntrack-min=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0s",
			},
			func(c *Config) { c.Conntrack = conntracksettings.Settings{} },
		},
		{"no batching", []string{"--batch-period=0"}, func(c *Config) { c.API.BatchPeriod = 0 }},
		{
			"batch period with manifests",
			[]string{"--manifests=m", "--batch-period=10ms"},
			func(c *Config) {
				c.Manifests, c.Tracker.NodePortAddresses, c.API.BatchPeriod = "m", kube.NodePortAddresses{All: true}, 10*time.Millisecond
				c.Warnings = []Warning{{"--batch-period", "it applies only to an API server, and --manifests is set", NoEffect}}
			},
		},
		{
			"detect local traffic by CIDR",
			[]string{"--cluster-cidr=10.244.0.0/16,fd00::/56", "--masquerade-all", "--bind-address=192.0.2.1"},
			func(c *Config) {
				c.Tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00::/56")}
				c.Tracker.MasqueradeAll = true
				c.Tracker.BindAddress = netip.MustParseAddr("192.0.2.1")
			},
		},
		{
			"detect local traffic by Node",
			[]string{"--detect-local-mode=NodeCIDR"},
			func(c *Config) { c.Tracker.DetectLocal.Mode = kube.DetectByNodeCIDR },
		},
		{
			"detect local traffic by bridge",
			[]string{"--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"},
			func(c *Config) {
				c.Tracker.DetectLocal = kube.DetectLocal{Mode: kube.DetectByBridgeInterface, Interface: "cni0"}
			},
		},
		{
			"detect local traffic by interface prefix",
			[]string{"--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=veth"},
			func(c *Config) {
				c.Tracker.DetectLocal = kube.DetectLocal{Mode: kube.DetectByInterfaceNamePrefix, InterfacePrefix: "veth"}
			},
		},
		{
			"node port addresses",
			[]string{"--nodeport-addresses=10.0.0.1/8,localhost", "--nodeport-addresses=primary"},
			func(c *Config) {
				c.Tracker.NodePortAddresses = kube.NodePortAddresses{Primary: true, Localhost: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
			},
		},
		{"pings", []string{"--ping-service-ips"}, func(c *Config) { c.Tracker.PingServiceIPs = true }},
		{"ipvs mode", []string{"--mode=ipvs"}, func(c *Config) { c.Mode, c.ProxyMode, c.Values = backend.IPVS, "ipvs", ipvsValues(nil) }},
		{"ipvs mode by kube-proxy's flag", []string{"--proxy-mode=ipvs"}, func(c *Config) {
			c.Mode, c.ProxyMode, c.ModeSetting, c.Values = backend.IPVS, "ipvs", "--proxy-mode", ipvsValues(nil)
		}},
		{"iptables mode", []string{"--proxy-mode=iptables"}, func(c *Config) {
			c.ProxyMode, c.ModeSetting, c.Tracker.NodePortAddresses = "iptables", "--proxy-mode", iptablesAddresses()
		}},
		{"iptables mode and its backend", []string{"--proxy-mode=iptables", "--mode=nft"}, func(c *Config) {
			c.ProxyMode, c.ModeSetting, c.Tracker.NodePortAddresses = "iptables", "--proxy-mode", iptablesAddresses()
		}},
		{"iptables mode without node ports on localhost", []string{"--proxy-mode=iptables", "--iptables-localhost-nodeports=false"}, func(c *Config) {
			c.ProxyMode, c.ModeSetting, c.Tracker.NodePortAddresses = "iptables", "--proxy-mode", kube.NodePortAddresses{All: true}
		}},
		{"iptables mode with all addresses", []string{"--proxy-mode=iptables", "--nodeport-addresses=0.0.0.0/0,::/0"}, func(c *Config) {
			c.ProxyMode, c.ModeSetting = "iptables", "--proxy-mode"
			c.Tracker.NodePortAddresses.CIDRs = []netip.Prefix{
				netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0"), netip.MustParsePrefix("127.0.0.0/8"),
			}
		}},
		{"iptables mode with one network", []string{"--proxy-mode=iptables", "--nodeport-addresses=192.0.2.0/24"}, func(c *Config) {
			c.ProxyMode, c.ModeSetting = "iptables", "--proxy-mode"
			c.Tracker.NodePortAddresses.CIDRs = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
		}},
		{"iptables mode with localhost", []string{"--proxy-mode=iptables", "--nodeport-addresses=primary,localhost,::1/128"}, func(c *Config) {
			c.ProxyMode, c.ModeSetting = "iptables", "--proxy-mode"
			c.Tracker.NodePortAddresses = kube.NodePortAddresses{Primary: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
		}},
		{"iptables mode without any address", []string{"--proxy-mode=iptables", "--nodeport-addresses=localhost", "--iptables-localhost-nodeports=false"}, func(c *Config) {
			c.ProxyMode, c.ModeSetting = "iptables", "--proxy-mode"
			c.Tracker.NodePortAddresses.CIDRs = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/32")}
		}},
		{
			"all IPVS settings",
			[]string{
				"--mode=ipvs", "--ipvs-scheduler=mh", "--ipvs-exclude-cidrs=192.0.2.1/24,2001:db8::/64", "--ipvs-exclude-cidrs=10.0.0.0/8",
				"--ipvs-strict-arp", "--ipvs-tcp-timeout=15m", "--ipvs-tcpfin-timeout=30s", "--ipvs-udp-timeout=1m30s",
			},
			func(c *Config) {
				c.Mode, c.ProxyMode = backend.IPVS, "ipvs"
				c.Values = backend.Values{
					"ipvs-scheduler": "mh", "ipvs-strict-arp": true,
					"ipvs-tcp-timeout": 15 * time.Minute, "ipvs-tcpfin-timeout": 30 * time.Second, "ipvs-udp-timeout": 90 * time.Second,
					"ipvs-exclude-cidrs": []netip.Prefix{
						netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/64"), netip.MustParsePrefix("10.0.0.0/8"),
					},
				}
			},
		},
		{
			"longest IPVS timeout and none",
			[]string{"--mode=ipvs", "--ipvs-tcp-timeout=2147483s", "--ipvs-udp-timeout=0"},
			func(c *Config) {
				c.Mode, c.ProxyMode, c.Values = backend.IPVS, "ipvs", ipvsValues(backend.Values{"ipvs-tcp-timeout": 2147483 * time.Second})
			},
		},
		{
			"sync periods of kube-proxy's ipvs mode",
			[]string{"--mode=ipvs", "--ipvs-sync-period=30s", "--ipvs-min-sync-period=0s"},
			func(c *Config) {
				c.Mode, c.ProxyMode, c.Values = backend.IPVS, "ipvs", ipvsValues(nil)
				c.Warnings = []Warning{{"--ipvs-min-sync-period", ignoredSync, NoEffect}, {"--ipvs-sync-period", ignoredSync, NoEffect}}
			},
		},
		{
			"IPVS settings in another mode",
			[]string{"--ipvs-scheduler=lc", "--ipvs-strict-arp"},
			func(c *Config) {
				c.Warnings = []Warning{{"--ipvs-scheduler", ignoredOtherMode(backend.IPVS), NoEffect}, {"--ipvs-strict-arp", ignoredOtherMode(backend.IPVS), NoEffect}}
			},
		},
		{
			"kube-proxy's flag for localhost node ports",
			[]string{"--iptables-localhost-nodeports=false"},
			func(c *Config) {
				c.Warnings = []Warning{{"--iptables-localhost-nodeports", ignoredLocalhost, NoEffect}}
			},
		},
		{
			"underscores",
			[]string{"--cluster_cidr=10.0.0.0/8", "--kube_api-burst=3"},
			func(c *Config) {
				c.Tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
				c.API.Burst = 3
			},
		},
		{
			"manifests",
			[]string{"--manifests=m"},
			func(c *Config) { c.Manifests, c.Tracker.NodePortAddresses = "m", kube.NodePortAddresses{All: true} },
		},
		{
			"IPv6 node",
			[]string{"--bind-address=::"},
			func(c *Config) {
				c.HealthzAddress, c.MetricsAddress, c.Tracker.BindAddress = "[::]:10256", "[::1]:10249", netip.IPv6Unspecified()
			},
		},
		{
			"server addresses",
			[]string{"--healthz-bind-address=[fd00::1]:1", "--metrics-bind-address=192.0.2.1", "--status-address=192.0.2.2", "--bind-address-hard-fail", "--profiling"},
			func(c *Config) {
				c.HealthzAddress, c.MetricsAddress, c.HardFail, c.Profiling = "[fd00::1]:1", "192.0.2.1:10249", true, true
				c.StatusAddress = "192.0.2.2:10265"
				c.Tracker.ProtectLoopback = false // no server listens on a loopback address
			},
		},
		{
			"another port of the status page",
			[]string{"--status-address=[::1]:1"},
			func(c *Config) { c.StatusAddress = "[::1]:1" },
		},
		{
			"no status page",
			[]string{"--status-address="},
			func(c *Config) { c.StatusAddress = "" },
		},
		{
			"values that only kube-proxy's parsers accept",
			[]string{
				"--kube-api-qps=+Inf", "--kube-api-burst=0x10", "--conntrack-min=1_000", "--cluster-cidr=10.1.0.0/16", "--cluster-cidr=010.0.0.1/08,::ffff:10.2.0.0/112",
				"--bind-address=010.0.0.1", "--healthz-bind-address=127.000.000.001:5", "--metrics-bind-address=010.0.0.2",
			},
			func(c *Config) {
				c.API.QPS, c.API.Burst, c.Conntrack.Min = -1, 16, 1000
				c.Tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.2.0.0/16")}
				c.Tracker.BindAddress = netip.MustParseAddr("10.0.0.1")
				c.HealthzAddress, c.MetricsAddress = "127.0.0.1:5", "10.0.0.2:10249"
			},
		},
		{
			"networks and interfaces that another mode to detect local traffic ignores",
			[]string{"--detect-local-mode=NodeCIDR", "--cluster-cidr=10.0.0.0/8,pods", "--pod-bridge-interface=a/b"},
			func(c *Config) {
				c.Tracker.DetectLocal.Mode, c.Tracker.DetectLocal.Interface = "NodeCIDR", "a/b"
				c.Warnings = []Warning{
					{"--cluster-cidr", "it requires --detect-local-mode=ClusterCIDR", NoEffect},
					{"--pod-bridge-interface", "it requires --detect-local-mode=BridgeInterface", NoEffect},
				}
			},
		},
		{
			"IPVS timeouts",
			[]string{"--mode=ipvs", "--ipvs-tcp-timeout=1500ms", "--ipvs-tcpfin-timeout=999ms", "--ipvs-udp-timeout=999999h"},
			func(c *Config) {
				c.Mode, c.ProxyMode = backend.IPVS, "ipvs"
				c.Values = ipvsValues(backend.Values{
					"ipvs-tcp-timeout": time.Second, "ipvs-tcpfin-timeout": time.Duration(0), "ipvs-udp-timeout": math.MaxInt32 / 1000 * time.Second,
				})
			},
		},
		{
			"deprecated ports",
			[]string{"--healthz-port=0", "--metrics-port=9999"},
			func(c *Config) {
				c.HealthzAddress = ""
				c.Warnings = []Warning{
					{"--healthz-port", "use --healthz-bind-address", Deprecated},
					{"--metrics-port", "it has no effect unless --metrics-bind-address is an address without a port: use --metrics-bind-address", Deprecated},
				}
			},
		},
		{
			"deprecated port and an address without a port",
			[]string{"--healthz-port=1", "--healthz-bind-address=192.0.2.1"},
			func(c *Config) {
				c.HealthzAddress = "192.0.2.1:1"
				c.Warnings = []Warning{{"--healthz-port", "use --healthz-bind-address", Deprecated}}
			},
		},
		{
			"deprecated port and an address with a port",
			[]string{"--healthz-port=1", "--healthz-bind-address=192.0.2.1:2"},
			func(c *Config) {
				c.HealthzAddress = "192.0.2.1:2"
				c.Warnings = []Warning{{"--healthz-port", "it has no effect unless --healthz-bind-address is an address without a port: use --healthz-bind-address", Deprecated}}
			},
		},
		{
			"logging",
			[]string{"--v=4", "--logging-format=json"},
			func(c *Config) { c.LogLevel, c.LogFormat = slog.LevelDebug, "json" },
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, _, err := Load(parseFlags(t, append(test.args, "--hostname-override=Node ")...))
			if err != nil {
				t.Fatal(err)
			}
			want := defaultConfig()
			test.want(&want)
			if diff := diffConfigs(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// kubeadmConfig returns the configuration that kubeadm 1.37 writes to the kube-proxy ConfigMap.
func kubeadmConfig(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("testdata/kubeadm.conf")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestConfigFile(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, file string
		args       []string
		want       func(*Config)
	}{
		{"no fields", configHeader, nil, func(*Config) {}},
		{
			"kubeadm", kubeadmConfig(t), nil,
			func(c *Config) {
				c.API.Kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf"
				c.Tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
				c.Tracker.BindAddress = netip.IPv4Unspecified()
			},
		},
		{
			"all supported fields", configHeader + `
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
			func(c *Config) {
				c.API = APIServer{Kubeconfig: "k", AcceptContentTypes: "a", ContentType: "c", QPS: 2.5, Burst: 3, BatchPeriod: c.API.BatchPeriod, MassRemovalDelay: c.API.MassRemovalDelay}
				c.LogFormat, c.LogLevel = "json", slog.LevelDebug
				c.HealthzAddress, c.MetricsAddress, c.HardFail, c.Profiling = "192.0.2.1:1", "192.0.2.1:2", true, true
				c.Tracker = kube.Options{
					NodeName: "node", BindAddress: netip.MustParseAddr("192.0.2.1"), MasqueradeAll: true,
					DetectLocal: kube.DetectLocal{
						Mode: kube.DetectByBridgeInterface, Interface: "cni0",
						ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00::/56")},
					},
					NodePortAddresses: kube.NodePortAddresses{Primary: true, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
					ProtectLoopback:   true, // for the status page
				}
				c.ProxyMode, c.ModeSetting = "nftables", "--config: mode"
			},
		},
		{
			"iptables.masqueradeAll without a mode", configHeader + "iptables: {masqueradeAll: true}\n", nil,
			func(c *Config) { c.Tracker.MasqueradeAll = true },
		},
		{
			"iptables.masqueradeAll in nftables mode", configHeader + "mode: nftables\niptables: {masqueradeAll: true}\n", nil,
			func(c *Config) {
				setFileMode(c, "nftables")
				c.Warnings = []Warning{{"--config: iptables.masqueradeAll", ignoredIPTables, NoEffect}}
			},
		},
		{
			"fields without effect",
			configHeader + "ipvs: {scheduler: lc, syncPeriod: 5s}\nnftables: {masqueradeBit: 3}\nfeatureGates: {A: true}\n",
			nil,
			func(c *Config) {
				c.Warnings = []Warning{
					{"--config: featureGates.A", ignoredFeatureGates, NoEffect},
					{"--config: ipvs.syncPeriod", ignoredSync, NoEffect},
					{"--config: nftables.masqueradeBit", "Fairlead does not mark packets", NoEffect},
					{"--config: ipvs.scheduler", ignoredOtherMode(backend.IPVS), NoEffect},
				}
			},
		},
		{
			"connection tracking", configHeader + "conntrack: {maxPerCore: 1, min: 2, tcpEstablishedTimeout: 3s, tcpCloseWaitTimeout: 4s, " +
				"tcpBeLiberal: true, udpTimeout: 5s, udpStreamTimeout: 6s}\n", nil,
			func(c *Config) {
				c.Conntrack = conntracksettings.Settings{
					MaxPerCore: 1, Min: 2, TCPEstablishedTimeout: 3 * time.Second, TCPCloseWaitTimeout: 4 * time.Second,
					TCPBeLiberal: true, UDPTimeout: 5 * time.Second, UDPStreamTimeout: 6 * time.Second,
				}
			},
		},
		{
			"connection tracking, null", configHeader + "conntrack: {maxPerCore: null, min: null, tcpEstablishedTimeout: null, tcpCloseWaitTimeout: null, " +
				"udpTimeout: 0s, udpStreamTimeout: 0s}\n", nil, func(*Config) {},
		},
		{
			"connection tracking, zero", configHeader + "conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}\n", nil,
			func(c *Config) { c.Conntrack = conntracksettings.Settings{} },
		},
		{
			"ipvs mode", configHeader + `
mode: ipvs
iptables: {masqueradeAll: true}
nftables: {masqueradeAll: true}
ipvs: {scheduler: lc, excludeCIDRs: [10.0.0.0/8], strictARP: true, tcpTimeout: 15m0s, tcpFinTimeout: 30s, udpTimeout: 1m0s, syncPeriod: 30s}
`, nil,
			func(c *Config) {
				setFileMode(c, "ipvs")
				c.Tracker.MasqueradeAll = true
				c.Values = backend.Values{
					"ipvs-scheduler": "lc", "ipvs-exclude-cidrs": []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, "ipvs-strict-arp": true,
					"ipvs-tcp-timeout": 15 * time.Minute, "ipvs-tcpfin-timeout": 30 * time.Second, "ipvs-udp-timeout": time.Minute,
				}
				c.Warnings = []Warning{{"--config: ipvs.syncPeriod", ignoredSync, NoEffect}, {"--config: nftables.masqueradeAll", ignoredNFTables, NoEffect}}
			},
		},
		{
			"mode by flag, empty in the file", configHeader + "mode: ''\nipvs: {scheduler: sh}\n",
			[]string{"--mode=ipvs", "--ipvs-scheduler=lc"},
			func(c *Config) {
				c.Mode, c.ProxyMode, c.Values = backend.IPVS, "ipvs", ipvsValues(backend.Values{"ipvs-scheduler": "sh"})
				c.Tracker.NodePortAddresses = kube.NodePortAddresses{}
				c.Warnings = []Warning{{"--ipvs-scheduler", "--config is set: set it in the file", NoEffect}}
			},
		},
		{
			"iptables.localhostNodePorts in mode nftables", configHeader + "mode: nftables\niptables: {localhostNodePorts: true}\n", nil,
			func(c *Config) {
				setFileMode(c, "nftables")
				c.Warnings = []Warning{{"--config: iptables.localhostNodePorts", ignoredLocalhost, NoEffect}}
			},
		},
		{
			"Fairlead's own flag", configHeader,
			[]string{"--ping-service-ips"},
			func(c *Config) { c.Tracker.PingServiceIPs = true },
		},
		{
			"batch period", configHeader,
			[]string{"--batch-period=0s"},
			func(c *Config) { c.API.BatchPeriod = 0 },
		},
		{
			"flags that override the file", configHeader + "hostnameOverride: other\nlogging: {verbosity: 9}\nmode: nftables\n",
			[]string{"--v=1", "--master=https://m", "--mode=nft"},
			func(c *Config) {
				setFileMode(c, "nftables")
				c.API.Master = "https://m"
			},
		},
		{
			"flags that the file overrides", configHeader + "clusterCIDR: 10.244.0.0/16\n",
			[]string{"--cluster-cidr=10.0.0.0/8", "--masquerade-all", "--healthz-port=0"},
			func(c *Config) {
				c.Tracker.DetectLocal.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
				const why = "--config is set: set it in the file"
				c.Warnings = []Warning{{"--cluster-cidr", why, NoEffect}, {"--masquerade-all", why, NoEffect}, {"--healthz-port", why, NoEffect}}
			},
		},
		{
			"manifests", configHeader,
			[]string{"--manifests=m", "--service-cidr=10.0.0.0/16"},
			func(c *Config) {
				c.Manifests = "m"
				c.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}
			},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, content, err := Load(parseFlags(t, append(test.args, "--config="+writeConfigFile(t, test.file), "--hostname-override=node")...))
			if err != nil {
				t.Fatal(err)
			}
			want := defaultConfig()
			want.ProxyMode, want.Tracker.NodePortAddresses = "iptables", iptablesAddresses() // the default of kube-proxy
			test.want(&want)
			want.API.Label = "--config: clientConnection.kubeconfig"
			if diff := diffConfigs(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if string(content) != test.file {
				t.Errorf("content %q, want %q", content, test.file)
			}
		})
	}
}

func TestInvalidConfigFile(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, file, want string }{
		{"empty", "", "--config: FILE: apiVersion: got nothing, want kubeproxy.config.k8s.io/v1alpha1"},
		{"another kind", "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: Kubelet\n", `--config: FILE: kind: got "Kubelet", want KubeProxyConfiguration`},
		{"invalid YAML", "a: [", "--config: FILE: yaml: line 1: did not find expected node content"},
		{
			"wrong type", configHeader + "masqueradeAll: 1\noomScoreAdj: much\n",
			"--config: FILE: json: cannot unmarshal string into Go struct field KubeProxyConfiguration.oomScoreAdj of type int32",
		},
		{
			"wrong values", configHeader + "clusterCIDR: pods\nmode: userspace\nhealthzBindAddress: here\n",
			`--config: mode: unknown mode "userspace": use nftables, ipvs, iptables` +
				` --config: clusterCIDR: "pods" is not a network: write it as 10.96.0.0/12 or fd00:96::/112` +
				` --config: healthzBindAddress: "here" is not an address with a port: write it as 127.0.0.1:10256 or [::1]:10256`,
		},
		{
			"wrong IPVS settings", configHeader + "mode: ipvs\nipvs: {scheduler: least, excludeCIDRs: [pods], tcpTimeout: -1s}\n",
			`--config: ipvs.scheduler: "least" is not an IPVS scheduler: use one of dh, fo, lblc, lblcr, lc, mh, nq, ovf, rr, sed, sh, twos, wlc, wrr` +
				` --config: ipvs.excludeCIDRs: "pods" is not a network: write it as 10.96.0.0/12 or fd00:96::/112` +
				` --config: ipvs.tcpTimeout: "-1s" is not a duration: write it as 15m or 90s, or 0 to keep the kernel's value`,
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			path := writeConfigFile(t, test.file)
			_, _, err := Load(parseFlags(t, "--config="+path, "--hostname-override=node"))
			if err == nil {
				t.Fatal("no error")
			}
			got := strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), path, "FILE")), " ")
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	_, _, err := Load(Flags{"config": "/does/not/exist", "mode": "x"})
	want := "--config: open /does/not/exist: no such file or directory\n--mode: unknown mode \"x\": use nft or ipvs"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

// TestConfigFields checks that every field of kube-proxy's configuration has either an
// equivalent flag or a reason why it has no effect.
func TestConfigFields(t *testing.T) {
	t.Parallel()
	flags, known := fieldFlags(), map[string]bool{}
	for _, s := range settings() {
		known[s.name] = true
	}
	seen := map[string]bool{}
	for _, name := range proxyconfig.Fields() {
		seen[name] = true
		flag, ok := flags[name]
		switch {
		case ok && !known[flag] && flag != acceptContentTypes:
			t.Errorf("%s: no flag --%s", name, flag)
		case !ok && strings.Contains(ignoredFieldReason(name), "does not support"):
			t.Errorf("%s has neither a flag nor a reason", name)
		}
	}
	for field := range flags {
		if !seen[field] {
			t.Errorf("%s is not a field of kube-proxy's configuration", field)
		}
	}
}

// TestCompatibilityFields checks that docs/compatibility.md lists every field of kube-proxy's
// configuration, and names the equivalent flag or says that there is no effect.
func TestCompatibilityFields(t *testing.T) {
	t.Parallel()
	document, err := os.ReadFile("../../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(document), "\n## Configuration fields\n")
	section, _, _ = strings.Cut(section, "\n## ")
	documented, flags := map[string]string{}, fieldFlags()
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.+) \\|$").FindAllStringSubmatch(section, -1) {
		documented[row[1]] = row[2]
	}
	if diff := cmp.Diff(proxyconfig.Fields(), slices.Sorted(maps.Keys(documented))); diff != "" {
		t.Errorf("fields in docs/compatibility.md (-want +got):\n%s", diff)
	}
	for field, answer := range documented {
		want := "no effect"
		if flag, ok := flags[field]; ok {
			if want = "`--" + flag + "`"; flag == acceptContentTypes {
				want = "same"
			}
		}
		if !strings.HasPrefix(answer, want) {
			t.Errorf("docs/compatibility.md: %s: %q, want %s", field, answer, want)
		}
	}
}

// TestRestartRequired checks the names of changed settings that only a restart can apply.
func TestRestartRequired(t *testing.T) {
	t.Parallel()
	const full = "mode: ipvs\nipvs: {scheduler: lc, excludeCIDRs: [10.0.0.0/8], strictARP: true, tcpTimeout: 1s, tcpFinTimeout: 2s, udpTimeout: 3s}\n"
	for _, test := range []struct {
		name, before, after string
		want                []string
	}{
		{"no change", full, full, nil},
		{"all IPVS settings", full, "mode: ipvs\n", []string{
			"ipvs-exclude-cidrs", "ipvs-scheduler", "ipvs-strict-arp", "ipvs-tcp-timeout", "ipvs-tcpfin-timeout", "ipvs-udp-timeout",
		}},
		{"one timeout", full, strings.Replace(full, "udpTimeout: 3s", "udpTimeout: 4s", 1), []string{"ipvs-udp-timeout"}},
		{"nftables to ipvs with its settings", "mode: nftables\n", full, []string{"mode"}},
		{"ipvs to nftables", full, "mode: nftables\n", []string{"mode"}},
		{"IPVS settings in nftables mode", "mode: nftables\n", strings.Replace(full, "mode: ipvs", "mode: nftables", 1), nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var configs [2]Config
			for i, text := range []string{test.before, test.after} {
				var err error
				if configs[i], _, err = Load(Flags{"config": writeConfigFile(t, configHeader+text), "hostname-override": "node"}); err != nil {
					t.Fatal(err)
				}
			}
			if got := configs[0].RestartRequired(configs[1]); !slices.Equal(got, test.want) {
				t.Errorf("RestartRequired() = %q, want %q", got, test.want)
			}
		})
	}
}

// TestFieldsAfterReload checks that /configz and /proxyMode keep the values that a reload does not
// change.
func TestFieldsAfterReload(t *testing.T) {
	t.Parallel()
	load := func(text string) Config {
		t.Helper()
		c, _, err := Load(Flags{"config": writeConfigFile(t, configHeader+text), "v": "3"})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	// Every field that needs a restart, and some others.
	const all = `clientConnection: {kubeconfig: k%[1]s, acceptContentTypes: a%[1]s, contentType: c%[1]s, qps: %[1]s, burst: %[1]s}
bindAddressHardFail: %[2]t
enableProfiling: %[2]t
healthzBindAddress: 127.0.0.1:%[1]s
metricsBindAddress: 127.0.0.2:%[1]s
hostnameOverride: n%[1]s
ipvs: {excludeCIDRs: [10.%[1]s.0.0/16], scheduler: %[3]s, strictARP: %[2]t, tcpTimeout: %[1]ss, tcpFinTimeout: %[1]ss, udpTimeout: %[1]ss}
logging: {format: %[4]s, verbosity: 2}
clusterCIDR: 10.%[1]s.0.0/16
mode: `
	before := load(fmt.Sprintf(all, "11", true, "rr", "text") + "ipvs")
	same := load(fmt.Sprintf(all, "12", false, "lc", "json") + "ipvs")
	other := load(fmt.Sprintf(all, "12", false, "lc", "json") + "iptables")
	for _, field := range restartFields() {
		if before.Fields[field] == "" || before.Fields[field] == same.Fields[field] {
			t.Errorf("%s: %q in both files", field, before.Fields[field])
		}
	}
	want := maps.Clone(before.Fields)
	want["clusterCIDR"] = "10.12.0.0/16"
	for _, next := range []Config{same, other} {
		if diff := cmp.Diff(want, before.FieldsAfterReload(next)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	if want["logging.verbosity"] != "3" {
		t.Errorf("verbosity %s, want the flag's", want["logging.verbosity"])
	}
	// A change between two modes of the same backend needs no restart.
	for _, mode := range []string{"nftables", "iptables"} {
		next := load("mode: " + mode + "\n")
		if got := other.FieldsAfterReload(next).Mode(); got != mode {
			t.Errorf("mode %s, want %s", got, mode)
		}
	}
}

func TestVerbosity(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args  []string
		debug bool
	}{
		{[]string{"-v4"}, true},
		{[]string{"--v=3"}, false},
		{[]string{"--v=9", "--log-level=info"}, false},
		{[]string{"--v=0", "--log-level=debug"}, true},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			t.Parallel()
			c, _, err := Load(parseFlags(t, append(test.args, "--manifests=x")...))
			if got := c.LogLevel < 0; err != nil || got != test.debug {
				t.Errorf("debug level: %t, error %v; want %t", got, err, test.debug)
			}
		})
	}
}
