package agent

import (
	"context"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/kube"
)

// applyConfig puts a changed configuration into use, as far as it needs no restart.
func (a *Agent) applyConfig(ctx context.Context, next config.Config) {
	next.LogWarnings(ctx, a.log)
	for _, what := range a.config.RestartRequired(next) {
		a.log.WarnContext(ctx, "the configuration file has changed what needs a restart; it stays as it is until then", "what", what)
	}
	a.logLevel.Set(next.LogLevel)
	a.dispatcher.configure(trackerOptions(a.backend, next.Tracker))
	a.log.InfoContext(ctx, "the configuration file has changed and is in use")
}

// trackerOptions returns the options of a tracker with what depends on the backend:
// where node ports are served unless that is configured, which is as with kube-proxy,
// and which schedulers there are.
func trackerOptions(b backend.Backend, o kube.Options) kube.Options {
	if b.NodePortsOnAllAddresses && o.NodePortAddresses.IsZero() {
		o.NodePortAddresses.All = true
	}
	o.Schedulers = b.Schedulers
	return o
}
