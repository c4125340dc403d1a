package main

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/nettest"
)

// awaitPacketCount waits until the metrics have so many packets of a label, for each
// family.
func (n *testNode) awaitPacketCount(metric, label, value string, want int) {
	n.t.Helper()
	for _, family := range []string{"IPv4", "IPv6"} {
		n.awaitGet(n.Node, "127.0.0.1:10249", "/metrics", http.StatusOK,
			fmt.Sprintf("\n%s{ip_family=%q,%s=%q} %d\n", metric, family, label, value, want))
	}
}

// expectNoAnswer sends a packet to each of the addresses.
func (n *testNode) expectNoAnswer(from *nettest.Host, addrs []netip.AddrPort) {
	n.t.Helper()
	for _, addr := range addrs {
		ctx, cancel := context.WithTimeout(n.t.Context(), connectTimeout/5)
		if answer, err := from.Connect(ctx, nettest.UDP, addr); err == nil {
			n.t.Errorf("%s answered: %+v", addr, answer)
		}
		cancel()
	}
}

// What is not served shows in the metrics, by its reason, also after a restart.
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
	const metric = "fairlead_unserved_packets_total"
	n.awaitPacketCount(metric, "reason", "rejected-no-endpoints", 0)
	n.expectNoAnswer(n.client, serviceAddrs(1, 80))
	n.expectNoAnswer(n.Node, loopbackAddrs(30080))
	check := func() {
		t.Helper()
		n.awaitPacketCount(metric, "reason", "rejected-no-endpoints", 1)
		n.awaitPacketCount(metric, "reason", "rejected-localhost-udp", 1)
		n.awaitPacketCount(metric, "reason", "dropped-no-service", 0)
		n.awaitPacketCount("kubeproxy_nftables_localhost_nodeport_rejected_packets_total", "protocol", "UDP", 1)
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
			t.Errorf("want a time as %s in\n%s", metric, body)
		}
	}
}
