package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// APIResource describes the list and watch of one API resource.
type APIResource struct {
	// Resource is the name of the resource, such as "endpointslices".
	Resource string
	// Synced reports whether the initial list is complete.
	Synced bool
	// HeldRemovals is the number of objects whose removal another list must confirm.
	HeldRemovals int
	// Failures counts failed requests. Recoveries counts lists and watches that were
	// restarted without an error from the API server, by reason.
	Failures   []APIFailures
	Recoveries map[string]uint64
}

// APIFailures counts failed requests by verb and code.
type APIFailures struct {
	Verb, Code string
	Count      uint64
}

// apiCollector collects the metrics of API resources.
type apiCollector struct {
	resources func() []APIResource

	synced, held, failures, recoveries *prometheus.Desc
}

var _ prometheus.Collector = (*apiCollector)(nil)

func newAPICollector(lists func() []APIResource) *apiCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(namespace+"_"+name, help, append([]string{"resource"}, labels...), nil)
	}
	return &apiCollector{
		resources: lists,
		synced:    desc("api_synced", "1 if the initial list of the resource is complete, else 0."),
		held: desc("api_held_removals", "Objects missing from the last list of the API server whose removal is delayed until another list "+
			"confirms it (--mass-removal-delay)."),
		failures: desc("api_request_failures_total", "Failed requests to the API server by verb (list, watch) and "+
			"code (HTTP status, unreachable, timeout, error).", "verb", "code"),
		recoveries: desc("api_recoveries_total", "Lists and watches restarted without an error from the API server, by reason: silent (no events "+
			"or bookmarks), unfinished (streamed list), backwards (resource versions).", "reason"),
	}
}

// Describe implements [prometheus.Collector].
func (a *apiCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{a.synced, a.held, a.failures, a.recoveries} {
		ch <- desc
	}
}

// Collect implements [prometheus.Collector].
func (a *apiCollector) Collect(ch chan<- prometheus.Metric) {
	for _, l := range a.resources() {
		synced := 0.0
		if l.Synced {
			synced = 1
		}
		ch <- prometheus.MustNewConstMetric(a.synced, prometheus.GaugeValue, synced, l.Resource)
		ch <- prometheus.MustNewConstMetric(a.held, prometheus.GaugeValue, float64(l.HeldRemovals), l.Resource)
		for _, f := range l.Failures {
			ch <- prometheus.MustNewConstMetric(a.failures, prometheus.CounterValue, float64(f.Count), l.Resource, f.Verb, f.Code)
		}
		for reason, n := range l.Recoveries {
			ch <- prometheus.MustNewConstMetric(a.recoveries, prometheus.CounterValue, float64(n), l.Resource, reason)
		}
	}
}

// APIConnection describes the connection to the API server.
type APIConnection struct {
	// Connected reports whether the API server answers requests.
	Connected bool
	// LastResponse is when it last answered a request; zero means never.
	LastResponse time.Time
	// Failures lists the resources whose last request failed, with the reason.
	Failures []string
}

// addAPIConnection adds the metrics of the connection to the API server.
func (m *Metrics) addAPIConnection(connection func() APIConnection) {
	gauge := func(name, help string, value func(APIConnection) float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, func() float64 {
			return value(connection())
		}))
	}
	gauge("api_connected", "1 if the API server answers requests, 0 if not or not yet.", func(c APIConnection) float64 {
		if c.Connected {
			return 1
		}
		return 0
	})
	gauge("api_last_response_timestamp_seconds", "Time of the last answer of the API server to a list or watch request; 0 before the first one.",
		func(c APIConnection) float64 {
			if c.LastResponse.IsZero() {
				return 0
			}
			return float64(c.LastResponse.UnixMilli()) / 1000
		})
}
