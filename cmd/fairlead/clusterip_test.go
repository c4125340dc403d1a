package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/nettest"
)

// A Service whose cluster IP belongs to the node, or to its loopback device, takes
// nothing from the node: other ports of the address go on answering, and an operator
// is told.
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
			n.awaitAnswers(serviceAddrs(10, 80), "a")
			eventually(t, func() error {
				for line := range strings.Lines(n.program.log.String()) {
					if strings.Contains(line, "bad") && strings.Contains(line, "spec.clusterIP") && strings.Contains(line, addr.String()) {
						return nil
					}
				}
				return fmt.Errorf("no line of the log names the Service, the field and the address:\n%s", n.program.log.String())
			})
			if _, err := connect(t.Context(), n.Node, nettest.TCP, netip.AddrPortFrom(addr, port)); err != nil {
				t.Errorf("the node's own connection to another port: %v", err)
			}
			if ruleset := strings.Join(n.ruleset(), "\n"); strings.Contains(ruleset, "default/bad") {
				t.Errorf("the Service is programmed:\n%s", ruleset)
			}
		})
	}
}
