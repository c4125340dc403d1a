// Package metrics exports Prometheus metrics of the agent.
//
// Metrics that kube-proxy has as well use kube-proxy's names, labels and buckets, so that its
// dashboards and alerts keep working. A Replace counts as kube-proxy's full sync and an Apply
// as its partial sync; a commit for both IP families counts for each of them. All other
// metrics start with fairlead_.
//
// "Refused" packets are packets that the kernel drops or rejects instead of forwarding them to
// an endpoint.
package metrics

import (
	"errors"
	"net/http"
	"slices"
	"strconv"
	stdsync "sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/connlimit"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/sync"
)

// Options are the options of [New]. Functions are called on each scrape, possibly from several
// goroutines, and must not block unless their comment says otherwise.
type Options struct {
	// Version and Mode are labels of the build info metric.
	Version, Mode string
	// KubernetesVersion is the release of kube-proxy that the agent corresponds to, such as
	// v1.37.2.
	KubernetesVersion string
	// Process returns the metrics of the process: the Go runtime, the API client and feature
	// gates. Nil means none.
	Process prometheus.Gatherer
	// Status returns the status of the syncer. [Metrics] also calls it when objects arrive
	// and when a commit ends.
	Status func() sync.Status
	// RelayStats returns the statistics of the relay; see [relay.Relay.Stats]. Nil means
	// that the node runs no relay.
	RelayStats func(dataplane.Family) relay.Stats
	// ServerStats returns the connection statistics of the servers by name. Nil means that
	// the agent runs no servers.
	ServerStats func() map[string]connlimit.Stats
	// Listening returns by name whether an HTTP server listens on its address. Nil means that
	// there are no servers.
	Listening func() map[string]bool
	// RefusedPackets returns the packets that the kernel has refused. It may block for a
	// short time. If it fails, the scrape omits these metrics; the function logs the error
	// itself. Nil means that the kernel does not count refused packets.
	RefusedPackets func() ([]RefusedPackets, error)
	// Standby reports whether this instance waits for another one to exit. WaitingInstances
	// returns the number of instances that wait for this one to exit.
	Standby          func() bool
	WaitingInstances func() int
	// APIResources returns the state of the watched API resources. Nil means that the source is
	// not an API server.
	APIResources func() []APIResource
	// APIConnection returns the state of the connection to the API server. Nil means that the
	// source is not an API server.
	APIConnection func() APIConnection
}

// Metrics holds the metrics of the agent. Its methods are safe for concurrent use and do not
// block.
type Metrics struct {
	options  Options
	registry *prometheus.Registry
	started  time.Time

	syncDuration, fullSyncDuration, partialSyncDuration, programmingLatency *prometheus.HistogramVec
	lastSync, lastQueued                                                    *prometheus.GaugeVec
	syncFailures                                                            *prometheus.CounterVec
	serviceChanges, endpointChanges                                         changeCounter
	healthz, livez                                                          *prometheus.CounterVec
	conntrackDuration                                                       *prometheus.HistogramVec
	conntrackDeleted                                                        *prometheus.CounterVec

	commits                       *prometheus.CounterVec
	commitDuration                *prometheus.HistogramVec
	changeLatency                 prometheus.Observer
	firstProgrammed               prometheus.Gauge
	firstService, lastService     prometheus.Gauge
	problems, healthCheckFailures prometheus.Counter
	reloads                       *prometheus.CounterVec
	configValid                   prometheus.Gauge
	otherProxy                    *prometheus.GaugeVec
	rebuilds                      *prometheus.CounterVec

	healthChecks healthChecks

	mu               stdsync.Mutex
	programmed       bool // a call to the dataplane has succeeded
	triggers         map[service][]trigger
	noLocalEndpoints map[trafficPolicy]map[dataplane.Key]int
}

type service struct{ namespace, name string }

// trigger describes a change of an EndpointSlice.
type trigger struct {
	// changed is the time of the change by the clock of its origin. queued is the time when
	// the syncer received it.
	changed, queued time.Time
}

// maxTriggers limits the triggers stored for a Service that cannot be programmed.
const maxTriggers = 16

// trafficPolicy is a value of the traffic_policy label.
type trafficPolicy string

const (
	internal trafficPolicy = "internal"
	external trafficPolicy = "external"
)

