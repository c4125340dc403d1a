package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/ipvs"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/nft"
)

// mode is a backend, by the value of --mode.
type mode string

const (
	modeNFT  mode = "nft"
	modeIPVS mode = "ipvs"
)

// modes are all backends, the default first.
func modes() []mode { return []mode{modeNFT, modeIPVS} }

// modeNames returns the values of --mode, and kubeProxyNames those of --proxy-mode.
func modeNames() []string {
	var names []string
	for _, m := range modes() {
		names = append(names, string(m))
	}
	return names
}

func kubeProxyNames() []string {
	var names []string
	for _, m := range modes() {
		names = append(names, m.kubeProxyName())
	}
	return names
}

func (m mode) validate() error {
	if !slices.Contains(modes(), m) {
		return fmt.Errorf("--mode: unknown mode %q: use %s", string(m), strings.Join(modeNames(), " or "))
	}
	return nil
}

// kubeProxyName is the value of kube-proxy's --proxy-mode for the same mechanism.
func (m mode) kubeProxyName() string {
	if m == modeNFT {
		return "nftables"
	}
	return string(m)
}

// fromKubeProxy returns the mode that has a name of kube-proxy's, if one has.
func fromKubeProxy(name string) (mode, bool) {
	i := slices.Index(kubeProxyNames(), name)
	if i < 0 {
		return "", false
	}
	return modes()[i], true
}

// tracker returns the options of a tracker with what depends on the mode: where
// node ports are served unless that is said, which is as with kube-proxy, and
// which schedulers there are.
func (m mode) tracker(o kube.Options) kube.Options {
	if m != modeIPVS {
		return o
	}
	if o.NodePortAddresses.IsZero() {
		o.NodePortAddresses.All = true
	}
	o.Schedulers = ipvs.Schedulers()
	return o
}

// backend is a dataplane that can let other programs' rules go first after its end.
type backend interface {
	dataplane.Dataplane
	GiveWay(after time.Duration) error
	// OwnsTables reports whether the kernel keeps other processes from changing the
	// nftables tables.
	OwnsTables() bool
}

// openBackend opens the backend, whose error says what the kernel or the process lacks.
// onRebuild is called when a table is rebuilt.
func (c config) openBackend(log *slog.Logger, onRebuild func(nft.Rebuild)) (d backend, err error) {
	backendLog := log.With("backend", string(c.mode))
	switch c.mode {
	case modeIPVS:
		settings := c.ipvs
		settings.Logger, settings.OnRebuild, settings.OwnTables = backendLog, onRebuild, c.ownTables
		d, err = ipvs.Open(settings)
	default:
		d, err = nft.Open(nft.Options{Logger: backendLog, OnRebuild: onRebuild, OwnTables: c.ownTables})
	}
	if err != nil {
		return nil, fmt.Errorf("--mode=%s: %w", c.mode, err)
	}
	if c.ownTables && !d.OwnsTables() {
		log.Warn("a setting has no effect", "setting", "--nft-own-table", "reason", "it needs Linux 6.9 or newer, and this is "+kernelRelease())
	}
	return d, nil
}

// kernelRelease returns the release of the kernel, as `uname -r` does.
func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "a kernel that does not tell its release"
	}
	return unix.ByteSliceToString(name.Release[:])
}

// setUp does what may take more rights than to program Services does, and programs
// none.
func (m mode) setUp(ctx context.Context, log *slog.Logger, settings ipvs.Options) error {
	if m != modeIPVS {
		log.InfoContext(ctx, "nothing to set up", "reason", "--init-only")
		return nil
	}
	settings.Logger = log.With("backend", string(m))
	if err := ipvs.SetUp(settings); err != nil {
		return fmt.Errorf("--mode=%s: %w", m, err)
	}
	log.InfoContext(ctx, "the kernel is set up", "reason", "--init-only", "mode", string(m))
	return nil
}

// counters returns what reads the backend's counters.
func (m mode) counters(log *slog.Logger) *counters {
	var options nft.Options
	if m == modeIPVS {
		options.Table = ipvs.TableName
	}
	kernel := nft.NewCounters(options)
	return &counters{log: log.With("backend", string(m)), close: kernel.Close, read: func(ctx context.Context) ([]metrics.Unserved, error) {
		counts, err := kernel.Read(ctx)
		if err != nil {
			return nil, fmt.Errorf("--mode=%s: %w", m, err)
		}
		unserved := make([]metrics.Unserved, 0, len(counts))
		for _, c := range counts {
			unserved = append(unserved, metrics.Unserved{Family: c.Family, Reason: c.Reason, Localhost: c.Localhost, Packets: c.Packets})
		}
		return unserved, nil
	}}
}

// cleanup removes what the backend has programmed.
func (m mode) cleanup(log *slog.Logger) error {
	log = log.With("backend", string(m))
	var err error
	switch m {
	case modeIPVS:
		err = ipvs.Cleanup(ipvs.Options{Logger: log})
	default:
		err = nft.Cleanup(nft.Options{Logger: log})
	}
	if err != nil {
		return fmt.Errorf("clean up after --mode=%s: %w", m, err)
	}
	return nil
}

// takeOver removes what other modes have left, once this one has programmed
// everything: Services work all the time. That it fails is logged, and holds up
// nothing.
func (m mode) takeOver(ctx context.Context, log *slog.Logger, programmed <-chan struct{}, cleanup func(mode, *slog.Logger) error) {
	select {
	case <-ctx.Done():
		return
	case <-programmed:
	}
	for _, other := range modes() {
		if other == m {
			continue
		}
		if err := cleanup(other, log); err != nil {
			log.WarnContext(ctx, "what another mode may have programmed is still there; the next start tries again",
				"other_mode", string(other), "error", err)
			continue
		}
		log.InfoContext(ctx, "nothing that another mode has programmed is left", "other_mode", string(other))
	}
}
