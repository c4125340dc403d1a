package kubeproxycleanup

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/nettest"
)

// othersRules are rules, chains and sets of other programs, including kubelet and kube-router.
func othersRules(program string) string {
	return strings.ReplaceAll(`ip -t nat -N OTHER
ip -t nat -A PREROUTING -p tcp --dport 81 -j OTHER
ip -t nat -A PREROUTING -m comment --comment 'rule without a target'
ip -t nat -A OTHER -p tcp -m limit --limit 3/sec -g OTHER-2
ip -t nat -A POSTROUTING -o eth9 -j MASQUERADE
ip -P FORWARD DROP
ip -A FORWARD -p udp -j ACCEPT
ip -N KUBE-FIREWALL
ip -A OUTPUT -j KUBE-FIREWALL
ip -N KUBE-ROUTER-INPUT
ip -A INPUT -j KUBE-ROUTER-INPUT
ip -N KUBE-POD-FW-ABC
ip -t mangle -N KUBE-KUBELET-CANARY
`, "ip ", program+" ")
}

// kubeProxyRules are rules of kube-proxy, before and between those of othersRules.
func kubeProxyRules(program string) string {
	return strings.ReplaceAll(`ip -t nat -N KUBE-SERVICES
ip -t nat -N KUBE-SVC-ABC
ip -t nat -N KUBE-SEP-ABC
ip -t nat -N KUBE-MARK-MASQ
ip -t nat -I PREROUTING -m comment --comment 'kubernetes service portals' -j KUBE-SERVICES
ip -t nat -A OUTPUT -j KUBE-SERVICES
ip -t nat -A KUBE-SERVICES -p tcp --dport 80 -j KUBE-SVC-ABC
ip -t nat -A KUBE-SVC-ABC -m statistic --mode random --probability 0.5 -j KUBE-SEP-ABC
ip -t nat -A KUBE-SEP-ABC -j KUBE-MARK-MASQ
ip -t nat -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
ip -N KUBE-FORWARD
ip -I FORWARD -j KUBE-FORWARD
ip -t mangle -N KUBE-PROXY-CANARY
`, "ip ", program+" ")
}

