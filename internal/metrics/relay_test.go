package metrics_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/relay"
)

// TestRelay checks the metrics of the relay, and that a node without a relay has no such metrics.
func TestRelay(t *testing.T) {
	t.Parallel()
	stats := func(f dataplane.Family) relay.Stats {
		if f == dataplane.IPv6 {
			return relay.Stats{}
		}
		return relay.Stats{
			Listeners: 1, Failing: 2, ListenFailures: 3, Open: 4, Limit: 10, Connected: 5, Unreachable: 6, RejectedByLimit: 7,
			RejectedByPortLimit: 8, HalfClosed: 9,
		}
	}
	prefixes := []string{"kubeproxy_nftables_localhost", "fairlead_localhost"}
	want := map[string]string{
		`kubeproxy_nftables_localhost_nodeport_listeners{ip_family="IPv4"}`:                        "1",
		`kubeproxy_nftables_localhost_nodeport_listeners{ip_family="IPv6"}`:                        "0",
		`kubeproxy_nftables_localhost_nodeport_listener_creation_failures_total{ip_family="IPv4"}`: "3",
		`kubeproxy_nftables_localhost_nodeport_listener_creation_failures_total{ip_family="IPv6"}`: "0",
		`fairlead_localhost_node_ports_failing{ip_family="IPv4"}`:                                  "2",
		`fairlead_localhost_node_ports_failing{ip_family="IPv6"}`:                                  "0",
		`fairlead_localhost_node_port_connections{ip_family="IPv4"}`:                               "4",
		`fairlead_localhost_node_port_connections{ip_family="IPv6"}`:                               "0",
		`fairlead_localhost_node_port_connections_total{ip_family="IPv4",result="connected"}`:      "5",
		`fairlead_localhost_node_port_connections_total{ip_family="IPv4",result="unreachable"}`:    "6",
		`fairlead_localhost_node_port_connections_total{ip_family="IPv4",result="limit"}`:          "7",
		`fairlead_localhost_node_port_connections_total{ip_family="IPv4",result="port_limit"}`:     "8",
		`fairlead_localhost_node_port_connections_total{ip_family="IPv6",result="port_limit"}`:     "0",
		`fairlead_localhost_node_port_half_closed_total{ip_family="IPv4"}`:                         "9",
		`fairlead_localhost_node_port_half_closed_total{ip_family="IPv6"}`:                         "0",
		`fairlead_localhost_node_port_connections_limit`:                                           "10",
		`fairlead_localhost_node_port_connections_total{ip_family="IPv6",result="connected"}`:      "0",
		`fairlead_localhost_node_port_connections_total{ip_family="IPv6",result="unreachable"}`:    "0",
		`fairlead_localhost_node_port_connections_total{ip_family="IPv6",result="limit"}`:          "0",
	}
	if diff := cmp.Diff(want, statusCollector(t, metrics.New(metrics.Options{Status: noStatus, RelayStats: stats}), prefixes...)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got := statusCollector(t, metrics.New(metrics.Options{Status: noStatus}), prefixes...); len(got) > 0 {
		t.Errorf("without a relay: %v", got)
	}
}
