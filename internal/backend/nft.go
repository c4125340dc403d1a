package backend

import (
	"context"
	"log/slog"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/nft"
)

var (
	_ Yielder    = (*nft.Dataplane)(nil)
	_ TableOwner = (*nft.Dataplane)(nil)
)

// nftBackend describes package nft.
func nftBackend() Backend {
	return Backend{
		Name: NFT, KubeProxyName: "nftables", Conntrack: true,
		Open: func(o Options) (dataplane.Dataplane, error) {
			return asDataplane(nft.Open(nft.Options{NetNS: o.NetNS, Logger: o.Logger, OnRebuild: o.onRebuild(), OwnTables: o.OwnTables}))
		},
		Cleanup:     func(log *slog.Logger) error { return nft.Cleanup(nft.Options{Logger: log}) },
		NewCounters: func() Counters { return nftCounters{nft.NewCounterReader(nft.Options{})} },
		NewAffinityLimiter: func(d dataplane.Dataplane) AffinityLimiter {
			return nftAffinityLimiter{nft.NewAffinityLimiter(d.(*nft.Dataplane), nft.Options{})} // as Open has returned it
		},
		ServedServices: func(ctx context.Context) (map[string]struct{}, error) {
			return nft.ServicesWithEndpoints(ctx, nft.Options{})
		},
	}
}

// onRebuild returns the callback of o for package nft.
func (o Options) onRebuild() func(nft.Rebuild) {
	if o.OnRebuild == nil {
		return nil
	}
	return func(r nft.Rebuild) { o.OnRebuild(Rebuild(r)) }
}

// asDataplane returns an untyped nil with an error.
func asDataplane[D dataplane.Dataplane](d D, err error) (dataplane.Dataplane, error) {
	if err != nil {
		return nil, err
	}
	return d, nil
}

// nftCounters reads the counters of tables of package nft.
type nftCounters struct{ *nft.CounterReader }

// Read implements [Counters].
func (c nftCounters) Read(ctx context.Context) ([]metrics.RefusedPackets, error) {
	counts, err := c.CounterReader.Read(ctx)
	if err != nil {
		return nil, err
	}
	unserved := make([]metrics.RefusedPackets, 0, len(counts))
	for _, c := range counts {
		unserved = append(unserved, metrics.RefusedPackets{Family: c.Family, Reason: c.Name, Localhost: c.Localhost, Packets: c.Packets})
	}
	return unserved, nil
}

// nftAffinityLimiter limits the maps of package nft.
type nftAffinityLimiter struct{ *nft.AffinityLimiter }

// Stats implements [AffinityLimiter].
func (a nftAffinityLimiter) Stats() []metrics.Affinity {
	var all []metrics.Affinity
	for _, s := range a.AffinityLimiter.Stats() {
		all = append(all, metrics.Affinity(s))
	}
	return all
}
