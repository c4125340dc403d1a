package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"fairlead.io/fairlead/bench/apiserver"
	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// TestCleanupRefuses checks that cleanup refuses to end connections, and that connections survive
// it if another program has NAT rules.
func TestCleanupRefuses(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	backend := agenttest.ServiceAddrs(10, 80)
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.awaitTCP(backend, "a")
	established := n.openConns(backend)
	n.stop()
	refuse := func(want string) {
		t.Helper()
		before := n.ruleset()
		code, stderr := n.runOnce(nil, "cleanup")
		if code != 1 || !strings.Contains(stderr, want) || !strings.Contains(stderr, "start kube-proxy first, or use --force") {
			t.Errorf("exit code %d, output %q; want 1 and %q", code, stderr, want)
		}
		if !slices.Equal(before, n.ruleset()) {
			t.Errorf("ruleset after the refused cleanup:\n%s", n.nft("list", "ruleset"))
		}
	}
	refuse("2 TCP connections and 0 flows of other protocols to Services would end")
	const (
		chain = "add table %[1]s other; add chain %[1]s other nat { type nat hook postrouting priority srcnat; }"
		rule  = "add rule %[1]s other nat oifname none masquerade"
	)
	n.nft(fmt.Sprintf(chain, "ip"))
	n.nft(fmt.Sprintf(chain, "ip6"))
	refuse("2 TCP connections and 0 flows of other protocols to Services would end") // chains without rules are not sufficient
	n.nft(fmt.Sprintf(rule, "ip"))
	refuse("1 TCP connections and 0 flows of other protocols to Services would end")
	n.nft(fmt.Sprintf(rule, "ip6"))
	if code, stderr := n.runOnce(nil, "cleanup"); code != 0 || stderr != "" {
		t.Errorf("cleanup: exit code %d, output %q, want 0 and nothing", code, stderr)
	}
	established.checkOpen(t)
}

// migrationNode is a node with an API server, on which Fairlead and the real kube-proxy can run.
type migrationNode struct {
	*testNode

	mode, kubeconfig string
	bin              string // a folder with the programs for kube-proxy and the document's commands
	kubeProxy        *exec.Cmd
}