// changeCounter counts the changed objects of one kind.
type changeCounter struct {
	total   prometheus.Counter
	pending *prometheus.Desc
	// nextCall counts changes for the next call to the dataplane, laterCall changes that
	// arrived during a call and belong to the one after it.
	nextCall, laterCall int
}

const (
	namespace = "fairlead"
	kubeProxy = "kubeproxy"
)

// ipFamilies returns the values of kube-proxy's ip_family label.
func ipFamilies() []dataplane.Family { return []dataplane.Family{dataplane.IPv4, dataplane.IPv6} }

// New returns Metrics with a new registry.
func New(options Options) *Metrics {
	m := &Metrics{
		options: options, registry: prometheus.NewRegistry(), started: time.Now(),
		triggers:         map[service][]trigger{},
		noLocalEndpoints: map[trafficPolicy]map[dataplane.Key]int{internal: {}, external: {}},
	}
	m.healthChecks = m.newHealthChecks()
	m.addKubernetes()
	m.addKubeProxy()
	m.addFairlead()
	m.registry.MustRegister(&statusCollector{m})
	if options.RelayStats != nil {
		m.registry.MustRegister(newRelayCollector(options.RelayStats))
	}
	m.addInstances(options)
	m.addOtherProxy()
	if options.Listening != nil {
		m.registry.MustRegister(newListeningCollector(options.Listening))
	}
	if options.ServerStats != nil {
		m.registry.MustRegister(newServerCollector(options.ServerStats))
	}
	if options.APIResources != nil {
		m.registry.MustRegister(newAPICollector(options.APIResources))
	}
	if options.APIConnection != nil {
		m.addAPIConnection(options.APIConnection)
	}
	if options.RefusedPackets != nil {
		m.registry.MustRegister(newRefusedCollector(options.RefusedPackets))
	}
	return m
}

// addKubeProxy registers the metrics of k8s.io/kubernetes/pkg/proxy/metrics.
func (m *Metrics) addKubeProxy() {
	syncBuckets := prometheus.ExponentialBuckets(0.001, 2, 15)
	m.syncDuration = m.histogram(kubeProxy, "sync_proxy_rules_duration_seconds",
		"Duration of commits to the kernel.", syncBuckets, "ip_family")
	m.fullSyncDuration = m.histogram(kubeProxy, "sync_full_proxy_rules_duration_seconds",
		"Duration of commits to the kernel that compared all Services.", syncBuckets, "ip_family")
	m.partialSyncDuration = m.histogram(kubeProxy, "sync_partial_proxy_rules_duration_seconds",
		"Duration of commits to the kernel that wrote only changes.", syncBuckets, "ip_family")
	buckets := []float64{0}
	buckets = append(buckets, prometheus.LinearBuckets(0.25, 0.25, 2)...)
	buckets = append(buckets, prometheus.LinearBuckets(1, 1, 59)...)
	buckets = append(buckets, prometheus.LinearBuckets(60, 5, 12)...)
	buckets = append(buckets, prometheus.LinearBuckets(120, 30, 7)...)
	m.programmingLatency = m.histogram(kubeProxy, "network_programming_duration_seconds",
		"Time from the change of a pod or Service, according to the EndpointSlice annotation "+
			"endpoints.kubernetes.io/last-change-trigger-time, until it was programmed.", buckets, "ip_family")
	m.lastSync = m.gauges(kubeProxy, "sync_proxy_rules_last_timestamp_seconds",
		"Time of the last successful commit to the kernel.", "ip_family")
	m.lastQueued = m.gauges(kubeProxy, "sync_proxy_rules_last_queued_timestamp_seconds",
		"Time when the last change was queued.", "ip_family")
	m.syncFailures = m.counters(kubeProxy, "sync_proxy_rules_nftables_sync_failures_total",
		"Commits to the kernel that failed completely or partly.", "ip_family")
	cleanupFailures := m.counters(kubeProxy, "sync_proxy_rules_nftables_cleanup_failures_total",
		"Always 0, because Fairlead deletes stale rules in the same commit; see sync_proxy_rules_nftables_sync_failures_total.", "ip_family")
	m.serviceChanges = m.newChangeCounter("service", "Services")
	m.endpointChanges = m.newChangeCounter("endpoint", "EndpointSlices")
	m.healthz = m.counters(kubeProxy, "proxy_healthz_total", "Responses of /healthz by HTTP status.", "code")
	m.livez = m.counters(kubeProxy, "proxy_livez_total", "Responses of /livez by HTTP status.", "code")
	m.conntrackDuration = m.histogram(kubeProxy, "conntrack_reconciler_sync_duration_seconds",
		"Duration of conntrack scans for stale entries.", syncBuckets, "ip_family")
	m.conntrackDeleted = m.counters(kubeProxy, "conntrack_reconciler_deleted_entries_total",
		"Conntrack entries deleted because they directed clients to removed endpoints.", "ip_family")
	for _, f := range ipFamilies() { // export zero values from the start
		m.syncFailures.WithLabelValues(f.String())
		cleanupFailures.WithLabelValues(f.String())
		m.conntrackDeleted.WithLabelValues(f.String())
		for _, h := range []*prometheus.HistogramVec{m.syncDuration, m.fullSyncDuration, m.partialSyncDuration, m.programmingLatency, m.conntrackDuration} {
			h.WithLabelValues(f.String())
		}
	}
	for _, code := range []int{http.StatusOK, http.StatusServiceUnavailable} {
		m.healthz.WithLabelValues(strconv.Itoa(code))
		m.livez.WithLabelValues(strconv.Itoa(code))
	}
}

