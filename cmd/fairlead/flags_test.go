package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/ipvs"
)

// invoke runs the program in this process, for commands that do not access the kernel.
func invoke(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs, ignoreClientLogger)
	return code, out.String(), errs.String()
}

// ignoreClientLogger does not set client-go's logger, because all tests share it.
func ignoreClientLogger(*slog.Logger) {}

func TestInvalidUsage(t *testing.T) {
	t.Parallel()
	// The error about a missing folder shows that the program accepted all other settings.
	const folder = "--manifests=/does/not/exist"
	const missing = "fairlead: --manifests: read folder /does/not/exist: no such file or directory\n"
	const timeouts = " is not a duration: write it as 15m or 90s, or 0 to keep the kernel's value\n"
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"unknown command", []string{"launch"}, "fairlead: unknown command \"launch\" for \"fairlead\"\n"},
		{"unknown flag", []string{"run", "--manifest=x"}, "fairlead: unknown flag: --manifest: see fairlead run --help\n"},
		{"flag that kube-proxy has removed", []string{"run", "--logtostderr"}, "fairlead: unknown flag: --logtostderr: see fairlead run --help\n"},
		{"flag without a value", []string{"run", "--manifests"}, "fairlead: flag needs an argument: --manifests: see fairlead run --help\n"},
		{"argument", []string{"run", "x"}, "fairlead: unknown command \"x\" for \"fairlead run\"\n"},
		{"argument of cleanup", []string{"cleanup", "nft"}, "fairlead: unknown command \"nft\" for \"fairlead cleanup\"\n"},
		{"argument of version", []string{"version", "x"}, "fairlead: unknown command \"x\" for \"fairlead version\"\n"},

		{
			"no source",
			[]string{"run"},
			"fairlead: --kubeconfig: no kubeconfig is given and this is not a pod of a cluster: " +
				"give the path of a kubeconfig file, or run in a pod with a ServiceAccount\n",
		},
		{
			"two sources",
			[]string{"run", folder, "--kubeconfig=x", "--master=https://192.0.2.1"},
			"fairlead: --kubeconfig: cannot be combined with --manifests: set one of them\nfairlead: --master: cannot be combined with --manifests: set one of them\n",
		},
		{
			"flags that require manifests",
			[]string{"run", "--kubeconfig=x", "--service-cidr=10.0.0.0/16", "--dns-listen=10.0.0.1:53", "--cluster-domain=x"},
			"fairlead: --service-cidr: requires --manifests: with an API server, the cluster's own setting applies\n" +
				"fairlead: --dns-listen: requires --manifests: with an API server, the cluster's own setting applies\n" +
				"fairlead: --cluster-domain: requires --manifests: with an API server, the cluster's own setting applies\n",
		},
		{"folder does not exist", []string{"run", folder}, missing},
		{"folder is a file", []string{"run", "--manifests=main.go"}, "fairlead: --manifests: read folder main.go: not a directory\n"},

		{"empty arguments", []string{"run", "", folder, ""}, missing},
		{"version that is none", []string{"run", "--version=new"}, "fairlead: --version: \"new\" is not a boolean: use true, false or raw\n"},
		{"version to report", []string{"run", folder, "--version=v1.30.0"}, missing},
		{"no version", []string{"run", folder, "--version=false"}, missing},
		{"mode", []string{"run", folder, "--mode=iptables"}, "fairlead: --mode: unknown mode \"iptables\": use nft or ipvs\n"},
		{"empty mode", []string{"run", folder, "--mode="}, missing},
		{"kube-proxy's mode", []string{"run", folder, "--proxy-mode=nftables"}, missing},
		{"equivalent modes", []string{"run", folder, "--proxy-mode=nftables", "--mode=nft"}, missing},
		{"empty mode of kube-proxy", []string{"run", folder, "--proxy-mode="}, missing},
		{"unsupported mode of kube-proxy", []string{"run", folder, "--proxy-mode=userspace"}, "fairlead: --proxy-mode: unknown mode \"userspace\": use nftables, ipvs, iptables\n"},
		{"conflicting modes", []string{"run", folder, "--proxy-mode=nftables", "--mode=ipvs"}, "fairlead: --proxy-mode: \"nftables\" conflicts with --mode=ipvs: set one of them\n"},
		{"equal modes", []string{"run", folder, "--proxy-mode=ipvs", "--mode=ipvs"}, missing},
		{"mode in upper case", []string{"run", folder, "--mode=NFT"}, "fairlead: --mode: unknown mode \"NFT\": use nft or ipvs\n"},

		{
			"service CIDR without length",
			[]string{"run", folder, "--service-cidr=10.96.0.0"},
			"fairlead: --service-cidr: \"10.96.0.0\" is not a network: write it as 10.96.0.0/12 or fd00:96::/112\n",
		},
		{
			"service CIDR with host bits",
			[]string{"run", folder, "--service-cidr=10.96.0.1/16"},
			"fairlead: --service-cidr: \"10.96.0.1/16\" has host bits set: write 10.96.0.0/16\n",
		},
		{
			"service CIDR in IPv6 form",
			[]string{"run", folder, "--service-cidr=::ffff:10.96.0.0/112"},
			"fairlead: --service-cidr: \"::ffff:10.96.0.0/112\" is an IPv4 network in IPv6 form: write it as IPv4\n",
		},
		{
			"empty element",
			[]string{"run", folder, "--service-cidr=10.96.0.0/16,"},
			"fairlead: --service-cidr: \"\" is not a network: write it as 10.96.0.0/12 or fd00:96::/112\n",
		},
		{
			"two service CIDRs of one family",
			[]string{"run", folder, "--service-cidr=10.96.0.0/16,fd00::/112,10.97.0.0/16"},
			"fairlead: --service-cidr: 10.96.0.0/16 and 10.97.0.0/16 have the same IP family: set one network, or one per family\n",
		},
		{
			"service CIDR too small",
			[]string{"run", folder, "--service-cidr=10.96.0.0/31"},
			"fairlead: --service-cidr: 10.96.0.0/31 has no address to allocate: use a larger network\n",
		},
		{
			"cluster CIDR that is none",
			[]string{"run", folder, "--cluster-cidr=10.244.0.0/16,pods"},
			"fairlead: --cluster-cidr: \"pods\" is not a network: write it as 10.96.0.0/12 or fd00:96::/112\n",
		},
		{"service CIDRs of both families, spaced", []string{"run", folder, "--service-cidr=10.96.0.0/16, fd00::/112"}, missing},
		{"cluster CIDR with bits behind its length", []string{"run", folder, "--cluster-cidr=10.244.0.1/16"}, missing},
		{"several cluster CIDRs of one family", []string{"run", folder, "--cluster-cidr=10.244.0.0/16,10.245.0.0/16"}, missing},

		{
			"DNS address without a port",
			[]string{"run", folder, "--dns-listen=10.0.0.1"},
			"fairlead: --dns-listen: \"10.0.0.1\" is not an address with a port: write it as 10.0.0.1:53 or [fd00::1]:53\n",
		},
		{
			"DNS address without an address",
			[]string{"run", folder, "--dns-listen=:53"},
			"fairlead: --dns-listen: \":53\" is not an address with a port: write it as 10.0.0.1:53 or [fd00::1]:53\n",
		},
		{
			"cluster domain",
			[]string{"run", folder, "--cluster-domain=cluster_local"},
			"fairlead: --cluster-domain: \"cluster_local\" is not a domain name: write it as cluster.local\n",
		},
		{"cluster domain with its dot", []string{"run", folder, "--cluster-domain=cluster.local."}, missing},
		{
			"node name",
			[]string{"run", folder, "--hostname-override= "},
			"fairlead: --hostname-override: \" \" is not a node name: write it as node-1 or node-1.example\n",
		},
		{"node name in upper case", []string{"run", folder, "--hostname-override=Node-1.example"}, missing},

		{
			"unknown way to detect pods",
			[]string{"run", folder, "--detect-local-mode=Guess"},
			"fairlead: --detect-local-mode: unknown mode \"Guess\": use ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix\n",
		},
		{
			"bridge without its name",
			[]string{"run", folder, "--detect-local-mode=BridgeInterface"},
			"fairlead: --detect-local-mode: BridgeInterface requires --pod-bridge-interface: set it to the name of the pods' bridge\n",
		},
		{
			"prefix without one",
			[]string{"run", folder, "--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix="},
			"fairlead: --detect-local-mode: InterfaceNamePrefix requires --pod-interface-name-prefix: set it to the name prefix of the pods' interfaces\n",
		},
		{
			"interface name too long",
			[]string{"run", folder, "--detect-local-mode=BridgeInterface", "--pod-bridge-interface=abcdefghijklmnop"},
			"fairlead: --pod-bridge-interface: \"abcdefghijklmnop\" is not a valid interface name: use at most 15 characters, no slash and no space\n",
		},
		{
			"pods of a Node that does not exist",
			[]string{"run", folder, "--detect-local-mode=NodeCIDR"},
			"fairlead: --detect-local-mode: NodeCIDR requires the Node object from an API server: use ClusterCIDR with --manifests\n",
		},
		{"pods by interface", []string{"run", folder, "--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=veth"}, missing},

		{
			"node port addresses",
			[]string{"run", folder, "--nodeport-addresses=primary,10.0.0.0"},
			"fairlead: --nodeport-addresses: \"10.0.0.0\" is not a network: use networks such as 192.0.2.0/24 or 2001:db8::/32, or primary, localhost or all\n",
		},
		{
			"scheduler that there is not",
			[]string{"run", folder, "--mode=ipvs", "--ipvs-scheduler=leastconn"},
			"fairlead: --ipvs-scheduler: \"leastconn\" is not an IPVS scheduler: " +
				"use one of dh, fo, lblc, lblcr, lc, mh, nq, ovf, rr, sed, sh, twos, wlc, wrr\n",
		},
		{
			"networks to leave alone",
			[]string{"run", folder, "--mode=ipvs", "--ipvs-exclude-cidrs=10.0.0.0/8,10.0.0.1"},
			"fairlead: --ipvs-exclude-cidrs: \"10.0.0.1\" is not a network: write it as 10.96.0.0/12 or fd00:96::/112\n",
		},
		{
			"strict ARP",
			[]string{"run", folder, "--mode=ipvs", "--ipvs-strict-arp=maybe"},
			"fairlead: --ipvs-strict-arp: \"maybe\" is not a boolean: use true or false\n",
		},
		{
			"IPVS timeouts: negative, fraction of a second, longest",
			[]string{"run", folder, "--mode=ipvs", "--ipvs-tcp-timeout=-1s", "--ipvs-tcpfin-timeout=1500ms", "--ipvs-udp-timeout=600h"},
			"fairlead: --ipvs-tcp-timeout: \"-1s\"" + timeouts,
		},
		{
			"IPVS timeout without unit",
			[]string{"run", folder, "--mode=ipvs", "--ipvs-tcp-timeout=900"},
			"fairlead: --ipvs-tcp-timeout: \"900\"" + timeouts,
		},
		{
			"flag of another mode, invalid value",
			[]string{"run", folder, "--ipvs-tcp-timeout=900"},
			"fairlead: --ipvs-tcp-timeout: \"900\" is not a value of type duration, and the flag has no effect: remove it\n",
		},
		{"flow offload", []string{"run", folder, "--flow-offload=on"}, "fairlead: --flow-offload: unknown value \"on\": use off, software or hardware\n"},
		{"flow offload without packets", []string{"run", folder, "--flow-offload-threshold=0"}, "fairlead: --flow-offload-threshold: \"0\" is not an integer from 1 to 2147483647\n"},
		{
			"flow offload of IPVS",
			[]string{"run", folder, "--mode=ipvs", "--flow-offload=software"},
			"fairlead: --flow-offload: requires --mode=nft: IPVS receives packets as if they were for the node itself, and the kernel " +
				"offloads only packets that the node forwards: remove the flag or change the mode\n",
		},
		{"no flow offload of IPVS", []string{"run", folder, "--mode=ipvs", "--flow-offload=off"}, missing},
		{"node port addresses with spaces, repeated", []string{"run", folder, "--nodeport-addresses=primary, 10.0.0.1/8", "--nodeport-addresses=localhost"}, missing},
		{"bind address", []string{"run", folder, "--bind-address=node"}, "fairlead: --bind-address: \"node\" is not an IP address: write it as 192.0.2.1 or 2001:db8::1\n"},

		{
			"healthz address",
			[]string{"run", folder, "--healthz-bind-address=localhost:10256"},
			"fairlead: --healthz-bind-address: \"localhost:10256\" is not an address with a port: write it as 127.0.0.1:10256 or [::1]:10256\n",
		},
		{
			"metrics address without host",
			[]string{"run", folder, "--metrics-bind-address=:10249"},
			"fairlead: --metrics-bind-address: \":10249\" is not an address with a port: write it as 127.0.0.1:10249 or [::1]:10249\n",
		},
		{"healthz address without port", []string{"run", folder, "--healthz-bind-address=127.0.0.1"}, missing},
		{
			"port",
			[]string{"run", folder, "--healthz-bind-address=0.0.0.0", "--healthz-port=65536"},
			"fairlead: --healthz-port: \"65536\" is not an integer from 1 to 65535\n",
		},
		{
			"port that is no number",
			[]string{"run", folder, "--metrics-port=x"},
			"fairlead: --metrics-port: \"x\" is not an integer from -2147483648 to 2147483647\n",
		},
		{"invalid boolean", []string{"run", folder, "--masquerade-all=maybe"}, "fairlead: --masquerade-all: \"maybe\" is not a boolean: use true or false\n"},
		{"rate too large", []string{"run", folder, "--kube-api-qps=1e39"}, "fairlead: --kube-api-qps: \"1e39\" is not a number: write it as 5 or 2.5\n"},
		{"invalid rate", []string{"run", folder, "--kube-api-qps=fast"}, "fairlead: --kube-api-qps: \"fast\" is not a number: write it as 5 or 2.5\n"},
		{"negative burst", []string{"run", folder, "--kube-api-burst=-1"}, "fairlead: --kube-api-burst: \"-1\" is not an integer from 0 to 2147483647\n"},

		{
			"batch period too long",
			[]string{"run", "--kubeconfig=x", "--batch-period=2s"},
			"fairlead: --batch-period: \"2s\" is not a duration from 0 to 1s: write it as 8ms, or 0 to read every change at once\n",
		},
		{
			"negative give-way time",
			[]string{"run", "--kubeconfig=x", "--give-way-after=-1s"},
			"fairlead: --give-way-after: \"-1s\" is not a duration: write it as 1m, or 0 to give precedence to another proxy's rules at once\n",
		},
		{
			"mass removal delay too long",
			[]string{"run", "--kubeconfig=x", "--mass-removal-delay=2h"},
			"fairlead: --mass-removal-delay: \"2h\" is not a duration from 0 to 1h0m0s: write it as 1m, or 0 to remove Services and endpoints at once\n",
		},
		{
			"negative batch period",
			[]string{"run", "--kubeconfig=x", "--batch-period=-1ms"},
			"fairlead: --batch-period: \"-1ms\" is not a duration from 0 to 1s: write it as 8ms, or 0 to read every change at once\n",
		},
		{
			"batch period without unit",
			[]string{"run", "--kubeconfig=x", "--batch-period=50"},
			"fairlead: --batch-period: \"50\" is not a duration from 0 to 1s: write it as 8ms, or 0 to read every change at once\n",
		},

		{
			"proxy name",
			[]string{"run", folder, "--service-proxy-name=a/b"},
			"fairlead: --service-proxy-name: \"a/b\" is not a valid label value: write it as fairlead or example.com_proxy-1\n",
		},

		{"cleanup flag set to false", []string{"run", folder, "--cleanup=false"}, missing},
		{
			"flag without effect, invalid value",
			[]string{"run", folder, "--oom-score-adj=few"},
			"fairlead: --oom-score-adj: \"few\" is not a value of type int, and the flag has no effect: remove it\n",
		},
		{
			"connection tracking",
			[]string{"run", folder, "--conntrack-min=-1", "--conntrack-udp-timeout=30", "--conntrack-tcp-timeout-close-wait=-1s"},
			"fairlead: --conntrack-min: \"-1\" is not an integer from 0 to 2147483647\n" +
				"fairlead: --conntrack-tcp-timeout-close-wait: \"-1s\" is not a duration: write it as 15m or 90s\n" +
				"fairlead: --conntrack-udp-timeout: \"30\" is not a duration: write it as 15m or 90s\n",
		},

		{
			"log level",
			[]string{"run", folder, "--log-level=loud"},
			"fairlead: --log-level: unknown level \"loud\": use debug, info, warn or error\n",
		},
		{"log format", []string{"run", folder, "--log-format=xml"}, "fairlead: --log-format: unknown format \"xml\": use text or json\n"},
		{
			"log level of cleanup",
			[]string{"cleanup", "--log-level=loud"},
			"fairlead: --log-level: unknown level \"loud\": use debug, info, warn or error\n",
		},

		{
			"many errors",
			[]string{
				"run", folder, "--mode=x", "--service-cidr=x", "--cluster-cidr=x", "--dns-listen=x", "--cluster-domain=-",
				"--hostname-override= ", "--log-level=x", "--log-format=x",
			},
			`fairlead: --mode: unknown mode "x": use nft or ipvs
fairlead: --service-cidr: "x" is not a network: write it as 10.96.0.0/12 or fd00:96::/112
fairlead: --dns-listen: "x" is not an address with a port: write it as 10.0.0.1:53 or [fd00::1]:53
fairlead: --cluster-domain: "-" is not a domain name: write it as cluster.local
fairlead: --hostname-override: " " is not a node name: write it as node-1 or node-1.example
fairlead: --cluster-cidr: "x" is not a network: write it as 10.96.0.0/12 or fd00:96::/112
fairlead: --log-level: unknown level "x": use debug, info, warn or error
fairlead: --log-format: unknown format "x": use text or json
`,
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			code, stdout, stderr := invoke(t, test.args...)
			if diff := cmp.Diff(test.want, stderr); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
			if code != 1 || stdout != "" {
				t.Errorf("exit code %d, stdout %q, want 1 and nothing", code, stdout)
			}
		})
	}
}

