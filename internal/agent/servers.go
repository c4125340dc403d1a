package agent

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/internal/connlimit"
	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/source/manifest/dns"
)

// serverLimiters bounds the connections of the program's servers, each on its own, so
// that the clients of one cannot keep another from being answered.
type serverLimiters struct{ healthz, metrics, healthChecks, dns *connlimit.Limiter }

// healthzReserve is the number of file descriptors kept for the kubelet's probes.
const healthzReserve = 4

// newServerLimiters returns limiters of connections each.
func newServerLimiters(connections int, log *slog.Logger) serverLimiters {
	limiter := func(options connlimit.Options) *connlimit.Limiter {
		options.Max, options.Logger = connections, log
		return connlimit.New(options)
	}
	return serverLimiters{
		healthz: limiter(connlimit.Options{Server: "healthz", Reserve: healthzReserve}),
		metrics: limiter(connlimit.Options{Server: "metrics"}),
		// One load balancer may keep a connection to each of many Services.
		healthChecks: limiter(connlimit.Options{Server: "health-check-node-ports", MaxPerClient: max(1, connections/2)}),
		dns:          limiter(connlimit.Options{Server: "dns", WriteTimeout: dns.WriteTimeout}),
	}
}

// stats returns the connections by the name of the server.
func (s serverLimiters) stats() map[string]connlimit.Stats {
	return map[string]connlimit.Stats{
		"healthz": s.healthz.Stats(), "metrics": s.metrics.Stats(),
		"health-check-node-ports": s.healthChecks.Stats(), "dns": s.dns.Stats(),
	}
}

// serveHTTP serves HTTP at an address, if there is one. On standby the other instance
// mostly has the address, which is no reason to end.
func (a *Agent) serveHTTP(ctx context.Context, group *errgroup.Group, flag, address string, handler http.Handler, limiter *connlimit.Limiter) {
	if address == "" {
		return
	}
	run := func(ctx context.Context) error {
		err := health.Serve(ctx, health.ServeOptions{
			Address: address, Handler: handler, HardFail: a.config.HardFail, Limiter: limiter, RetryNow: a.standby.activated,
			Logger: a.log.With("setting", flag),
		})
		if err != nil {
			return fmt.Errorf("--%s: %w", flag, err)
		}
		return nil
	}
	if a.config.HardFail {
		run = a.standby.whenActive(run)
	}
	group.Go(func() error { return run(ctx) })
}

// metricsHandler answers at the metrics' address, by kube-proxy's paths.
func (a *Agent) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", a.metrics.Handler())
	answer := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			_, _ = io.WriteString(w, text) // the client has gone
		}
	}
	mux.Handle("/healthz", answer("ok"))
	mux.Handle("/proxyMode", answer(cmp.Or(a.backend.KubeProxyName, a.backend.Name)))
	if a.config.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// serveDNS starts to answer DNS names, if it is asked for: on standby when the other
// instance has ended.
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
