package agent

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/kube"
)

// TestBackendWithRequiredFieldsOnly checks that the agent works with a backend that sets only the
// required fields.
func TestBackendWithRequiredFieldsOnly(t *testing.T) {
	t.Parallel()
	c, _, err := config.Load(config.Flags{"manifests": t.TempDir(), "hostname-override": "node"})
	if err != nil {
		t.Fatal(err)
	}
	c.Mode, c.Fields = "third", nil
	third := backend.Backend{
		Name:    c.Mode,
		Open:    func(backend.Options) (dataplane.Dataplane, error) { return fake.New(fake.Options{}), nil },
		Cleanup: func(*slog.Logger) error { return nil },
	}
	a, err := New(Options{
		Config: c, Backend: third, Events: NoEvents{}, Logger: slog.New(slog.DiscardHandler), LogLevel: &slog.LevelVar{},
	})
	if err != nil {
		t.Fatal(err)
	}
	if a.counters != nil || a.conntrack != nil || a.affinity != nil {
		t.Errorf("counters %v, conntrack %v, affinity limiter %v, want none", a.counters, a.conntrack, a.affinity)
	}
	if err := third.Prepare(t.Context(), backend.Options{Logger: a.log}); err != nil {
		t.Errorf("--init-only: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.pipeline.Syncer.Run(ctx) }()
	a.dispatcher.deliver(kube.Delta{})
	select {
	case <-a.progress.programmed:
	case <-t.Context().Done():
	}
	handler := a.metricsHandler()
	for path, want := range map[string]string{"/proxyMode": "third", "/metrics": `fairlead_commits_total{kind="replace",reason="start",result="success"} 1`} {
		response := httptest.NewRecorder()
		handler.ServeHTTP(response, httptest.NewRequestWithContext(ctx, http.MethodGet, path, nil))
		if !strings.Contains(response.Body.String(), want) {
			t.Errorf("%s: response without %q", path, want)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	a.close(t.Context())
}
