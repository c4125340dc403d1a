// Package agent implements the node agent. It watches a source of Kubernetes objects and this
// node's addresses, and programs a backend. It also runs health checks, metrics, conntrack
// cleanup, the relay for node ports on loopback addresses, and DNS.
//
// [New] creates all components and [Agent.Run] runs them. The caller parses the flags, selects
// the backend and opens the source.
package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	stdsync "sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/flowoffload"
	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/history"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/nodeip"
	"fairlead.io/fairlead/internal/nodesettings"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/internal/servicecounters"
	"fairlead.io/fairlead/internal/zpages"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/manifest/dns"
	"fairlead.io/fairlead/sync"
)

// resyncPeriod is how often the kernel state is compared with the desired state without a
// kernel notification, because notifications can be lost. A resync writes only differences.
const resyncPeriod = 15 * time.Minute

// Options are the options of [New].
type Options struct {
	Config  config.Config
	Backend backend.Backend
	// Version appears in the log, in metrics and in messages of other instances.
	Version string
	// KubernetesVersion is the release of kube-proxy that the agent corresponds to.
	KubernetesVersion string
	// Flags has the values of all flags, for /flagz.
	Flags map[string]string
	// ProcessMetrics returns the metrics of the process, see [metrics.Options].
	ProcessMetrics prometheus.Gatherer

	// Source delivers the objects. SourceName names it in the log.
	Source     Source
	SourceName string
	// Events reports problems to the cluster.
	Events Events
	// APIResources returns the state of the watched API resources, nil without an API server.
	APIResources func() []metrics.APIResource
	// APIConnection returns the state of the connection to the API server, nil without one.
	APIConnection func() metrics.APIConnection

	Logger *slog.Logger
	// LogLevel is the level of Logger. Reloading the configuration file sets it.
	LogLevel *slog.LevelVar
	// File is the configuration file to watch, nil without one.
	File *ConfigFile
}

// ConfigFile describes a loaded configuration file.
type ConfigFile struct {
	// Flags contains the path of the file and the other flags.
	Flags config.Flags
	// Content is the content that [config.Load] returned.
	Content []byte
}

// Agent programs a node. [New] creates it.
type Agent struct {
	log      *slog.Logger
	logLevel *slog.LevelVar
	config   config.Config
	version  string
	backend  backend.Backend
	dp       dataplane.Dataplane
	counters *packetCounters
	// serviceCounters is nil without --service-metrics.
	serviceCounters *servicecounters.Dataplane
	// flowOffload is nil without --flow-offload.
	flowOffload  *flowoffload.Dataplane
	source       Source
	sourceName   string
	pipeline     *pipeline.Pipeline
	conntrack    *conntrack.Cleaner
	relay        *relay.Relay
	limiters     serverLimiters
	listeners    listeners
	healthChecks *health.Ports
	nodeHealth   *health.Proxy
	metrics      *metrics.Metrics
	history      *history.Recorder // of the status page
	affinity     *affinityLimiter  // nil if the backend does not need one
	nodeSettings *nodesettings.Watcher
	// conntrackSettings are the kernel's settings, conntrack deletes stale entries.
	conntrackSettings *conntrackSettings
	dispatcher        *dispatcher
	standby           *standby
	progress          *progress
	dns               *dns.Server      // nil without --dns-listen
	reloader          *config.Reloader // nil without a configuration file
	pages             zpages.Options
	// apiConnection returns the state of the connection to the API server, nil without one.
	apiConnection func() metrics.APIConnection
	// fields is the KubeProxyConfiguration in effect.
	fields atomic.Pointer[config.Fields]
}

