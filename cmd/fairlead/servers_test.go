package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// get sends a GET request to one of the program's HTTP servers.
func get(ctx context.Context, from *nettest.Host, address, path string) (status int, body string, err error) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		return from.Dial(ctx, "tcp", netip.MustParseAddrPort(address))
	}}
	ctx, cancel := context.WithTimeout(ctx, waitTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return 0, "", err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// awaitGet waits for a response with this status and a body that contains text.
func (n *testNode) awaitGet(from *nettest.Host, address, path string, want int, text string) {
	n.t.Helper()
	agenttest.Eventually(n.t, func() error {
		status, body, err := get(n.t.Context(), from, address, path)
		if err == nil && (status != want || !strings.Contains(body, text)) {
			err = fmt.Errorf("%s%s: status %d, want %d with %q; body:\n%s", address, path, status, want, text, body)
		}
		return err
	})
}

// awaitClosed waits until connections to the address are refused.
func (n *testNode) awaitClosed(address string) {
	n.t.Helper()
	agenttest.Eventually(n.t, func() error {
		status, _, err := get(n.t.Context(), n.Outside, address, "/")
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		return fmt.Errorf("%s: status %d, error %w; want connection refused", address, status, err)
	})
}

// hostPort returns an address of the node with a port.
func (n *testNode) hostPort(addr netip.Addr, port uint16) string {
	return netip.AddrPortFrom(addr, port).String()
}

func TestNodeHealth(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.run()
	for _, addr := range n.Node.Addrs() {
		for _, path := range []string{"/healthz", "/livez"} {
			n.awaitGet(n.Outside, n.hostPort(addr, 10256), path, http.StatusOK, `"healthy":true`)
		}
	}
	_, body, err := get(t.Context(), n.Outside, n.hostPort(n.Node.IPv4, 10256), "/healthz")
	var answer map[string]any
	if err == nil {
		err = json.Unmarshal([]byte(body), &answer)
	}
	if err != nil || answer["nodeEligible"] != true || answer["status"] == nil {
		t.Errorf("error %v, body:\n%s", err, body)
	}
	// By default, metrics are served on a loopback address.
	n.awaitClosed(n.hostPort(n.Node.IPv4, 10249))
	n.stop()
	n.awaitClosed(n.hostPort(n.Node.IPv4, 10256))
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	const address = "127.0.0.1:10249"
	for _, want := range []string{
		"fairlead_services 4\n", // two ports in two IP families
		`fairlead_services_failing{reason="error"} 0`,
		`fairlead_commits_total{kind="replace",reason="start",result="success"} 1`,
		`kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv6"} 1`,
		"kubeproxy_sync_proxy_rules_service_changes_total 1\n",
		`fairlead_build_info{mode="nft",version="` + version + `"} 1`,
		"go_goroutines ", "process_resident_memory_bytes ",
	} {
		n.awaitGet(n.Node, address, "/metrics", http.StatusOK, want)
	}
	n.awaitGet(n.Node, "127.0.0.1:10256", "/healthz", http.StatusOK, "")
	n.awaitGet(n.Node, address, "/metrics", http.StatusOK, `kubeproxy_proxy_healthz_total{code="200"} 1`)
	n.removeFile("pod-a.yaml")
	n.awaitGet(n.Node, address, "/metrics", http.StatusOK, `fairlead_commits_total{kind="apply",reason="change",result="success"} 1`)
	for path, want := range map[string]string{"/healthz": "ok", "/proxyMode": "nftables"} {
		if status, body, err := get(t.Context(), n.Node, address, path); status != http.StatusOK || body != want || err != nil {
			t.Errorf("%s: status %d, body %q, error %v; want %q", path, status, body, err, want)
		}
	}
	n.awaitGet(n.Node, address, "/debug/pprof/", http.StatusNotFound, "")
	n.stop()

	n.program = n.start(nil, append(n.runArgs(), "--metrics-bind-address=0.0.0.0", "--profiling", "--healthz-port=0")...)
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv6, 10249), "/debug/pprof/", http.StatusOK, "heap")
	n.awaitClosed(n.hostPort(n.Node.IPv4, 10256))
	n.program.awaitLog(func(r record) bool {
		return r.Msg == "settings are deprecated" && strings.HasPrefix(r.Settings, "--healthz-port (")
	})
}

// loadBalancerYAML returns a Service with a health-check node port.
func loadBalancerYAML(port int) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: backend, namespace: default}
spec:
  clusterIP: 10.96.0.10
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: %d
  selector: {app: backend}
  ports: [{port: 80, targetPort: web}]
