package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"
	stdsync "sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/connlimit"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/nodeip"
	"fairlead.io/fairlead/internal/nodesettings"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/source/manifest/dns"
	"fairlead.io/fairlead/sync"
)

// resyncPeriod is how often the kernel is compared with what is wanted although
// nobody has announced a change: for announcements that were lost. Where nothing
// differs nothing is written.
const resyncPeriod = 15 * time.Minute

func runCommand(setClientLogger func(*slog.Logger)) *cobra.Command {
	var flags config.Flags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Program this node and keep it programmed",
		Long: `Program this node's kernel with the Services of a Kubernetes API server, or of a
folder of YAML files, and keep it so until the program is told to stop (SIGTERM
or SIGINT). What is programmed then stays and works; "fairlead cleanup" removes
it. A start in another mode takes over: what the mode before has programmed is
removed when everything is programmed anew.

The flags are kube-proxy's where it has one for the purpose, and an empty value
means that a flag is not set. kube-proxy's flags that have no effect here are
accepted as well, and named in a warning.`,
		Example: `  fairlead run --kubeconfig=/etc/fairlead/kubeconfig.conf --cluster-cidr=10.244.0.0/16
  fairlead run --kubeconfig=/etc/fairlead/kubeconfig.conf --mode=ipvs --ipvs-scheduler=lc
  fairlead run --mode=nft --manifests=./services --service-cidr=10.96.0.0/16 --cluster-cidr=10.244.0.0/16`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runProgram(cmd.Context(), flags, cmd.ErrOrStderr(), setClientLogger)
		},
	}
	flags = config.AddFlags(cmd)
	return cmd
}

// runProgram is `fairlead run`.
func runProgram(ctx context.Context, flags config.Flags, stderr io.Writer, setClientLogger func(*slog.Logger)) error {
	c, content, err := config.Load(flags)
	if err != nil {
		return err
	}
	heap := newStartHeap()
	level := &slog.LevelVar{}
	level.Set(c.LogLevel)
	log := config.NewLogger(stderr, level, c.LogFormat)
	setClientLogger(log.With("component", "client-go"))
	warn(ctx, log, c)
	b, err := backend.ByName(c.Mode)
	if err != nil {
		return err
	}
	if c.InitOnly {
		return b.Prepare(ctx, backend.Options{Logger: log, Values: c.Values})
	}
	p, err := build(c, b, log) //nolint:contextcheck // what it opens has contexts of its own
	if err != nil {
		return err
	}
	defer p.close(ctx, c)
	if content != nil {
		p.reload = config.NewReloader(config.ReloaderOptions{
			Flags: flags, Content: content, Logger: log, Apply: p.applier(c, level), Done: p.metrics.Reloaded,
		})
	}
	return p.run(ctx, c, heap)
}

// warn logs what was given without effect, and what is deprecated.
func warn(ctx context.Context, log *slog.Logger, c config.Config) {
	for _, n := range c.Notes {
		if n.Deprecated {
			log.WarnContext(ctx, "a setting is deprecated", "setting", n.Setting, "instead", n.Reason)
			continue
		}
		log.WarnContext(ctx, "a setting has no effect", "setting", n.Setting, "reason", n.Reason)
	}
}

// program has all parts.
type program struct {
	log      *slog.Logger
	backend  backend.Backend
	dp       dataplane.Dataplane
	counters *counters
	source   source
	syncer   *sync.Syncer
	flows    *conntrack.Cleaner
	relay    *relay.Relay
	servers  servers
	ports    *health.Ports
	proxy    *health.Proxy
	metrics  *metrics.Metrics
	affinity *affinity // nil where the kernel has no maps for it
	settings *nodesettings.Watcher
	join     *join
	standby  *standby
	progress *progress
	names    *dns.Server      // nil if nobody asks for names
	reload   *config.Reloader // nil without a configuration file
}

