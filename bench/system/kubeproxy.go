package system

import (
	"context"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"

	"fairlead.io/fairlead/internal/nettest"
)

// KubeProxy runs kube-proxy in one mode with its defaults, except that it leaves the
// machine's limits of connection tracking and its own OOM score unchanged.
type KubeProxy struct {
	// Binary is the path of the program.
	Binary string
	// Mode is the value of --proxy-mode: nftables, ipvs or iptables.
	Mode string
	// Args are additional arguments.
	Args []string
}

var (
	_ System  = KubeProxy{}
	_ Checker = KubeProxy{}
)

// Name implements [System].
func (k KubeProxy) Name() string { return "kube-proxy-" + k.Mode }

// Command returns the command line that starts the program.
func (k KubeProxy) Command(env Environment) []string {
	return append([]string{
		k.Binary, "--proxy-mode=" + k.Mode,
		"--kubeconfig=" + env.Kubeconfig,
		"--hostname-override=" + env.NodeName,
		"--cluster-cidr=" + env.ClusterCIDR.String(),
		"--conntrack-max-per-core=0",
		"--conntrack-tcp-timeout-established=0s",
		"--conntrack-tcp-timeout-close-wait=0s",
		"--oom-score-adj=0",
	}, k.Args...)
}

// Check implements [Checker]. It looks for the programs that kube-proxy runs before it checks the
// kernel.
func (k KubeProxy) Check(ctx context.Context, node *nettest.Namespace) error {
	if _, err := exec.LookPath(k.Binary); err != nil {
		return unavailable("kube-proxy not found at %q: build it with `make kube-proxy`, or set --kube-proxy", k.Binary)
	}
	needs := map[string][]string{
		"nftables": {"nft"},
		"iptables": {"iptables", "iptables-save", "iptables-restore"},
		"ipvs":     {"iptables", "iptables-save", "iptables-restore", "ipset"},
	}
	for _, program := range needs[k.Mode] {
		if _, err := exec.LookPath(program); err != nil {
			return unavailable("kube-proxy's mode %s needs the program %s: install it", k.Mode, program)
		}
	}
	switch k.Mode {
	case "ipvs":
		return checkIPVS(node)
	case "iptables":
		return checkIPTables(ctx, node)
	default:
		return nil
	}
}

// Start implements [System].
func (k KubeProxy) Start(ctx context.Context, env Environment) (Instance, error) {
	if err := k.Check(ctx, env.Namespace); err != nil {
		return nil, err
	}
	return asInstance(StartProcess(env, k.Name(), k.Command(env)...))
}

// Path returns the absolute path of the program, or an error if the program does not exist.
func (k KubeProxy) Path() (string, error) { return absolutePath(k.Binary) }

// Version returns the version that the program prints.
func (k KubeProxy) Version(ctx context.Context) (string, error) {
	return programVersion(ctx, k.Binary, "--version")
}

// checkIPVS checks whether the kernel has IPVS. The kernel loads the module if it can.
func checkIPVS(node *nettest.Namespace) error {
	return node.Do(func() error {
		if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
			return unsupportedByKernel("the kernel does not support IPVS (%v)", err)
		}
		return nil
	})
}

// checkIPTables tries the iptables matches and targets that kube-proxy needs, in an unused chain.
func checkIPTables(ctx context.Context, node *nettest.Namespace) error {
	const chain = "BENCH-TRY"
	for _, args := range [][]string{
		{"-N", chain},
		{"-A", chain, "-m", "comment", "--comment", "a comment", "-m", "statistic", "--mode", "random", "--probability", "0.5", "-j", "RETURN"},
		{"-A", chain, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"},
		{"-A", chain, "-j", "MARK", "--or-mark", "0x4000"},
		{"-A", chain, "-p", "tcp", "-m", "tcp", "-j", "DNAT", "--to-destination", "10.0.0.1:80"},
		{"-F", chain},
		{"-X", chain},
	} {
		var out []byte
		err := node.Do(func() (err error) {
			out, err = exec.CommandContext(ctx, "iptables", append([]string{"-w", "-t", "nat"}, args...)...).CombinedOutput()
			return err
		})
		if err != nil {
			first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
			return unsupportedByKernel("iptables does not work on this kernel: iptables -t nat %s: %s", strings.Join(args, " "), first)
		}
	}
	return nil
}