`, port)
}

func TestHealthCheckNodePort(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", loadBalancerYAML(32000))
	n.run()
	const body = "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"backend\"\n\t},\n\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": true\n}"
	for _, addr := range n.Node.Addrs() {
		n.awaitGet(n.Outside, n.hostPort(addr, 32000), "/", http.StatusServiceUnavailable, fmt.Sprintf(body, 0))
	}
	n.writePods("backend", "a", "b")
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv4, 32000), "/any", http.StatusOK, fmt.Sprintf(body, 2))
	n.writeFile("pod-a.yaml", n.podYAML("backend", "a", false))
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv6, 32000), "/any", http.StatusOK, fmt.Sprintf(body, 1))
	n.writeFile("backend.yaml", loadBalancerYAML(32001))
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv6, 32001), "/", http.StatusOK, fmt.Sprintf(body, 1))
	n.awaitClosed(n.hostPort(n.Node.IPv4, 32000))
	n.removeFile("pod-b.yaml")
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv4, 32001), "/", http.StatusServiceUnavailable, fmt.Sprintf(body, 0))
	n.removeFile("backend.yaml")
	n.awaitClosed(n.hostPort(n.Node.IPv4, 32001))
}

// TestNodePortAddressAdded checks that node ports are served on an address as soon as it is added to
// the node.
func TestNodePortAddressAdded(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", loadBalancerYAML(32000))
	n.writePods("backend", "a")
	n.program = n.start(nil, append(n.runArgs(), "--nodeport-addresses=198.51.100.0/24")...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	n.awaitClosed(n.hostPort(n.Node.IPv4, 32000))
	added := netip.MustParseAddr("198.51.100.7")
	if err := n.Node.AddAddr(added); err != nil {
		t.Fatal(err)
	}
	n.awaitGet(n.Node, n.hostPort(added, 32000), "/", http.StatusOK, `"localEndpoints": 1`)
	n.awaitClosed(n.hostPort(n.Node.IPv4, 32000))
}

// TestNodePortsAtLocalRoutes checks that node ports and health-check node ports are served on
// addresses of local routes until the routes are removed.
func TestNodePortsAtLocalRoutes(t *testing.T) {
	t.Parallel()
	const port, healthCheck = 30080, 32000
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: backend, namespace: default}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:10:96::a"]
  ipFamilyPolicy: RequireDualStack
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: %d
  selector: {app: backend}
  ports:
    - {name: tcp, protocol: TCP, port: 80, targetPort: web, nodePort: %d}
    - {name: udp, protocol: UDP, port: 80, targetPort: %d, nodePort: %[2]d}
`, healthCheck, port, podPort))
	n.writePods("backend", "a")
	n.program = n.start(nil, append(n.runArgs(), "--nodeport-addresses=0.0.0.0/0,::/0")...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	// Without a local route, connections fail at once instead of looping between hosts.
	n.command("ip", "-4", "route", "add", "unreachable", "192.0.2.64/26")
	n.command("ip", "-4", "route", "add", "unreachable", "203.0.113.0/24")
	n.command("ip", "-6", "route", "add", "unreachable", "2001:db8:4::/46")
	served := func(addr string) {
		t.Helper()
		at := netip.AddrPortFrom(netip.MustParseAddr(addr), port)
		for _, network := range []string{nettest.TCP, nettest.UDP} {
			agenttest.Eventually(t, func() error { return checkAnswers(t.Context(), n.Outside, network, at, "a") })
		}
		n.awaitGet(n.Outside, n.hostPort(at.Addr(), healthCheck), "/", http.StatusOK, `"localEndpoints": 1`)
	}
	silent := func(addr string) {
		t.Helper()
		at := netip.AddrPortFrom(netip.MustParseAddr(addr), port)
		for _, network := range []string{nettest.TCP, nettest.UDP} {
			agenttest.Eventually(t, func() error {
				answer, err := connect(t.Context(), n.Outside, network, at)
				if err == nil {
					return fmt.Errorf("%s %s: answer from %s, want none", network, at, answer.Host)
				}
				return nil
			})
		}
		ctx, cancel := context.WithTimeout(t.Context(), connectTimeout)
		defer cancel()
		if status, body, err := get(ctx, n.Outside, n.hostPort(at.Addr(), healthCheck), "/"); err == nil {
			t.Errorf("health check on %s: status %d, body %q; want an error", addr, status, body)
		}
	}
	for _, test := range []struct{ family, route, addr, other string }{
		{"-4", "192.0.2.90/32", "192.0.2.90", "192.0.2.91"},
		{"-6", "2001:db8:5::5a/128", "2001:db8:5::5a", "2001:db8:5::5b"},
		{"-4", "203.0.113.128/26", "203.0.113.150", "203.0.113.200"},
		{"-6", "2001:db8:6::/64", "2001:db8:6::7", "2001:db8:7::7"},
	} {
		silent(test.addr)
		route := []string{"local", test.route, "dev", "lo", "proto", "66"}
		n.command("ip", append([]string{test.family, "route", "add"}, route...)...)
		served(test.addr)
		silent(test.other)
		n.command("ip", append([]string{test.family, "route", "del"}, route...)...)
		silent(test.addr)
	}
	served(n.Node.IPv4.String())
	served(n.Node.IPv6.String())
}

