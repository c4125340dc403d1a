package metrics

import (
	"io"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// healthChecks holds the metrics of /metrics/slis, which all components of Kubernetes have.
type healthChecks struct {
	registry *prometheus.Registry
	result   *prometheus.GaugeVec
	total    *prometheus.CounterVec
}

func (m *Metrics) newHealthChecks() healthChecks {
	c := healthChecks{
		registry: prometheus.NewRegistry(),
		result: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: "kubernetes", Name: "healthcheck",
			Help: "Result of the last run of a health check: 1 for success, else 0.",
		}, []string{"name", "type"}),
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "kubernetes", Name: "healthchecks_total",
			Help: "Runs of a health check by status (success, error).",
		}, []string{"name", "type", "status"}),
	}
	started := prometheus.NewGauge(prometheus.GaugeOpts{Name: "process_start_time_seconds", Help: "Start time of the process since the Unix epoch."})
	started.Set(float64(m.started.UnixMilli()) / 1000)
	c.registry.MustRegister(c.result, c.total, started)
	return c
}

// RecordHealthCheck records the success of a check of /healthz on the metrics server.
func (m *Metrics) RecordHealthCheck(name string) {
	m.healthChecks.result.WithLabelValues(name, "healthz").Set(1)
	m.healthChecks.total.WithLabelValues(name, "healthz", "success").Inc()
}

// SLIHandler returns the HTTP handler of /metrics/slis. DELETE resets the metrics of health checks.
func (m *Metrics) SLIHandler() http.Handler {
	scrape := promhttp.HandlerFor(m.healthChecks.registry, promhttp.HandlerOpts{ProcessStartTime: m.started})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodDelete {
			scrape.ServeHTTP(w, r)
			return
		}
		m.healthChecks.result.Reset()
		m.healthChecks.total.Reset()
		_, _ = io.WriteString(w, "metrics reset\n") // fails only if the client has disconnected
	})
}
