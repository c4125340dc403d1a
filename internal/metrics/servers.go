package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/internal/connlimit"
)

// serverCollector collects the connection metrics of the agent's servers.
type serverCollector struct {
	stats func() map[string]connlimit.Stats

	open, limit, displaced *prometheus.Desc
}

var _ prometheus.Collector = (*serverCollector)(nil)

func newServerCollector(stats func() map[string]connlimit.Stats) *serverCollector {
	server := []string{"server"}
	return &serverCollector{
		stats: stats,
		open:  prometheus.NewDesc("fairlead_server_connections", "Open connections of a server.", server, nil),
		limit: prometheus.NewDesc("fairlead_server_connections_limit", "Maximum number of open connections of a server.", server, nil),
		displaced: prometheus.NewDesc("fairlead_server_connections_displaced_total",
			"Connections that a server closed to make room for others, by reason: client_limit (too many of one client), "+
				"limit (too many of the server), descriptors (too many open files in the process).", []string{"server", "reason"}, nil),
	}
}

// Describe implements [prometheus.Collector].
func (s *serverCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{s.open, s.limit, s.displaced} {
		ch <- desc
	}
}

// Collect implements [prometheus.Collector].
func (s *serverCollector) Collect(ch chan<- prometheus.Metric) {
	for name, stats := range s.stats() {
		ch <- prometheus.MustNewConstMetric(s.open, prometheus.GaugeValue, float64(stats.Open), name)
		ch <- prometheus.MustNewConstMetric(s.limit, prometheus.GaugeValue, float64(stats.Limit), name)
		for reason, count := range map[string]uint64{
			"client_limit": stats.DisplacedByClient, "limit": stats.DisplacedByLimit, "descriptors": stats.DisplacedByDescriptors,
		} {
			ch <- prometheus.MustNewConstMetric(s.displaced, prometheus.CounterValue, float64(count), name, reason)
		}
	}
}
