// Package agent is the node agent: it follows a source of Kubernetes objects and this
// node's addresses, programs a backend, and runs what belongs to it: health checks,
// metrics, connection tracking, node ports at loopback addresses, DNS.
//
// [New] builds all parts in one place, and [Agent.Run] runs them. The command that uses
// it reads the flags, chooses the backend and opens the source.
package agent

import (
	"context"
	"errors"
	"log/slog"
	stdsync "sync"
	"time"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/nodeip"
	"fairlead.io/fairlead/internal/nodesettings"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/source/manifest/dns"
	"fairlead.io/fairlead/sync"
)

// resyncPeriod is the time after which the kernel's state is compared with the desired
// state although the kernel has announced no change: announcements can get lost. The
// comparison writes only differences.
const resyncPeriod = 15 * time.Minute

// Options describe an [Agent].
type Options struct {
	Config  config.Config
	Backend backend.Backend
	// Version is the program's, for the log, the metrics and other instances.
	Version string

	// Source delivers the objects. The log calls it by SourceName.
	Source     Source
	SourceName string
	// Events reports to the cluster what the source's objects ask for in vain.
	Events Events
	// APILists returns how the lists of the API server are followed. Nil if the source
	// follows none.
	APILists func() []metrics.APIList

	Logger *slog.Logger
	// LogLevel is the level of Logger. A changed configuration file may set it.
	LogLevel *slog.LevelVar
	// File is the configuration file to follow, nil without one.
	File *ConfigFile
}

// ConfigFile is a configuration file that was read.
type ConfigFile struct {
	// Flags has the path, and what the command line says besides the file.
	Flags config.Flags
	// Content is the text that [config.Load] returned.
	Content []byte
}

// Agent has all parts.
type Agent struct {
	log        *slog.Logger
	level      *slog.LevelVar
	config     config.Config
	version    string
	backend    backend.Backend
	dp         dataplane.Dataplane
	counters   *counters
	source     Source
	sourceName string
	pipeline   *pipeline.Pipeline
	flows      *conntrack.Cleaner
	relay      *relay.Relay
	servers    servers
	ports      *health.Ports
	proxy      *health.Proxy
	metrics    *metrics.Metrics
	affinity   *affinity // nil where the kernel has no maps for it
	settings   *nodesettings.Watcher
	dispatcher *dispatcher
	standby    *standby
	progress   *progress
	names      *dns.Server      // nil without --dns-listen
	reload     *config.Reloader // nil without a configuration file
}

// New opens the backend and makes the parts, each after the parts that it needs. Nothing
// runs yet, and New programs nothing. The dataplane and the syncer report to observers,
// because parts that need the syncer's status also observe its commits.
//
// Only [Agent.Run] closes the backend.
func New(o Options) (*Agent, error) {
	c, b, log := o.Config, o.Backend, o.Logger
	a := &Agent{
		log: log, level: o.LogLevel, config: c, version: o.Version, backend: b, source: o.Source, sourceName: o.SourceName,
		standby: newStandby(log, describe(o)),
	}
	var err error
	var rebuilds observers[backend.Rebuild]
	if a.dp, err = b.Dial(backend.Options{Logger: log, Values: c.Values, OwnTables: c.OwnTables, OnRebuild: rebuilds.notify}); err != nil {
		return nil, err
	}
	var commits observers[sync.Commit]
	tracker := trackerOptions(b, c.Tracker)
	a.pipeline = pipeline.New(a.dp, pipeline.Options{
		Tracker: tracker, Logger: log.With("component", "sync"), ResyncPeriod: resyncPeriod, OnCommit: commits.notify,
	})
	a.progress = newProgress(a.pipeline.Syncer.Status)
	state := &nodeState{log: log, hasNode: c.Manifests == "", name: c.Tracker.NodeName}
	shares := divideDescriptors(openFilesLimit())
	a.relay = relay.New(relay.Options{
		MaxConnections: shares.relayConnections, MaxListeners: shares.relayListeners, Logger: log.With("component", "relay"),
	})
	a.servers = newServers(shares.serverConnections, log)
	a.settings = nodesettings.New(nodesettings.Options{Logger: log.With("component", "node-settings")})
	a.counters = newCounters(b, log)
	a.metrics = a.newMetrics(o)
	if a.affinity = newAffinity(b, a.dp, log); a.affinity != nil {
		a.metrics.AddAffinity(a.affinity.limiter.Stats)
	}
	a.proxy = health.NewProxy(health.ProxyOptions{
		Progress: a.progress.report, Eligible: state.eligible, Answered: a.metrics.Answered,
	})
	a.ports = health.NewPorts(health.PortsOptions{
		Healthy: a.proxy.Healthy, MaxListeners: shares.healthCheckListeners,
		Failed: func(service health.Service, port uint16, err error) {
			a.metrics.HealthCheckFailed()
			o.Events.HealthCheckFailed(service.Namespace, service.Name, port, err)
		},
		Limiter: a.servers.healthChecks, Logger: log.With("component", "health"),
	})
	if b.Conntrack {
		a.flows = conntrack.New(conntrack.Options{Logger: log.With("component", "conntrack"), OnLook: func(l conntrack.Look) {
			if l.Err == nil || l.Deleted > 0 {
				a.metrics.Looked(l.Family, l.Took, l.Deleted)
			}
		}})
	}
	if c.DNSListen != "" {
		a.names = dns.New(dns.Options{ClusterDomain: c.ClusterDomain, Limiter: a.servers.dns, Logger: log.With("component", "dns")})
	}
	rebuilds.add(func(r backend.Rebuild) {
		a.metrics.TableRebuilt(r.Family)
		o.Events.TableRebuilt(r.Table, r.Reason)
	})
	commits.add(a.metrics.Committed)
	if a.flows != nil {
		commits.add(a.flows.Committed)
	}
	commits.add(a.relay.Committed)
	commits.add(a.progress.committed)
	commits.add(func(c sync.Commit) {
		for key, err := range c.Failed {
			o.Events.NotProgrammed(key, err)
		}
	})
	a.dispatcher = &dispatcher{
		log: log, pipeline: a.pipeline, flows: a.flows, relay: a.relay, ports: a.ports, metrics: a.metrics, settings: a.settings,
		events: o.Events, names: a.names, state: state, nodePorts: tracker.NodePortAddresses,
	}
	if f := o.File; f != nil {
		a.reload = config.NewReloader(config.ReloaderOptions{
			Flags: f.Flags, Content: f.Content, Logger: log, Apply: a.apply, Done: a.metrics.Reloaded,
		})
	}
	return a, nil
}

