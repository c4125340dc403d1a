package metrics_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/connlimit"
	"fairlead.io/fairlead/internal/metrics"
)

func TestServers(t *testing.T) {
	t.Parallel()
	stats := func() map[string]connlimit.Stats {
		return map[string]connlimit.Stats{
			"healthz": {Open: 1, Limit: 2, DisplacedByClient: 3, DisplacedByLimit: 4, DisplacedByDescriptors: 5},
		}
	}
	want := map[string]string{
		`fairlead_server_connections{server="healthz"}`:                                       "1",
		`fairlead_server_connections_limit{server="healthz"}`:                                 "2",
		`fairlead_server_connections_displaced_total{reason="client_limit",server="healthz"}`: "3",
		`fairlead_server_connections_displaced_total{reason="limit",server="healthz"}`:        "4",
		`fairlead_server_connections_displaced_total{reason="descriptors",server="healthz"}`:  "5",
	}
	got := statusCollector(t, metrics.New(metrics.Options{Status: noStatus, ServerStats: stats}), "fairlead_server_")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
