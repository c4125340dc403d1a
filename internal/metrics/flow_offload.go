package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/internal/flowoffload"
)

// flowOffloadCollector collects the state of the flowtable of --flow-offload.
type flowOffloadCollector struct {
	read func() flowoffload.Stats

	ready, devices, refused, offloaded, active *prometheus.Desc
}

var _ prometheus.Collector = (*flowOffloadCollector)(nil)

// AddFlowOffload adds the metrics of the flowtable. Metrics calls read on each scrape; it must not
// block for long.
func (m *Metrics) AddFlowOffload(read func() flowoffload.Stats) {
	m.registry.MustRegister(&flowOffloadCollector{
		read: read,
		ready: prometheus.NewDesc("fairlead_flow_offload_ready",
			"1 if the kernel has the flowtable of --flow-offload, else 0.", nil, nil),
		devices: prometheus.NewDesc("fairlead_flow_offload_devices",
			"Network interfaces in the flowtable of --flow-offload.", nil, nil),
		refused: prometheus.NewDesc("fairlead_flow_offload_refused_devices",
			"Network interfaces that are not in the flowtable of --flow-offload, because their drivers do not support it.", nil, nil),
		offloaded: prometheus.NewDesc("fairlead_flow_offload_connections_total",
			"Connections that were put into the flowtable of --flow-offload. A connection that was idle and continues counts again.", nil, nil),
		active: prometheus.NewDesc("fairlead_flow_offload_active_connections",
			"Connections to Services that are in a flowtable now, including some that ended at most 30 s ago.", nil, nil),
	})
}

// Describe implements [prometheus.Collector].
func (f *flowOffloadCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{f.ready, f.devices, f.refused, f.offloaded, f.active} {
		ch <- desc
	}
}

// Collect implements [prometheus.Collector].
func (f *flowOffloadCollector) Collect(ch chan<- prometheus.Metric) {
	s := f.read()
	ready := 0.0
	if s.Ready {
		ready = 1
	}
	ch <- prometheus.MustNewConstMetric(f.ready, prometheus.GaugeValue, ready)
	ch <- prometheus.MustNewConstMetric(f.devices, prometheus.GaugeValue, float64(s.Devices))
	ch <- prometheus.MustNewConstMetric(f.refused, prometheus.GaugeValue, float64(s.Refused))
	ch <- prometheus.MustNewConstMetric(f.offloaded, prometheus.CounterValue, float64(s.Offloaded))
	if s.Active >= 0 {
		ch <- prometheus.MustNewConstMetric(f.active, prometheus.GaugeValue, float64(s.Active))
	}
}
