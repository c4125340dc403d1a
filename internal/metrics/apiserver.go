package metrics

import "github.com/prometheus/client_golang/prometheus"

// APIResource says how a list of the API server is followed.
type APIResource struct {
	// Resource is the name of the list, such as "endpointslices".
	Resource string
	// Synced says that the list was complete once.
	Synced bool
	// HeldRemovals is the number of objects whose removal waits for another list.
	HeldRemovals int
	// Failures counts failed requests, and Recoveries lists and watches that were
	// made anew without an error, by reason.
	Failures   []APIFailures
	Recoveries map[string]uint64
}

// APIFailures counts the requests with one verb that failed with one code.
type APIFailures struct {
	Verb, Code string
	Count      uint64
}

// apiCollector collects how the lists of the API server are followed.
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
		synced:    desc("api_synced", "Whether the list of the API server was complete once: 1 or 0."),
		held: desc("api_held_removals", "Objects that the last list of the API server lacks, and whose removal waits for another list "+
			"(--mass-removal-delay)."),
		failures: desc("api_request_failures_total", "Requests to the API server that failed, by verb (list, watch) and "+
			"code (HTTP status, unreachable, timeout, error).", "verb", "code"),
		recoveries: desc("api_recoveries_total", "Lists and watches that were made anew although the API server reported no error, by reason: "+
			"silent without events and bookmarks, unfinished streamed list, backwards resource versions.", "reason"),
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