func (m *Metrics) addFairlead() {
	m.gauges(namespace, "build_info", "Always 1. The labels identify the version and the mode.", "version", "mode").
		WithLabelValues(m.options.Version, m.options.Mode).Set(1)
	m.commits = m.counters(namespace, "commits_total", "Commits to the kernel by kind (apply, replace), reason "+
		"(change, start, retry, node, drift, resync) and result (success, partial, failure).", "kind", "reason", "result")
	m.commitDuration = m.histogram(namespace, "commit_duration_seconds", "Duration of commits to the kernel.",
		prometheus.ExponentialBuckets(0.00001, 2, 22), "kind")
	m.changeLatency = m.histogram(namespace, "change_latency_seconds",
		"Time from the arrival of the oldest change in each commit until it was programmed.",
		prometheus.ExponentialBuckets(0.00001, 2, 24)).WithLabelValues()
	m.firstProgrammed = m.gauges(namespace, "first_programmed_seconds",
		"Time from process start until all Services were programmed for the first time; 0 before that.").WithLabelValues()
	m.firstService = m.gauges(namespace, "first_service_programmed_seconds",
		"Time from process start until the first Service of the first commit was programmed; cluster DNS Services come "+
			"first. 0 until all are programmed, or without Services.").WithLabelValues()
	m.lastService = m.gauges(namespace, "last_service_programmed_seconds",
		"Time from process start until the last Service of the first commit was programmed. 0 until all are programmed, "+
			"or without Services.").WithLabelValues()
	m.problems = m.counters(namespace, "service_problems_total",
		"Problems found in Services that cannot be programmed as written; see the Events and the log.").WithLabelValues()
	m.healthCheckFailures = m.counters(namespace, "health_check_node_port_failures_total",
		"Failed attempts to listen on a health-check node port.").WithLabelValues()
	m.rebuilds = m.counters(namespace, "nftables_table_rebuilds_total",
		"Rebuilds of nftables tables that could not be repaired in place; see the log and the Events of the Node.", "ip_family")
	for _, f := range ipFamilies() {
		m.rebuilds.WithLabelValues(f.String())
	}
	m.reloads = m.counters(namespace, "config_reloads_total", "Changes of the configuration file by result (success, failure).", "result")
	m.configValid = m.gauges(namespace, "config_valid", "1 if the current content of the configuration file is in use, 0 if it is invalid.").WithLabelValues()
	m.configValid.Set(1)
}

func (m *Metrics) histogram(prefix, name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	v := prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: prefix, Name: name, Help: help, Buckets: buckets}, labels)
	m.registry.MustRegister(v)
	return v
}

func (m *Metrics) gauges(prefix, name, help string, labels ...string) *prometheus.GaugeVec {
	v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: prefix, Name: name, Help: help}, labels)
	m.registry.MustRegister(v)
	return v
}

func (m *Metrics) counters(prefix, name, help string, labels ...string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: prefix, Name: name, Help: help}, labels)
	m.registry.MustRegister(v)
	return v
}

func (m *Metrics) newChangeCounter(name, objects string) changeCounter {
	name = "sync_proxy_rules_" + name + "_changes_"
	return changeCounter{
		total:   m.counters(kubeProxy, name+"total", objects+" added, changed or deleted.").WithLabelValues(),
		pending: prometheus.NewDesc(kubeProxy+"_"+name+"pending", "Changed "+objects+" not yet programmed.", nil, nil),
	}
}

