package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/metrics"
)

// countersTimeout limits how long a scrape waits for the kernel's counters. Reading them takes
// less than a millisecond.
const countersTimeout = time.Second

// packetCounters reads the counters of refused packets for metrics.
type packetCounters struct {
	log   *slog.Logger
	read  func(context.Context) ([]metrics.RefusedPackets, error)
	close func() error

	readFailing atomic.Bool
}

// newPacketCounters returns packetCounters, nil if the backend does not count refused packets.
func newPacketCounters(b backend.Backend, log *slog.Logger) *packetCounters {
	if b.NewCounters == nil {
		return nil
	}
	counters := b.NewCounters()
	return &packetCounters{log: log.With("backend", b.Name), close: counters.Close, read: func(ctx context.Context) ([]metrics.RefusedPackets, error) {
		counts, err := counters.Read(ctx)
		if err != nil {
			return nil, fmt.Errorf("--mode=%s: %w", b.Name, err)
		}
		return counts, nil
	}}
}

// readRefused reads the counters. It logs the first of consecutive failures and the next
// success. It is safe for concurrent use.
func (c *packetCounters) readRefused() ([]metrics.RefusedPackets, error) {
	ctx, cancel := context.WithTimeout(context.Background(), countersTimeout)
	defer cancel()
	counts, err := c.read(ctx)
	switch failed := c.readFailing.Swap(err != nil); {
	case err != nil && !failed:
		c.log.Warn("reading packet counters failed; metrics of refused packets are missing until it succeeds", "error", err)
	case err == nil && failed:
		c.log.Info("reading packet counters succeeded again")
	}
	return counts, err
}
