// Package metrics counts what the program does, and shows it to Prometheus.
//
// What kube-proxy counts too has kube-proxy's name, labels and buckets, so that
// dashboards and alerts made for it go on working; a commit that concerns both
// IP families counts for each. A Replace is what kube-proxy calls a full sync,
// an Apply a partial one. All else begins with fairlead_.
package metrics

import (
	"errors"
	"net/http"
	"slices"
	"strconv"
	stdsync "sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/connlimit"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/sync"
)

// Options are what [Metrics] depend on.
type Options struct {
	// Version and Mode are those of the program.
	Version, Mode string
	// Status is asked at each scrape and when objects arrive. It must not block.
	Status func() sync.Status
	// RelayStats is asked for each family at each scrape, as [relay.Relay.Stats], and
	// must not block. Nil means that there is no relay.
	RelayStats func(dataplane.Family) relay.Stats
	// ServerStats is asked at each scrape for the connections of servers by name, and
	// must not block. Nil means that there are none.
	ServerStats func() map[string]connlimit.Stats
	// RefusedPackets is asked at each scrape for what the kernel did not serve since it
	// began to count, and may be asked from several goroutines. Its metrics are
	// left out of a scrape when it fails, which is its own to report. Nil means
	// that nobody counts.
	RefusedPackets func() ([]RefusedPackets, error)
	// Standby and Waiting are asked at each scrape: whether this instance waits for
	// the end of another one, and how many wait for this one's. They must not block.
	Standby          func() bool
	WaitingInstances func() int
	// APIResources is asked at each scrape how the lists of the API server are followed,
	// and must not block. Nil means that there is no API server.
	APIResources func() []APIResource
}

// Metrics are the program's. Their methods may be called from any goroutine and
// do not block.
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

	mu               stdsync.Mutex
	programmed       bool // has succeeded
	triggers         map[service][]trigger
	noLocalEndpoints map[trafficPolicy]map[dataplane.Key]int
}

type service struct{ namespace, name string }

// trigger is a change of an EndpointSlice.
type trigger struct {
	// changed is when the change happened that led to it, in its maker's clock, and
	// handed when it came to this program.
	changed, queued time.Time
}

// maxTriggers bounds the triggers of a Service that does not get into the kernel.
const maxTriggers = 16

// trafficPolicy is a value of the label traffic_policy.
type trafficPolicy string

const (
	internal trafficPolicy = "internal"
	external trafficPolicy = "external"
)

// changeCounter counts the objects of one sort that arrive.
type changeCounter struct {
	total   prometheus.Counter
	pending *prometheus.Desc
	// nextCall will be part of the next call to the dataplane, and later of the
	// one after that.
	nextCall, laterCall int
}

const (
	namespace = "fairlead"
	kubeProxy = "kubeproxy"
)

// ipFamilies are the values of kube-proxy's label ip_family.
func ipFamilies() []dataplane.Family { return []dataplane.Family{dataplane.IPv4, dataplane.IPv6} }

// New returns Metrics in a registry of their own, with those of the Go runtime
// and of the process.
func New(options Options) *Metrics {
	m := &Metrics{
		options: options, registry: prometheus.NewRegistry(), started: time.Now(),
		triggers:         map[service][]trigger{},
		noLocalEndpoints: map[trafficPolicy]map[dataplane.Key]int{internal: {}, external: {}},
	}
	m.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	m.addKubeProxy()
	m.addFairlead()
	m.registry.MustRegister(&statusCollector{m})
	if options.RelayStats != nil {
		m.registry.MustRegister(newRelayCollector(options.RelayStats))
	}
	m.addInstances(options)
	m.addOtherProxy()
	if options.ServerStats != nil {
		m.registry.MustRegister(newServerCollector(options.ServerStats))
	}
	if options.APIResources != nil {
		m.registry.MustRegister(newAPICollector(options.APIResources))
	}
	if options.RefusedPackets != nil {
		m.registry.MustRegister(newRefusedCollector(options.RefusedPackets))
	}
	return m
}