// New opens the backend and creates the components, without starting or programming anything.
// Only [Agent.Run] closes the backend.
//
// The dataplane and the syncer report to observers, because components that observe commits
// depend on the syncer and are created after it.
func New(o Options) (*Agent, error) {
	c, b, log := o.Config, o.Backend, o.Logger
	a := &Agent{
		log: log, logLevel: o.LogLevel, config: c, version: o.Version, backend: b, source: o.Source, sourceName: o.SourceName,
		apiConnection: o.APIConnection, history: history.New(), standby: newStandby(log, instanceDescription(o)),
		pages: zpages.Options{Component: "fairlead", Version: o.Version, KubernetesVersion: o.KubernetesVersion, Flags: o.Flags},
	}
	a.fields.Store(&c.Fields)
	a.pages.Config = func() (map[string]json.RawMessage, error) { return a.fields.Load().Configz() }
	var err error
	var rebuilds observers[backend.Rebuild]
	if a.dp, err = b.Dial(backend.Options{Logger: log, Values: c.Values, OwnTables: c.OwnTables, OnRebuild: rebuilds.notify}); err != nil {
		return nil, err
	}
	var commits observers[sync.Commit]
	tracker := b.TrackerOptions(c.Tracker, c.Values)
	counted, err := a.newServiceCounters(b, c)
	if err != nil {
		return nil, err
	}
	programmed, err := a.newFlowOffload(counted, c.FlowOffload, o.Events)
	if err != nil {
		return nil, err
	}
	a.pipeline = pipeline.New(programmed, pipeline.Options{
		Tracker: tracker, Logger: log.With("component", "sync"), ResyncPeriod: resyncPeriod, OnCommit: commits.notify,
	})
	a.progress = newProgress(a.pipeline.Syncer.Status)
	a.conntrackSettings = newConntrackSettings(c.Conntrack, a.progress.programmed, log.With("component", "conntrack"))
	state := &nodeState{log: log, sourceHasNodes: c.Manifests == "", name: c.Tracker.NodeName}
	shares := divideDescriptors(openFilesLimit())
	a.relay = relay.New(relay.Options{
		MaxConnections: shares.relayConnections, MaxListeners: shares.relayListeners, Logger: log.With("component", "relay"),
	})
	a.limiters = newServerLimiters(shares.serverConnections, log)
	a.nodeSettings = nodesettings.New(nodesettings.Options{Logger: log.With("component", "node-settings")})
	a.counters = newPacketCounters(b, log)
	a.metrics = a.newMetrics(o)
	if a.affinity = newAffinityLimiter(b, a.dp, log); a.affinity != nil {
		a.metrics.AddAffinity(a.affinity.limiter.Stats)
	}
	a.nodeHealth = health.NewProxy(health.ProxyOptions{
		Progress: a.progress.healthProgress, Eligible: state.eligible, APIServer: apiServerHealth(o.APIConnection), OnResponse: a.metrics.RecordHealthResponse,
	})
	a.healthChecks = health.NewPorts(health.PortsOptions{
		Healthy: a.nodeHealth.Healthy, MaxListeners: shares.healthCheckListeners,
		OnListenError: func(service health.Service, port uint16, err error) {
			a.metrics.RecordHealthCheckFailure()
			o.Events.HealthCheckFailed(service.Namespace, service.Name, port, err)
		},
		Limiter: a.limiters.healthChecks, Logger: log.With("component", "health"),
	})
	if b.Conntrack {
		a.conntrack = conntrack.New(conntrack.Options{Logger: log.With("component", "conntrack"), OnScan: func(l conntrack.ScanResult) {
			if l.Err == nil || l.Deleted > 0 {
				a.metrics.RecordConntrackScan(l.Family, l.Duration, l.Deleted)
			}
		}})
	}
	if c.DNSListen != "" {
		a.dns = dns.New(dns.Options{ClusterDomain: c.ClusterDomain, Limiter: a.limiters.dns, Logger: log.With("component", "dns")})
	}
	rebuilds.add(func(r backend.Rebuild) {
		a.metrics.RecordTableRebuild(r.Family)
		a.history.RecordEvent(history.Rebuild, true, fmt.Sprintf("table %s was rebuilt: %s", r.Table, r.Reason))
		o.Events.TableRebuilt(r.Table, r.Reason)
	})
	commits.add(a.metrics.OnCommit)
	commits.add(a.history.OnCommit)
	if a.conntrack != nil {
		commits.add(a.conntrack.OnCommit)
	}
	commits.add(a.relay.OnCommit)
	commits.add(a.progress.onCommit)
	commits.add(func(c sync.Commit) {
		for key, err := range c.Failed {
			o.Events.NotProgrammed(key, err)
		}
	})
	a.dispatcher = &dispatcher{
		log: log, pipeline: a.pipeline, conntrack: a.conntrack, relay: a.relay, healthChecks: a.healthChecks, metrics: a.metrics, history: a.history, nodeSettings: a.nodeSettings,
		events: o.Events, dns: a.dns, nodeState: state, nodePortAddresses: tracker.NodePortAddresses, proxyName: tracker.ServiceProxyName,
	}
	if f := o.File; f != nil {
		a.reloader = config.NewReloader(config.ReloaderOptions{
			Flags: f.Flags, Content: f.Content, Logger: log, Apply: a.applyConfig, OnResult: a.recordReload,
		})
	}
	return a, nil
}

// newMetrics returns the Metrics of the components created so far.
func (a *Agent) newMetrics(o Options) *metrics.Metrics {
	options := metrics.Options{
		Version: a.version, Mode: a.config.Mode, KubernetesVersion: o.KubernetesVersion, Process: o.ProcessMetrics, Status: a.pipeline.Syncer.Status, RelayStats: a.relay.Stats,
		ServerStats: a.limiters.stats, Listening: a.listenerStates, Standby: a.standby.isStandby, WaitingInstances: a.standby.waitingInstances,
		APIResources: o.APIResources, APIConnection: o.APIConnection,
	}
	if a.counters != nil {
		options.RefusedPackets = a.counters.readRefused
	}
	m := metrics.New(options)
	if a.serviceCounters != nil {
		m.AddServiceConnections(a.readServiceCounters)
	}
	if a.flowOffload != nil {
		m.AddFlowOffload(a.readFlowOffload)
	}
	m.AddConntrackSettings(func() int { return int(a.conntrackSettings.failing.Load()) })
	m.AddNodeSettings(func() map[string]int { return countSettingProblems(a.nodeSettings.Problems()) })
	return m
}

