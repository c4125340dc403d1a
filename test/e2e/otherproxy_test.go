//go:build e2e

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/otherproxy"
)

// kubeProxy is a kube-proxy that runs beside Fairlead on this node.
type kubeProxy struct {
	*fairlead
	s *scenario
	// ruleset prints all rules that it may have made.
	ruleset [][]string
}

// flavours are the programs that kube-proxy's modes use: by the test's name, the
// mode, and the program whose names start with "ip" to use in place of iptables.
var flavours = []struct{ name, mode, iptables string }{
	{"nftables", "nftables", ""},
	{"iptables-nft", "iptables", "xtables-nft-multi"},
	{"iptables-legacy", "iptables", "xtables-legacy-multi"},
}

// newKubeProxy returns a kube-proxy that does not run yet. It removes all of the
// proxy's rules when the test ends, and sees to it that Fairlead runs then.
func newKubeProxy(s *scenario, mode, iptables string) *kubeProxy {
	s.Helper()
	binary, err := filepath.Abs(filepath.Join(root, ".cache", "kube-proxy", "kube-proxy"))
	s.must(err)
	if _, err := os.Stat(binary); err != nil {
		s.Fatalf("there is no kube-proxy: build it with `make kube-proxy` (%v)", err)
	}
	dir := s.TempDir()
	p := &kubeProxy{s: s, ruleset: [][]string{{"nft", "list", "ruleset"}}, fairlead: &fairlead{
		host: s.net.Node, binary: binary, log: filepath.Join(dir, "kube-proxy.log"), kubeProxy: true,
	}}
	if iptables != "" {
		multi, err := exec.LookPath(iptables)
		if err != nil {
			s.Skipf("iptables is not installed in this variant: %v", err)
		}
		for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
			s.must(os.Symlink(multi, filepath.Join(dir, name)))
		}
		s.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		p.ruleset = [][]string{{"iptables-save"}, {"ip6tables-save"}}
	}
	if err := (system.KubeProxy{Binary: binary, Mode: mode}).Check(s.ctx, s.net.Node.Namespace); err != nil {
		if unavailable := (*system.UnavailableError)(nil); errors.As(err, &unavailable) && unavailable.Kernel {
			s.Skip(err)
		}
		s.Fatal(err)
	}
	kubeconfig := filepath.Join(dir, "kubeconfig")
	s.must(s.cp.Kubeconfig(kubeconfig, "system:kube-proxy"))
	cidrs := make([]string, 0, len(s.net.PodCIDRs))
	for _, c := range s.net.PodCIDRs {
		cidrs = append(cidrs, c.String())
	}
	p.args = []string{
		"--proxy-mode=" + mode, "--kubeconfig=" + kubeconfig, "--hostname-override=" + thisNode, "--cluster-cidr=" + strings.Join(cidrs, ","),
		"--healthz-bind-address=127.0.0.1:30256", "--metrics-bind-address=127.0.0.1:30249",
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s", "--oom-score-adj=0",
	}
	// kube-proxy --cleanup does not set it back.
	const routeLocalnet = "/proc/sys/net/ipv4/conf/all/route_localnet"
	before, err := p.output("cat", routeLocalnet)
	s.must(err)
	s.Cleanup(func() {
		if s.Failed() {
			s.Logf("the end of kube-proxy's log:\n%s", p.tail())
		}
		err := errors.Join(p.kill(), p.removeRules())
		_, resetErr := p.output("sh", "-c", "echo "+strings.TrimSpace(before)+" >"+routeLocalnet)
		err = errors.Join(err, resetErr)
		if !s.lead.running() {
			err = errors.Join(err, s.start(context.WithoutCancel(s.ctx)))
		}
		if err != nil {
			s.Errorf("clean up after kube-proxy: %v", err)
		}
	})
	return p
}

// begin starts kube-proxy, and returns when it has programmed the endpoints.
func (p *kubeProxy) begin(endpoints ...*pod) {
	p.s.Helper()
	p.s.must(p.start())
	p.programs(endpoints...)
}