// addKubeProxy makes what k8s.io/kubernetes/pkg/proxy/metrics has.
func (m *Metrics) addKubeProxy() {
	syncBuckets := prometheus.ExponentialBuckets(0.001, 2, 15)
	m.syncDuration = m.histogram(kubeProxy, "sync_proxy_rules_duration_seconds",
		"How long calls to the kernel took.", syncBuckets, "ip_family")
	m.fullSyncDuration = m.histogram(kubeProxy, "sync_full_proxy_rules_duration_seconds",
		"How long calls to the kernel took that compared everything.", syncBuckets, "ip_family")
	m.partialSyncDuration = m.histogram(kubeProxy, "sync_partial_proxy_rules_duration_seconds",
		"How long calls to the kernel took that carried changes only.", syncBuckets, "ip_family")
	var buckets []float64
	buckets = append(buckets, prometheus.LinearBuckets(0.25, 0.25, 2)...)
	buckets = append(buckets, prometheus.LinearBuckets(1, 1, 59)...)
	buckets = append(buckets, prometheus.LinearBuckets(60, 5, 12)...)
	buckets = append(buckets, prometheus.LinearBuckets(120, 30, 7)...)
	m.programmingLatency = m.histogram(kubeProxy, "network_programming_duration_seconds",
		"Time from a change of a pod or Service, as the EndpointSlice's annotation "+
			"endpoints.kubernetes.io/last-change-trigger-time has it, until the kernel had it.", buckets, "ip_family")
	m.lastSync = m.gauges(kubeProxy, "sync_proxy_rules_last_timestamp_seconds",
		"When the kernel was last programmed with success.", "ip_family")
	m.lastQueued = m.gauges(kubeProxy, "sync_proxy_rules_last_queued_timestamp_seconds",
		"When the last change was queued for the kernel.", "ip_family")
	m.syncFailures = m.counters(kubeProxy, "sync_proxy_rules_nftables_sync_failures_total",
		"Calls to the kernel that failed, as a whole or in part.", "ip_family")
	m.serviceChanges = m.newChangeCounter("service", "Services")
	m.endpointChanges = m.newChangeCounter("endpoint", "EndpointSlices")
	m.healthz = m.counters(kubeProxy, "proxy_healthz_total", "Answers of /healthz, by HTTP status.", "code")
	m.livez = m.counters(kubeProxy, "proxy_livez_total", "Answers of /livez, by HTTP status.", "code")
	m.conntrackDuration = m.histogram(kubeProxy, "conntrack_reconciler_sync_duration_seconds",
		"How long looks for UDP flows took that would stick to endpoints that have left.", syncBuckets, "ip_family")
	m.conntrackDeleted = m.counters(kubeProxy, "conntrack_reconciler_deleted_entries_total",
		"UDP flows that were forgotten, so that their clients move on to other endpoints.", "ip_family")
	for _, f := range ipFamilies() { // so that they can be seen before they have happened
		m.syncFailures.WithLabelValues(f.String())
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
	m.gauges(namespace, "build_info", "Always 1; the labels say what runs.", "version", "mode").
		WithLabelValues(m.options.Version, m.options.Mode).Set(1)
	m.commits = m.counters(namespace, "commits_total", "Calls to the kernel by kind (apply, replace), reason "+
		"(change, start, retry, node, drift, resync) and result (success, partial, failure).", "kind", "reason", "result")
	m.commitDuration = m.histogram(namespace, "commit_duration_seconds", "How long calls to the kernel took.",
		prometheus.ExponentialBuckets(0.00001, 2, 22), "kind")
	m.changeLatency = m.histogram(namespace, "change_latency_seconds",
		"Time from the arrival of a change, the oldest of each call to the kernel, until the kernel had it.",
		prometheus.ExponentialBuckets(0.00001, 2, 24)).WithLabelValues()
	m.firstProgrammed = m.gauges(namespace, "first_programmed_seconds",
		"Time from the program's start until the kernel had all Services; 0 until then.").WithLabelValues()
	m.firstService = m.gauges(namespace, "first_service_programmed_seconds",
		"Time from the program's start until the first of the Services of the start was complete in the kernel, which those of "+
			"the cluster's DNS are before others; 0 until the kernel has all, and if there are none.").WithLabelValues()
	m.lastService = m.gauges(namespace, "last_service_programmed_seconds",
		"Time from the program's start until the last of the Services of the start was complete in the kernel; 0 until the "+
			"kernel has all, and if there are none.").WithLabelValues()
	m.problems = m.counters(namespace, "service_problems_total",
		"Times that a Service was found to ask for something that it does not get; see the Events and the log.").WithLabelValues()
	m.healthCheckFailures = m.counters(namespace, "health_check_node_port_failures_total",
		"Times that a health-check node port could not be listened on.").WithLabelValues()
	m.rebuilds = m.counters(namespace, "nftables_table_rebuilds_total",
		"Times that an nftables table could not be repaired in place and was rebuilt; see the log and the Events of the Node.", "ip_family")
	for _, f := range ipFamilies() {
		m.rebuilds.WithLabelValues(f.String())
	}
	m.reloads = m.counters(namespace, "config_reloads_total", "Changes of the configuration file by result (success, failure).", "result")
	m.configValid = m.gauges(namespace, "config_valid", "Whether the configuration file is in use as it is: 1, or 0 if it is broken.").WithLabelValues()
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
		total:   m.counters(kubeProxy, name+"total", objects+" that were new, changed or gone.").WithLabelValues(),
		pending: prometheus.NewDesc(kubeProxy+"_"+name+"pending", objects+" that arrived and are not in the kernel yet.", nil, nil),
	}
}