// close closes the connections to the kernel and releases the instance lock.
func (a *Agent) close(ctx context.Context) {
	a.giveWay(context.WithoutCancel(ctx), a.config.GiveWayAfter)
	closeCounters := func() error { return nil }
	if a.counters != nil {
		closeCounters = a.counters.close
	}
	closeServiceCounters := func() error { return nil }
	if a.serviceCounters != nil {
		closeServiceCounters = a.serviceCounters.Close
	}
	closeFlowOffload := func() error { return nil }
	if a.flowOffload != nil {
		closeFlowOffload = a.flowOffload.Close
	}
	if err := errors.Join(closeCounters(), closeServiceCounters(), closeFlowOffload(), a.dp.Close(), a.standby.release()); err != nil {
		a.log.WarnContext(ctx, "closing the connections to the kernel failed", "error", err)
	}
}

// Run programs the node until ctx is done or a component fails, and then closes the backend.
// Programmed Services stay in the kernel. Run must be called at most once.
//
// Until all Services are programmed for the first time, Run changes the garbage collector
// settings of the process, unless GOGC or GOMEMLIMIT is set.
func (a *Agent) Run(ctx context.Context) error {
	heap := newStartupHeap()
	defer a.close(ctx)
	group, ctx := errgroup.WithContext(ctx)
	a.standby.start(ctx, group)
	active := func(run func(context.Context) error) {
		run = a.standby.whenActive(run)
		group.Go(func() error { return run(ctx) })
	}
	if err := a.serveDNS(ctx, group); err != nil {
		return err
	}
	a.reportReplacedMode(a.config)
	watchOthers := a.detectOtherProxies(ctx)
	group.Go(func() error { return watchOthers(ctx) })
	// Start the source after the node's addresses are known, so that the first commit
	// includes node ports.
	addressesKnown := make(chan struct{})
	ready := stdsync.OnceFunc(func() { close(addressesKnown) })
	group.Go(func() error {
		watch := func(ctx context.Context, deliver func(nodeip.Addresses)) error {
			return nodeip.Watch(ctx, nodeip.Options{Logger: a.log.With("component", "nodeip")}, deliver)
		}
		return a.dispatcher.watchAddresses(ctx, watch, ready)
	})
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-addressesKnown:
			return a.source.Run(ctx, func(d kube.Delta) {
				heap.endLists()
				a.dispatcher.deliver(d)
			})
		}
	})
	group.Go(func() error {
		a.pipeline.Syncer.Prepare(ctx, a.standby.activated)
		return a.standby.whenActive(a.pipeline.Syncer.Run)(ctx)
	})
	group.Go(func() error {
		removeOtherBackends(ctx, a.backend, a.log, a.progress.programmed, backend.Backend.RemoveDrained)
		return nil
	})
	if a.serviceCounters == nil {
		group.Go(func() error {
			removeServiceCounters(ctx, a.log, a.progress.programmed)
			return nil
		})
	}
	if a.flowOffload == nil {
		group.Go(func() error {
			removeFlowOffload(ctx, a.log, a.progress.programmed)
			return nil
		})
	} else {
		active(a.flowOffload.Run)
	}
	group.Go(func() error {
		heap.releaseAfter(ctx, a.progress.programmed)
		return nil
	})
	if a.conntrack != nil {
		active(a.conntrack.Run)
	}
	active(a.relay.Run)
	active(a.nodeSettings.Run)
	active(a.conntrackSettings.run)
	if a.affinity != nil {
		active(a.affinity.run)
	}
	active(a.healthChecks.Run)
	active(a.dispatcher.events.Run)
	a.serveHTTP(ctx, group, httpServer{
		flag: "healthz-bind-address", address: a.config.HealthzAddress, handler: a.nodeHealth.Handler(), limiter: a.limiters.healthz, hardFail: a.config.HardFail,
		listening: &a.listeners.healthz, report: a.dispatcher.events.HealthzServerFailed,
	})
	a.serveHTTP(ctx, group, httpServer{
		flag: "metrics-bind-address", address: a.config.MetricsAddress, handler: a.metricsHandler(), limiter: a.limiters.metrics, hardFail: a.config.HardFail,
		listening: &a.listeners.metrics, report: a.dispatcher.events.MetricsServerFailed,
	})
	// The page is not essential, so the agent never exits because of its address.
	a.serveHTTP(ctx, group, httpServer{
		flag: "status-address", address: a.config.StatusAddress, handler: a.newStatusPage().Handler(), limiter: a.limiters.status, listening: &a.listeners.status,
	})
	if a.reloader != nil {
		group.Go(func() error { return a.reloader.Run(ctx) })
	}
	a.log.InfoContext(ctx, "running", "version", a.version, "mode", a.config.Mode, "source", a.sourceName, "node", a.config.Tracker.NodeName)
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	a.log.InfoContext(ctx, "stopped; programmed Services stay in place")
	return nil
}
