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

// countersTimeout is how long a scrape waits for the kernel's counters, which
// take a fraction of a millisecond.
const countersTimeout = time.Second

// packetCounters read what the kernel did not serve, for metrics.
type packetCounters struct {
	log   *slog.Logger
	read  func(context.Context) ([]metrics.RefusedPackets, error)
	close func() error

	readFailing atomic.Bool
}

// newPacketCounters returns nil if the backend counts nothing.
func newPacketCounters(b backend.Backend, log *slog.Logger) *packetCounters {
	if b.NewCounters == nil {
		return nil
	}
	kernel := b.NewCounters()
	return &packetCounters{log: log.With("backend", b.Name), close: kernel.Close, read: func(ctx context.Context) ([]metrics.RefusedPackets, error) {
		counts, err := kernel.Read(ctx)
		if err != nil {
			return nil, fmt.Errorf("--mode=%s: %w", b.Name, err)
		}
		return counts, nil
	}}
}

// readRefused reads them. That they can't be read is logged once, and so is that
// they can again. It may be called from any goroutine.
func (c *packetCounters) readRefused() ([]metrics.RefusedPackets, error) {
	ctx, cancel := context.WithTimeout(context.Background(), countersTimeout)
	defer cancel()
	counts, err := c.read(ctx)
	switch failed := c.readFailing.Swap(err != nil); {
	case err != nil && !failed:
		c.log.Warn("the kernel's counters can't be read: the metrics are without what was not served until they can", "error", err)
	case err == nil && failed:
		c.log.Info("the kernel's counters can be read again")
	}
	return counts, err
}
