package metrics

import "github.com/prometheus/client_golang/prometheus"

// listeningCollector reports which HTTP servers of the agent listen.
type listeningCollector struct {
	read func() map[string]bool
	desc *prometheus.Desc
}

var _ prometheus.Collector = (*listeningCollector)(nil)

func newListeningCollector(read func() map[string]bool) *listeningCollector {
	return &listeningCollector{read: read, desc: prometheus.NewDesc("fairlead_server_listening",
		"Whether the HTTP server listens on its address: 0 if another process holds the address; see the log.", []string{"server"}, nil)}
}

// Describe implements [prometheus.Collector].
func (l *listeningCollector) Describe(ch chan<- *prometheus.Desc) { ch <- l.desc }

// Collect implements [prometheus.Collector].
func (l *listeningCollector) Collect(ch chan<- prometheus.Metric) {
	for server, listening := range l.read() {
		value := 0.0
		if listening {
			value = 1
		}
		ch <- prometheus.MustNewConstMetric(l.desc, prometheus.GaugeValue, value, server)
	}
}
