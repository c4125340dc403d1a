package metrics

import "github.com/prometheus/client_golang/prometheus"

// AddNodeSettings adds a metric for the number of interfaces with a harmful kernel setting, by
// setting. Metrics calls read on each scrape; it must not block.
func (m *Metrics) AddNodeSettings(read func() map[string]int) {
	m.registry.MustRegister(&nodeSettingsCollector{read: read, problems: prometheus.NewDesc("fairlead_node_setting_problems",
		"Interfaces of the node with a kernel setting that breaks Services or exposes loopback addresses, by setting; see the log.",
		[]string{"setting"}, nil)})
}

type nodeSettingsCollector struct {
	read     func() map[string]int
	problems *prometheus.Desc
}

var _ prometheus.Collector = (*nodeSettingsCollector)(nil)

// Describe implements [prometheus.Collector].
func (n *nodeSettingsCollector) Describe(ch chan<- *prometheus.Desc) { ch <- n.problems }

// Collect implements [prometheus.Collector].
func (n *nodeSettingsCollector) Collect(ch chan<- prometheus.Metric) {
	for setting, interfaces := range n.read() {
		ch <- prometheus.MustNewConstMetric(n.problems, prometheus.GaugeValue, float64(interfaces), setting)
	}
}

// AddConntrackSettings adds a metric for connection-tracking settings that could not be applied.
// Metrics calls failing on each scrape.
func (m *Metrics) AddConntrackSettings(failing func() int) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: namespace, Name: "conntrack_settings_failing",
		Help: "Connection-tracking settings of the configuration that could not be applied; see the log.",
	}, func() float64 { return float64(failing()) }))
}