// TestHealthCheckOnLoadBalancerAddress checks that without --nodeport-addresses, a health-check node
// port is served on all addresses of the node, including a load balancer address on its loopback
// device.
func TestHealthCheckOnLoadBalancerAddress(t *testing.T) {
	t.Parallel()
	const healthCheck = 32000
	vip := netip.MustParseAddr("192.0.2.71")
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: backend, namespace: default}
spec:
  clusterIP: 10.96.0.10
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: %d
  selector: {app: backend}
  ports: [{name: tcp, port: 80, targetPort: web}]
status: {loadBalancer: {ingress: [{ip: %s}]}}
`, healthCheck, vip))
	n.writePods("backend", "a")
	n.run()
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv4, healthCheck), "/", http.StatusOK, `"localEndpoints": 1`)
	address := func(verb string) {
		t.Helper()
		n.command("ip", "addr", verb, vip.String()+"/32", "dev", "lo")
	}
	address("add")
	n.awaitGet(n.Outside, n.hostPort(vip, healthCheck), "/", http.StatusOK, `"localEndpoints": 1`)
	address("del")
	if status, body, err := get(t.Context(), n.Outside, n.hostPort(vip, healthCheck), "/"); err == nil {
		t.Errorf("health check after the address was removed: status %d, body %q; want an error", status, body)
	}
}

// TestHealthCheckNodePortInUse checks that a port in use by another process is reported, and that it
// is served once it is free.
func TestHealthCheckNodePortInUse(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	taken, err := n.Node.Listen(t.Context(), "tcp4", netip.AddrPortFrom(netip.IPv4Unspecified(), 32000))
	if err != nil {
		t.Fatal(err)
	}
	n.writeFile("backend.yaml", loadBalancerYAML(32000))
	n.writePods("backend", "a")
	n.run()
	n.program.awaitLog(func(r record) bool { return r.Level == "WARN" && strings.Contains(r.Error, "address already in use") })
	n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK, "fairlead_health_check_node_port_failures_total 1\n")
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv6, 32000), "/", http.StatusOK, "")
	taken.Close()
	n.awaitGet(n.Outside, n.hostPort(n.Node.IPv4, 32000), "/", http.StatusOK, "")
}

func TestServerAddressInUse(t *testing.T) {
	t.Parallel()
	for _, server := range []string{"healthz", "metrics"} {
		t.Run(server, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t)
			taken, err := n.Node.Listen(t.Context(), "tcp", netip.AddrPortFrom(n.Node.IPv4, 9999))
			if err != nil {
				t.Fatal(err)
			}
			args := append(n.runArgs(), "--"+server+"-bind-address="+n.hostPort(n.Node.IPv4, 9999))
			code, stderr := n.runOnce(nil, append(args, "--bind-address-hard-fail")...)
			want := "fairlead: --" + server + "-bind-address: listen on 192.0.2.1:9999: listen tcp 192.0.2.1:9999: bind: address already in use\n"
			if code != 1 || !strings.HasSuffix(stderr, want) {
				t.Errorf("exit code %d, output %q; want 1 and %q at the end", code, stderr, want)
			}

			n.program = n.start(nil, args...)
			n.program.awaitLog(func(r record) bool {
				return r.Level == "WARN" && r.Setting == server+"-bind-address" && strings.Contains(r.Error, "address already in use")
			})
			taken.Close()
			n.awaitGet(n.Outside, n.hostPort(n.Node.IPv4, 9999), "/healthz", http.StatusOK, "")
		})
	}
}

// TestIgnoredSettings checks the warnings for kube-proxy flags without effect, and that nothing else
// is logged above INFO.
func TestIgnoredSettings(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.program = n.start(nil, append(n.runArgs(), "--ipvs-scheduler=lc", "--iptables-sync-period=10s",
		"--oom-score-adj=-998", "--pod-bridge-interface=cni0", "--feature-gates=A=true", "--ipvs-exclude-cidrs=", "-v=2")...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	n.stop()
	var warned []string
	for _, r := range n.program.log.records() {
		if r.Level != "INFO" {
			warned = append(warned, r.Msg+": "+r.Settings)
		}
	}
	want := []string{
		"--pod-bridge-interface (it requires --detect-local-mode=BridgeInterface)",
		"--ipvs-scheduler (it applies only to --mode=ipvs)",
		"--feature-gates (Fairlead has no feature gates, and always serves external IPs)",
		"--iptables-sync-period (Fairlead programs changes as they arrive instead of periodically; use --batch-period to batch them)",
		"--oom-score-adj (Fairlead does not set its oom_score_adj: in Kubernetes, priorityClassName system-node-critical sets it)",
	}
	if got, want := strings.Join(warned, "\n"), "settings have no effect: "+strings.Join(want, "; "); got != want {
		t.Errorf("warnings:\n%s\nwant:\n%s", got, want)
	}
}