// newMigrationNode creates a node with a Service for the pods a and b, for kube-proxy in the given
// mode with the given flavor of iptables.
func newMigrationNode(t *testing.T, mode, flavor string) *migrationNode {
	t.Helper()
	if _, err := os.Stat(kubeProxyBinary(t)); err != nil {
		t.Skipf("kube-proxy not found: run `make kube-proxy` (%v)", err)
	}
	n := &migrationNode{testNode: newTestNode(t, "a", "b"), mode: mode, bin: t.TempDir()}
	n.serveAPI()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\nexec env %s=1 GORACE=atexit_sleep_ms=0 %s \"$@\"\n", runProgramEnv, self)
	if err := os.WriteFile(filepath.Join(n.bin, "fairlead"), []byte(script), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	if flavor != "" {
		multi, err := exec.LookPath("xtables-" + flavor + "-multi")
		if err != nil {
			t.Skipf("this flavor of iptables is not installed: %v", err)
		}
		for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
			if err := os.Symlink(multi, filepath.Join(n.bin, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return n
}

func kubeProxyBinary(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "..", ".cache", "kube-proxy", "kube-proxy"))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// serveAPI starts an API server at a loopback address of the node.
func (n *migrationNode) serveAPI() {
	n.t.Helper()
	const namespace, name, port = "default", "backend", "port"
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "0", Labels: map[string]string{discoveryv1.LabelServiceName: "backend"}}
	}
	addrs := agenttest.ServiceAddrs(10, 80)
	service := &corev1.Service{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "1"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: addrs[0].Addr().String(), ClusterIPs: []string{addrs[0].Addr().String(), addrs[1].Addr().String()},
			IPFamilies:      []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
			SessionAffinity: corev1.ServiceAffinityNone, InternalTrafficPolicy: new(corev1.ServiceInternalTrafficPolicyCluster),
		},
	}
	node := &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "node", UID: "2"}}
	var endpointPorts []discoveryv1.EndpointPort
	for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		name := strings.ToLower(string(protocol))
		service.Spec.Ports = append(service.Spec.Ports, corev1.ServicePort{Name: name, Protocol: protocol, Port: 80, TargetPort: intstr.FromInt32(podPort)})
		endpointPorts = append(endpointPorts, discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: new(int32(podPort))})
	}
	objects := []apiserver.Object{node, service}
	for family, kind := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, n.PodCIDRs[family].String())
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: n.Node.Addrs()[family].String()})
		slice := &discoveryv1.EndpointSlice{
			TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"}, ObjectMeta: meta(fmt.Sprint(name, family)),
			AddressType: kind, Ports: endpointPorts,
		}
		for _, pod := range n.pods {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{pod.Addrs()[family].String()}, NodeName: new("node"), Conditions: discoveryv1.EndpointConditions{Ready: new(true)},
			})
		}
		objects = append(objects, slice)
	}
	node.Spec.PodCIDR = node.Spec.PodCIDRs[0]
	server := apiserver.New()
	var versions apiserver.VersionSequence
	for _, o := range objects {
		v, err := versions.Stamp(o)
		if err != nil {
			n.t.Fatal(err)
		}
		server.Put(v)
	}
	address := netip.MustParseAddrPort("127.0.0.1:6443")
	listener, err := n.Node.Listen(n.t.Context(), nettest.TCP, address)
	if err != nil {
		n.t.Fatal(err)
	}
	requests, end := context.WithCancel(context.WithoutCancel(n.t.Context()))
	api := &http.Server{Handler: server, ReadHeaderTimeout: time.Minute, BaseContext: func(net.Listener) context.Context { return requests }}
	go func() { _ = api.Serve(listener) }() // until it is closed
	n.t.Cleanup(func() {
		end()
		_ = api.Close()
	})
	n.kubeconfig = filepath.Join(n.t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: test, cluster: {server: \"http://%s\"}}]\nusers: [{name: test}]\n"+
		"contexts: [{name: test, context: {cluster: test, user: test}}]\ncurrent-context: test\n", address)
	if err := os.WriteFile(n.kubeconfig, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// startFairlead starts Fairlead and waits until it has programmed the node.
func (n *migrationNode) startFairlead(args ...string) {
	n.t.Helper()
	n.program = n.start(nil, slices.Concat([]string{
		"run", "--mode=nft", "--kubeconfig=" + n.kubeconfig, "--cluster-cidr=" + n.PodCIDRs[0].String() + "," + n.PodCIDRs[1].String(),
		"--hostname-override=node", "--log-format=json", "--conntrack-max-per-core=0",
	}, args)...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
}

// startKubeProxy starts kube-proxy and waits until it has programmed the endpoints.
func (n *migrationNode) startKubeProxy() {
	n.t.Helper()
	log := &logBuffer{}
	cmd := exec.CommandContext(n.t.Context(), kubeProxyBinary(n.t),
		"--proxy-mode="+n.mode, "--kubeconfig="+n.kubeconfig, "--hostname-override=node", "--cluster-cidr="+n.PodCIDRs[0].String()+","+n.PodCIDRs[1].String(),
		"--healthz-bind-address=127.0.0.1:30256", "--metrics-bind-address=127.0.0.1:30249",
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s", "--oom-score-adj=0",
	)
	cmd.Env = n.environment()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = waitTimeout // time from SIGTERM to SIGKILL
	if err := n.Node.Do(cmd.Start); err != nil {
		n.t.Fatal(err)
	}
	n.kubeProxy = cmd
	n.t.Cleanup(func() {
		n.stopKubeProxy()
		if n.t.Failed() {
			n.t.Logf("kube-proxy's log:\n%s", log.String())
		}
	})
	deadline := time.Now().Add(4 * waitTimeout) // kube-proxy's start takes seconds of CPU time
	for {
		missing := n.missingEndpoints()
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("kube-proxy has not programmed %s", missing)
		}
		time.Sleep(100 * time.Millisecond) // leaves CPU time to kube-proxy
	}
}

// environment returns the environment for kube-proxy and for the document's commands.
func (n *migrationNode) environment() []string {
	return append(os.Environ(), "PATH="+n.bin+":"+os.Getenv("PATH"))
}

// missingEndpoints returns an endpoint or another object that kube-proxy has not programmed, or "".
func (n *migrationNode) missingEndpoints() string {
	n.t.Helper()
	list := "nft list table ip kube-proxy; nft list table ip6 kube-proxy"
	var want []string
	switch n.mode {
	case "iptables":
		list = "iptables-save; ip6tables-save"
	case "ipvs":
		// Fairlead can have the same virtual servers. kube-proxy adds its iptables rules last.
		list = "ipvsadm -Ln; ip -o address show dev kube-ipvs0; iptables-save; ip6tables-save"
		want = []string{"inet 10.96.0.10/32", "inet6 fd00:10:96::a/128", "--match-set KUBE-CLUSTER-IP", "--match-set KUBE-6-CLUSTER-IP"}
	}
	for _, pod := range n.pods {
		for _, addr := range pod.Addrs() {
			want = append(want, addr.String())
		}
	}
	rules, _ := n.shell("(" + list + ") 2>&1 || true") // fails before kube-proxy has created its objects
	for _, object := range want {
		if !strings.Contains(rules, object) {
			return object
		}
	}
	return ""
}

// stopKubeProxy stops kube-proxy with SIGTERM if it is running.
func (n *migrationNode) stopKubeProxy() {
	n.t.Helper()
	if n.kubeProxy == nil {
		return
	}
	if err := n.kubeProxy.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		n.t.Error(err)
	}
	_ = n.kubeProxy.Wait() // kube-proxy exits with an error after SIGTERM
	n.kubeProxy = nil
}

// shell runs commands on the node and returns their output.
func (n *migrationNode) shell(commands string) (string, error) {
	cmd := exec.CommandContext(n.t.Context(), "sh", "-ec", commands)
	cmd.Env = n.environment()
	out := &logBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	stdin, err := cmd.StdinPipe() // the program exits at the end of its input
	if err != nil {
		return "", fmt.Errorf("run commands: %w", err)
	}
	defer stdin.Close()
	if err := n.Node.Do(cmd.Start); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s", commands, err, out.String())
	}
	return out.String(), nil
}