// build makes the parts, each after those that it needs. Nothing runs yet, and nothing
// is programmed. The dataplane and the syncer report to observers, since those that
// read the syncer's status also hear of its commits.
func build(c config.Config, b backend.Backend, log *slog.Logger) (*program, error) {
	p := &program{log: log, backend: b, standby: newStandby(log, describe(c))}
	var err error
	var events events
	if p.source, events, err = openSource(c, b, log); err != nil {
		return nil, err
	}
	var rebuilds observers[backend.Rebuild]
	if p.dp, err = b.Dial(backend.Options{Logger: log, Values: c.Values, OwnTables: c.OwnTables, OnRebuild: rebuilds.notify}); err != nil {
		return nil, err
	}
	var commits observers[sync.Commit]
	p.syncer = sync.New(p.dp, sync.Options{
		Logger: log.With("component", "sync"), ResyncPeriod: resyncPeriod, First: kube.IsFirst, OnCommit: commits.notify,
	})
	p.progress = newProgress(p.syncer.Status)
	state := &nodeState{log: log, hasNode: c.Manifests == "", name: c.Tracker.NodeName}
	shares := divideDescriptors(openFilesLimit())
	p.relay = relay.New(relay.Options{
		MaxConnections: shares.relayConnections, MaxListeners: shares.relayListeners, Logger: log.With("component", "relay"),
	})
	p.servers = newServers(shares.serverConnections, log)
	p.settings = nodesettings.New(nodesettings.Options{Logger: log.With("component", "node-settings")})
	p.counters = newCounters(b, log)
	p.metrics = p.newMetrics(c)
	if p.affinity = newAffinity(b, p.dp, log); p.affinity != nil {
		p.metrics.AddAffinity(p.affinity.limiter.Stats)
	}
	p.proxy = health.NewProxy(health.ProxyOptions{
		Progress: p.progress.report, Eligible: state.eligible, Answered: p.metrics.Answered,
	})
	p.ports = health.NewPorts(health.PortsOptions{
		Healthy: p.proxy.Healthy, MaxListeners: shares.healthCheckListeners,
		Failed: func(service health.Service, port uint16, err error) {
			p.metrics.HealthCheckFailed()
			events.HealthCheckFailed(types.NamespacedName{Namespace: service.Namespace, Name: service.Name}, port, err)
		},
		Limiter: p.servers.healthChecks, Logger: log.With("component", "health"),
	})
	if b.Conntrack {
		p.flows = conntrack.New(conntrack.Options{Logger: log.With("component", "conntrack"), OnLook: func(l conntrack.Look) {
			if l.Err == nil || l.Deleted > 0 {
				p.metrics.Looked(l.Family, l.Took, l.Deleted)
			}
		}})
	}
	if c.DNSListen != "" {
		p.names = dns.New(dns.Options{ClusterDomain: c.ClusterDomain, Limiter: p.servers.dns, Logger: log.With("component", "dns")})
	}
	rebuilds.add(func(r backend.Rebuild) {
		p.metrics.TableRebuilt(r.Family)
		events.TableRebuilt(r.Table, r.Reason)
	})
	commits.add(p.metrics.Committed)
	if p.flows != nil {
		commits.add(p.flows.Committed)
	}
	commits.add(p.relay.Committed)
	commits.add(p.progress.committed)
	commits.add(func(c sync.Commit) {
		for key, err := range c.Failed {
			events.NotProgrammed(key, err)
		}
	})
	options := trackerOptions(b, c.Tracker)
	p.join = &join{
		log: log, syncer: p.syncer, flows: p.flows, relay: p.relay, ports: p.ports, metrics: p.metrics, settings: p.settings,
		events: events, names: p.names, state: state, tracker: kube.NewTracker(options), nodePorts: options.NodePortAddresses,
	}
	return p, nil
}

// newMetrics returns the metrics of the parts that there are by now.
func (p *program) newMetrics(c config.Config) *metrics.Metrics {
	options := metrics.Options{
		Version: version, Mode: c.Mode, Status: p.syncer.Status, Relay: p.relay.Stats,
		Servers: p.servers.stats, Standby: p.standby.onStandby, Waiting: p.standby.waiting,
		APILists: apiLists(p.source),
	}
	if p.counters != nil {
		options.Unserved = p.counters.unserved
	}
	m := metrics.New(options)
	m.AddNodeSettings(func() map[string]int { return countSettings(p.settings.Problems()) })
	return m
}

func (p *program) close(ctx context.Context, c config.Config) {
	p.giveWay(context.WithoutCancel(ctx), c.GiveWayAfter)
	closeCounters := func() error { return nil }
	if p.counters != nil {
		closeCounters = p.counters.close
	}
	if err := errors.Join(closeCounters(), p.dp.Close(), p.standby.release()); err != nil {
		p.log.WarnContext(ctx, "the connection to the kernel was not closed", "error", err)
	}
}