func runCommands(t *testing.T, ns *nettest.Namespace, commands string) (output string) {
	t.Helper()
	for line := range strings.Lines(commands) {
		err := ns.Do(func() error {
			out, err := exec.Command("sh", "-c", line).CombinedOutput()
			output += string(out)
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", line, err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return output
}

func newNamespace(t *testing.T) *nettest.Namespace {
	t.Helper()
	ns := nettest.NamespaceT(t)
	return ns
}

func remove(t *testing.T, ns *nettest.Namespace) (removed []string, err error) {
	t.Helper()
	err = ns.Do(func() error { return Remove(t.Context(), func(object string) { removed = append(removed, object) }) })
	return removed, err
}

// TestRemove adds kube-proxy's rules to those of other programs. After Remove, the rules and
// counters of other programs are as before.
func TestRemove(t *testing.T) {
	t.Parallel()
	for _, flavor := range []string{"nft", "legacy"} {
		for _, family := range []string{"ip", "ip6"} {
			t.Run(flavor+"/"+family, func(t *testing.T) {
				t.Parallel()
				ns := newNamespace(t)
				program := map[string]string{"ip": "iptables-", "ip6": "ip6tables-"}[family] + flavor
				others := program + " -t nat -N OTHER-2\n" + othersRules(program) + program + " -t nat -I OTHER -c 7 700 -p udp -j RETURN\n"
				runCommands(t, ns, others)
				list := func() string {
					// Lines with "#" contain the time.
					return runCommands(t, ns, program+"-save -c | grep -v '^#' | sort")
				}
				before := list()
				if removed, err := remove(t, ns); err != nil || len(removed) > 0 {
					t.Fatalf("removed %v without kube-proxy's rules, error %v", removed, err)
				}
				if diff := cmp.Diff(before, list()); diff != "" {
					t.Fatalf("rules after the first Remove (-want +got):\n%s", diff)
				}
				runCommands(t, ns, kubeProxyRules(program))
				got, err := remove(t, ns)
				want := []string{
					fmt.Sprintf("kube-proxy's chains (1) and the rules that jump to them (0) in table %s mangle of iptables-%s", family, flavor),
					fmt.Sprintf("kube-proxy's chains (4) and the rules that jump to them (2) in table %s nat of iptables-%s", family, flavor),
					fmt.Sprintf("kube-proxy's chains (1) and the rules that jump to them (1) in table %s filter of iptables-%s", family, flavor),
				}
				if diff := cmp.Diff(want, got); diff != "" || err != nil {
					t.Errorf("error %v, removed (-want +got):\n%s", err, diff)
				}
				if diff := cmp.Diff(before, list()); diff != "" {
					t.Errorf("rules after Remove (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestKeepUsedChains checks that Remove keeps a chain that another program's rule jumps to, and
// reports it.
func TestKeepUsedChains(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(program, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			runCommands(t, ns, kubeProxyRules(program))
			runCommands(t, ns, program+" -t nat -N OTHER\n"+program+" -t nat -A OTHER -j KUBE-SEP-ABC\n")
			_, err := remove(t, ns)
			if err == nil || strings.Count(err.Error(), "\n") != 1 || !strings.Contains(err.Error(), "a rule in chain OTHER jumps to it") {
				t.Errorf("error %v, want one line for each of KUBE-SEP-ABC and KUBE-MARK-MASQ", err)
			}
			want := "-N KUBE-MARK-MASQ\n-N KUBE-SEP-ABC\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n-A KUBE-SEP-ABC -j KUBE-MARK-MASQ\n"
			if diff := cmp.Diff(want, runCommands(t, ns, program+" -t nat -S | grep -E '^-[NA] KUBE'")); diff != "" {
				t.Errorf("kube-proxy's rules after Remove (-want +got):\n%s", diff)
			}
			runCommands(t, ns, program+" -t nat -F OTHER")
			if _, err := remove(t, ns); err != nil {
				t.Error(err)
			}
			if left := runCommands(t, ns, program+" -t nat -S"); strings.Contains(left, "KUBE") {
				t.Errorf("after the rule was deleted:\n%s", left)
			}
		})
	}
}

// TestRemoveTablesAndSets checks tables of mode nftables, sets, and many chains.
func TestRemoveTablesAndSets(t *testing.T) {
	t.Parallel()
	ns := newNamespace(t)
	runCommands(t, ns, "nft 'add table ip kube-proxy; add table ip6 kube-proxy; add table ip other'\n"+
		"ipset create KUBE-CLUSTER-IP hash:ip,port\nipset create KUBE-6-CLUSTER-IP hash:ip,port family inet6\nipset create KUBE-SRC-ABC hash:ip\n")
	const many = 1200
	var restore strings.Builder
	restore.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n")
	for i := range many {
		fmt.Fprintf(&restore, ":KUBE-SVC-%d - [0:0]\n-A KUBE-SERVICES -p tcp --dport %d -j KUBE-SVC-%d\n", i, i+1, i)
	}
	restore.WriteString("COMMIT\n")
	for _, program := range []string{"iptables-nft-restore", "iptables-legacy-restore"} {
		if err := ns.Do(func() error {
			cmd := exec.Command(program)
			cmd.Stdin = strings.NewReader(restore.String())
			return cmd.Run()
		}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := remove(t, ns)
	want := []string{
		fmt.Sprintf("kube-proxy's chains (%d) and the rules that jump to them (0) in table ip nat of iptables-nft", many+1),
		"table ip kube-proxy", "table ip6 kube-proxy",
		fmt.Sprintf("kube-proxy's chains (%d) and the rules that jump to them (0) in table ip nat of iptables-legacy", many+1),
		"ipset KUBE-CLUSTER-IP", "ipset KUBE-6-CLUSTER-IP",
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("error %v, removed (-want +got):\n%s", err, diff)
	}
	if tables, sets := runCommands(t, ns, "nft list tables"), runCommands(t, ns, "ipset list -n"); strings.Contains(tables, "kube-proxy") || !strings.Contains(tables, "other") || sets != "KUBE-SRC-ABC\n" {
		t.Errorf("after Remove: sets %q, tables:\n%s", sets, tables)
	}
	if left := runCommands(t, ns, "iptables-legacy-save; iptables-nft-save"); strings.Contains(left, "KUBE") {
		t.Errorf("chains after Remove:\n%s", left)
	}
}

// TestChainPattern checks that the command for iptables programs matches the same chains.
func TestChainPattern(t *testing.T) {
	t.Parallel()
	names := []string{
		"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-MARK-DROP", "KUBE-FORWARD",
		"KUBE-PROXY-FIREWALL", "KUBE-PROXY-CANARY", "KUBE-SVC-ABC", "KUBE-SVL-ABC", "KUBE-FW-ABC", "KUBE-EXT-ABC", "KUBE-XLB-ABC", "KUBE-SEP-ABC",
		"KUBE-SOURCE-RANGES-FIREWALL", "KUBE-NODE-PORT", "KUBE-LOAD-BALANCER", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER",
		"KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-ROUTER-INPUT", "KUBE-POD-FW-ABC", "KUBE-NWPLCY-ABC", "OTHER",
	}
	cmd := exec.Command("grep", "-E", chainPattern)
	cmd.Stdin = strings.NewReader(strings.Join(names, "\n"))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	want := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !isKubeProxyChain(name) })
	if diff := cmp.Diff(want, strings.Fields(string(out))); diff != "" {
		t.Errorf("chains that match (-isKubeProxyChain +pattern):\n%s", diff)
	}
}