// Handler returns the HTTP handler for scrapes.
func (m *Metrics) Handler() http.Handler {
	gatherers := prometheus.Gatherers{m.registry}
	if m.options.Process != nil {
		gatherers = append(gatherers, m.options.Process)
	}
	return promhttp.InstrumentMetricHandler(m.registry, promhttp.HandlerFor(gatherers, promhttp.HandlerOpts{ProcessStartTime: m.started}))
}

// RecordObjectChanges counts added, changed or deleted Services and EndpointSlices.
func (m *Metrics) RecordObjectChanges(services, endpointSlices int) {
	status := m.options.Status()
	now := float64(time.Now().UnixMilli()) / 1000
	m.mu.Lock()
	defer m.mu.Unlock()
	for c, n := range map[*changeCounter]int{&m.serviceChanges: services, &m.endpointChanges: endpointSlices} {
		if isIdle(status) {
			c.nextCall, c.laterCall = 0, 0 // earlier changes did not affect the kernel
		}
		c.add(n, !status.CallSince.IsZero())
	}
	for _, f := range ipFamilies() {
		m.lastQueued.WithLabelValues(f.String()).Set(now)
	}
}

func (c *changeCounter) add(n int, inCall bool) {
	c.total.Add(float64(n))
	if inCall {
		c.laterCall += n
	} else {
		c.nextCall += n
	}
}

// isIdle reports whether no change is pending and no call to the dataplane is in flight.
func isIdle(status sync.Status) bool {
	return status.PendingSince.IsZero() && status.CallSince.IsZero()
}

// endCall updates the counts when a call to the dataplane has returned. Changes of a failed
// call become part of the next one.
func (c *changeCounter) endCall(success bool) {
	if success {
		c.nextCall = 0
	}
	c.nextCall, c.laterCall = c.nextCall+c.laterCall, 0
}

// RecordTrigger records that endpoints of a Service changed at the given time, which is from
// another machine's clock, and that the syncer just received the change. It ignores times
// before the start of the process.
func (m *Metrics) RecordTrigger(namespace, name string, at time.Time) {
	if at.Before(m.started) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	key := service{namespace, name}
	if m.triggers[key] = append(m.triggers[key], trigger{at, time.Now()}); len(m.triggers[key]) > maxTriggers {
		// Keep the oldest trigger, which has waited longest.
		m.triggers[key] = slices.Delete(m.triggers[key], 1, 2)
	}
}

// RemoveService discards the triggers of a deleted Service.
func (m *Metrics) RemoveService(namespace, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.triggers, service{namespace, name})
}

// OnCommit records a call to the dataplane; see [sync.Options].
func (m *Metrics) OnCommit(c sync.Commit) {
	result := "success"
	switch {
	case c.Err != nil:
		result = "failure"
	case len(c.Failed) > 0:
		result = "partial"
	}
	duration := c.End.Sub(c.Start).Seconds()
	m.commits.WithLabelValues(string(c.Op), string(c.Reason), result).Inc()
	m.commitDuration.WithLabelValues(string(c.Op)).Observe(duration)
	part := m.partialSyncDuration
	if c.Op == sync.OpReplace {
		part = m.fullSyncDuration
	}
	for _, f := range commitFamilies(c) {
		m.syncDuration.WithLabelValues(f.String()).Observe(duration)
		part.WithLabelValues(f.String()).Observe(duration)
		if c.Err == nil {
			m.lastSync.WithLabelValues(f.String()).Set(float64(c.End.UnixMilli()) / 1000)
		}
		if c.Err != nil || hasFailed(c, f) {
			m.syncFailures.WithLabelValues(f.String()).Inc()
		}
	}
	if !c.OldestUpdate.IsZero() && c.Err == nil {
		m.changeLatency.Observe(c.End.Sub(c.OldestUpdate).Seconds())
	}

	before := m.options.Status().Failing
	m.mu.Lock()
	defer m.mu.Unlock()
	m.serviceChanges.endCall(c.Err == nil)
	m.endpointChanges.endCall(c.Err == nil)
	if c.Err == nil && !m.programmed {
		m.programmed = true
		m.firstProgrammed.Set(c.End.Sub(m.started).Seconds())
		if !c.FirstComplete.IsZero() {
			m.firstService.Set(c.FirstComplete.Sub(m.started).Seconds())
			m.lastService.Set(c.LastComplete.Sub(m.started).Seconds())
		}
	}
	m.observeTriggers(c, before)
	for _, change := range c.Changes {
		m.countNoLocalEndpoints(change.Old, -1)
		m.countNoLocalEndpoints(change.New, +1)
	}
}

