package metrics_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
)

// TestRefusedPackets checks that each scrape reads the counters, that kube-proxy's metric is
// exported as well, and that unreadable counters do not affect other metrics.
func TestRefusedPackets(t *testing.T) {
	t.Parallel()
	counts := []metrics.RefusedPackets{
		{Family: dataplane.IPv4, Verdict: metrics.Reject, Reason: "no-endpoints", Packets: 3},
		{Family: dataplane.IPv6, Verdict: metrics.Drop, Reason: "no-endpoints"},
		{Family: dataplane.IPv4, Verdict: metrics.Reject, Reason: "localhost-udp", Localhost: dataplane.UDP, Packets: 4},
	}
	var failure error
	m := metrics.New(metrics.Options{Status: noStatus, RefusedPackets: func() ([]metrics.RefusedPackets, error) { return counts, failure }})
	check := func(step string, want map[string]string) {
		t.Helper()
		want["fairlead_services"] = "0"
		got := statusCollector(t, m, "fairlead_refused", "kubeproxy_nftables_localhost", "fairlead_services")
		delete(got, `fairlead_services_failing{reason="error"}`)
		delete(got, `fairlead_services_failing{reason="unsupported"}`)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step, diff)
		}
	}
	check("first scrape", map[string]string{
		`fairlead_refused_packets_total{ip_family="IPv4",reason="no-endpoints",verdict="reject"}`:       "3",
		`fairlead_refused_packets_total{ip_family="IPv6",reason="no-endpoints",verdict="drop"}`:         "0",
		`fairlead_refused_packets_total{ip_family="IPv4",reason="localhost-udp",verdict="reject"}`:      "4",
		`kubeproxy_nftables_localhost_nodeport_rejected_packets_total{ip_family="IPv4",protocol="UDP"}`: "4",
	})
	failure = errors.New("no")
	check("unreadable", map[string]string{})
	failure, counts = nil, []metrics.RefusedPackets{{Family: dataplane.IPv4, Verdict: metrics.Reject, Reason: "no-endpoints", Packets: 1}}
	check("rebuilt table", map[string]string{
		`fairlead_refused_packets_total{ip_family="IPv4",reason="no-endpoints",verdict="reject"}`: "1",
	})

	m = metrics.New(metrics.Options{Status: noStatus})
	check("not counted", map[string]string{})
}
