package main

import (
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// TestServiceProxyName checks with real connections that each program serves only its own Services,
// and that a Service moves between programs with its label.
func TestServiceProxyName(t *testing.T) {
	t.Parallel()
	labeled := func(yaml, proxy string) string {
		return strings.Replace(yaml, "metadata:\n", "metadata:\n  labels: {service.kubernetes.io/service-proxy-name: "+proxy+"}\n", 1)
	}
	for _, test := range []struct {
		name string
		args []string
		own  func(string) string // sets the label of a Service that the program serves
	}{
		{"default proxy", nil, func(yaml string) string { return yaml }},
		{"named proxy", []string{"--service-proxy-name=try"}, func(yaml string) string { return labeled(yaml, "try") }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n := newTestNode(t, "a", "b")
			n.writePods("one", "a")
			n.writePods("two", "b")
			one, two := serviceYAML("one", 10, 80), serviceYAML("two", 20, 80)
			n.writeFile("one.yaml", test.own(one))
			n.writeFile("two.yaml", labeled(two, "other"))
			n.program = n.start(nil, append(n.runArgs(), test.args...)...)
			n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
			if listing := n.nft("list", "ruleset"); strings.Contains(listing, "10.96.0.20") {
				t.Errorf("the Service of another proxy is programmed:\n%s", listing)
			}
			n.writeFile("two.yaml", test.own(two))
			n.awaitAnswers(agenttest.ServiceAddrs(20, 80), "b")
			n.writeFile("one.yaml", labeled(one, "other"))
			n.awaitGone(agenttest.ServiceAddrs(10, 80))
			n.awaitAnswers(agenttest.ServiceAddrs(20, 80), "b")
		})
	}
}
