package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
)

// TestClusterIPOnThisNode checks that a Service whose cluster IP is an address of the node or a
// loopback address is not programmed and is logged, and that other ports of the address keep
// working.
func TestClusterIPOnThisNode(t *testing.T) {
	t.Parallel()
	for name, addr := range map[string]netip.Addr{
		"the node's own address": netip.MustParseAddr("192.0.2.1"),
		"a loopback address":     netip.AddrFrom4([4]byte{127, 0, 0, 1}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t, "a")
			const port = 7070
			n.Node.ServeAtT(t, nettest.TCP, []netip.Addr{addr}, port)
			n.writeFile("bad.yaml", fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: bad}
spec:
  clusterIP: %s
  selector: {app: backend}
  ports: [{port: 80, targetPort: %d}]
`, addr, podPort))
			n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
			n.writePods("backend", "a")
			n.run()
			n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
			agenttest.Eventually(t, func() error {
				for line := range strings.Lines(n.program.log.String()) {
					if strings.Contains(line, "bad") && strings.Contains(line, "spec.clusterIP") && strings.Contains(line, addr.String()) {
						return nil
					}
				}
				return fmt.Errorf("no log line names the Service, the field and the address:\n%s", n.program.log.String())
			})
			if _, err := connect(t.Context(), n.Node, nettest.TCP, netip.AddrPortFrom(addr, port)); err != nil {
				t.Errorf("connection from the node to another port: %v", err)
			}
			if ruleset := strings.Join(n.ruleset(), "\n"); strings.Contains(ruleset, "default/bad") {
				t.Errorf("the Service is programmed:\n%s", ruleset)
			}
		})
	}
}
