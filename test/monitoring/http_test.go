package monitoring_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// TestPaths compares the status and the content type of each path of the metrics server with the
// real kube-proxy's, and the body where it does not depend on the program.
func TestPaths(t *testing.T) {
	kube, fair := kubeProxy(t), fairlead(t)
	kube.awaitProgrammed()
	fair.awaitProgrammed()
	const statusz, flagz = "v=v1beta1;g=config.k8s.io;as=Statusz", "v=v1beta1;g=config.k8s.io;as=Flagz"
	for _, tc := range []struct {
		method, path, accept, body string
		compareBody                bool
	}{
		{http.MethodGet, "/healthz", "", "", true},
		{http.MethodPost, "/healthz", "", "", true},
		{http.MethodGet, "/healthz?verbose", "", "", true},
		{http.MethodGet, "/healthz?verbose&exclude=ping", "", "", true},
		{http.MethodGet, "/healthz/ping", "", "", true},
		{http.MethodGet, "/healthz/x", "", "", true},
		{http.MethodGet, "/livez", "", "", true},
		{http.MethodGet, "/", "", "", true},
		{http.MethodGet, "/proxyMode", "", "", true},
		{http.MethodGet, "/configz", "", "", true},
		{http.MethodPost, "/configz", "", "", true},
		{http.MethodGet, "/statusz", "", "", false},
		{http.MethodGet, "/statusz", "*/*", "", false},
		{http.MethodGet, "/statusz", "application/json", "", true},
		{http.MethodGet, "/statusz", "application/json;" + statusz, "", false},
		{http.MethodGet, "/statusz", "application/yaml;" + statusz, "", false},
		{http.MethodGet, "/statusz", "application/json;" + flagz, "", false},
		{http.MethodGet, "/flagz", "", "", false},
		{http.MethodGet, "/flagz", "application/json;" + flagz, "", false},
		{http.MethodGet, "/flagz/", "", "", true},
		{http.MethodGet, "/metrics/slis", "", "", false},
		{http.MethodDelete, "/metrics/slis", "", "", true},
		{http.MethodGet, "/debug/flags", "", "", true},
		{http.MethodGet, "/debug/flags/", "", "", true},
		{http.MethodGet, "/debug/flags/v", "", "", true},
		{http.MethodPut, "/debug/flags/v", "", "4", true},
		{http.MethodPut, "/debug/flags/v", "", "x", true},
		{http.MethodGet, "/debug/pprof/", "", "", false},
		{http.MethodGet, "/debug/pprof/nope", "", "", false},
	} {
		request := fmt.Sprintf("%s %s (Accept: %q)", tc.method, tc.path, tc.accept)
		want, err := kube.request(tc.method, metricsAddress, tc.path, tc.accept, tc.body)
		if err != nil {
			t.Fatalf("%s: kube-proxy: %v", request, err)
		}
		got, err := fair.request(tc.method, metricsAddress, tc.path, tc.accept, tc.body)
		if err != nil {
			t.Fatalf("%s: %v", request, err)
		}
		if g, w := got.header.Get("Content-Type"), want.header.Get("Content-Type"); got.status != want.status || g != w {
			t.Errorf("%s: status %d, %s, want %d, %s", request, got.status, g, want.status, w)
		}
		if g, w := fair.withoutPaths(got.body), kube.withoutPaths(want.body); tc.compareBody && g != w {
			t.Errorf("%s: body\n%s\nwant\n%s", request, g, w)
		}
		if strings.HasPrefix(tc.accept, "application/json;") && want.status == http.StatusOK {
			compareKeys(t, request, got.body, want.body)
		}
	}
}

// withoutPaths returns a body without the name of the program's folder and without space at its
// ends.
func (p *proxy) withoutPaths(body string) string {
	return strings.TrimSpace(strings.ReplaceAll(body, filepath.Dir(p.log), "FOLDER"))
}

// compareKeys checks that two JSON objects have the same keys.
func compareKeys(t *testing.T, request, got, want string) {
	t.Helper()
	var g, w map[string]any
	if err := json.Unmarshal([]byte(got), &g); err != nil {
		t.Fatalf("%s: %v", request, err)
	}
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		t.Fatalf("%s: kube-proxy: %v", request, err)
	}
	for key := range w {
		if _, ok := g[key]; !ok {
			t.Errorf("%s: the field %s is missing", request, key)
		}
	}
	for key := range g {
		if _, ok := w[key]; !ok {
			t.Errorf("%s: kube-proxy does not have the field %s", request, key)
		}
	}
}

// TestUnreachableAPIServer checks that /healthz and the metrics show an API server that has been
// unreachable since the start.
func TestUnreachableAPIServer(t *testing.T) {
	p := startProxy(t, true, fairleadBinary, "run", "--mode=nft")
	p.eventually(func() error {
		got, err := p.request(http.MethodGet, healthzAddress, "/healthz", "", "")
		if err == nil && (!strings.Contains(got.body, `"connected":false,"failures":["`) ||
			!strings.Contains(got.body, "services: unreachable")) {
			err = fmt.Errorf("status %d, body %s", got.status, got.body)
		}
		return err
	})
	for _, want := range []string{"fairlead_api_connected 0\n", "fairlead_api_last_response_timestamp_seconds 0\n"} {
		if body := p.get("/metrics"); !strings.Contains(body, want) {
			t.Errorf("the metrics lack %q", want)
		}
	}
	if !strings.Contains(p.get("/metrics"), `fairlead_api_synced{resource="services"} 0`) {
		t.Error("the services are synced")
	}
}
