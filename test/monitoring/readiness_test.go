package monitoring_test

import (
	"fmt"
	"net/http"
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
