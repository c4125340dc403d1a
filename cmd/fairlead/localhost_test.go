package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// loopbackAddrs returns the loopback addresses that the relay serves node ports on.
func loopbackAddrs(port uint16) []netip.AddrPort {
	return []netip.AddrPort{
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port),
		netip.AddrPortFrom(netip.IPv6Loopback(), port),
	}
}

// awaitRefusedFromNode waits until connections from the node are refused.
func (n *testNode) awaitRefusedFromNode(network string, addr netip.AddrPort) {
	n.t.Helper()
	agenttest.Eventually(n.t, func() error {
		answer, err := connect(n.t.Context(), n.Node, network, addr)
		if errors.Is(err, nettest.ErrRefused) {
			return nil
		}
		return fmt.Errorf("%s %s: answer %+v, error %w; want connection refused", network, addr, answer, err)
	})
}

// TestLocalhostNodePorts checks that TCP node ports and health-check node ports are served on the
// configured loopback addresses, and that this follows the configuration and the endpoints.
func TestLocalhostNodePorts(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", `apiVersion: v1
kind: Service
metadata: {name: backend}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: 32000
  ipFamilyPolicy: RequireDualStack
  selector: {app: backend}
  ports:
    - {name: tcp, port: 80, nodePort: 30080, targetPort: web}
    - {name: udp, port: 80, nodePort: 30080, targetPort: 8080, protocol: UDP}
`)
	n.writePods("backend", "a", "b")
	path := filepath.Join(t.TempDir(), "config.yaml")
	configure := func(addresses string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(configHeader+"nodePortAddresses: ["+addresses+"]\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	configure("all")
	args := append(n.runArgs(), "--config="+path)
	n.program = n.start(nil, args...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	listeners := func(v4, v6 int) {
		t.Helper()
		for family, want := range map[string]int{"IPv4": v4, "IPv6": v6} {
			n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK,
				fmt.Sprintf("kubeproxy_nftables_localhost_nodeport_listeners{ip_family=%q} %d\n", family, want))
		}
	}
	refused := func(networks ...string) {
		t.Helper()
		for _, network := range networks {
			for _, addr := range loopbackAddrs(30080) {
				n.awaitRefusedFromNode(network, addr)
			}
		}
	}
	listeners(0, 0)
	refused("tcp", "udp")

	configure("localhost")
	listeners(1, 1)
	for _, addr := range loopbackAddrs(30080) {
		agenttest.Eventually(t, func() error { return checkAnswers(t.Context(), n.Node, "tcp", addr, "a", "b") })
	}
	refused("udp")
	for _, addr := range loopbackAddrs(32000) {
		n.awaitGet(n.Node, addr.String(), "/", http.StatusOK, `"localEndpoints": 2`)
	}
	n.awaitClosed(n.hostPort(n.Node.IPv4, 32000))

	n.removeFile("pod-a.yaml")
	agenttest.Eventually(t, func() error { return checkAnswers(t.Context(), n.Node, "tcp", loopbackAddrs(30080)[1], "b") })
	n.removeFile("pod-b.yaml")
	listeners(0, 0)
	refused("tcp")
	n.writePods("backend", "a")
	listeners(1, 1)

	configure("127.0.0.0/8")
	listeners(1, 0)
	agenttest.Eventually(t, func() error { return checkAnswers(t.Context(), n.Node, "tcp", loopbackAddrs(30080)[0], "a") })
	n.awaitRefusedFromNode("tcp", loopbackAddrs(30080)[1])
	n.stop()
	refused("tcp")
}
