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

// kubeProxy is a kube-proxy that runs on this node in addition to Fairlead.
type kubeProxy struct {
	*fairlead
	scenario *scenario
	// rulesetCommands print all rules that kube-proxy may have created.
	rulesetCommands [][]string
}

// kubeProxyModes lists kube-proxy's modes: the name of the subtest, the mode, and the
// multi-call binary to use as iptables.
var kubeProxyModes = []struct{ name, mode, iptables string }{
	{"nftables", "nftables", ""},
	{"iptables-nft", "iptables", "xtables-nft-multi"},
	{"iptables-legacy", "iptables", "xtables-legacy-multi"},
}

// newKubeProxy returns a kube-proxy that is not running yet. At the end of the test it
// removes the proxy's rules and makes sure that Fairlead is running.
func newKubeProxy(s *scenario, mode, iptables string) *kubeProxy {
	s.Helper()
	binary, err := filepath.Abs(filepath.Join(moduleRoot, ".cache", "kube-proxy", "kube-proxy"))
	s.must(err)
	if _, err := os.Stat(binary); err != nil {
		s.Fatalf("kube-proxy not found: run `make kube-proxy` (%v)", err)
	}
	dir := s.TempDir()
	p := &kubeProxy{scenario: s, rulesetCommands: [][]string{{"nft", "list", "ruleset"}}, fairlead: &fairlead{
		host: s.net.Node, binary: binary, logFile: filepath.Join(dir, "kube-proxy.log"), kubeProxy: true,
	}}
	if iptables != "" {
		multi, err := exec.LookPath(iptables)
		if err != nil {
			s.Skipf("this variant of iptables is not installed: %v", err)
		}
		for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
			s.must(os.Symlink(multi, filepath.Join(dir, name)))
		}
		s.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		p.rulesetCommands = [][]string{{"iptables-save"}, {"ip6tables-save"}}
	}
	if err := (system.KubeProxy{Binary: binary, Mode: mode}).Check(s.ctx, s.net.Node.Namespace); err != nil {
		if unavailable := (*system.UnavailableError)(nil); errors.As(err, &unavailable) && unavailable.KernelLacksSupport {
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
	// kube-proxy --cleanup does not reset this sysctl.
	const routeLocalnet = "/proc/sys/net/ipv4/conf/all/route_localnet"
	before, err := p.output("cat", routeLocalnet)
	s.must(err)
	s.Cleanup(func() {
		if s.Failed() {
			s.Logf("the end of kube-proxy's log:\n%s", p.logTail())
		}
		err := errors.Join(p.kill(), p.cleanUp())
		_, resetErr := p.output("sh", "-c", "echo "+strings.TrimSpace(before)+" >"+routeLocalnet)
		err = errors.Join(err, resetErr)
		if !s.fairlead.running() {
			err = errors.Join(err, s.start(context.WithoutCancel(s.ctx)))
		}
		if err != nil {
			s.Errorf("clean up after kube-proxy: %v", err)
		}
	})
	return p
}

// startAndWait starts kube-proxy and waits until it has programmed the endpoints.
func (p *kubeProxy) startAndWait(endpoints ...*pod) {
	p.scenario.Helper()
	p.scenario.must(p.start())
	p.waitProgrammed(endpoints...)
}

// waitProgrammed waits until kube-proxy has rules for the endpoints in both families.
func (p *kubeProxy) waitProgrammed(endpoints ...*pod) {
	p.scenario.Helper()
	const pause = 200 * time.Millisecond // leaves CPU time to kube-proxy
	p.scenario.eventually(func(context.Context) error {
		var rules strings.Builder
		for _, command := range p.rulesetCommands {
			if command[0] == "nft" {
				for _, family := range []string{"ip", "ip6"} {
					out, _ := p.output("nft", "list", "table", family, "kube-proxy") // fails without a table, which means no rules
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
					return fmt.Errorf("kube-proxy has no rule for %s; its log ends:\n%s", addr, p.logTail())
				}
			}
		}
		return nil
	})
}

// output runs a command on the node and returns its output.
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

// cleanUp runs kube-proxy --cleanup.
func (p *kubeProxy) cleanUp() error {
	_, err := p.output(p.binary, "--cleanup")
	return err
}

// checkRemoveCommand removes kube-proxy's rules with the command that Fairlead suggests, and
// checks that none is left.
func checkRemoveCommand(s *scenario, p *kubeProxy) {
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
	_, err := p.output(s.fairlead.binary, "cleanup", "--kube-proxy")
	s.must(err)
	if left := scan(); len(left) > 0 {
		s.Errorf("fairlead cleanup --kube-proxy left %v", left)
	}
}

// checkReaches makes several connections to each destination. Every connection must reach the
// pod want.
func (s *scenario) checkReaches(from *nettest.Host, to []destination, want *pod) {
	s.Helper()
	const attempts = 20
	for _, d := range to {
		got := map[string]int{}
		for range attempts {
			answer, err := connect(s.ctx, from, d, connectTimeout)
			if err != nil {
				s.Errorf("%s from %s: %v", d, from.Name, err)
			}
			got[answer.Host]++
		}
		if got[want.Name] != attempts {
			s.Errorf("%s from %s: reached %v, want only %s", d, from.Name, got, want.Name)
		}
	}
}

// waitReachesAll waits until connections to every destination reach the pod.
func (s *scenario) waitReachesAll(from *nettest.Host, to []destination, want *pod) {
	s.Helper()
	for _, d := range to {
		s.waitReaches(from, d, want)
	}
}

// replace replaces the pod's endpoint by a new pod of the app. The old pod still serves
// connections.
func (p *pod) replace(app string) *pod {
	p.scenario.Helper()
	next := p.scenario.createPod(app)
	// Two steps, because a count cannot tell the old pod from the new one.
	p.scenario.eventually(func(ctx context.Context) error { return p.scenario.checkReadyEndpoints(ctx, app, 2) })
	p.markNotReady()
	p.scenario.eventually(func(ctx context.Context) error { return p.scenario.checkReadyEndpoints(ctx, app, 1) })
	return next
}

// expectLog returns a function that waits until Fairlead has logged a line with all of the
// parts after the call of expectLog.
func (s *scenario) expectLog(parts ...string) (wait func()) {
	s.Helper()
	info, err := os.Stat(s.fairlead.logFile)
	s.must(err)
	return func() {
		s.Helper()
		s.eventually(func(context.Context) error {
			data, err := os.ReadFile(s.fairlead.logFile)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(data[info.Size():])) {
				if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
					return nil
				}
			}
			return fmt.Errorf("no log line contains %q:\n%s", parts, s.fairlead.logTail())
		})
	}
}

