package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/relay"
)

// relayCollector collects the metrics of the relay for node ports on loopback addresses.
type relayCollector struct {
	stats func(dataplane.Family) relay.Stats

	listeners, failures, failing, open, limit, connections, halfClosed *prometheus.Desc
}

var _ prometheus.Collector = (*relayCollector)(nil)

func newRelayCollector(stats func(dataplane.Family) relay.Stats) *relayCollector {
	family := []string{"ip_family"}
	return &relayCollector{
		stats: stats,
		listeners: prometheus.NewDesc("kubeproxy_nftables_localhost_nodeport_listeners",
			"Node ports with a listener on a loopback address.", family, nil),
		failures: prometheus.NewDesc("kubeproxy_nftables_localhost_nodeport_listener_creation_failures_total",
			"Failed attempts to listen on a node port on a loopback address.", family, nil),
		failing: prometheus.NewDesc("fairlead_localhost_node_ports_failing",
			"Node ports without a listener on a loopback address because listening fails; see the log.", family, nil),
		open: prometheus.NewDesc("fairlead_localhost_node_port_connections",
			"Open connections to node ports on loopback addresses.", family, nil),
		limit: prometheus.NewDesc("fairlead_localhost_node_port_connections_limit",
			"Maximum number of open connections to node ports on loopback addresses, for both IP families together.", nil, nil),
		halfClosed: prometheus.NewDesc("fairlead_localhost_node_port_half_closed_total",
			"Connections to node ports on loopback addresses closed because one side had closed and no data was transferred for a minute.",
			family, nil),
		connections: prometheus.NewDesc("fairlead_localhost_node_port_connections_total",
			"Connections to node ports on loopback addresses by result: connected, unreachable (no endpoint answered), "+
				"limit (all connections in use), port_limit (the node port's share in use).", []string{"ip_family", "result"}, nil),
	}
}

// Describe implements [prometheus.Collector].
func (r *relayCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{r.listeners, r.failures, r.failing, r.open, r.limit, r.connections, r.halfClosed} {
		ch <- desc
	}
}

// Collect implements [prometheus.Collector].
func (r *relayCollector) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.MustNewConstMetric(r.limit, prometheus.GaugeValue, float64(r.stats(dataplane.IPv4).Limit))
	for _, f := range ipFamilies() {
		stats := r.stats(f)
		gauge := func(desc *prometheus.Desc, value int) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(value), f.String())
		}
		counter := func(desc *prometheus.Desc, value uint64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value), append([]string{f.String()}, labels...)...)
		}
		gauge(r.listeners, stats.Listeners)
		counter(r.failures, stats.ListenFailures)
		gauge(r.failing, stats.Failing)
		gauge(r.open, stats.Open)
		counter(r.connections, stats.Connected, "connected")
		counter(r.connections, stats.Unreachable, "unreachable")
		counter(r.connections, stats.RejectedByLimit, "limit")
		counter(r.connections, stats.RejectedByPortLimit, "port_limit")
		counter(r.halfClosed, stats.HalfClosed)
	}
}
