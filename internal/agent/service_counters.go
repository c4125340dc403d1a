package agent

import (
	"context"
	"log/slog"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/servicecounters"
)

// newServiceCounters sets a.serviceCounters and returns the Dataplane to program.
func (a *Agent) newServiceCounters(b backend.Backend, c config.Config) (dataplane.Dataplane, error) {
	if len(c.ServiceMetrics) == 0 {
		return a.dp, nil
	}
	counters, err := servicecounters.New(a.dp, servicecounters.Options{
		Services: c.ServiceMetrics, TranslatedOnly: b.Name == backend.NFT, Logger: a.log.With("component", "service-metrics"),
	})
	if err != nil {
		return nil, err
	}
	a.serviceCounters = counters
	return counters, nil
}

// readServiceCounters reads the counters for a scrape.
func (a *Agent) readServiceCounters() (servicecounters.Counts, error) {
	ctx, cancel := context.WithTimeout(context.Background(), countersTimeout)
	defer cancel()
	return a.serviceCounters.Counts(ctx)
}

// removeServiceCounters removes the counters of an earlier process with --service-metrics, once all
// Services are programmed.
func removeServiceCounters(ctx context.Context, log *slog.Logger, programmed <-chan struct{}) {
	select {
	case <-ctx.Done():
	case <-programmed:
		if err := servicecounters.Remove(0); err != nil {
			log.WarnContext(ctx, "removing the counters of an earlier --service-metrics failed; the next start retries", "error", err)
		}
	}
}