// openFlows opens a TCP connection and a UDP flow to each address.
func (n *migrationNode) openFlows() (check func(after string)) {
	n.t.Helper()
	type flow struct {
		*nettest.Conn

		name, host string
	}
	var flows []flow
	ask := func(f flow) (nettest.Answer, error) {
		ctx, cancel := context.WithTimeout(n.t.Context(), waitTimeout)
		defer cancel()
		return f.Ask(ctx)
	}
	for _, network := range []string{nettest.TCP, nettest.UDP} {
		for _, addr := range agenttest.ServiceAddrs(10, 80) {
			conn, err := n.client.Open(n.t.Context(), network, addr)
			if err != nil {
				n.t.Fatal(err)
			}
			n.t.Cleanup(func() { _ = conn.Close() })
			f := flow{Conn: conn, name: network + " " + addr.String()}
			answer, err := ask(f)
			if err != nil {
				n.t.Fatal(err)
			}
			f.host = answer.Host
			flows = append(flows, f)
		}
	}
	return func(after string) {
		n.t.Helper()
		for _, f := range flows {
			if answer, err := ask(f); err != nil || answer.Host != f.host {
				n.t.Errorf("after step %q: the established flow %s is answered by %q, error %v; want %s", after, f.name, answer.Host, err, f.host)
			}
		}
	}
}

// leftovers returns the objects of a proxy that the node still has.
func (n *migrationNode) leftovers(words ...string) []string {
	n.t.Helper()
	list := "nft list ruleset"
	if n.mode != "nftables" {
		list += "; iptables-save; ip6tables-save"
	}
	listing, err := n.shell(list)
	if err != nil {
		n.t.Fatal(err)
	}
	return slices.DeleteFunc(words, func(word string) bool { return !strings.Contains(listing, word) })
}

// TestMigration follows the document from kube-proxy to Fairlead and back, under load and with
// established connections. It runs the document's commands on the node. Where a step changes which
// proxy runs, the document's commands are for kubectl, and the test starts and stops the programs.
func TestMigration(t *testing.T) {
	t.Parallel()
	for _, variant := range []struct{ name, mode, flavor string }{
		{"nftables", "nftables", ""}, {"iptables-nft", "iptables", "nft"}, {"iptables-legacy", "iptables", "legacy"},
	} {
		t.Run(variant.name, func(t *testing.T) {
			t.Parallel()
			n := newMigrationNode(t, variant.mode, variant.flavor)
			n.startKubeProxy()
			backend := agenttest.ServiceAddrs(10, 80)
			n.awaitAnswers(backend, "a", "b")
			checkEstablished := n.openFlows()
			stopLoad := n.keepConnecting(backend)
			followRunbook(n, checkEstablished)
			stopLoad()
		})
	}
}

// followRunbook follows all steps of the document.
func followRunbook(n *migrationNode, checkEstablished func(after string)) {
	n.t.Helper()
	actions := map[string]func(){
		"one node": func() { // the label stops kube-proxy and starts Fairlead
			want := fmt.Sprintf("kube-proxy is running on this node (PID %d)", n.kubeProxy.Process.Pid)
			if output, err := n.shell("fairlead cleanup --kube-proxy"); err == nil || !strings.Contains(output, want) {
				n.t.Errorf("cleanup beside kube-proxy: error %v, output %q; want a failure with %q", err, output, want)
			}
			n.stopKubeProxy()
			n.startFairlead()
		},
		"back on one node": func() {
			n.stop()
			n.startKubeProxy()
		},
	}
	checks := map[string]func(output string){
		"remove kube-proxy's rules": func(string) {
			if left := n.leftovers("kube-proxy", "KUBE-SERVICES", "KUBE-SVC-", "KUBE-SEP-", "KUBE-POSTROUTING"); len(left) > 0 {
				n.t.Errorf("left of kube-proxy: %v", left)
			}
		},
		"remove Fairlead's rules": func(string) {
			if left := n.leftovers("table ip fairlead", "table ip6 fairlead"); len(left) > 0 {
				n.t.Errorf("left of Fairlead: %v", left)
			}
		},
	}
	seen := 0
	for _, step := range readRunbook(n.t, "migrate-from-kube-proxy.md") {
		if action := actions[step.name]; action != nil {
			action()
			seen++
		} else {
			output, err := n.shell(step.commands)
			if err != nil {
				n.t.Fatalf("step %q: %v", step.name, err)
			}
			n.t.Logf("step %q:\n%s", step.name, output)
			if check := checks[step.name]; check != nil {
				check(output)
				seen++
			}
		}
		checkEstablished(step.name)
	}
	if seen < len(actions)+len(checks) {
		n.t.Errorf("the document has %d of the steps of this test, want each of %d", seen, len(actions)+len(checks))
	}
}
