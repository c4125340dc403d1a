package metrics

import "github.com/prometheus/client_golang/prometheus"

// addInstances makes what is counted of other instances on the node.
func (m *Metrics) addInstances(options Options) {
	gauge := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, value))
	}
	if options.Standby != nil {
		gauge("standby", "Whether this instance waits until another one on this node ends, and programs nothing: 1 or 0.", func() float64 {
			if options.Standby() {
				return 1
			}
			return 0
		})
	}
	if options.Waiting != nil {
		gauge("waiting_instances", "Other instances on this node that wait until this one ends.", func() float64 {
			return float64(options.Waiting())
		})
	}
}