// waitOtherProxyEvent waits for an Event on the Node about the rules of another proxy. The
// note must name the mode and the command that removes the rules.
func (s *scenario) waitOtherProxyEvent(mode string) {
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
		return fmt.Errorf("none of %d Events is about kube-proxy in mode %s", len(events.Items), mode)
	})
}

// TestKubeProxy runs the real kube-proxy before, after and at the same time as Fairlead. The
// proxy that is running decides where new connections go; open connections continue. See
// docs/migrate-from-kube-proxy.md.
func TestKubeProxy(t *testing.T) {
	if os.Getenv(kubeProxyEnv) != "" {
		t.Skip("kube-proxy runs in place of Fairlead")
	}
	for _, variant := range kubeProxyModes {
		t.Run(variant.name, func(t *testing.T) {
			s := newScenario(t, sharedCluster)
			kubeProxy := newKubeProxy(s, variant.mode, variant.iptables)
			logParts := []string{"rules of another Service proxy found on this node", "mode " + variant.mode, "kube-proxy --cleanup"}
			metric := func(want float64) {
				t.Helper()
				s.eventually(func(ctx context.Context) error {
					got, err := s.fairlead.metric(ctx, "fairlead_other_proxy_rules", `mode="`+variant.mode+`"`)
					if err == nil && got != want {
						err = fmt.Errorf("fairlead_other_proxy_rules is %v, want %v", got, want)
					}
					return err
				})
			}
			began := time.Now()
			step := func(description string) {
				t.Helper()
				t.Logf("after %s: %s", time.Since(began).Round(10*time.Millisecond), description)
			}
			web := s.createService("web", tcpAndUDP)
			client, first := s.addClient(), s.createPod("web")
			var to []destination
			for _, addr := range web.addrPorts(80) {
				to = append(to, tcpTo(addr), udpTo(addr))
			}
			s.waitReachesAll(client, to, first)
			var open []*nettest.Conn
			for _, addr := range web.addrPorts(80) {
				conn, err := client.Open(s.ctx, nettest.TCP, addr)
				s.must(err)
				defer conn.Close()
				open = append(open, conn)
			}
			checkOpen := func() {
				t.Helper()
				for _, conn := range open {
					if answer, err := conn.Ask(s.ctx); err != nil || answer.Host != first.Name {
						t.Errorf("an open connection is answered by %q, error %v; want %s", answer.Host, err, first.Name)
					}
				}
			}
			load := s.startLoad(client, to[0], to[len(to)-1])

			step("kube-proxy runs in parallel and is killed, leaving its rules; the endpoints change while Fairlead is down")
			logged := s.expectLog(logParts...)
			kubeProxy.startAndWait(first)
			logged()
			metric(1)
			s.waitOtherProxyEvent(variant.mode)
			s.must(kubeProxy.kill())
			s.must(s.fairlead.kill())
			second := first.replace("web")
			logged = s.expectLog(logParts...)
			s.must(s.start(s.ctx))
			s.checkReaches(client, to, second)
			logged()
			metric(1)
			checkOpen()

			step("Fairlead is stopped, and kube-proxy starts with its own stale rules")
			args := s.fairlead.args
			s.must(s.fairlead.stop())
			s.fairlead.args = append(slices.Clone(args), "--give-way-after=1s")
			defer func() { s.fairlead.args = args }()
			s.must(s.start(s.ctx))
			s.checkReaches(client, to, second)
			s.must(s.fairlead.stop())
			kubeProxy.startAndWait(second)
			third := second.replace("web")
			s.waitReachesAll(client, to, third)
			checkOpen()
			s.fairlead.args = args

			step("Fairlead takes over again, and kube-proxy --cleanup runs in parallel")
			s.must(s.start(s.ctx))
			s.checkReaches(client, to, third)
			s.must(kubeProxy.kill())
			logged = s.expectLog("rules of other Service proxies are gone from this node")
			s.must(kubeProxy.cleanUp())
			logged()
			metric(0)
			s.eventually(func(context.Context) error { // the rules change after the metric
				chains, err := kubeProxy.output("nft", "list", "chains")
				if err == nil && strings.Contains(chains, "-ahead") {
					err = errors.New("Fairlead's chains are still ahead of kube-proxy's")
				}
				return err
			})
			s.checkReaches(client, to, third)
			checkOpen()

			step("Fairlead is killed, and kube-proxy starts on a node without its own rules")
			s.must(s.fairlead.kill())
			kubeProxy.startAndWait(third)
			fourth := third.replace("web")
			s.waitReachesAll(client, to, fourth)
			checkOpen()

			step("fairlead cleanup completes the rollback")
			_, err := kubeProxy.output(s.fairlead.binary, "cleanup")
			s.must(err)
			s.checkReaches(client, to, fourth)
			checkOpen()
			s.must(kubeProxy.kill())
			s.must(s.start(s.ctx))
			s.checkReaches(client, to, fourth)
			checkRemoveCommand(s, kubeProxy)
			s.checkReaches(client, to, fourth)
			checkOpen()
			s.stopLoad(load)
		})
	}
}
