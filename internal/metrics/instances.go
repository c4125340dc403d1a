package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"fairlead.io/fairlead/internal/otherproxy"
)

// addInstances adds metrics about other instances on the node.
func (m *Metrics) addInstances(options Options) {
	gauge := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, value))
	}
	if options.Standby != nil {
		gauge("standby", "1 if this instance is on standby until another instance on this node exits, else 0.", func() float64 {
			if options.Standby() {
				return 1
			}
			return 0
		})
	}
	if options.WaitingInstances != nil {
		gauge("waiting_instances", "Other instances on this node that wait for this one to exit.", func() float64 {
			return float64(options.WaitingInstances())
		})
	}
}

// addOtherProxy adds metrics about other Service proxies on the node.
func (m *Metrics) addOtherProxy() {
	m.otherProxy = m.gauges(namespace, "other_proxy_rules", "1 if this node has rules of another Service proxy in this mode, else 0; "+
		"see the log and the Events of the Node.", "proxy", "mode")
	m.SetOtherProxy(nil)
}

// SetOtherProxy updates the metric from the rules of other Service proxies on the node.
func (m *Metrics) SetOtherProxy(rules []otherproxy.Rules) {
	for _, mode := range otherproxy.Modes() {
		m.otherProxy.WithLabelValues("kube-proxy", string(mode)).Set(0)
	}
	for _, r := range rules {
		m.otherProxy.WithLabelValues("kube-proxy", string(r.Mode)).Set(1)
	}
}
