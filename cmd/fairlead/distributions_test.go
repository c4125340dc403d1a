package main

import (
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/internal/agent/agenttest"
)

// distribution is kube-proxy's configuration in a Kubernetes distribution: the settings that it
// writes, as facts, without names and addresses of a real cluster. KUBECONFIG and MASTER stand for
// the test's API server. NODE stands for the name of the node.
type distribution struct {
	name, source string
	file         string
	args         []string
	// iptables reports whether kube-proxy's mode is iptables instead of nftables.
	iptables bool
	// warnings are the expected log lines about settings, without the notice about the mode.
	warnings []string
}

const (
	noEffect      = "settings have no effect: "
	ignoredFields = "fields of the configuration file are ignored: "
	syncNote      = " (Fairlead programs changes as they arrive instead of periodically; use --batch-period to batch them)"
	oomNote       = " (Fairlead does not set its oom_score_adj: in Kubernetes, priorityClassName system-node-critical sets it)"
)

func distributions(t *testing.T) []distribution {
	t.Helper()
	kubeadm := strings.Replace(kubeadmConfig(t), "/var/lib/kube-proxy/kubeconfig.conf", "KUBECONFIG", 1)
	const eks = configHeader + `bindAddress: 0.0.0.0
clientConnection: {acceptContentTypes: "", burst: 10, contentType: application/vnd.kubernetes.protobuf, kubeconfig: KUBECONFIG, qps: 5}
clusterCIDR: ""
configSyncPeriod: 15m0s
conntrack: {max: 0, maxPerCore: 32768, min: 131072, tcpCloseWaitTimeout: 1h0m0s, tcpEstablishedTimeout: 24h0m0s}
enableProfiling: false
healthzBindAddress: 0.0.0.0:10256
hostnameOverride: ""
iptables: {masqueradeAll: false, masqueradeBit: 14, minSyncPeriod: 0s, syncPeriod: 30s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", syncPeriod: 30s}
metricsBindAddress: 127.0.0.1:10249
mode: "iptables"
nodePortAddresses: null
oomScoreAdj: -998
portRange: ""
udpIdleTimeout: 250ms
`
	eksWarnings := []string{
		ignoredFields + "conntrack.max, udpIdleTimeout (unknown field)",
		noEffect + "--config: configSyncPeriod (Fairlead watches for changes and has nothing to refresh); " +
			"--config: iptables.masqueradeBit (it applies only to kube-proxy's iptables mode); " +
			"--config: iptables.syncPeriod, --config: ipvs.syncPeriod" + syncNote + "; --config: oomScoreAdj" + oomNote,
	}
	return []distribution{
		{
			name: "kubeadm", source: "kubernetes/kubernetes, cmd/kubeadm/app/phases/addons/proxy/manifests.go",
			file: kubeadm, args: []string{"--hostname-override=NODE"}, iptables: true,
		},
		{
			name: "kind", source: "kubernetes-sigs/kind, pkg/cluster/internal/kubeadm/config.go, which changes kubeadm's configuration",
			file: strings.NewReplacer(`mode: ""`, "mode: iptables", "maxPerCore: null", "maxPerCore: 0",
				"localhostNodePorts: null\n  masqueradeAll: false\n  masqueradeBit: null\n  minSyncPeriod: 0s",
				"localhostNodePorts: null\n  masqueradeAll: false\n  masqueradeBit: null\n  minSyncPeriod: 1s").Replace(kubeadm),
			args: []string{"--hostname-override=NODE"}, iptables: true,
			warnings: []string{noEffect + "--config: iptables.minSyncPeriod" + syncNote},
		},
		{
			name: "EKS", source: "aws/containers-roadmap, issue 142",
			file: eks, args: []string{"--v=2", "--hostname-override=NODE"}, iptables: true, warnings: eksWarnings,
		},
		{
			name: "EKS with nftables", source: "none found; assumed: the same file with the mode nftables",
			file: strings.Replace(eks, `mode: "iptables"`, "mode: nftables", 1), args: []string{"--v=2", "--hostname-override=NODE"},
			warnings: eksWarnings,
		},
		{
			name: "k3s and RKE2", source: "k3s-io/k3s, pkg/daemons/agent/agent_linux.go; RKE2 passes the same arguments to a static pod",
			args: []string{
				"--cluster-cidr=10.42.0.0/16", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-close-wait=0s",
				"--conntrack-tcp-timeout-established=0s", "--healthz-bind-address=127.0.0.1", "--hostname-override=NODE",
				"--kubeconfig=KUBECONFIG", "--proxy-mode=iptables",
			},
			iptables: true,
		},
		{
			name: "GCE", source: "kubernetes/kubernetes, cluster/gce/gci/configure-helper.sh and cluster/gce/manifests/kube-proxy.manifest",
			args: []string{
				"--master=MASTER", "--kubeconfig=KUBECONFIG", "--cluster-cidr=10.64.0.0/14", "--oom-score-adj=-998", "--v=2",
				"--proxy-mode=iptables", "--iptables-sync-period=1m", "--iptables-min-sync-period=10s",
			},
			iptables: true,
			warnings: []string{noEffect + "--iptables-min-sync-period, --iptables-sync-period" + syncNote + "; --oom-score-adj" + oomNote},
		},
		{
			name: "GCE with nftables", source: "kubernetes/kubernetes, cluster/gce/gci/configure-helper.sh",
			args: []string{
				"--master=MASTER", "--kubeconfig=KUBECONFIG", "--cluster-cidr=10.64.0.0/14", "--oom-score-adj=-998", "--v=2",
				"--proxy-mode=nftables", "--conntrack-tcp-be-liberal",
			},
			warnings: []string{noEffect + "--oom-score-adj" + oomNote},
		},
		{
			// The pod's ServiceAccount identifies it. The kubeconfig takes its place here.
			name: "AKS", source: "Azure/unbounded, its controller of a managed kube-proxy",
			args: []string{
				"--conntrack-max-per-core=0", "--metrics-bind-address=0.0.0.0:10249", "--cluster-cidr=10.244.0.0/16",
				"--detect-local-mode=ClusterCIDR", "--pod-interface-name-prefix=", "--v=3", "--kubeconfig=KUBECONFIG",
			},
			iptables: true,
		},
		{
			name: "AKS with Azure CNI", source: "arguments of the pods of mcr.microsoft.com/oss/kubernetes/kube-proxy:v1.29.7",
			args: []string{
				"--conntrack-max-per-core=0", "--metrics-bind-address=0.0.0.0:10249", "--cluster-cidr=10.244.0.0/16",
				"--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=azv", "--v=3", "--kubeconfig=KUBECONFIG",
			},
			iptables: true,
		},
		{
			name: "Talos", source: "siderolabs/talos, internal/app/machined/pkg/controllers/k8s/control_plane.go",
			args: []string{
				"--cluster-cidr=10.244.0.0/16", "--conntrack-max-per-core=0", "--hostname-override=NODE", "--kubeconfig=KUBECONFIG",
				"--proxy-mode=nftables",
			},
		},
		{
			name: "Talos with a file", source: "siderolabs/talos, internal/app/machined/pkg/controllers/k8s/internal/k8stemplates/kube-proxy.go",
			file: configHeader + "clientConnection: {kubeconfig: KUBECONFIG}\nclusterCIDR: 10.244.0.0/16\nconntrack: {maxPerCore: 0}\nmode: nftables\n",
			args: []string{"--hostname-override=NODE"},
		},
		{
			name: "k0s", source: "k0sproject/k0s, pkg/component/controller/kubeproxy.go",
			file: configHeader + `bindAddress: 0.0.0.0
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: KUBECONFIG, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
featureGates:
mode: "iptables"
conntrack: {maxPerCore: 0, min: null, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {"syncPeriod":"0s","minSyncPeriod":"0s"}
ipvs: {"syncPeriod":"0s","minSyncPeriod":"0s","tcpTimeout":"0s","tcpFinTimeout":"0s","udpTimeout":"0s"}
nftables: {"syncPeriod":"0s","minSyncPeriod":"0s"}
metricsBindAddress: 0.0.0.0:10249
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
udpIdleTimeout: 0s
winkernel: {enableDSR: false, networkName: "", sourceVip: ""}
`,
			args: []string{"--hostname-override=NODE"}, iptables: true,
			warnings: []string{ignoredFields + "udpIdleTimeout (unknown field)"},
		},
		{
			name: "kOps", source: "kubernetes/kops, nodeup/pkg/model/kube_proxy.go and pkg/model/components/kubeproxy.go",
			args: []string{
				"--cluster-cidr=100.96.0.0/11", "--conntrack-max-per-core=131072", "--kubeconfig=KUBECONFIG", "--master=MASTER",
				"--oom-score-adj=-998", "--v=2",
			},
			iptables: true, warnings: []string{noEffect + "--oom-score-adj" + oomNote},
		},
		{
			name: "BOSH", source: "jhunt/k8s-boshrelease, issue 58",
			file: "---\n" + configHeader + "clientConnection: {kubeconfig: KUBECONFIG}\nmode: nftables\nconntrack: {max: 0, maxPerCore: 32768}\n" +
				"resourceContainer: /kube-proxy\nportRange: \"\"\nudpIdleTimeout: 250ms\n---\n",
			args:     []string{"", "--hostname-override=NODE"},
			warnings: []string{ignoredFields + "conntrack.max, resourceContainer, udpIdleTimeout (unknown field)"},
		},
		{
			name: "fields in another case", source: "none: written for this test",
			file:     configHeader + "clientConnection: {kubeconfig: KUBECONFIG}\nmode: nftables\nIPTables: {masqueradeAll: true}\nclustercidr: 10.244.0.0/16\n",
			args:     []string{"--hostname-override=NODE"},
			warnings: []string{ignoredFields + "IPTables (unknown field: write it as iptables); clustercidr (unknown field: write it as clusterCIDR)"},
		},
		{
			name: "duplicate field", source: "none: written for this test",
			file: configHeader + "clientConnection: {kubeconfig: KUBECONFIG}\nmode: \"\"\nclusterCIDR: 10.245.0.0/16\nclusterCIDR: 10.244.0.0/16\n",
			args: []string{"--hostname-override=NODE"}, iptables: true,
			warnings: []string{ignoredFields + "clusterCIDR in line 5 (duplicate field: the value in line 6, 10.244.0.0/16, counts)"},
		},
		{
			name: "fields of a newer release", source: "none: written for this test",
			file: configHeader + `clientConnection: {kubeconfig: KUBECONFIG}
mode: nftables
nodePortAddresses: [primary]
bindAddress: "::"
iptables: {masqueradeAll: true}
winkernel: {enableDSR: false}
detectLocalMode: ClusterCIDR
kubeProxyAutoscaler: {}
`,
			args: []string{"--hostname-override=NODE"},
			warnings: []string{
				ignoredFields + "kubeProxyAutoscaler (unknown field)",
				noEffect + "--config: iptables.masqueradeAll (it applies only to kube-proxy's iptables mode)",
			},
		},
		{
			name: "IPVS timeouts in nftables mode", source: "none: written for this test",
			args: []string{
				"--kubeconfig=KUBECONFIG", "--hostname-override=NODE", "--proxy-mode=nftables", "--healthz-port=9999", "--ipvs-tcp-timeout=1500ms", "",
			},
			warnings: []string{
				noEffect + "--ipvs-tcp-timeout (it applies only to --mode=ipvs)",
				"settings are deprecated: --healthz-port (it has no effect unless --healthz-bind-address is an address without a port: use --healthz-bind-address)",
			},
		},
	}
}

