package main

import (
	"context"
	"log/slog"
	"time"

	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/nft"
)

// affinityInterval is how often the agent looks whether a map of session affinity is full.
const affinityInterval = 5 * time.Second

// affinity keeps room in the maps of session affinity.
type affinity struct {
	log     *slog.Logger
	limiter *nft.AffinityLimiter
}

// newAffinity returns nil in the mode ipvs, where IPVS remembers clients in its own table.
func newAffinity(dp backend, log *slog.Logger) *affinity {
	d, ok := dp.(*nft.Dataplane)
	if !ok {
		return nil
	}
	return &affinity{log: log.With("component", "session-affinity"), limiter: nft.NewAffinityLimiter(d, nft.Options{})}
}

// run evicts clients from full maps until ctx is done. It logs the beginning and the end
// of evictions and of failures.
func (a *affinity) run(ctx context.Context) error {
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

func (a *affinity) stats() []metrics.Affinity {
	var all []metrics.Affinity
	for _, s := range a.limiter.Stats() {
		all = append(all, metrics.Affinity(s))
	}
	return all
}
