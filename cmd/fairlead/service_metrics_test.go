package main

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/servicecounters"
)

// TestServiceMetrics checks the metrics of connections while endpoints change, and after restarts with
// other selections. `fairlead top` counts the same connections.
func TestServiceMetrics(t *testing.T) {
	t.Parallel()
	const metrics = "127.0.0.1:10249"
	n := newTestNode(t, "a", "b")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writeFile("other.yaml", serviceYAML("other", 11, 80))
	n.writePods("backend", "a", "b")
	run := func(args ...string) {
		t.Helper()
		n.program = n.start(nil, slices.Concat(n.runArgs(), args)...)
		n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	}
	total, byEndpoint := 0, map[string]int{}
	connect := func() {
		t.Helper()
		for _, addr := range agenttest.ServiceAddrs(10, 80) {
			for range 4 {
				answer, err := n.client.Connect(t.Context(), nettest.TCP, addr)
				if err != nil {
					t.Fatal(err)
				}
				total++
				byEndpoint[answer.Endpoint.String()]++
			}
		}
	}
	const labels = `namespace="default",port="tcp",protocol="TCP",service="backend"`
	check := func() {
		t.Helper()
		n.awaitMetric(metrics, fmt.Sprintf(`fairlead_service_connections_total{kind="ClusterIP",%s} %d`, labels, total))
		for endpoint, count := range byEndpoint {
			n.awaitMetric(metrics, fmt.Sprintf(`fairlead_endpoint_connections_total{endpoint=%q,%s} %d`, endpoint, labels, count))
		}
	}
	awaitWithout := func(text string) {
		t.Helper()
		agenttest.Eventually(t, func() error {
			status, body, err := get(t.Context(), n.Node, metrics, "/metrics")
			if err == nil && (status != http.StatusOK || strings.Contains(body, text)) {
				err = fmt.Errorf("status %d, body with %q", status, text)
			}
			return err
		})
	}

	run("--service-metrics=default/backend")
	top := n.start(nil, "top", "backend", "--endpoints", "--interval=100ms", "-o", "json")
	agenttest.Eventually(t, func() error {
		if !strings.Contains(top.log.String(), "\n") {
			return fmt.Errorf("top has printed nothing: %q", top.log.String())
		}
		return nil
	})
	connect()
	check()
	topTotal := fmt.Sprintf(`"connections":%d,"endpoints"`, total)
	agenttest.Eventually(t, func() error {
		if !strings.Contains(top.log.String(), topTotal) {
			return fmt.Errorf("top prints no %s: %s", topTotal, top.log.String())
		}
		return nil
	})
	n.removeFile("pod-a.yaml")
	for _, addr := range n.pods["a"].Addrs() {
		awaitWithout(n.hostPort(addr, podPort))
		delete(byEndpoint, n.hostPort(addr, podPort))
	}
	connect()
	check()

	n.stop()
	run("--service-metrics=default/*")
	check()
	// TCP and UDP, IPv4 and IPv6, of two Services; the first one has an endpoint.
	n.awaitMetric(metrics, "fairlead_service_counters 12")
	n.awaitMetric(metrics, "fairlead_service_counters_limited 0")
	n.removeFile("backend.yaml")
	awaitWithout(`service="backend"`)

	n.stop()
	run()
	awaitWithout("fairlead_service_connections_total")
	agenttest.Eventually(t, func() error {
		if tables := n.nft("list", "tables"); strings.Contains(tables, servicecounters.TableName) {
			return fmt.Errorf("the counters remain: %s", tables)
		}
		return nil
	})
}
