package otherproxy

import (
	"fmt"
	"log/slog"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/nettest"
)

// runCommands runs commands in a namespace, one per line.
func runCommands(t *testing.T, ns *nettest.Namespace, commands string) {
	t.Helper()
	for line := range strings.Lines(commands) {
		err := ns.Do(func() error {
			out, err := exec.Command("sh", "-c", line).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", line, err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// mustScan returns the rules in the namespace, and fails the test on an error.
func mustScan(t *testing.T, ns *nettest.Namespace, s *Scanner) []Rules {
	t.Helper()
	var rules []Rules
	err := ns.Do(func() (err error) {
		rules, err = s.Scan()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

func newScanner(t *testing.T) (*Scanner, *nettest.Namespace) {
	t.Helper()
	ns := nettest.NamespaceT(t)
	var s *Scanner
	if err := ns.Do(func() (err error) {
		s, err = NewScanner()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, ns
}

// TestScan creates kube-proxy's rules with the same tools as kube-proxy, and removes them.
func TestScan(t *testing.T) {
	t.Parallel()
	chains := func(program string) string {
		return program + " -t nat -N KUBE-SERVICES\n" +
			program + " -t nat -A PREROUTING -m comment --comment 'kubernetes service portals' -j KUBE-SERVICES\n" +
			program + " -t nat -A KUBE-SERVICES -p tcp --dport 80 -j RETURN"
	}
	remove := func(flavour string) string {
		return strings.ReplaceAll("iptables-FLAVOUR-save | grep -v KUBE- | iptables-FLAVOUR-restore; ip6tables-FLAVOUR-save | grep -v KUBE- | ip6tables-FLAVOUR-restore",
			"FLAVOUR", flavour)
	}
	for name, test := range map[string]struct {
		make, remove string
		want         []Rules
	}{
		"nftables": {
			"nft add table ip kube-proxy\nnft add table ip6 kube-proxy",
			"nft 'delete table ip kube-proxy; delete table ip6 kube-proxy'",
			[]Rules{{ModeNFTables, []string{"table ip kube-proxy", "table ip6 kube-proxy"}}},
		},
		"one family": {
			"nft add table ip6 kube-proxy", "nft delete table ip6 kube-proxy",
			[]Rules{{ModeNFTables, []string{"table ip6 kube-proxy"}}},
		},
		"iptables nft": {
			chains("iptables-nft") + "\n" + chains("ip6tables-nft"), remove("nft"),
			[]Rules{{ModeIPTables, []string{"chain KUBE-SERVICES in table ip nat", "chain KUBE-SERVICES in table ip6 nat"}}},
		},
		"iptables legacy": {
			chains("iptables-legacy") + "\n" + chains("ip6tables-legacy"), remove("legacy"),
			[]Rules{{ModeIPTables, []string{
				"chain KUBE-SERVICES in table ip nat of iptables-legacy", "chain KUBE-SERVICES in table ip6 nat of iptables-legacy",
			}}},
		},
		"ipvs": {
			"ip link add kube-ipvs0 type veth", "ip link delete kube-ipvs0",
			[]Rules{{ModeIPVS, []string{"interface kube-ipvs0"}}},
		},
		"others": {
			"nft add table inet kube-proxy\nnft add table ip fairlead\n" +
				"iptables-legacy -t nat -N KUBE-SERVICES-OF-OTHERS\niptables-legacy -t nat -N KUBE-SERVICE\n" +
				"iptables-nft -t nat -N KUBE\niptables-nft -t filter -N KUBE-FORWARD\niptables-legacy -N KUBE-SERVICES",
			"true", nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, ns := newScanner(t)
			if got := mustScan(t, ns, s); got != nil {
				t.Errorf("before creating rules: %v", got)
			}
			runCommands(t, ns, test.make)
			for range 2 {
				if diff := cmp.Diff(test.want, mustScan(t, ns, s)); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
			runCommands(t, ns, test.remove)
			if got := mustScan(t, ns, s); got != nil {
				t.Errorf("after %s: %v", test.remove, got)
			}
		})
	}
}

// TestScanIsReadOnly checks that a scan does not create iptables tables. Their hooks would
// slow down every packet.
func TestScanIsReadOnly(t *testing.T) {
	t.Parallel()
	s, ns := newScanner(t)
	mustScan(t, ns, s)
	runCommands(t, ns, `test -z "$(cat /proc/thread-self/net/ip_tables_names /proc/thread-self/net/ip6_tables_names)"`+"\n"+`test -z "$(nft list ruleset)"`)
}

// TestWatch checks that Watch reports new and removed rules, and nothing else.
func TestWatch(t *testing.T) {
	t.Parallel()
	s, ns := newScanner(t)
	changes := make(chan []Rules, 10)
	go s.Watch(t.Context(), nil, slog.New(slog.DiscardHandler), func(r []Rules) { changes <- r })
	expect := func(want []Rules) {
		t.Helper()
		select {
		case got := <-changes:
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("Watch did not report %v", want)
		}
	}
	runCommands(t, ns, "nft add table ip kube-proxy")
	expect([]Rules{{ModeNFTables, []string{"table ip kube-proxy"}}})
	runCommands(t, ns, "nft delete table ip kube-proxy")
	expect(nil)
}

// BenchmarkScan measures a scan with as many iptables rules as kube-proxy has for 10,000
// Services with 10 endpoints each.
func BenchmarkScan(b *testing.B) {
	ns, err := nettest.NewNamespace("")
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		var rules strings.Builder
		rules.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n")
		for i := range 220_000 {
			fmt.Fprintf(&rules, "-A KUBE-SERVICES -d 10.%d.%d.%d/32 -j RETURN\n", i>>16, i>>8&255, i&255)
		}
		rules.WriteString("COMMIT\n")
		cmd := exec.Command("iptables-legacy-restore")
		cmd.Stdin = strings.NewReader(rules.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		s, err := NewScanner()
		if err != nil {
			return err
		}
		defer s.Close()
		for first := true; b.Loop(); first = false {
			began := time.Now()
			if _, err := s.Scan(); err != nil {
				return err
			}
			if first {
				b.ReportMetric(float64(time.Since(began).Microseconds())/1000, "ms/first")
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}
