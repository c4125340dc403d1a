package agent

import (
	"context"
	"log/slog"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
)

// affinityInterval is how often the agent looks whether a map of session affinity is full.
const affinityInterval = 5 * time.Second

// affinityLimiter keeps room in the maps of session affinity.
type affinityLimiter struct {
	log     *slog.Logger
	limiter backend.AffinityLimiter
}

// newAffinityLimiter returns nil if the backend has no such maps.
func newAffinityLimiter(b backend.Backend, dp dataplane.Dataplane, log *slog.Logger) *affinityLimiter {
	if b.NewAffinityLimiter == nil {
		return nil
	}
	return &affinityLimiter{log: log.With("component", "session-affinity"), limiter: b.NewAffinityLimiter(dp)}
}

// run evicts clients from full maps until ctx is done. It logs the beginning and the end
// of evictions and of failures.
func (a *affinityLimiter) run(ctx context.Context) error {
	ticker := time.NewTicker(affinityInterval)
	defer ticker.Stop()
	var evicted uint64
	evicting, failing := false, false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		err := a.limiter.Limit(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !failing:
			a.log.WarnContext(ctx, "session affinity cannot be limited", "error", err)
		case err == nil && failing:
			a.log.InfoContext(ctx, "session affinity can be limited again")
		}
		failing = err != nil
		var now uint64
		for _, s := range a.limiter.Stats() {
			now += s.Evicted
		}
		switch {
		case now > evicted && !evicting:
			a.log.WarnContext(ctx, "a map of session affinity is full: clients that have not connected for the longest time are forgotten",
				"evicted", now-evicted)
		case now == evicted && evicting:
			a.log.InfoContext(ctx, "no map of session affinity is full any more")
		}
		evicting, evicted = now > evicted, now
	}
}
