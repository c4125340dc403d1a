package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"fairlead/dataplane"
	"fairlead/internal/metrics"
	"fairlead/nft"
)

// mode is a backend, by the value of --mode.
type mode string

const modeNFT mode = "nft"

// modes are all backends, the default first.
func modes() []mode { return []mode{modeNFT} }

// modeNames returns the values of --mode, for people.
func modeNames() string {
	var names []string
	for _, m := range modes() {
		names = append(names, string(m))
	}
	return strings.Join(names, " or ")
}

func (m mode) validate() error {
	if !slices.Contains(modes(), m) {
		return fmt.Errorf("--mode: unknown mode %q: use %s", string(m), modeNames())
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

// open opens the backend, whose error says what the kernel or the process lacks.
func (m mode) open(log *slog.Logger) (dataplane.Dataplane, error) {
	d, err := nft.Open(nft.Options{Logger: log.With("backend", string(m))})
	if err != nil {
		return nil, fmt.Errorf("--mode=%s: %w", m, err)
	}
	return d, nil
}

// counters returns what reads the backend's counters.
func (m mode) counters(log *slog.Logger) *counters {
	kernel := nft.NewCounters(nft.Options{})
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

func (m mode) cleanup(log *slog.Logger) error {
	if err := nft.Cleanup(nft.Options{Logger: log}); err != nil {
		return fmt.Errorf("clean up after --mode=%s: %w", m, err)
	}
	return nil
}
