package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// awaitPacketCount waits until the metric has this value for both IP families. labels are the
// labels after ip_family.
func (n *testNode) awaitPacketCount(metric, labels string, want int) {
	n.t.Helper()
	for _, family := range []string{"IPv4", "IPv6"} {
		n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK,
			fmt.Sprintf("\n%s{ip_family=%q,%s} %d\n", metric, family, labels, want))
	}
}

// TestRefusedPackets checks the metrics of refused packets, also after a restart.
func TestRefusedPackets(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.writeFile("empty.yaml", serviceYAML("empty", 1, 80))
	n.writeFile("node-port.yaml", `apiVersion: v1
kind: Service
metadata: {name: node-port}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  ports: [{name: game, port: 80, nodePort: 30080, protocol: UDP}]
`)
	n.run()
	const metric = "fairlead_refused_packets_total"
	n.awaitPacketCount(metric, `reason="no-endpoints",verdict="reject"`, 0)
	agenttest.ExpectNoAnswer(t, n.client, agenttest.ServiceAddrs(1, 80))
	agenttest.ExpectNoAnswer(t, n.Node, loopbackAddrs(30080))
	check := func() {
		t.Helper()
		n.awaitPacketCount(metric, `reason="no-endpoints",verdict="reject"`, 1)
		n.awaitPacketCount(metric, `reason="localhost-udp",verdict="reject"`, 1)
		n.awaitPacketCount(metric, `reason="no-service",verdict="drop"`, 0)
		n.awaitPacketCount("kubeproxy_nftables_localhost_nodeport_rejected_packets_total", `protocol="UDP"`, 1)
	}
	check()
	n.stop()
	n.run()
	check()
	status, body, err := get(t.Context(), n.Node, "127.0.0.1:10249", "/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("status %d, error %v", status, err)
	}
	for _, metric := range []string{"fairlead_first_service_programmed_seconds ", "fairlead_last_service_programmed_seconds "} {
		if _, value, found := strings.Cut(body, "\n"+metric); !found || strings.HasPrefix(value, "0\n") {
			t.Errorf("no time for %s in\n%s", metric, body)
		}
	}
}
