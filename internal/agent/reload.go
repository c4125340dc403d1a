package agent

import (
	"context"

	"fairlead.io/fairlead/internal/config"
)

// applyConfig applies the changed settings that do not need a restart, and logs the others.
func (a *Agent) applyConfig(ctx context.Context, next config.Config) {
	next.LogWarnings(ctx, a.log)
	for _, what := range a.config.RestartRequired(next) {
		a.log.WarnContext(ctx, "configuration change needs a restart to take effect", "what", what)
	}
	fields := a.config.FieldsAfterReload(next)
	a.fields.Store(&fields)
	a.logLevel.Set(next.LogLevel)
	a.reportReplacedMode(next)
	a.conntrackSettings.set(next.Conntrack)
	a.dispatcher.configure(a.backend.TrackerOptions(next.Tracker, next.Values))
	a.log.InfoContext(ctx, "configuration file reloaded")
}

// reportReplacedMode writes an Event if the configuration asks for kube-proxy's iptables mode.
func (a *Agent) reportReplacedMode(c config.Config) {
	if notice := c.IPTablesNotice(); notice != "" {
		a.dispatcher.events.ModeReplaced(notice)
	}
}
