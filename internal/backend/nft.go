package backend

import (
	"context"
	"log/slog"
	"strings"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/nft"
)

var (
	_ Yielder    = (*nft.Dataplane)(nil)
	_ TableOwner = (*nft.Dataplane)(nil)
)

// nftBackend describes package nft.
func nftBackend() Backend {
	return Backend{
		Name: NFT, KubeProxyName: "nftables", Conntrack: true, Balancing: nftBalancing,
		Open: func(o Options) (dataplane.Dataplane, error) {
			return asDataplane(nft.Open(nft.Options{NetNS: o.NetNS, Logger: o.Logger, OnRebuild: o.onRebuild(), OwnTables: o.OwnTables, DryRun: o.DryRun}))
		},
		Cleanup:     func(log *slog.Logger) error { return nft.Cleanup(nft.Options{Logger: log}) },
		NewCounters: func() Counters { return nftCounters{nft.NewCounterReader(nft.Options{})} },
		NewAffinityLimiter: func(d dataplane.Dataplane) AffinityLimiter {
			return nftAffinityLimiter{nft.NewAffinityLimiter(d.(*nft.Dataplane), nft.Options{})} // Open returned this type
		},
		ServedServices: func(ctx context.Context) (map[string]struct{}, error) {
			return nft.ServicesWithEndpoints(ctx, nft.Options{})
		},
	}
}

// nftBalancing returns the kinds of balancing of package nft. The kernel's rules cannot count the
// connections of an endpoint that are still open, so least-connections is not possible.
func nftBalancing(Values) kube.Balancing {
	return kube.Balancing{Default: kube.BalanceRandom, Schedulers: map[string]string{
		kube.BalanceRandom:     "",
		kube.BalanceRoundRobin: dataplane.RoundRobin,
		kube.BalanceSourceHash: dataplane.SourceHash,
	}}
}

// onRebuild converts o.OnRebuild for package nft.
func (o Options) onRebuild() func(nft.Rebuild) {
	if o.OnRebuild == nil {
		return nil
	}
	return func(r nft.Rebuild) { o.OnRebuild(Rebuild(r)) }
}

// asDataplane converts the results of Open functions. It returns an untyped nil with an error.
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
	refused := make([]metrics.RefusedPackets, 0, len(counts))
	for _, c := range counts {
		verdict, reason := splitCounterName(c.Name)
		refused = append(refused, metrics.RefusedPackets{
			Family: c.Family, Verdict: verdict, Reason: reason, Localhost: c.Localhost, Packets: c.Packets,
		})
	}
	return refused, nil
}

// splitCounterName splits the name of a counter of package nft, such as
// "rejected-no-endpoints", into its verdict and reason.
func splitCounterName(name string) (verdict metrics.Verdict, reason string) {
	if reason, ok := strings.CutPrefix(name, "dropped-"); ok {
		return metrics.Drop, reason
	}
	return metrics.Reject, strings.TrimPrefix(name, "rejected-")
}

// nftAffinityLimiter implements [AffinityLimiter] for package nft.
type nftAffinityLimiter struct{ *nft.AffinityLimiter }

// Stats implements [AffinityLimiter].
func (a nftAffinityLimiter) Stats() []metrics.Affinity {
	var all []metrics.Affinity
	for _, s := range a.AffinityLimiter.Stats() {
		all = append(all, metrics.Affinity(s))
	}
	return all
}
