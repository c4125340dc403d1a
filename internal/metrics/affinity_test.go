package metrics_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
)

func TestAffinityAndNodeSettings(t *testing.T) {
	t.Parallel()
	m := metrics.New(metrics.Options{Status: noStatus})
	m.AddAffinity(func() []metrics.Affinity {
		return []metrics.Affinity{{Family: dataplane.IPv6, Clients: 5, FullestMap: 4, Limit: 9, Full: 3, NetworkLimit: 2, Evicted: 1}}
	})
	m.AddNodeSettings(func() map[string]int { return map[string]int{"route_localnet": 2} })
	m.AddConntrackSettings(func() int { return 3 })
	want := map[string]string{
		"fairlead_conntrack_settings_failing":                                               "3",
		`fairlead_node_setting_problems{setting="route_localnet"}`:                          "2",
		`fairlead_session_affinity_clients{ip_family="IPv6"}`:                               "5",
		`fairlead_session_affinity_fullest_map_clients{ip_family="IPv6"}`:                   "4",
		`fairlead_session_affinity_map_limit_clients{ip_family="IPv6"}`:                     "9",
		`fairlead_session_affinity_not_remembered_total{ip_family="IPv6",reason="full"}`:    "3",
		`fairlead_session_affinity_not_remembered_total{ip_family="IPv6",reason="network"}`: "2",
		`fairlead_session_affinity_evictions_total{ip_family="IPv6"}`:                       "1",
	}
	if diff := cmp.Diff(want, statusCollector(t, m, "fairlead_session_affinity", "fairlead_node_setting", "fairlead_conntrack")); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}
