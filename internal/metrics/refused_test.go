package metrics_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
)

// What the kernel does not serve is asked for at each scrape, has kube-proxy's
// name as well where kube-proxy counts it, and is missing when it can't be read,
// without a loss of other metrics.
func TestRefusedPackets(t *testing.T) {
	t.Parallel()
	counts := []metrics.RefusedPackets{
		{Family: dataplane.IPv4, Reason: "rejected-no-endpoints", Packets: 3},
		{Family: dataplane.IPv6, Reason: "rejected-no-endpoints"},
		{Family: dataplane.IPv4, Reason: "rejected-localhost-udp", Localhost: dataplane.UDP, Packets: 4},
	}
	var failure error
	m := metrics.New(metrics.Options{Status: noStatus, RefusedPackets: func() ([]metrics.RefusedPackets, error) { return counts, failure }})
	check := func(step string, want map[string]string) {
		t.Helper()
		want["fairlead_services"] = "0"
		got := statusCollector(t, m, "fairlead_unserved", "kubeproxy_nftables_localhost", "fairlead_services")
		delete(got, `fairlead_services_failing{reason="error"}`)
		delete(got, `fairlead_services_failing{reason="unsupported"}`)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step, diff)
		}
	}
	check("at first", map[string]string{
		`fairlead_unserved_packets_total{ip_family="IPv4",reason="rejected-no-endpoints"}`:              "3",
		`fairlead_unserved_packets_total{ip_family="IPv6",reason="rejected-no-endpoints"}`:              "0",
		`fairlead_unserved_packets_total{ip_family="IPv4",reason="rejected-localhost-udp"}`:             "4",
		`kubeproxy_nftables_localhost_nodeport_rejected_packets_total{ip_family="IPv4",protocol="UDP"}`: "4",
	})
	failure = errors.New("no")
	check("unreadable", map[string]string{})
	failure, counts = nil, []metrics.RefusedPackets{{Family: dataplane.IPv4, Reason: "rejected-no-endpoints", Packets: 1}}
	check("in a new table", map[string]string{
		`fairlead_unserved_packets_total{ip_family="IPv4",reason="rejected-no-endpoints"}`: "1",
	})

	m = metrics.New(metrics.Options{Status: noStatus})
	check("not counted", map[string]string{})
}
