package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/agent/agenttest"
)

// readReport returns the files of a report by name.
func readReport(t *testing.T, name string) map[string]string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	archive := tar.NewReader(unzipped)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		files[path.Base(header.Name)] = string(content)
	}
}

// TestReport checks the content of a report about an agent that has a kubeconfig with credentials,
// and that no file contains them.
func TestReport(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	kubeconfig := n.serveAPI("a")
	secrets := []string{"planted-token", "cGxhbnRlZC1rZXk", "planted-password", "planted-variable", "planted-user"}
	text := strings.Replace(readFile(t, kubeconfig), "context: {cluster: test}", "context: {cluster: test, user: test}", 1) + `users:
- {name: test, user: {token: planted-token}}
- {name: other, user: {client-key-data: cGxhbnRlZC1rZXk=, client-certificate-data: cGxhbnRlZC1rZXk=, password: planted-password, username: planted-user}}
`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.environment = []string{"CREDENTIAL=planted-variable", "GOMEMLIMIT=300MiB"}
	n.program = n.start(nil, "run", "--mode=nft", "--kubeconfig="+kubeconfig, "--master=http://admin:planted-password@"+apiServerAddress,
		"--hostname-override=node-a", "--log-format=json", "--conntrack-max-per-core=0")
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	n.awaitGet(n.Node, "127.0.0.1:10265", "/api/status", 200, `"total": 1`)

	name := filepath.Join(t.TempDir(), "report.tar.gz")
	code, output := n.runOnce(nil, "report", "--output="+name)
	files := readReport(t, name)
	if code != 0 {
		t.Errorf("exit code %d, output:\n%s", code, output)
	}
	for file, want := range map[string]string{
		"versions.json":         `"kernel": "`,
		"modules.txt":           "",
		"check.json":            `"check": "mode-nft"`,
		"configuration.json":    `"GOMEMLIMIT": "300MiB"`,
		"kernel-services.json":  `"service":"default/backend:tcp","frontend":"10.96.0.10:80/TCP","kind":"ClusterIP"`,
		"desired-services.json": `"service":"default/backend:tcp IPv4"`,
		"ruleset.json":          `"name": "fairlead"`,
		"hooks.txt":             "chain ip fairlead nat-prerouting",
		"other-proxies.json":    "[]",
		"conntrack.json":        `"insertFailed"`,
		"sysctls.txt":           "net.ipv4.ip_forward = ",
		"interfaces.json":       `"name":"lo"`,
		"healthz.json":          `"healthy":true`,
		"metrics.txt":           "fairlead_build_info",
		"configz.json":          `"kubeproxy.config.k8s.io"`,
		"statusz.txt":           "fairlead statusz",
		"status.json":           `"mode": "nft"`,
		"changes.json":          "[",
		"events.json":           `"kind": "start"`,
		"refused-packets.json":  `"reason": "no-endpoints"`,
		"report.json":           `"name": "metrics.txt"`,
	} {
		if content, ok := files[file]; !ok || !strings.Contains(content, want) {
			t.Errorf("%s does not contain %q:\n%.1000s", file, want, content)
		}
	}
	for file, content := range files {
		for _, secret := range append(secrets, "Authorization") {
			if strings.Contains(content, secret) {
				t.Errorf("%s contains %s", file, secret)
			}
		}
	}
	if strings.Contains(output, "planted") {
		t.Errorf("the output contains a credential:\n%s", output)
	}
}

// TestReportWithoutAgent checks that a report about the tables that an agent has left is complete
// except for the parts that need the agent, which it names.
func TestReportWithoutAgent(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	n.run()
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	n.stop()
	name := filepath.Join(t.TempDir(), "report.tar.gz")
	code, output := n.runOnce(nil, "report", "-o", name)
	files := readReport(t, name)
	if want := "status.json: no Fairlead runs on this node"; code != 1 || !strings.Contains(output, want) {
		t.Errorf("exit code %d, output:\n%s\nwant 1 and %q", code, output, want)
	}
	if want := `"frontend":"10.96.0.10:80/UDP"`; !strings.Contains(files["kernel-services.json"], want) {
		t.Errorf("kernel-services.json does not contain %s:\n%s", want, files["kernel-services.json"])
	}
	var summary struct {
		Files []struct{ Name, Error string }
	}
	if err := json.Unmarshal([]byte(files["report.json"]), &summary); err != nil {
		t.Fatal(err)
	}
	var missing []string
	for _, f := range summary.Files {
		if f.Error != "" {
			missing = append(missing, f.Name)
		}
	}
	if got, want := strings.Join(missing, " "), "configuration.json desired-services.json status.json"; got != want {
		t.Errorf("missing files %s, want %s", got, want)
	}
}

// TestStatusAddressTaken checks that an agent whose status address another process has serves the
// node, and takes the address over, even with --bind-address-hard-fail.
func TestStatusAddressTaken(t *testing.T) {
	t.Parallel()
	n := newTestNode(t, "a")
	n.writeFile("backend.yaml", serviceYAML("backend", 10, 80))
	n.writePods("backend", "a")
	const address = "127.0.0.1:10265"
	other, err := n.Node.Listen(t.Context(), "tcp", netip.MustParseAddrPort(address))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	n.program = n.start(nil, append(n.runArgs(), "--bind-address-hard-fail")...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "cannot serve HTTP, will retry" })
	n.awaitAnswers(agenttest.ServiceAddrs(10, 80), "a")
	n.awaitMetric("127.0.0.1:10249", `fairlead_server_listening{server="status"} 0`)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	n.awaitGet(n.Node, address, "/api/services", 200, `"10.96.0.10:80/TCP"`)
	n.awaitGet(n.Node, address, "/", 200, "<h2 id=\"services-title\">Services</h2>")
	n.stop()
	n.program = n.start(nil, append(n.runArgs(), "--status-address=")...)
	n.program.awaitLog(func(r record) bool { return r.Msg == "committed" && r.Reason == "start" })
	n.awaitClosed(n.hostPort(n.Node.IPv4, 10265))
}
