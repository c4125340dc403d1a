package main

import (
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

var updateGet = flag.Bool("update", false, "update the golden outputs in testdata")

// getManifests are Services with each property that `fairlead get` shows, and with endpoints.
const getManifests = `apiVersion: v1
kind: Service
metadata: {name: web, labels: {tier: front}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:10:96::a"]
  ipFamilyPolicy: RequireDualStack
  externalTrafficPolicy: Local
  loadBalancerSourceRanges: [192.0.2.0/24, 198.51.100.0/24, 203.0.113.0/28]
  sessionAffinity: ClientIP
  externalIPs: [198.51.100.7]
  selector: {app: web}
  ports: [{name: http, port: 80, nodePort: 30080, targetPort: web}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.3}]}}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, labels: {tier: back}}
spec:
  clusterIP: 10.96.0.20
  selector: {app: cart}
  ports: [{port: 9000, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: api, labels: {tier: back}}
spec:
  clusterIP: 10.96.0.30
  selector: {app: api}
  ports: [{port: 443, targetPort: web}]
`

// openConnection opens a connection from the client to a Service, which stays open until the test ends.
func (n *testNode) openConnection(last byte, port uint16) {
	n.t.Helper()
	var conn net.Conn
	agenttest.Eventually(n.t, func() (err error) {
		conn, err = n.client.Dial(n.t.Context(), "tcp", agenttest.ServiceAddrs(last, port)[0])
		return err
	})
	n.t.Cleanup(func() { _ = conn.Close() }) // after the test, the error does not matter
}

// wantGolden compares an output with a file in testdata/get.
func wantGolden(t *testing.T, name, got string) {
	t.Helper()
	golden := filepath.Join("testdata", "get", name+".txt")
	if *updateGet {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil { //nolint:gosec // part of the repository
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
}

// TestGet compares outputs of `fairlead get` with golden files. The kernel holds three Services and a
// connection to a removed endpoint, and Fairlead has exited.
func TestGet(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a", "b", "c")
	n.writeFile("services.yaml", getManifests)
	n.writePods("api", "a")
	n.writePods("web", "b")
	n.run()
	n.openConnection(30, 443)
	n.writePods("web", "a")
	n.writePods("api", "c")
	n.awaitTCP(agenttest.ServiceAddrs(30, 443)[:1], "c")
	n.stop()
	for _, test := range []struct {
		name string
		args []string
	}{
		{"services", []string{"services"}},
		{"services-all", []string{"svc", "-A"}},
		{"services-wide", []string{"service", "-A", "-o", "wide"}},
		{"services-name", []string{"services", "-A", "-o", "name"}},
		{"services-json", []string{"services", "api", "-o", "json"}},
		{"services-yaml", []string{"services", "-n", "shop", "-o", "yaml"}},
		{"services-jsonpath", []string{"services", "-A", "-o", `jsonpath={range .items[*]}{.metadata.name}{"\t"}{.frontends[0].address}{"\n"}{end}`}},
		{"services-port-name", []string{"services", "web:http", "--no-headers"}},
		{"services-frontend", []string{"services", "10.96.0.20"}},
		{"services-node-port", []string{"services", "192.0.2.1:30080"}},
		{"services-port", []string{"services", "9000"}},
		{"services-endpoint", []string{"services", n.pods["c"].IPv4.String()}},
		{"services-labels", []string{"services", "-A", "-l", "tier=back", "--manifests=" + n.folder, "--service-cidr=10.96.0.0/16,fd00:10:96::/112"}},
		{"endpoints", []string{"endpoints", "-A"}},
		{"endpoints-wide", []string{"ep", "-o", "wide"}},
		{"endpoints-json", []string{"endpoints", "api", "-o", "json"}},
		{"endpoints-address", []string{"endpoints", n.pods["a"].IPv4.String()}},
		{"empty", []string{"services", "-n", "empty"}},
		{"unknown-name", []string{"services", "wbe"}},
		{"unknown-namespace", []string{"services", "cart"}},
		{"unknown-address", []string{"services", "10.96.0.99"}},
		{"unknown-port", []string{"services", "1234"}},
		{"invalid-port", []string{"services", "70000"}},
		{"invalid-format", []string{"services", "-o", "xml"}},
		{"invalid-selector", []string{"services", "-l", "a=b=c", "--manifests=" + n.folder, "--service-cidr=10.96.0.0/16,fd00:10:96::/112"}},
		{"labels-without-settings", []string{"services", "-l", "tier=back"}},
		{"other-mode", []string{"services", "--mode=ipvs"}},
		{"unknown-mode", []string{"services", "--mode=iptables"}},
		{"counters", []string{"counters"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			code, out := n.runOnce(nil, append([]string{"get"}, test.args...)...)
			wantGolden(t, test.name, fmt.Sprintf("%s\nexit code %d\n", out, code))
		})
	}
}

// TestGetErrors checks the errors of a node on which nothing is programmed, and of a process without
// privileges.
func TestGetErrors(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	if code, out := n.runOnce(nil, "get", "services"); code != 1 || !strings.Contains(out, "has programmed nothing") {
		t.Errorf("nothing programmed: exit code %d, output %q", code, out)
	}
	code, out := n.runOnce(asNobody(), "get", "services")
	if code != 1 || !strings.Contains(out, "CAP_NET_ADMIN") || !strings.Contains(out, "kubectl -n kube-system exec ds/fairlead") {
		t.Errorf("without privileges: exit code %d, output %q", code, out)
	}
}

// TestGetWatch checks that --watch prints an added and a deleted Service.
func TestGetWatch(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("one.yaml", serviceYAML("one", 1, 80))
	n.writePods("one", "a")
	n.run()
	watch := n.start(nil, "get", "services", "--watch", "--output-watch-events", "--watch-interval=20ms")
	await := func(event, name string) {
		t.Helper()
		agenttest.Eventually(t, func() error {
			for line := range strings.Lines(watch.log.String()) {
				if fields := strings.Fields(line); len(fields) > 1 && fields[0] == event && fields[1] == name {
					return nil
				}
			}
			return fmt.Errorf("no %s %s in\n%s", event, name, watch.log.String())
		})
	}
	await("ADDED", "one:tcp")
	n.writeFile("two.yaml", serviceYAML("two", 2, 80))
	await("ADDED", "two:udp")
	n.removeFile("pod-a.yaml")
	await("MODIFIED", "one:tcp")
	n.removeFile("two.yaml")
	await("DELETED", "two:udp")
	if err := watch.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := watch.wait(); code != 0 {
		t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
}

// TestCompletionOfServices checks that the shell completes the names of Services from the kernel.
func TestCompletionOfServices(t *testing.T) {
	t.Parallel()
	n := newTestNode(t)
	n.writeFile("services.yaml", getManifests)
	n.run()
	for _, test := range []struct {
		args, want string
	}{
		{"get services ", "api\nweb\nshop/cart\n"},
		{"get services w", "web\n"},
		{"get services default/", "default/api\ndefault/web\n"},
		{"get services web ", "api\nshop/cart\n"},
		{"get services -n shop ", "default/api\ndefault/web\ncart\n"},
		{"get endpoints shop/", "shop/cart\n"},
		{"get services -n ", "default\nshop\n"},
		{"get services --mode ", "nft\nipvs\n"},
		{"get ", "counters\tShow the counters of refused packets\n"},
	} {
		words := append([]string{"__complete"}, strings.Split(test.args, " ")...)
		if code, out := n.runOnce(nil, words...); code != 0 || !strings.HasPrefix(out, test.want) {
			t.Errorf("%q: exit code %d, output\n%s\nwant\n%s", test.args, code, out, test.want)
		}
	}
}
