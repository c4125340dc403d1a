package agent

import (
	"context"
	"log/slog"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
)

// affinityInterval is how often the agent checks for full session affinity maps.
const affinityInterval = 5 * time.Second

// affinityLimiter evicts clients from full session affinity maps.
type affinityLimiter struct {
	log     *slog.Logger
	limiter backend.AffinityLimiter
}

// newAffinityLimiter returns an affinityLimiter, nil if the backend does not need one.
func newAffinityLimiter(b backend.Backend, dp dataplane.Dataplane, log *slog.Logger) *affinityLimiter {
	if b.NewAffinityLimiter == nil {
		return nil
	}
	return &affinityLimiter{log: log.With("component", "session-affinity"), limiter: b.NewAffinityLimiter(dp)}
}

// run evicts clients from full maps until ctx is done. It logs when evictions or failures
// start and end.
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
			a.log.WarnContext(ctx, "checking session affinity maps failed", "error", err)
		case err == nil && failing:
			a.log.InfoContext(ctx, "checking session affinity maps succeeded again")
		}
		failing = err != nil
		var now uint64
		for _, s := range a.limiter.Stats() {
			now += s.Evicted
		}
		switch {
		case now > evicted && !evicting:
			a.log.WarnContext(ctx, "session affinity map is full; evicting the least recently connected clients",
				"evicted", now-evicted)
		case now == evicted && evicting:
			a.log.InfoContext(ctx, "session affinity maps have room again")
		}
		evicting, evicted = now > evicted, now
	}
}
