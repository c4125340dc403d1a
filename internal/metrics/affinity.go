package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/dataplane"
)

// Affinity describes what session affinity remembers in the kernel.
type Affinity struct {
	Family dataplane.Family
	// Clients are remembered in all maps, FullestMap in the one with most of them, and
	// Limit is what one map takes.
	Clients, FullestMap, Limit int
	// Full and NetworkLimit count connections whose clients were not remembered. They
	// may become less, as [RefusedPackets.Packets].
	Full, NetworkLimit uint64
	// Evicted counts clients that were forgotten because their map was full.
	Evicted uint64
}

type affinityCollector struct {
	read func() []Affinity

	clients, fullestMap, mapLimit, notRemembered, evicted *prometheus.Desc
}

var _ prometheus.Collector = (*affinityCollector)(nil)

// AddAffinity adds the metrics of session affinity. Read is asked at each scrape and must
// not block for long.
func (m *Metrics) AddAffinity(read func() []Affinity) {
	family := []string{"ip_family"}
	m.registry.MustRegister(&affinityCollector{
		read: read,
		clients: prometheus.NewDesc("fairlead_session_affinity_clients",
			"Clients of Services with session affinity whose endpoint is remembered, as counted in the last minute.", family, nil),
		fullestMap: prometheus.NewDesc("fairlead_session_affinity_fullest_map_clients",
			"Clients in the fullest of the maps that Services share by the last digit of their address, as counted in the last minute.", family, nil),
		mapLimit: prometheus.NewDesc("fairlead_session_affinity_map_limit_clients", "Clients that one map takes.", family, nil),
		notRemembered: prometheus.NewDesc("fairlead_session_affinity_not_remembered_total",
			"Connections whose client was not remembered, by reason: full if the Service's map was full, network if the client's "+
				"IPv6 network of 64 bits had had its share.", []string{"ip_family", "reason"}, nil),
		evicted: prometheus.NewDesc("fairlead_session_affinity_evictions_total",
			"Clients that were forgotten before their timeout because their map was full.", family, nil),
	})
}

// Describe implements [prometheus.Collector].
func (a *affinityCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{a.clients, a.fullestMap, a.mapLimit, a.notRemembered, a.evicted} {
		ch <- desc
	}
}

// Collect implements [prometheus.Collector].
func (a *affinityCollector) Collect(ch chan<- prometheus.Metric) {
	for _, s := range a.read() {
		add := func(desc *prometheus.Desc, typ prometheus.ValueType, value float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, typ, value, append([]string{s.Family.String()}, labels...)...)
		}
		add(a.clients, prometheus.GaugeValue, float64(s.Clients))
		add(a.fullestMap, prometheus.GaugeValue, float64(s.FullestMap))
		add(a.mapLimit, prometheus.GaugeValue, float64(s.Limit))
		add(a.notRemembered, prometheus.CounterValue, float64(s.Full), "full")
		add(a.notRemembered, prometheus.CounterValue, float64(s.NetworkLimit), "network")
		add(a.evicted, prometheus.CounterValue, float64(s.Evicted))
	}
}
