package apiserver_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.io/fairlead/source/apiserver"
)

// TestConfigErrors checks that an error names the file or URL and the fix, and no flag,
// because the caller may get the values from elsewhere.
func TestConfigErrors(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad")
	if err := os.WriteFile(bad, []byte("apiVersion: v1\nkind: Config\ncurrent-context: none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, kubeconfig, master, want string }{
		{"no file and not in a pod", "", "", "no kubeconfig is given and this is not a pod of a cluster: give the path of a kubeconfig file"},
		{"missing file", filepath.Join(dir, "none"), "", "kubeconfig " + filepath.Join(dir, "none") + ": "},
		{"unknown context", bad, "", "kubeconfig " + bad + ": "},
		{"invalid master URL", "", "http://a b", "API server http://a b: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config, err := apiserver.Config(tt.kubeconfig, tt.master)
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), "--") {
				t.Errorf("got %v, error %v, want error prefix %q and no flag", config, err, tt.want)
			}
		})
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	if _, err := apiserver.Config("", ""); err == nil || !strings.Contains(err.Error(), "automountServiceAccountToken") {
		t.Errorf("in a pod without a token: error %v", err)
	}
}

// TestConfig checks the server URL from the kubeconfig file and the master, the content
// type and the user agent.
func TestConfig(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := cluster.Kubeconfig(path, "admin", "system:masters"); err != nil {
		t.Fatal(err)
	}
	config, err := apiserver.Config(path, "https://192.0.2.1:6443")
	if err != nil {
		t.Fatal(err)
	}
	if config.Host != "https://192.0.2.1:6443" || config.CAData == nil && config.CAFile == "" {
		t.Errorf("Host %s, want the master's, and the file's certificates", config.Host)
	}
	if config, err = apiserver.Config(path, ""); err != nil {
		t.Fatal(err)
	}
	f := injectFaults(config)
	agents, accepts := make(chan string, 100), make(chan string, 100)
	f.setRule(func(r *http.Request) (*http.Response, error) {
		agents <- r.UserAgent()
		accepts <- r.Header.Get("Accept")
		return nil, nil
	})
	client := adminClient(t)
	ns := createNamespace(t, client)
	must[*corev1.Service](t)(client.CoreV1().Services(ns).Create(t.Context(), newService("web"), metav1.CreateOptions{}))
	r := startSource(t, ns, apiserver.Options{Config: config, Version: "1.2.3"})
	r.waitFor(t, "first Delta", hasFirstDelta)
	if agent, accept := <-agents, <-accepts; agent != "fairlead/1.2.3" || !strings.HasPrefix(accept, "application/vnd.kubernetes.protobuf") {
		t.Errorf("User-Agent %q, Accept %q", agent, accept)
	}
}
