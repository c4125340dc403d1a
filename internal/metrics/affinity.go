package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/dataplane"
)

// Affinity describes the session affinity maps of one IP family.
type Affinity struct {
	Family dataplane.Family
	// Clients is the number of clients in all maps, FullestMap the number in the fullest
	// map, and Limit the capacity of one map.
	Clients, FullestMap, Limit int
	// Full and NetworkLimit count connections of clients that a map did not store. They may
	// decrease like [RefusedPackets.Packets].
	Full, NetworkLimit uint64
	// Evicted counts clients evicted from full maps.
	Evicted uint64
}

type affinityCollector struct {
	read func() []Affinity

	clients, fullestMap, mapLimit, notRemembered, evicted *prometheus.Desc
}

var _ prometheus.Collector = (*affinityCollector)(nil)

// AddAffinity adds the session affinity metrics. Metrics calls read on each scrape; it must not
// block for long.
func (m *Metrics) AddAffinity(read func() []Affinity) {
	family := []string{"ip_family"}
	m.registry.MustRegister(&affinityCollector{
		read: read,
		clients: prometheus.NewDesc("fairlead_session_affinity_clients",
			"Clients with session affinity, as counted within the last minute.", family, nil),
		fullestMap: prometheus.NewDesc("fairlead_session_affinity_fullest_map_clients",
			"Clients in the fullest session affinity map, as counted within the last minute. Services share maps by the last digit "+
				"of their address.", family, nil),
		mapLimit: prometheus.NewDesc("fairlead_session_affinity_map_limit_clients", "Maximum number of clients in one session affinity map.", family, nil),
		notRemembered: prometheus.NewDesc("fairlead_session_affinity_not_remembered_total",
			"Connections without session affinity because the client was not stored, by reason: full if the Service's map was full, "+
				"network if the client's IPv6 /64 network had reached its limit.", []string{"ip_family", "reason"}, nil),
		evicted: prometheus.NewDesc("fairlead_session_affinity_evictions_total",
			"Clients evicted from full session affinity maps before their timeout.", family, nil),
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