// TestDistributions runs the program with the name kube-proxy and the configuration of each
// distribution. It checks the warnings, and with real connections that a Service is programmed and
// that its node port is served where kube-proxy's mode serves it.
func TestDistributions(t *testing.T) {
	t.Parallel()
	for _, d := range distributions(t) {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t, "a")
			n.linkKubeProxy()
			kubeconfig := n.serveAPI("a")
			values := strings.NewReplacer("KUBECONFIG", kubeconfig, "MASTER", "http://"+apiServerAddress, "NODE", "node-a")
			var args []string
			for _, arg := range d.args {
				args = append(args, values.Replace(arg))
			}
			if d.file != "" {
				args = append(args, "--config="+writeConfigFile(t, values.Replace(d.file)))
			}
			n.program = n.start(nil, append(args, "--log-format=json")...)
			n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
			n.awaitTCP(agenttest.ServiceAddrs(10, 80), "a")
			n.awaitTCP([]netip.AddrPort{netip.AddrPortFrom(n.Node.IPv4, 30080), netip.AddrPortFrom(n.Node.IPv6, 30080)}, "a")
			loopback := loopbackAddrs(30080)
			if d.iptables {
				agenttest.Eventually(t, func() error { return checkAnswers(t.Context(), n.Node, "tcp", loopback[0], "a") })
			} else {
				n.awaitRefusedFromNode("tcp", loopback[0])
			}
			n.awaitRefusedFromNode("tcp", loopback[1])
			if got := strings.Contains(n.program.log.String(), "kube-proxy's mode iptables is replaced"); got != d.iptables {
				t.Errorf("notice about the mode iptables: %t, want %t", got, d.iptables)
			}
			if got := n.program.settingWarnings(); !slices.Equal(got, d.warnings) {
				t.Errorf("warnings:\n%s\nwant:\n%s\nsource of the configuration: %s",
					strings.Join(got, "\n"), strings.Join(d.warnings, "\n"), d.source)
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

// settingWarnings returns the warnings about settings. Other tests check the connection-tracking
// settings.
func (p *process) settingWarnings() []string {
	var warnings []string
	for _, r := range p.log.records() {
		if r.Level == "WARN" && r.Settings != "" && !strings.Contains(r.Msg, "connection-tracking") {
			warnings = append(warnings, r.Msg+": "+r.Settings)
		}
	}
	return warnings
}

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

// apiServerAddress is the address of the API server on the node.
const apiServerAddress = "127.0.0.1:6443"

// serveAPI starts an API server on the node and returns the path of its kubeconfig. The Service
// backend has a node port and this pod as its endpoint.
func (n *testNode) serveAPI(pod string) (kubeconfig string) {
	n.t.Helper()
	return n.serveAPIWith(pod, func(next http.Handler) http.Handler { return next })
}

// serveAPIWith is like serveAPI, but wraps the API server's handler.
func (n *testNode) serveAPIWith(pod string, wrap func(http.Handler) http.Handler) (kubeconfig string) {
	n.t.Helper()
	feed := apiserver.New()
	var versions apiserver.VersionSequence
	for _, o := range n.apiObjects(pod) {
		v, err := versions.Stamp(o)
		if err != nil {
			n.t.Fatal(err)
		}
		feed.Put(v)
	}
	listener, err := n.Node.Listen(n.t.Context(), "tcp4", netip.MustParseAddrPort(apiServerAddress))
	if err != nil {
		n.t.Fatal(err)
	}
	server := &http.Server{Handler: wrap(feed), ReadHeaderTimeout: waitTimeout}
	go func() { _ = server.Serve(listener) }() // returns when the test closes the server
	n.t.Cleanup(func() { _ = server.Close() })
	kubeconfig = filepath.Join(n.t.TempDir(), "kubeconfig")
	text := `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "http://` + apiServerAddress + `"}}]
contexts: [{name: test, context: {cluster: test}}]
current-context: test
`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	return kubeconfig
}

func (n *testNode) apiObjects(pod string) []apiserver.Object {
	n.t.Helper()
	// Distributions that do not set --hostname-override use the name of the machine.
	hostname, err := os.Hostname()
	if err != nil {
		n.t.Fatal(err)
	}
	objects := []apiserver.Object{
		&networkingv1.ServiceCIDR{
			ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"},
			Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "fd00:10:96::/112"}},
		},
	}
	for _, name := range []string{"node-a", strings.ToLower(hostname)} {
		objects = append(objects, &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, UID: "node-uid"},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: n.Node.IPv4.String()}, {Type: corev1.NodeInternalIP, Address: n.Node.IPv6.String()},
			}},
		})
	}
	name, tcp, port, ready := "tcp", corev1.ProtocolTCP, int32(podPort), true
	objects = append(objects, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "backend", UID: "backend-uid"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, ClusterIP: "10.96.0.10", ClusterIPs: []string{"10.96.0.10", "fd00:10:96::a"},
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
			Ports:      []corev1.ServicePort{{Name: name, Protocol: tcp, Port: 80, NodePort: 30080}},
		},
	})
	for addressType, address := range map[discoveryv1.AddressType]netip.Addr{
		discoveryv1.AddressTypeIPv4: n.pods[pod].IPv4, discoveryv1.AddressTypeIPv6: n.pods[pod].IPv6,
	} {
		objects = append(objects, &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "default", Name: "backend-" + strings.ToLower(string(addressType)),
				Labels: map[string]string{discoveryv1.LabelServiceName: "backend"},
			},
			AddressType: addressType,
			Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{address.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
			Ports:       []discoveryv1.EndpointPort{{Name: &name, Protocol: &tcp, Port: &port}},
		})
	}
	return objects
}