// newMetrics returns the metrics of the parts that there are by now.
func (a *Agent) newMetrics(o Options) *metrics.Metrics {
	options := metrics.Options{
		Version: a.version, Mode: a.config.Mode, Status: a.pipeline.Syncer.Status, Relay: a.relay.Stats,
		Servers: a.servers.stats, Standby: a.standby.onStandby, Waiting: a.standby.waiting,
		APILists: o.APILists,
	}
	if a.counters != nil {
		options.Unserved = a.counters.unserved
	}
	m := metrics.New(options)
	m.AddNodeSettings(func() map[string]int { return countSettings(a.settings.Problems()) })
	return m
}

// close closes the connections to the kernel and lets the next instance take over.
func (a *Agent) close(ctx context.Context) {
	a.giveWay(context.WithoutCancel(ctx), a.config.GiveWayAfter)
	closeCounters := func() error { return nil }
	if a.counters != nil {
		closeCounters = a.counters.close
	}
	if err := errors.Join(closeCounters(), a.dp.Close(), a.standby.release()); err != nil {
		a.log.WarnContext(ctx, "the connection to the kernel was not closed", "error", err)
	}
}

// Run programs the node until ctx is done or one of the parts fails, and then closes the
// backend. The kernel keeps the Services. Run must be called at most once.
//
// While everything is programmed for the first time, it changes the settings of the garbage
// collector, unless the environment has them (GOGC, GOMEMLIMIT).
func (a *Agent) Run(ctx context.Context) error {
	heap := newStartHeap()
	defer a.close(ctx)
	group, ctx := errgroup.WithContext(ctx)
	a.standby.start(ctx, group)
	active := func(run func(context.Context) error) {
		run = a.standby.gate(run)
		group.Go(func() error { return run(ctx) })
	}
	if err := a.serveDNS(ctx, group); err != nil {
		return err
	}
	watchOthers := a.lookForOthers(ctx)
	group.Go(func() error { return watchOthers(ctx) })
	// The node's addresses are known before the first programming, so that node
	// ports are part of it.
	addressed := make(chan struct{})
	ready := stdsync.OnceFunc(func() { close(addressed) })
	group.Go(func() error {
		watch := func(ctx context.Context, deliver func(nodeip.Addresses)) error {
			return nodeip.Watch(ctx, nodeip.Options{Logger: a.log.With("component", "nodeip")}, deliver)
		}
		return a.dispatcher.followAddresses(ctx, watch, ready)
	})
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-addressed:
			return a.source.Run(ctx, a.dispatcher.deliver)
		}
	})
	group.Go(func() error {
		a.standby.prefetch(ctx, a.dp)
		return a.standby.gate(a.pipeline.Syncer.Run)(ctx)
	})
	group.Go(func() error {
		takeOver(ctx, a.backend, a.log, a.progress.programmed, backend.Backend.Remove)
		return nil
	})
	group.Go(func() error {
		heap.end(ctx, a.progress.programmed)
		return nil
	})
	if a.flows != nil {
		active(a.flows.Run)
	}
	active(a.relay.Run)
	active(a.settings.Run)
	if a.affinity != nil {
		active(a.affinity.run)
	}
	active(a.ports.Run)
	active(a.dispatcher.events.Run)
	a.serve(ctx, group, "healthz-bind-address", a.config.HealthzAddress, a.proxy.Handler(), a.servers.healthz)
	a.serve(ctx, group, "metrics-bind-address", a.config.MetricsAddress, a.metricsHandler(), a.servers.metrics)
	if a.reload != nil {
		group.Go(func() error { return a.reload.Run(ctx) })
	}
	a.log.InfoContext(ctx, "running", "version", a.version, "mode", a.config.Mode, "source", a.sourceName, "node", a.config.Tracker.NodeName)
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	a.log.InfoContext(ctx, "stopped; what is programmed stays in place")
	return nil
}
