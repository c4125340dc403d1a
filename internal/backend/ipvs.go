package backend

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/nft"
)

var (
	_ Yielder    = (*ipvs.Dataplane)(nil)
	_ TableOwner = (*ipvs.Dataplane)(nil)
)

// kube-proxy's flags for its ipvs mode.
const (
	flagScheduler     = "ipvs-scheduler"
	flagExcludeCIDRs  = "ipvs-exclude-cidrs"
	flagStrictARP     = "ipvs-strict-arp"
	flagTCPTimeout    = "ipvs-tcp-timeout"
	flagTCPFinTimeout = "ipvs-tcpfin-timeout"
	flagUDPTimeout    = "ipvs-udp-timeout"
)

// ipvsBackend describes package ipvs, which also uses tables of package nft. It has no affinity
// limiter, because IPVS stores session affinity in its own connection table.
func ipvsBackend() Backend {
	tables := nft.Options{Table: ipvs.TableName}
	return Backend{
		Name: IPVS, KubeProxyName: "ipvs", Flags: ipvsFlags(), Conntrack: true,
		NodePortsOnAllAddresses: true, Schedulers: ipvs.Schedulers(), Balancing: ipvsBalancing,
		Open: func(o Options) (dataplane.Dataplane, error) {
			return asDataplane(ipvs.Open(ipvsOptions(o)))
		},
		SetUp:       func(o Options) error { return ipvs.SetUp(ipvsOptions(o)) },
		Drain:       func(ctx context.Context, log *slog.Logger) error { return ipvs.Drain(ctx, ipvs.Options{Logger: log}) },
		Cleanup:     func(log *slog.Logger) error { return ipvs.Cleanup(ipvs.Options{Logger: log}) },
		NewCounters: func() Counters { return nftCounters{nft.NewCounterReader(tables)} },
		ServedServices: func(ctx context.Context) (map[string]struct{}, error) {
			return nft.ServicesWithEndpoints(ctx, tables)
		},
	}
}

// ipvsBalancing returns the kinds of balancing of package ipvs. IPVS has no scheduler that selects
// endpoints at random.
func ipvsBalancing(v Values) kube.Balancing {
	b := kube.Balancing{Default: "--" + flagScheduler, Schedulers: map[string]string{
		kube.BalanceRoundRobin:       dataplane.RoundRobin,
		kube.BalanceSourceHash:       ipvs.SourceHashScheduler(),
		kube.BalanceLeastConnections: "lc",
	}}
	for name, scheduler := range b.Schedulers {
		if scheduler == cmp.Or(value[string](v, flagScheduler), ipvs.DefaultScheduler) {
			b.Schedulers[name] = "" // Read reports the default scheduler as none
		}
	}
	return b
}

func ipvsOptions(o Options) ipvs.Options {
	return ipvs.Options{
		NetNS: o.NetNS, Logger: o.Logger, OnRebuild: o.onRebuild(), OwnTables: o.OwnTables, DryRun: o.DryRun,
		Scheduler:     value[string](o.Values, flagScheduler),
		ExcludeCIDRs:  value[[]netip.Prefix](o.Values, flagExcludeCIDRs),
		StrictARP:     value[bool](o.Values, flagStrictARP),
		TCPTimeout:    value[time.Duration](o.Values, flagTCPTimeout),
		TCPFinTimeout: value[time.Duration](o.Values, flagTCPFinTimeout),
		UDPTimeout:    value[time.Duration](o.Values, flagUDPTimeout),
	}
}

func ipvsFlags() []Flag {
	return []Flag{
		{
			Name: flagScheduler, Kind: String, Default: ipvs.DefaultScheduler, Choices: ipvs.Schedulers(), Parse: parseScheduler,
			Usage: "IPVS scheduler of Services without the annotation " + kube.AnnotationIPVSScheduler,
		},
		{
			Name: flagExcludeCIDRs, Kind: CIDRs,
			Usage: "networks of virtual servers that belong to other programs and are not changed",
		},
		{
			Name: flagStrictARP, Kind: Bool, Default: "false",
			Usage: "answer ARP only for addresses of the incoming interface (sysctls arp_ignore=1, arp_announce=2)",
		},
		{
			Name: flagTCPTimeout, Kind: Duration, Default: "0s", Parse: parseTimeout,
			Usage: "timeout of idle TCP connections, for all IPVS services of this node. Fractions of a second are cut off. 0: keep the kernel's value",
		},
		{
			Name: flagTCPFinTimeout, Kind: Duration, Default: "0s", Parse: parseTimeout,
			Usage: "timeout of TCP connections after a FIN packet, like --ipvs-tcp-timeout",
		},
		{
			Name: flagUDPTimeout, Kind: Duration, Default: "0s", Parse: parseTimeout,
			Usage: "timeout of idle UDP flows, like --ipvs-tcp-timeout",
		},
	}
}

func parseScheduler(text string) (any, error) {
	if all := ipvs.Schedulers(); !slices.Contains(all, text) {
		return nil, fmt.Errorf("%q is not an IPVS scheduler: use one of %s", text, strings.Join(all, ", "))
	}
	return text, nil
}

// maxTimeout is the longest timeout that every kernel accepts. The kernel stores timeouts as a
// signed 32-bit number of ticks, at most 1,000 per second.
const maxTimeout = math.MaxInt32 / 1000 * time.Second

// parseTimeout cuts off fractions of a second, like kube-proxy.
func parseTimeout(text string) (any, error) {
	d, err := time.ParseDuration(cmp.Or(text, "0"))
	if err != nil || d < 0 {
		return nil, fmt.Errorf("%q is not a duration: write it as 15m or 90s, or 0 to keep the kernel's value", text)
	}
	return min(d.Truncate(time.Second), maxTimeout), nil
}