// Handler answers a scrape.
func (m *Metrics) Handler() http.Handler {
	return promhttp.InstrumentMetricHandler(m.registry, promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
}

// Registry is where others may add their collectors.
func (m *Metrics) Registry() prometheus.Registerer { return m.registry }

// RecordObjectChanges counts Services and EndpointSlices that are new, changed or gone.
func (m *Metrics) RecordObjectChanges(services, endpointSlices int) {
	status := m.options.Status()
	now := float64(time.Now().UnixMilli()) / 1000
	m.mu.Lock()
	defer m.mu.Unlock()
	for c, n := range map[*changeCounter]int{&m.serviceChanges: services, &m.endpointChanges: endpointSlices} {
		if isIdle(status) {
			c.nextCall, c.laterCall = 0, 0 // it was no change to the kernel
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

// isIdle reports whether nothing waits for the kernel, nor is on its way to it.
func isIdle(status sync.Status) bool {
	return status.PendingSince.IsZero() && status.CallSince.IsZero()
}

// endCall says that a call to the dataplane has ended.
func (c *changeCounter) endCall(success bool) {
	if success {
		c.nextCall = 0
	}
	c.nextCall, c.laterCall = c.nextCall+c.laterCall, 0
}

// RecordTrigger says that endpoints of a Service have changed at a time that somebody
// else's clock has taken, and that the Service was just handed to the syncer.
// Times before this program's start are left out.
func (m *Metrics) RecordTrigger(namespace, name string, at time.Time) {
	if at.Before(m.started) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	key := service{namespace, name}
	if m.triggers[key] = append(m.triggers[key], trigger{at, time.Now()}); len(m.triggers[key]) > maxTriggers {
		// The oldest stays: it has waited longest.
		m.triggers[key] = slices.Delete(m.triggers[key], 1, 2)
	}
}

// RemoveService says that a Service was deleted, and that this was just handed to the
// syncer: how long its endpoints' changes take is of no interest.
func (m *Metrics) RemoveService(namespace, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.triggers, service{namespace, name})
}

// OnCommit takes over a call to the dataplane, see [sync.Options].
func (m *Metrics) OnCommit(c sync.Commit) {
	result := "success"
	switch {
	case c.Err != nil:
		result = "failure"
	case len(c.Failed) > 0:
		result = "partial"
	}
	took := c.End.Sub(c.Start).Seconds()
	m.commits.WithLabelValues(string(c.Op), string(c.Reason), result).Inc()
	m.commitDuration.WithLabelValues(string(c.Op)).Observe(took)
	part := m.partialSyncDuration
	if c.Op == sync.OpReplace {
		part = m.fullSyncDuration
	}
	for _, f := range commitFamilies(c) {
		m.syncDuration.WithLabelValues(f.String()).Observe(took)
		part.WithLabelValues(f.String()).Observe(took)
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

// hasFailed reports whether a Service of a family did not take.
func hasFailed(c sync.Commit, f dataplane.Family) bool {
	for key := range c.Failed {
		if key.Family == f {
			return true
		}
	}
	return false
}

// commitFamilies returns the families that a call concerned.
func commitFamilies(c sync.Commit) []dataplane.Family {
	var concerned []dataplane.Family
	for _, f := range ipFamilies() {
		if c.Op == sync.OpReplace || c.Err != nil || hasFailed(c, f) ||
			slices.ContainsFunc(c.Changes, func(change dataplane.Change) bool { return change.Key().Family == f }) {
			concerned = append(concerned, f)
		}
	}
	return concerned
}

// observeTriggers takes the time of the triggers that were part of a call, before
// which the keys of before were failing.
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
			continue // it is tried again
		}
		var later []trigger
		for _, t := range triggers {
			switch {
			case t.queued.After(c.Start):
				later = append(later, t)
			case t.queued.Before(c.OldestUpdate) && !failing[s]:
				// It was not in this call, and waits for no other: it was undone
				// before it got to the kernel.
			default:
				for f := range families { // none if it was undone
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

// countNoLocalEndpoints counts svc in or out if a traffic policy of Local leaves its
// clients without endpoints here while there are some elsewhere. A Service port
// counts once, however many kinds of frontends it has.
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

// RecordHealthResponse counts an answer of /healthz or /livez.
func (m *Metrics) RecordHealthResponse(path string, status int) {
	switch path {
	case "/healthz":
		m.healthz.WithLabelValues(strconv.Itoa(status)).Inc()
	case "/livez":
		m.livez.WithLabelValues(strconv.Itoa(status)).Inc()
	}
}

// RecordConntrackScan counts a look for stale UDP flows of a family.
func (m *Metrics) RecordConntrackScan(family dataplane.Family, took time.Duration, deleted int) {
	m.conntrackDuration.WithLabelValues(family.String()).Observe(took.Seconds())
	m.conntrackDeleted.WithLabelValues(family.String()).Add(float64(deleted))
}

// RecordProblem counts a Service that asks for what it does not get.
func (m *Metrics) RecordProblem() { m.problems.Inc() }

// RecordHealthCheckFailure counts a health-check node port that can't be listened on.
func (m *Metrics) RecordHealthCheckFailure() { m.healthCheckFailures.Inc() }

// RecordTableRebuild counts a table of nftables that was rebuilt.
func (m *Metrics) RecordTableRebuild(f dataplane.Family) {
	m.rebuilds.WithLabelValues(f.String()).Inc()
}

// RecordReload counts a change of the configuration file, with what became of it.
func (m *Metrics) RecordReload(err error) {
	if err != nil {
		m.reloads.WithLabelValues("failure").Inc()
		m.configValid.Set(0)
		return
	}
	m.reloads.WithLabelValues("success").Inc()
	m.configValid.Set(1)
}

// statusCollector collects what is worked out when somebody asks.
type statusCollector struct{ metrics *Metrics }

var _ prometheus.Collector = (*statusCollector)(nil)

type statusDescs struct{ services, servicesFailing, dataplaneFailed, oldestChangeAge, noLocalEndpoints *prometheus.Desc }

func newStatusDescs() statusDescs {
	return statusDescs{
		services: prometheus.NewDesc("fairlead_services",
			"Service ports wanted in the kernel; each IP family, and each kind of address (cluster IP, node port, "+
				"external IP, load balancer), counts for itself.", nil, nil),
		servicesFailing: prometheus.NewDesc("fairlead_services_failing",
			"Of fairlead_services, those that are not in the kernel as wanted, by reason: unsupported means that this mode "+
				"can't carry them out, error that the kernel did not take them.", []string{"reason"}, nil),
		dataplaneFailed: prometheus.NewDesc("fairlead_dataplane_failed",
			"1 if the last call to the kernel failed as a whole, else 0.", nil, nil),
		oldestChangeAge: prometheus.NewDesc("fairlead_oldest_change_age_seconds",
			"How long the oldest change has been waiting for the kernel; 0 if there is none.", nil, nil),
		noLocalEndpoints: prometheus.NewDesc("kubeproxy_sync_proxy_rules_no_local_endpoints_total",
			"Service ports with a Local traffic policy that have endpoints, but none here.", []string{"traffic_policy", "ip_family"}, nil),
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
			pending = 0 // what came last was no change to the kernel
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
