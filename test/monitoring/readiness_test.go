package monitoring_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"testing"
)

// awaitStatus waits for a response of the healthz server with this status, and returns it.
func (p *proxy) awaitStatus(path string, want int) response {
	p.t.Helper()
	var got response
	p.eventually(func() (err error) {
		got, err = p.request(http.MethodGet, healthzAddress, path, "", "")
		if err == nil && got.status != want {
			err = fmt.Errorf("%s: status %d, want %d; body:\n%s", path, got.status, want, got.body)
		}
		return err
	})
	return got
}

// TestReadinessBesideKubeProxy checks that the DaemonSet's readiness probe fails while kube-proxy
// holds the port of /healthz, and that Fairlead takes the port over when kube-proxy ends.
func TestReadinessBesideKubeProxy(t *testing.T) {
	other := kubeProxy(t)
	other.awaitProgrammed()
	const ownMetrics = "127.0.0.1:20249"
	p := startBeside(other, fairleadBinary, "run", "--mode=nft", "--metrics-bind-address="+ownMetrics)
	awaitMetric := func(want string) {
		t.Helper()
		p.eventually(func() error {
			got, err := p.request(http.MethodGet, ownMetrics, "/metrics", "", "")
			if err == nil && !strings.Contains(got.body, "\n"+want+"\n") {
				err = fmt.Errorf("the metrics lack %q", want)
			}
			return err
		})
	}
	awaitMetric(`fairlead_server_listening{server="healthz"} 0`)
	awaitMetric(`fairlead_server_listening{server="metrics"} 1`)
	awaitMetric("fairlead_services 1")
	// kube-proxy answers the paths that it has.
	p.awaitStatus("/livez", http.StatusOK)
	p.awaitStatus("/healthz", http.StatusOK)
	if got := p.awaitStatus("/readyz", http.StatusNotFound); got.header.Get("Service-Proxy") != "" {
		t.Errorf("header %v, want kube-proxy's", got.header)
	}
	_ = other.cmd.Process.Kill()
	<-other.done
	if got := p.awaitStatus("/readyz", http.StatusOK); got.header.Get("Service-Proxy") != "fairlead" {
		t.Errorf("header %v, want Service-Proxy: fairlead", got.header)
	}
	awaitMetric(`fairlead_server_listening{server="healthz"} 1`)
}

// TestCheckBesideKubeProxy runs fairlead check beside the real kube-proxy in each mode that works in
// a network namespace.
func TestCheckBesideKubeProxy(t *testing.T) {
	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) {
			other := kubeProxy(t, "--proxy-mode="+mode)
			other.awaitProgrammed()
			check := exec.CommandContext(t.Context(), fairleadBinary, "check", "-o", "json", "--hostname-override="+nodeName,
				"--kubeconfig="+writeKubeconfig(t, t.TempDir()))
			var out bytes.Buffer
			check.Stdout = &out
			if err := other.net.Node.Do(check.Start); err != nil {
				t.Fatal(err)
			}
			_ = check.Wait() // the API server of the test has no authorization, which is a failure
			var report struct {
				Findings []struct{ Check, Status, Message, Fix string }
			}
			if err := json.Unmarshal(out.Bytes(), &report); err != nil {
				t.Fatalf("%v: %s", err, &out)
			}
			for _, want := range []struct{ check, status, text string }{
				{"other-proxy", "warning", "kube-proxy's mode " + mode},
				{"healthz-port", "warning", "(kube-proxy) listens on 0.0.0.0:10256"},
				{"metrics-port", "warning", "(kube-proxy) listens on 127.0.0.1:10249"},
				{"mode-nft", "ok", ""},
				{"instance", "ok", "no Fairlead"},
				{"masquerading", "info", "no other program"},
			} {
				found := false
				for _, f := range report.Findings {
					found = found || f.Check == want.check && f.Status == want.status && strings.Contains(f.Message, want.text)
				}
				if !found {
					t.Errorf("no finding %v in:\n%s", want, &out)
				}
			}
		})
	}
}