// run blocks until ctx is done or one of the parts fails.
func (p *program) run(ctx context.Context, c config.Config, heap *startHeap) error {
	group, ctx := errgroup.WithContext(ctx)
	p.standby.start(ctx, group)
	active := func(run func(context.Context) error) {
		run = p.standby.gate(run)
		group.Go(func() error { return run(ctx) })
	}
	if err := p.serveDNS(ctx, group, c); err != nil {
		return err
	}
	watchOthers := p.lookForOthers(ctx)
	group.Go(func() error { return watchOthers(ctx) })
	// The node's addresses are known before the first programming, so that node
	// ports are part of it.
	addressed := make(chan struct{})
	ready := stdsync.OnceFunc(func() { close(addressed) })
	group.Go(func() error {
		watch := func(ctx context.Context, deliver func(nodeip.Addresses)) error {
			return nodeip.Watch(ctx, nodeip.Options{Logger: p.log.With("component", "nodeip")}, deliver)
		}
		return p.join.follow(ctx, watch, ready)
	})
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-addressed:
			return p.source.Run(ctx, p.join.deliver)
		}
	})
	group.Go(func() error {
		p.standby.prefetch(ctx, p.dp)
		return p.standby.gate(p.syncer.Run)(ctx)
	})
	group.Go(func() error {
		takeOver(ctx, p.backend, p.log, p.progress.programmed, backend.Backend.Remove)
		return nil
	})
	group.Go(func() error {
		heap.end(ctx, p.progress.programmed)
		return nil
	})
	if p.flows != nil {
		active(p.flows.Run)
	}
	active(p.relay.Run)
	active(p.settings.Run)
	if p.affinity != nil {
		active(p.affinity.run)
	}
	active(p.ports.Run)
	active(p.join.events.Run)
	p.serve(ctx, group, c, "healthz-bind-address", c.HealthzAddress, p.proxy.Handler(), p.servers.healthz)
	p.serve(ctx, group, c, "metrics-bind-address", c.MetricsAddress, p.metricsHandler(c), p.servers.metrics)
	if p.reload != nil {
		group.Go(func() error { return p.reload.Run(ctx) })
	}
	p.log.InfoContext(ctx, "running", "version", version, "mode", c.Mode, "source", sourceName(c), "node", c.Tracker.NodeName)
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	p.log.InfoContext(ctx, "stopped; what is programmed stays in place")
	return nil
}

// sourceName says for people where objects come from.
func sourceName(c config.Config) string {
	switch {
	case c.Manifests != "":
		return "manifests " + c.Manifests
	case c.API.Kubeconfig != "":
		return "API server of " + c.API.Kubeconfig
	case c.API.Master != "":
		return "API server " + c.API.Master
	default:
		return "API server of this pod's cluster"
	}
}

// serve serves HTTP at an address, if there is one. On standby the other instance
// mostly has the address, which is no reason to end.
func (p *program) serve(ctx context.Context, group *errgroup.Group, c config.Config, flag, address string, handler http.Handler, limiter *connlimit.Limiter) {
	if address == "" {
		return
	}
	run := func(ctx context.Context) error {
		err := health.Serve(ctx, health.ServeOptions{
			Address: address, Handler: handler, HardFail: c.HardFail, Limiter: limiter, Wake: p.standby.active,
			Logger: p.log.With("setting", flag),
		})
		if err != nil {
			return fmt.Errorf("--%s: %w", flag, err)
		}
		return nil
	}
	if c.HardFail {
		run = p.standby.gate(run)
	}
	group.Go(func() error { return run(ctx) })
}

// metricsHandler answers at the metrics' address, by kube-proxy's paths.
func (p *program) metricsHandler(c config.Config) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", p.metrics.Handler())
	answer := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			_, _ = io.WriteString(w, text) // the client has gone
		}
	}
	mux.Handle("/healthz", answer("ok"))
	mux.Handle("/proxyMode", answer(cmp.Or(p.backend.KubeProxyName, p.backend.Name)))
	if c.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// applier returns what applies a changed configuration. c is the one that runs.
func (p *program) applier(c config.Config, level *slog.LevelVar) func(context.Context, config.Config) {
	return func(ctx context.Context, next config.Config) {
		warn(ctx, p.log, next)
		for _, what := range c.NeedRestart(next) {
			p.log.WarnContext(ctx, "the configuration file has changed what needs a restart; it stays as it is until then", "what", what)
		}
		level.Set(next.LogLevel)
		p.join.configure(trackerOptions(p.backend, next.Tracker))
		p.log.InfoContext(ctx, "the configuration file has changed and is in use")
	}
}

// serveDNS starts to answer DNS names, if it is asked for: on standby when the other
// instance has ended.
func (p *program) serveDNS(ctx context.Context, group *errgroup.Group, c config.Config) error {
	if p.names == nil {
		return nil
	}
	listen := func(ctx context.Context) (func(context.Context) error, error) {
		sockets, err := dns.Listen(ctx, c.DNSListen)
		if err != nil {
			return nil, fmt.Errorf("--dns-listen: %w", err)
		}
		return func(ctx context.Context) error { return p.names.Serve(ctx, sockets) }, nil
	}
	if p.standby.isActive() {
		serve, err := listen(ctx)
		if err != nil {
			return err
		}
		group.Go(func() error { return serve(ctx) })
		return nil
	}
	serve := p.standby.gate(func(ctx context.Context) error {
		serve, err := listen(ctx)
		if err != nil {
			return err
		}
		return serve(ctx)
	})
	group.Go(func() error { return serve(ctx) })
	return nil
}