// TestKubeProxyFlags checks that Fairlead accepts every flag of kube-proxy on Linux, so that command
// lines of kube-proxy work unchanged, and that docs/compatibility.md lists them.
func TestKubeProxyFlags(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/kube-proxy-flags.txt")
	if err != nil {
		t.Fatal(err)
	}
	flags := strings.Fields(string(text))
	known := runCommand(ignoreClientLogger).Flags()
	known.Bool("help", false, "cobra adds this flag when it parses a command line")
	for _, name := range append([]string{"healthz-port", "metrics-port"}, flags...) { // the help hides deprecated flags
		if known.Lookup(name) == nil {
			t.Errorf("no flag --%s", name)
		}
	}
	document, err := os.ReadFile("../../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| `--([^`]+)` \\| .+ \\|$").FindAllStringSubmatch(string(document), -1) {
		documented = append(documented, row[1])
	}
	if diff := cmp.Diff(flags, documented); diff != "" {
		t.Errorf("flags in docs/compatibility.md (-want +got):\n%s", diff)
	}
}

// TestKubeProxyHelp compares the list of kube-proxy's flags with the help of the real kube-proxy.
func TestKubeProxyHelp(t *testing.T) {
	t.Parallel()
	const kubeProxy = "../../.cache/kube-proxy/kube-proxy"
	if _, err := os.Stat(kubeProxy); err != nil {
		t.Skip("run make kube-proxy: ", err)
	}
	help, err := exec.CommandContext(t.Context(), kubeProxy, "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, help)
	}
	var got []string
	for _, flag := range regexp.MustCompile(`(?m)^ +(?:-\w, )?--([a-z0-9-]+)`).FindAllSubmatch(help, -1) {
		got = append(got, string(flag[1]))
	}
	slices.Sort(got)
	want, err := os.ReadFile("testdata/kube-proxy-flags.txt")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Fields(string(want)), got); diff != "" {
		t.Errorf("kube-proxy's flags have changed: run make kube-proxy-flags and update docs/compatibility.md (-want +got):\n%s", diff)
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	code, stdout, stderr := invoke(t, "version")
	if want := "fairlead " + version + "\n"; code != 0 || stdout != want || stderr != "" {
		t.Errorf("exit code %d, stdout %q, stderr %q, want 0, %q and nothing", code, stdout, stderr, want)
	}
}

