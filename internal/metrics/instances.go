package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/internal/otherproxy"
)

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
	if options.WaitingInstances != nil {
		gauge("waiting_instances", "Other instances on this node that wait until this one ends.", func() float64 {
			return float64(options.WaitingInstances())
		})
	}
}

// addOtherProxy makes what is said of another Service proxy.
func (m *Metrics) addOtherProxy() {
	m.otherProxy = m.gauges(namespace, "other_proxy_rules", "Whether rules of another Service proxy, by its mode, are on this node: 1 or 0; "+
		"see the log and the Events of the Node.", "proxy", "mode")
	m.SetOtherProxy(nil)
}

// SetOtherProxy takes all that is on the node of another Service proxy.
func (m *Metrics) SetOtherProxy(rules []otherproxy.Rules) {
	for _, mode := range otherproxy.Modes() {
		m.otherProxy.WithLabelValues("kube-proxy", string(mode)).Set(0)
	}
	for _, r := range rules {
		m.otherProxy.WithLabelValues("kube-proxy", string(r.Mode)).Set(1)
	}
}