// programs waits until kube-proxy has rules for the endpoints, in both families.
func (p *kubeProxy) programs(endpoints ...*pod) {
	p.s.Helper()
	const pause = 200 * time.Millisecond // leaves kube-proxy the processor
	p.s.eventually(func(context.Context) error {
		var rules strings.Builder
		for _, command := range p.ruleset {
			if command[0] == "nft" {
				for _, family := range []string{"ip", "ip6"} {
					out, _ := p.output("nft", "list", "table", family, "kube-proxy") // no table, no rules
					rules.WriteString(out)
				}
				continue
			}
			out, err := p.output(command...)
			if err != nil {
				return err
			}
			rules.WriteString(out)
		}
		for _, endpoint := range endpoints {
			for _, addr := range endpoint.Addrs() {
				if !strings.Contains(rules.String(), addr.String()) {
					time.Sleep(pause)
					return fmt.Errorf("kube-proxy has no rule for %s; its log ends:\n%s", addr, p.tail())
				}
			}
		}
		return nil
	})
}

// output returns the output of a command on the node.
func (p *kubeProxy) output(command ...string) (string, error) {
	var out []byte
	err := p.host.Do(func() (err error) {
		out, err = exec.Command(command[0], command[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(command, " "), err, out)
	}
	return string(out), nil
}

// removeRules runs kube-proxy --cleanup.
func (p *kubeProxy) removeRules() error {
	_, err := p.output(p.binary, "--cleanup")
	return err
}

// removesRules removes kube-proxy's rules by the commands that Fairlead names, and
// checks that they do.
func removesRules(s *scenario, p *kubeProxy) {
	s.Helper()
	scan := func() []otherproxy.Rules {
		s.Helper()
		var rules []otherproxy.Rules
		s.must(p.host.Do(func() error {
			scanner, err := otherproxy.NewScanner()
			if err != nil {
				return err
			}
			rules, err = scanner.Scan()
			return errors.Join(err, scanner.Close())
		}))
		return rules
	}
	rules := scan()
	if len(rules) != 1 {
		s.Fatalf("found %v, want the rules of one mode", rules)
	}
	_, err := p.output("sh", "-c", rules[0].Remove())
	s.must(err)
	if left := scan(); len(left) > 0 {
		s.Errorf("%s left %v", rules[0].Remove(), left)
	}
}

// always makes connections, all of which have to end at one pod, from now on.
func (s *scenario) always(from *nettest.Host, to []destination, want *pod) {
	s.Helper()
	const attempts = 20
	for _, d := range to {
		got := map[string]int{}
		for range attempts {
			answer, err := connect(s.ctx, from, d, slow)
			if err != nil {
				s.Errorf("%s from %s: %v", d, from.Name, err)
			}
			got[answer.Host]++
		}
		if got[want.Name] != attempts {
			s.Errorf("%s from %s: reached %v, want %s alone", d, from.Name, got, want.Name)
		}
	}
}

// reachesAll waits until connections to all destinations end at this pod.
func (s *scenario) reachesAll(from *nettest.Host, to []destination, want *pod) {
	s.Helper()
	for _, d := range to {
		s.reaches(from, d, want)
	}
}

// replace makes another pod of the app take the place of one, which still serves
// the connections that it gets.
func (p *pod) replace(app string) *pod {
	p.in.Helper()
	next := p.in.pod(app)
	p.unready()
	p.in.eventually(func(ctx context.Context) error { return p.in.endpoints(ctx, app, 1) })
	return next
}

// logsNext returns a function that waits until a line that Fairlead logs from now on
// has all of the parts.
func (s *scenario) logsNext(parts ...string) (wait func()) {
	s.Helper()
	info, err := os.Stat(s.lead.log)
	s.must(err)
	return func() {
		s.Helper()
		s.eventually(func(context.Context) error {
			data, err := os.ReadFile(s.lead.log)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(data[info.Size():])) {
				if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
					return nil
				}
			}
			return fmt.Errorf("no line of the log has %q:\n%s", parts, s.lead.tail())
		})
	}
}

// otherProxyReported waits until the Node has an Event about another proxy's rules
// that names the mode and how to remove the rules.
func (s *scenario) otherProxyReported(mode string) {
	s.Helper()
	s.eventually(func(ctx context.Context) error {
		events, err := s.api.EventsV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for i := range events.Items {
			e := &events.Items[i]
			if e.Reason == "OtherServiceProxy" && e.Regarding.Kind == "Node" && e.Regarding.Name == thisNode &&
				strings.Contains(e.Note, "mode "+mode) && strings.Contains(e.Note, "kube-proxy --cleanup") {
				return nil
			}
		}
		return fmt.Errorf("%d Events, none of which is about kube-proxy's mode %s", len(events.Items), mode)
	})
}

