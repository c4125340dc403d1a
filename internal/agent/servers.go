package agent

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/connlimit"
	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/zpages"
	"fairlead.io/fairlead/source/manifest/dns"
)

// serverLimiters limits the connections of each server separately, so that the clients of one
// server cannot block the others.
type serverLimiters struct {
	healthz, metrics, status, healthChecks, dns *connlimit.Limiter
}

// healthzReserve is the number of file descriptors kept for the kubelet's probes.
const healthzReserve = 4

// newServerLimiters returns limiters that allow the given number of connections each.
func newServerLimiters(connections int, log *slog.Logger) serverLimiters {
	limiter := func(options connlimit.Options) *connlimit.Limiter {
		options.Max, options.Logger = connections, log
		return connlimit.New(options)
	}
	return serverLimiters{
		healthz: limiter(connlimit.Options{Server: "healthz", Reserve: healthzReserve}),
		metrics: limiter(connlimit.Options{Server: "metrics"}),
		// The page has few readers, and usually all of them come from the loopback address.
		status: connlimit.New(connlimit.Options{Server: "status", Max: max(1, connections/8), MaxPerClient: max(1, connections/8), Logger: log}),
		// One load balancer may keep connections for many Services.
		healthChecks: limiter(connlimit.Options{Server: "health-check-node-ports", MaxPerClient: max(1, connections/2)}),
		dns:          limiter(connlimit.Options{Server: "dns", WriteTimeout: dns.WriteTimeout}),
	}
}

// stats returns the connection statistics by server name.
func (s serverLimiters) stats() map[string]connlimit.Stats {
	return map[string]connlimit.Stats{
		"healthz": s.healthz.Stats(), "metrics": s.metrics.Stats(), "status": s.status.Stats(),
		"health-check-node-ports": s.healthChecks.Stats(), "dns": s.dns.Stats(),
	}
}

// httpServer describes an HTTP server of the agent.
type httpServer struct {
	// flag is the flag that sets the address. An empty address means no server.
	flag, address string
	handler       http.Handler
	limiter       *connlimit.Limiter
	// hardFail makes the agent exit if the server cannot listen.
	hardFail bool
	// listening is set while the server listens.
	listening *atomic.Bool
	// report records an Event about a server that cannot listen. Nil means no Event.
	report func(error)
}

// serveHTTP runs an HTTP server. With hardFail, it waits until this instance is active, because
// the other instance usually listens on the same address. For the same reason, an instance on
// standby reports no Events.
func (a *Agent) serveHTTP(ctx context.Context, group *errgroup.Group, s httpServer) {
	if s.address == "" {
		return
	}
	run := func(ctx context.Context) error {
		err := health.Serve(ctx, health.ServeOptions{
			Address: s.address, Handler: s.handler, HardFail: s.hardFail, Limiter: s.limiter, RetryNow: a.standby.activated,
			OnError: func(err error) {
				if s.report != nil && a.standby.isActive() {
					s.report(fmt.Errorf("--%s: %w", s.flag, err))
				}
			},
			OnListening: s.listening.Store, Logger: a.log.With("setting", s.flag),
		})
		if err != nil {
			return fmt.Errorf("--%s: %w", s.flag, err)
		}
		return nil
	}
	if s.hardFail {
		run = a.standby.whenActive(run)
	}
	group.Go(func() error { return run(ctx) })
}

// listeners records which HTTP servers listen. Another process may hold the address.
type listeners struct{ healthz, metrics, status atomic.Bool }

// listenerStates returns by server name whether it listens, for the servers that are configured.
func (a *Agent) listenerStates() map[string]bool {
	states := map[string]bool{}
	if a.config.HealthzAddress != "" {
		states["healthz"] = a.listeners.healthz.Load()
	}
	if a.config.MetricsAddress != "" {
		states["metrics"] = a.listeners.metrics.Load()
	}
	if a.config.StatusAddress != "" {
		states["status"] = a.listeners.status.Load()
	}
	return states
}

// apiServerHealth returns a function for the field apiServer of /healthz, nil without an API
// server.
func apiServerHealth(connection func() metrics.APIConnection) func() health.APIServer {
	if connection == nil {
		return nil
	}
	return func() health.APIServer {
		c := connection()
		return health.APIServer{Connected: c.Connected, LastResponse: c.LastResponse, Failures: c.Failures}
	}
}

// metricsHandler returns the handler of the metrics server, with kube-proxy's paths.
func (a *Agent) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", a.metrics.Handler())
	mux.Handle("/metrics/slis", a.metrics.SLIHandler())
	mux.HandleFunc("/proxyMode", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		_, _ = io.WriteString(w, cmp.Or(a.fields.Load().Mode(), a.backend.Name)) // fails only if the client has disconnected
	})
	pages := a.pages
	pages.OnHealthCheck = a.metrics.RecordHealthCheck
	if a.config.Profiling {
		pages.SetVerbosity = a.setVerbosity
	}
	zpages.Install(mux, pages, "/metrics", "/proxyMode")
	if a.config.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// setVerbosity sets the level of the log to a verbosity of kube-proxy.
func (a *Agent) setVerbosity(v uint64) {
	level := slog.LevelInfo
	if v >= config.DebugVerbosity {
		level = slog.LevelDebug
	}
	a.logLevel.Set(level)
}

// serveDNS starts the DNS server, if it is configured. On standby, the server starts when this
// instance becomes active.
func (a *Agent) serveDNS(ctx context.Context, group *errgroup.Group) error {
	if a.dns == nil {
		return nil
	}
	listen := func(ctx context.Context) (func(context.Context) error, error) {
		sockets, err := dns.Listen(ctx, a.config.DNSListen)
		if err != nil {
			return nil, fmt.Errorf("--dns-listen: %w", err)
		}
		return func(ctx context.Context) error { return a.dns.Serve(ctx, sockets) }, nil
	}
	if a.standby.isActive() {
		serve, err := listen(ctx)
		if err != nil {
			return err
		}
		group.Go(func() error { return serve(ctx) })
		return nil
	}
	serve := a.standby.whenActive(func(ctx context.Context) error {
		serve, err := listen(ctx)
		if err != nil {
			return err
		}
		return serve(ctx)
	})
	group.Go(func() error { return serve(ctx) })
	return nil
}
