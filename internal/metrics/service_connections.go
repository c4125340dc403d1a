package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/internal/servicecounters"
)

// serviceConnectionsCollector collects the connections of the Services of --service-metrics.
type serviceConnectionsCollector struct {
	read func() (servicecounters.Counts, error)

	services, endpoints, counters, limited *prometheus.Desc
}

var _ prometheus.Collector = (*serviceConnectionsCollector)(nil)

// AddServiceConnections adds the metrics of connections by Service and endpoint. Metrics calls read on
// each scrape; it must not block for long.
func (m *Metrics) AddServiceConnections(read func() (servicecounters.Counts, error)) {
	service := []string{"namespace", "service", "port", "protocol"}
	m.registry.MustRegister(&serviceConnectionsCollector{
		read: read,
		services: prometheus.NewDesc("fairlead_service_connections_total",
			"New connections from or through this node to the Services of --service-metrics, by kind of address: TCP and SCTP connections, and UDP flows, "+
				"whose first packet went to an endpoint.", append(service[:4:4], "kind"), nil),
		endpoints: prometheus.NewDesc("fairlead_endpoint_connections_total",
			"New connections from or through this node to the endpoints of the Services of --service-metrics.", append(service[:4:4], "endpoint"), nil),
		counters: prometheus.NewDesc("fairlead_service_counters",
			"Counters in the kernel for --service-metrics, one for each address of a Service, and one for each of its endpoints.", nil, nil),
		limited: prometheus.NewDesc("fairlead_service_counters_limited",
			"Service ports of --service-metrics whose connections are not counted, because there would be too many counters.", nil, nil),
	})
}

// Describe implements [prometheus.Collector].
func (s *serviceConnectionsCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{s.services, s.endpoints, s.counters, s.limited} {
		ch <- desc
	}
}

// Collect implements [prometheus.Collector]. It omits counters that cannot be read, because an error would
// fail the whole scrape.
func (s *serviceConnectionsCollector) Collect(ch chan<- prometheus.Metric) {
	counts, err := s.read()
	if err != nil {
		return
	}
	for series, connections := range counts.Connections {
		desc, last := s.services, series.Kind.String()
		if series.Endpoint.IsValid() {
			desc, last = s.endpoints, series.Endpoint.String()
		}
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(connections),
			series.Namespace, series.Name, series.Port, series.Protocol.String(), last)
	}
	ch <- prometheus.MustNewConstMetric(s.counters, prometheus.GaugeValue, float64(counts.Counters))
	ch <- prometheus.MustNewConstMetric(s.limited, prometheus.GaugeValue, float64(counts.Limited))
}