// TestKubeProxy runs the real kube-proxy beside, before and after Fairlead. The one
// that runs decides where new connections go, and open ones stay where they are. See
// docs/rollback.md.
func TestKubeProxy(t *testing.T) {
	if os.Getenv(referenceEnv) != "" {
		t.Skip("kube-proxy runs in place of Fairlead")
	}
	for _, flavour := range flavours {
		t.Run(flavour.name, func(t *testing.T) {
			s := newScenario(t, shared)
			kubeProxy := newKubeProxy(s, flavour.mode, flavour.iptables)
			found := []string{"another Service proxy's rules are on this node", "mode " + flavour.mode, "kube-proxy --cleanup"}
			metric := func(want float64) {
				t.Helper()
				s.eventually(func(ctx context.Context) error {
					got, err := s.lead.metric(ctx, "fairlead_other_proxy_rules", `mode="`+flavour.mode+`"`)
					if err == nil && got != want {
						err = fmt.Errorf("fairlead_other_proxy_rules is %v, want %v", got, want)
					}
					return err
				})
			}
			began := time.Now()
			step := func(what string) {
				t.Helper()
				t.Logf("after %s: %s", time.Since(began).Round(10*time.Millisecond), what)
			}
			web := s.service("web", both)
			client, first := s.client(), s.pod("web")
			var to []destination
			for _, addr := range web.all(80) {
				to = append(to, tcpTo(addr), udpTo(addr))
			}
			s.reachesAll(client, to, first)
			var open []*nettest.Conn
			for _, addr := range web.all(80) {
				conn, err := client.Open(s.ctx, nettest.TCP, addr)
				s.must(err)
				defer conn.Close()
				open = append(open, conn)
			}
			established := func() {
				t.Helper()
				for _, conn := range open {
					if answer, err := conn.Ask(s.ctx); err != nil || answer.Host != first.Name {
						t.Errorf("an open connection: answered by %q, error %v; want %s", answer.Host, err, first.Name)
					}
				}
			}
			load := s.load(client, to[0], to[len(to)-1])

			step("kube-proxy runs beside Fairlead, ends, and leaves its rules; the endpoints change while Fairlead is away")
			logged := s.logsNext(found...)
			kubeProxy.begin(first)
			logged()
			metric(1)
			s.otherProxyReported(flavour.mode)
			s.must(kubeProxy.kill())
			s.must(s.lead.kill())
			second := first.replace("web")
			logged = s.logsNext(found...)
			s.must(s.start(s.ctx))
			s.always(client, to, second)
			logged()
			metric(1)
			established()

			step("Fairlead has been stopped, and kube-proxy starts with its own stale rules there")
			args := s.lead.args
			s.must(s.lead.stop())
			s.lead.args = append(slices.Clone(args), "--give-way-after=1s")
			defer func() { s.lead.args = args }()
			s.must(s.start(s.ctx))
			s.always(client, to, second)
			s.must(s.lead.stop())
			kubeProxy.begin(second)
			third := second.replace("web")
			s.reachesAll(client, to, third)
			established()
			s.lead.args = args

			step("Fairlead takes over again, and kube-proxy --cleanup runs beside it")
			s.must(s.start(s.ctx))
			s.always(client, to, third)
			s.must(kubeProxy.kill())
			logged = s.logsNext("no rules of another Service proxy are left on this node")
			s.must(kubeProxy.removeRules())
			logged()
			metric(0)
			s.always(client, to, third)
			established()

			step("Fairlead is killed, and kube-proxy starts on a node without its rules")
			s.must(s.lead.kill())
			kubeProxy.begin(third)
			fourth := third.replace("web")
			s.reachesAll(client, to, fourth)
			established()

			step("fairlead cleanup ends the way back")
			_, err := kubeProxy.output(s.lead.binary, "cleanup")
			s.must(err)
			s.always(client, to, fourth)
			established()
			s.must(kubeProxy.kill())
			s.must(s.start(s.ctx))
			s.always(client, to, fourth)
			removesRules(s, kubeProxy)
			s.always(client, to, fourth)
			established()
			s.wentWell(load)
		})
	}
}