// hasFailed reports whether a Service of the family failed in the commit.
func hasFailed(c sync.Commit, f dataplane.Family) bool {
	for key := range c.Failed {
		if key.Family == f {
			return true
		}
	}
	return false
}

// commitFamilies returns the IP families that a commit wrote or tried to write.
func commitFamilies(c sync.Commit) []dataplane.Family {
	var families []dataplane.Family
	for _, f := range ipFamilies() {
		if c.Op == sync.OpReplace || c.Err != nil || hasFailed(c, f) ||
			slices.ContainsFunc(c.Changes, func(change dataplane.Change) bool { return change.Key().Family == f }) {
			families = append(families, f)
		}
	}
	return families
}

// observeTriggers records the latency of the triggers that a commit programmed. before holds
// the keys that were failing before the commit.
func (m *Metrics) observeTriggers(c sync.Commit, before map[dataplane.Key]error) {
	if len(m.triggers) == 0 {
		return
	}
	concerned := map[service]map[dataplane.Family]bool{}
	for _, change := range c.Changes {
		key := change.Key()
		s := service{key.Namespace, key.Name}
		if _, ok := m.triggers[s]; !ok {
			continue
		}
		if concerned[s] == nil {
			concerned[s] = map[dataplane.Family]bool{}
		}
		concerned[s][key.Family] = true
	}
	failing := map[service]bool{}
	for _, keys := range []map[dataplane.Key]error{before, c.Failed} {
		for key := range keys {
			failing[service{key.Namespace, key.Name}] = true
		}
	}
	for s, triggers := range m.triggers {
		families, ok := concerned[s]
		if !ok && (c.Err != nil || failing[s]) {
			continue // the syncer retries the Service
		}
		var later []trigger
		for _, t := range triggers {
			switch {
			case t.queued.After(c.Start):
				later = append(later, t)
			case t.queued.Before(c.OldestUpdate) && !failing[s]:
				// The change was neither in this commit nor is it pending: a later
				// change reverted it before it was programmed.
			default:
				for f := range families { // empty if the change was reverted
					m.programmingLatency.WithLabelValues(f.String()).Observe(c.End.Sub(t.changed).Seconds())
				}
			}
		}
		if len(later) == 0 {
			delete(m.triggers, s)
		} else {
			m.triggers[s] = later
		}
	}
}

// countNoLocalEndpoints adds n to the count of svc if its traffic policy is Local and it has
// endpoints, but none on this node. A Service port counts once for all kinds of frontends.
func (m *Metrics) countNoLocalEndpoints(svc *dataplane.Service, n int) {
	if svc == nil || svc.NoEndpointsVerdict != dataplane.Drop {
		return
	}
	var p trafficPolicy
	switch {
	case svc.ExternalTrafficPolicyLocal && len(svc.LocalEndpoints) == 0:
		p = external
	case svc.Key.Kind == dataplane.ClusterIP && !svc.ExternalTrafficPolicyLocal && len(svc.Endpoints) == 0:
		p = internal
	default:
		return
	}
	key := svc.Key
	key.Kind = 0
	if m.noLocalEndpoints[p][key] += n; m.noLocalEndpoints[p][key] <= 0 {
		delete(m.noLocalEndpoints[p], key)
	}
}

// RecordHealthResponse counts a response of /healthz or /livez.
func (m *Metrics) RecordHealthResponse(path string, status int) {
	switch path {
	case "/healthz":
		m.healthz.WithLabelValues(strconv.Itoa(status)).Inc()
	case "/livez":
		m.livez.WithLabelValues(strconv.Itoa(status)).Inc()
	}
}

// RecordConntrackScan records a conntrack scan for stale entries of a family.
func (m *Metrics) RecordConntrackScan(family dataplane.Family, duration time.Duration, deleted int) {
	m.conntrackDuration.WithLabelValues(family.String()).Observe(duration.Seconds())
	m.conntrackDeleted.WithLabelValues(family.String()).Add(float64(deleted))
}