// TestVersionFlag checks kube-proxy's flag, also in a program with the name kube-proxy.
func TestVersionFlag(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"fairlead", "run", "--version"}, "fairlead " + version + "\n"},
		{[]string{"/usr/local/bin/kube-proxy", "--version"}, "fairlead " + version + "\n"},
		{[]string{"kube-proxy", "--version=true", "--mode=x"}, "fairlead " + version + "\n"},
		{[]string{"kube-proxy", "--version=raw"}, fmt.Sprintf("version.Info{GitVersion:%q, GoVersion:%q, Compiler:%q, Platform:%q}\n",
			version, runtime.Version(), runtime.Compiler, runtime.GOOS+"/"+runtime.GOARCH)},
	} {
		code, stdout, stderr := invoke(t, commandArgs(test.args)...)
		if code != 0 || stdout != test.want || stderr != "" {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q, want 0, %q and nothing", test.args, code, stdout, stderr, test.want)
		}
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	tests := []struct {
		args []string
		want []string
	}{
		{nil, []string{"Kubernetes Service", "run ", "cleanup ", "version ", "completion "}},
		{[]string{"run", "--help"}, []string{
			"SIGTERM", `"fairlead cleanup"`, "fairlead run --mode=nft --manifests=", "fairlead run --kubeconfig=",
			"--mode=ipvs --ipvs-scheduler=lc", "fairlead.io/ipvs-scheduler", "with --mode=ipvs, --proxy-mode=iptables or --manifests: all",
			"--ipvs-scheduler ", "--ipvs-exclude-cidrs ", "--ipvs-strict-arp ", "--ipvs-tcp-timeout ", "--ipvs-tcpfin-timeout ", "--ipvs-udp-timeout ",
			"--mode ", "--manifests ", "--service-cidr ", "--cluster-cidr ", "--dns-listen ", "--cluster-domain ",
			"--hostname-override ", "--log-level ", "--log-format ", "--kubeconfig ", "--nodeport-addresses ",
			"--healthz-bind-address ", "--metrics-bind-address ", "-v, --v ", "--batch-period ", "--mass-removal-delay ", "--give-way-after ",
			"--flow-offload ", "--flow-offload-threshold ", "--nft-own-table ", "--version ", "--cleanup ", "--write-config-to ", "--kube-proxy-defaults ", "--iptables-localhost-nodeports ",
		}},
		{[]string{"cleanup", "--help"}, []string{"Remove everything", "programs' rules are not changed", "--kube-proxy"}},
	}
	for _, test := range tests {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			t.Parallel()
			code, stdout, stderr := invoke(t, test.args...)
			if code != 0 || stderr != "" {
				t.Errorf("exit code %d, stderr %q, want 0 and nothing", code, stderr)
			}
			for _, want := range test.want {
				if !strings.Contains(stdout, want) {
					t.Errorf("no %q in:\n%s", want, stdout)
				}
			}
		})
	}
}

