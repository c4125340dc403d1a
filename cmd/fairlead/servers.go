package main

import (
	"log/slog"

	"fairlead.io/fairlead/internal/connlimit"
	"fairlead.io/fairlead/source/manifest/dns"
)

// servers bounds the connections of the program's servers, each on its own, so
// that the clients of one cannot keep another from being answered.
type servers struct{ healthz, metrics, healthChecks, dns *connlimit.Limiter }

// healthzReserve is the number of file descriptors kept for the kubelet's probes.
const healthzReserve = 4

// newServers returns limiters of connections each.
func newServers(connections int, log *slog.Logger) servers {
	limiter := func(options connlimit.Options) *connlimit.Limiter {
		options.Max, options.Logger = connections, log
		return connlimit.New(options)
	}
	return servers{
		healthz: limiter(connlimit.Options{Server: "healthz", Reserve: healthzReserve}),
		metrics: limiter(connlimit.Options{Server: "metrics"}),
		// One load balancer may keep a connection to each of many Services.
		healthChecks: limiter(connlimit.Options{Server: "health-check-node-ports", MaxPerClient: max(1, connections/2)}),
		dns:          limiter(connlimit.Options{Server: "dns", WriteTimeout: dns.WriteTimeout}),
	}
}

// stats returns the connections by the name of the server.
func (s servers) stats() map[string]connlimit.Stats {
	return map[string]connlimit.Stats{
		"healthz": s.healthz.Stats(), "metrics": s.metrics.Stats(),
		"health-check-node-ports": s.healthChecks.Stats(), "dns": s.dns.Stats(),
	}
}
