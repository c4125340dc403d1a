package zpages_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"fairlead.io/fairlead/internal/zpages"
)

// TestPages compares responses with the ones of kube-proxy v1.37.2.
func TestPages(t *testing.T) {
	t.Parallel()
	var checks int
	var verbosity uint64
	mux := http.NewServeMux()
	zpages.Install(mux, zpages.Options{
		Component: "fairlead", Version: "v1", KubernetesVersion: "v1.37.2", Flags: map[string]string{"v": "0", "config": ""},
		Config: func() (map[string]json.RawMessage, error) {
			return map[string]json.RawMessage{"kubeproxy.config.k8s.io": json.RawMessage(`{"mode":"nftables"}`)}, nil
		},
		SetVerbosity: func(v uint64) { verbosity = v }, OnHealthCheck: func(string) { checks++ },
	}, "/metrics", "/proxyMode")
	const (
		statusz = "g=config.k8s.io;as=Statusz"
		flagz   = "g=config.k8s.io;as=Flagz"
		text    = "text/plain; charset=utf-8"
	)
	for _, tc := range []struct {
		method, path, accept, body string
		status                     int
		contentType, contains      string
	}{
		{"GET", "/healthz", "", "", 200, text, "ok"},
		{"GET", "/healthz/ping", "", "", 200, text, "ok"},
		{"GET", "/healthz?verbose", "", "", 200, text, "[+]ping ok\nhealthz check passed\n"},
		{"GET", "/healthz?verbose&exclude=ping", "", "", 200, text, "[+]ping excluded: ok\nhealthz check passed\n"},
		{"GET", "/healthz/other", "", "", 404, text, ""},
		{"GET", "/configz", "", "", 200, "application/json", `{"kubeproxy.config.k8s.io":{"mode":"nftables"}}`},
		{"GET", "/statusz", "", "", 200, text, "Paths: /configz /flagz /healthz /metrics /proxyMode\n"},
		{"GET", "/statusz", "*/*", "", 200, text, "Emulation version: 1.37\n"},
		{"GET", "/statusz", "application/json", "", 406, "application/json", `"reason":"NotAcceptable"`},
		{"GET", "/statusz", "application/json;v=v1;" + statusz, "", 406, "application/json", ""},
		{"GET", "/statusz", "application/json;v=v1beta1;" + flagz, "", 406, "application/json", ""},
		{
			"GET", "/statusz", "application/json;v=v1beta1;" + statusz, "", 200, "application/json;g=config.k8s.io;v=v1beta1;as=Statusz",
			`"emulationVersion":"1.37"`,
		},
		{
			"GET", "/statusz", "application/yaml;v=v1beta1;" + statusz, "", 200, "application/yaml;g=config.k8s.io;v=v1beta1;as=Statusz",
			"apiVersion: config.k8s.io/v1beta1\n",
		},
		{"GET", "/flagz", "text/html,*/*;q=0.8", "", 200, text, "config=\nv=0\n"},
		{
			"GET", "/flagz", "text/plain;q=0.5, application/json;v=v1beta1;" + flagz, "", 200, "application/json;g=config.k8s.io;v=v1beta1;as=Flagz",
			`"flags":{"config":"","v":"0"}`,
		},
		{"GET", "/debug/flags/", "", "", 200, "text/html; charset=utf-8", "<tr>v<br>"},
		{"GET", "/debug/flags/v", "", "", 406, "text/plain", "unsupported http method\n"},
		{"PUT", "/debug/flags/v", "", "x", 400, "text/plain", "invalid syntax\n"},
		{"PUT", "/debug/flags/v", "", "4", 200, "text/plain", "successfully set klog.logging.verbosity to 4\n"},
	} {
		request := httptest.NewRequestWithContext(t.Context(), tc.method, tc.path, strings.NewReader(tc.body))
		if tc.accept != "" {
			request.Header.Set("Accept", tc.accept)
		}
		response := httptest.NewRecorder()
		mux.ServeHTTP(response, request)
		if got := response.Header().Get("Content-Type"); response.Code != tc.status || got != tc.contentType || !strings.Contains(response.Body.String(), tc.contains) {
			t.Errorf("%s %s (Accept: %s): status %d, %s, body:\n%s\nwant %d, %s, %q", tc.method, tc.path, tc.accept,
				response.Code, got, response.Body, tc.status, tc.contentType, tc.contains)
		}
	}
	if checks != 3 || verbosity != 4 {
		t.Errorf("%d health checks, verbosity %d; want 3 and 4", checks, verbosity)
	}
}