// RecordProblem counts a problem of a Service that cannot be programmed as written.
func (m *Metrics) RecordProblem() { m.problems.Inc() }

// RecordHealthCheckFailure counts a failed attempt to listen on a health-check node port.
func (m *Metrics) RecordHealthCheckFailure() { m.healthCheckFailures.Inc() }

// RecordTableRebuild counts a rebuild of an nftables table.
func (m *Metrics) RecordTableRebuild(f dataplane.Family) {
	m.rebuilds.WithLabelValues(f.String()).Inc()
}

// RecordReload counts a change of the configuration file. A non-nil err means that the file is
// invalid.
func (m *Metrics) RecordReload(err error) {
	if err != nil {
		m.reloads.WithLabelValues("failure").Inc()
		m.configValid.Set(0)
		return
	}
	m.reloads.WithLabelValues("success").Inc()
	m.configValid.Set(1)
}

// statusCollector collects metrics that are computed on each scrape.
type statusCollector struct{ metrics *Metrics }

var _ prometheus.Collector = (*statusCollector)(nil)

type statusDescs struct{ services, servicesFailing, dataplaneFailed, oldestChangeAge, noLocalEndpoints *prometheus.Desc }

func newStatusDescs() statusDescs {
	return statusDescs{
		services: prometheus.NewDesc("fairlead_services",
			"Desired Service ports. Each IP family and each kind of address (cluster IP, node port, external IP, "+
				"load balancer) counts separately.", nil, nil),
		servicesFailing: prometheus.NewDesc("fairlead_services_failing",
			"Desired Service ports that are not programmed, by reason: unsupported (by the current mode), error (from the "+
				"kernel).", []string{"reason"}, nil),
		dataplaneFailed: prometheus.NewDesc("fairlead_dataplane_failed",
			"1 if the last commit to the kernel failed completely, else 0.", nil, nil),
		oldestChangeAge: prometheus.NewDesc("fairlead_oldest_change_age_seconds",
			"Age of the oldest change that is not yet programmed; 0 without pending changes.", nil, nil),
		noLocalEndpoints: prometheus.NewDesc("kubeproxy_sync_proxy_rules_no_local_endpoints_total",
			"Service ports with traffic policy Local that have endpoints, but none on this node.", []string{"traffic_policy", "ip_family"}, nil),
	}
}

// Describe implements [prometheus.Collector].
func (s *statusCollector) Describe(ch chan<- *prometheus.Desc) {
	d := newStatusDescs()
	for _, desc := range []*prometheus.Desc{d.services, d.servicesFailing, d.dataplaneFailed, d.oldestChangeAge, d.noLocalEndpoints, s.metrics.serviceChanges.pending, s.metrics.endpointChanges.pending} {
		ch <- desc
	}
}

// Collect implements [prometheus.Collector].
func (s *statusCollector) Collect(ch chan<- prometheus.Metric) {
	d, status := newStatusDescs(), s.metrics.options.Status()
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	unsupported := 0
	for _, err := range status.Failing {
		if errors.Is(err, dataplane.ErrUnsupported) {
			unsupported++
		}
	}
	gauge(d.services, float64(status.Services))
	gauge(d.servicesFailing, float64(unsupported), "unsupported")
	gauge(d.servicesFailing, float64(len(status.Failing)-unsupported), "error")
	failed := 0.0
	if status.Err != nil {
		failed = 1
	}
	gauge(d.dataplaneFailed, failed)
	age := 0.0
	if !status.PendingSince.IsZero() {
		age = max(0, time.Since(status.PendingSince).Seconds())
	}
	gauge(d.oldestChangeAge, age)

	s.metrics.mu.Lock()
	defer s.metrics.mu.Unlock()
	for _, c := range []changeCounter{s.metrics.serviceChanges, s.metrics.endpointChanges} {
		pending := c.nextCall + c.laterCall
		if isIdle(status) {
			pending = 0 // the last changes did not affect the kernel
		}
		gauge(c.pending, float64(pending))
	}
	for _, p := range []trafficPolicy{internal, external} {
		count := map[dataplane.Family]int{}
		for key := range s.metrics.noLocalEndpoints[p] {
			count[key.Family]++
		}
		for _, f := range ipFamilies() {
			gauge(d.noLocalEndpoints, float64(count[f]), string(p), f.String())
		}
	}
}
