package main

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// invoke runs the program in this process, for what touches no kernel.
func invoke(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestWrongUse(t *testing.T) {
	t.Parallel()
	// A folder that does not exist shows how far the program came.
	const folder = "--manifests=/does/not/exist"
	const missing = "fairlead: --manifests: read folder /does/not/exist: no such file or directory\n"
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"unknown command", []string{"launch"}, "fairlead: unknown command \"launch\" for \"fairlead\"\n"},
		{"unknown flag", []string{"run", "--manifest=x"}, "fairlead: unknown flag: --manifest: see fairlead run --help\n"},
		{"flag without a value", []string{"run", "--manifests"}, "fairlead: flag needs an argument: --manifests: see fairlead run --help\n"},
		{"argument", []string{"run", "x"}, "fairlead: unknown command \"x\" for \"fairlead run\"\n"},
		{"argument of cleanup", []string{"cleanup", "nft"}, "fairlead: unknown command \"nft\" for \"fairlead cleanup\"\n"},
		{"argument of version", []string{"version", "x"}, "fairlead: unknown command \"x\" for \"fairlead version\"\n"},

		{"no folder", []string{"run"}, "fairlead: --manifests: give the folder with the Services' YAML files\n"},
		{"folder does not exist", []string{"run", folder}, missing},
		{"folder is a file", []string{"run", "--manifests=main.go"}, "fairlead: --manifests: read folder main.go: not a directory\n"},

		{"mode", []string{"run", folder, "--mode=iptables"}, "fairlead: --mode: unknown mode \"iptables\": use nft\n"},
		{"empty mode", []string{"run", folder, "--mode="}, "fairlead: --mode: unknown mode \"\": use nft\n"},
		{"mode is in lower case", []string{"run", folder, "--mode=NFT"}, "fairlead: --mode: unknown mode \"NFT\": use nft\n"},

		{
			"service CIDR that is none",
			[]string{"run", folder, "--service-cidr=10.96.0.0"},
			"fairlead: --service-cidr: \"10.96.0.0\" is not a network: write it as 10.96.0.0/12 or fd00:96::/112\n",
		},
		{
			"service CIDR of an address in a network",
			[]string{"run", folder, "--service-cidr=10.96.0.1/16"},
			"fairlead: --service-cidr: \"10.96.0.1/16\" has bits set behind its length: write 10.96.0.0/16\n",
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
			"fairlead: --service-cidr: 10.96.0.0/16 and 10.97.0.0/16 are of one family: give one network, or one of each family\n",
		},
		{
			"service CIDR too small",
			[]string{"run", folder, "--service-cidr=10.96.0.0/31"},
			"fairlead: --service-cidr: 10.96.0.0/31 has no address to hand out: use a larger network\n",
		},
		{
			"cluster CIDR that is none",
			[]string{"run", folder, "--cluster-cidr=10.244.0.0/16,pods"},
			"fairlead: --cluster-cidr: \"pods\" is not a network: write it as 10.96.0.0/12 or fd00:96::/112\n",
		},
		{"service CIDRs of both families, spaced", []string{"run", folder, "--service-cidr=10.96.0.0/16, fd00::/112"}, missing},
		{"several cluster CIDRs of one family", []string{"run", folder, "--cluster-cidr=10.244.0.0/16,10.245.0.0/16"}, missing},

		{
			"DNS address without a port",
			[]string{"run", folder, "--dns-listen=10.0.0.1"},
			"fairlead: --dns-listen: \"10.0.0.1\" is not an address with a port: write 10.0.0.1:53 or [fd00::1]:53\n",
		},
		{
			"DNS address without an address",
			[]string{"run", folder, "--dns-listen=:53"},
			"fairlead: --dns-listen: \":53\" is not an address with a port: write 10.0.0.1:53 or [fd00::1]:53\n",
		},
		{
			"cluster domain",
			[]string{"run", folder, "--cluster-domain=cluster_local"},
			"fairlead: --cluster-domain: \"cluster_local\" is not a domain: write it as cluster.local\n",
		},
		{"cluster domain with its dot", []string{"run", folder, "--cluster-domain=cluster.local."}, missing},
		{
			"node name",
			[]string{"run", folder, "--hostname-override=node 1"},
			"fairlead: --hostname-override: \"node 1\" is not the name of a node: write it as node-1 or node-1.example\n",
		},
		{"node name in upper case", []string{"run", folder, "--hostname-override=Node-1.example"}, missing},

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
			"everything at once",
			[]string{
				"run", "--mode=x", "--service-cidr=x", "--cluster-cidr=x", "--dns-listen=x", "--cluster-domain=-",
				"--hostname-override=-", "--log-level=x", "--log-format=x",
			},
			`fairlead: --mode: unknown mode "x": use nft
fairlead: --manifests: give the folder with the Services' YAML files
fairlead: --service-cidr: "x" is not a network: write it as 10.96.0.0/12 or fd00:96::/112
fairlead: --cluster-cidr: "x" is not a network: write it as 10.96.0.0/12 or fd00:96::/112
fairlead: --dns-listen: "x" is not an address with a port: write 10.0.0.1:53 or [fd00::1]:53
fairlead: --cluster-domain: "-" is not a domain: write it as cluster.local
fairlead: --hostname-override: "-" is not the name of a node: write it as node-1 or node-1.example
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

func TestVersion(t *testing.T) {
	t.Parallel()
	code, stdout, stderr := invoke(t, "version")
	if want := "fairlead " + version + "\n"; code != 0 || stdout != want || stderr != "" {
		t.Errorf("exit code %d, stdout %q, stderr %q, want 0, %q and nothing", code, stdout, stderr, want)
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
			"SIGTERM", `"fairlead cleanup"`, "fairlead run --mode=nft --manifests=",
			"--mode ", "--manifests ", "--service-cidr ", "--cluster-cidr ", "--dns-listen ", "--cluster-domain ",
			"--hostname-override ", "--log-level ", "--log-format ",
		}},
		{[]string{"cleanup", "--help"}, []string{"Remove everything", "Other\nprograms' rules are not touched"}},
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

// Every flag that is in the help's example must exist.
func TestExample(t *testing.T) {
	t.Parallel()
	args := append(strings.Fields(runCommand().Example), "--manifests=/does/not/exist")
	code, _, stderr := invoke(t, args[1:]...)
	if want := "fairlead: --manifests: read folder /does/not/exist: no such file or directory\n"; code != 1 || stderr != want {
		t.Errorf("exit code %d, stderr %q, want 1 and %q", code, stderr, want)
	}
}

// What the shell asks the program when the user presses Tab.
func TestCompletion(t *testing.T) {
	t.Parallel()
	tests := []struct {
		args []string
		want string // all but the line for people
	}{
		{[]string{"run", "--mode", ""}, "nft\n:4\n"},
		{[]string{"run", "--mode="}, "nft\n:4\n"},
		{[]string{"run", "--log-level="}, "debug\ninfo\nwarn\nerror\n:4\n"},
		{[]string{"cleanup", "--log-format="}, "text\njson\n:4\n"},
		{[]string{"run", "--manifests="}, ":16\n"},   // folders
		{[]string{"run", "--service-cidr="}, ":4\n"}, // no files
		{[]string{"cl"}, "cleanup\tRemove everything that Fairlead has programmed on this node\n:4\n"},
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
	// bash must accept its script, and know the program by it.
	_, script, _ := invoke(t, "completion", "bash")
	bash := exec.CommandContext(t.Context(), "bash", "--norc", "-euc", "source /dev/stdin; complete -p fairlead")
	bash.Stdin = strings.NewReader(script)
	out, err := bash.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "__start_fairlead fairlead") {
		t.Errorf("bash: %v\n%s", err, out)
	}
}
