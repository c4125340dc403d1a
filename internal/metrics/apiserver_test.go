package metrics_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/internal/metrics"
)

// TestAPIResources checks the metrics of API resources.
func TestAPIResources(t *testing.T) {
	t.Parallel()
	lists := func() []metrics.APIResource {
		return []metrics.APIResource{
			{Resource: "services", Synced: true, HeldRemovals: 20, Recoveries: map[string]uint64{"silent": 1, "backwards": 0}},
			{Resource: "servicecidrs", Failures: []metrics.APIFailures{{Verb: "list", Code: "500", Count: 3}}},
		}
	}
	want := map[string]string{
		`fairlead_api_synced{resource="services"}`:                                            "1",
		`fairlead_api_synced{resource="servicecidrs"}`:                                        "0",
		`fairlead_api_held_removals{resource="services"}`:                                     "20",
		`fairlead_api_held_removals{resource="servicecidrs"}`:                                 "0",
		`fairlead_api_request_failures_total{code="500",resource="servicecidrs",verb="list"}`: "3",
		`fairlead_api_recoveries_total{reason="silent",resource="services"}`:                  "1",
		`fairlead_api_recoveries_total{reason="backwards",resource="services"}`:               "0",
	}
	m := metrics.New(metrics.Options{Status: noStatus, APIResources: lists})
	if diff := cmp.Diff(want, statusCollector(t, m, "fairlead_api")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