// TestExample checks that the flags in the help's examples exist and have valid values.
func TestExample(t *testing.T) {
	t.Parallel()
	wants := []string{
		"fairlead: --kubeconfig: kubeconfig /does/not/exist: ",
		"fairlead: --kubeconfig: kubeconfig /does/not/exist: ",
		"fairlead: --manifests: read folder /does/not/exist: no such file or directory\n",
	}
	examples := strings.Split(runCommand(ignoreClientLogger).Example, "\n")
	if len(examples) != len(wants) {
		t.Fatalf("%d examples, want %d", len(examples), len(wants))
	}
	for i, source := range []string{"--kubeconfig=", "--kubeconfig=", "--manifests="} {
		args := append(strings.Fields(examples[i]), source+"/does/not/exist")
		code, _, stderr := invoke(t, args[1:]...)
		if code != 1 || !strings.HasPrefix(stderr, wants[i]) {
			t.Errorf("%s: exit code %d, stderr %q, want 1 and %q", examples[i], code, stderr, wants[i])
		}
	}
}

// TestCompletion checks the completions that shells request.
func TestCompletion(t *testing.T) {
	t.Parallel()
	tests := []struct {
		args []string
		want string // standard output; standard error has an explanation
	}{
		{[]string{"run", "--mode", ""}, "nft\nipvs\n:4\n"},
		{[]string{"run", "--mode="}, "nft\nipvs\n:4\n"},
		{[]string{"run", "--proxy-mode="}, "nftables\nipvs\niptables\n:4\n"},
		{[]string{"run", "--ipvs-scheduler="}, strings.Join(ipvs.Schedulers(), "\n") + "\n:4\n"},
		{[]string{"run", "--log-level="}, "debug\ninfo\nwarn\nerror\n:4\n"},
		{[]string{"cleanup", "--log-format="}, "text\njson\n:4\n"},
		{[]string{"run", "--manifests="}, ":16\n"}, // folders
		{[]string{"run", "--kubeconfig="}, ":0\n"}, // files
		{[]string{"run", "--detect-local-mode="}, "ClusterCIDR\nNodeCIDR\nBridgeInterface\nInterfaceNamePrefix\n:4\n"},
		{[]string{"run", "--nodeport-addresses="}, "primary\nlocalhost\nall\n:4\n"},
		{[]string{"run", "--service-cidr="}, ":4\n"}, // no files
		{[]string{"cl"}, "cleanup\tRemove everything that Fairlead or kube-proxy has programmed on this node\n:4\n"},
	}
	for _, test := range tests {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			t.Parallel()
			code, stdout, _ := invoke(t, append([]string{"__complete"}, test.args...)...)
			if diff := cmp.Diff(test.want, stdout); diff != "" || code != 0 {
				t.Errorf("exit code %d, completions (-want +got):\n%s", code, diff)
			}
		})
	}
}

func TestCompletionScripts(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		code, stdout, stderr := invoke(t, "completion", shell)
		if code != 0 || stderr != "" || !strings.Contains(stdout, "__complete") {
			t.Errorf("%s: exit code %d, stderr %q, %d bytes of script", shell, code, stderr, len(stdout))
		}
	}
	// bash must accept the script and register the completion.
	_, script, _ := invoke(t, "completion", "bash")
	bash := exec.CommandContext(t.Context(), "bash", "--norc", "-euc", "source /dev/stdin; complete -p fairlead")
	bash.Stdin = strings.NewReader(script)
	out, err := bash.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "__start_fairlead fairlead") {
		t.Errorf("bash: %v\n%s", err, out)
	}
}
