package top

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/inspect"
)

// Options configure a [Monitor].
type Options struct {
	// NetNS is a file descriptor of the network namespace. 0 means the namespace of the calling
	// thread.
	NetNS int
	// Mode is the mode to read. Empty means the programmed mode.
	Mode string
	// Interval is the time between samples.
	Interval time.Duration
}

// Names are read again after an interval with a connection to an unknown frontend, and otherwise
// after namesMaxAge.
const (
	namesMinAge = time.Second
	namesMaxAge = 10 * time.Second
)

// Monitor counts new connections.
type Monitor struct {
	options Options
	events  *conntrack.Events
	// countActive reports whether to count connections that have not ended.
	countActive atomic.Bool

	mu      sync.Mutex
	counter *counter
}

// Open reads the names of the Services and starts to listen. The error names the missing part:
// a programmed mode, a capability, or events of the kernel.
func Open(ctx context.Context, o Options) (*Monitor, error) {
	k, err := inspect.Read(ctx, inspect.Options{NetNS: o.NetNS, Mode: o.Mode})
	if err != nil {
		return nil, err
	}
	if err := conntrack.CheckEvents(); err != nil {
		return nil, err
	}
	o.Mode = k.Mode
	events, err := conntrack.OpenEvents(conntrack.EventsOptions{NetNS: o.NetNS, TranslatedOnly: k.Mode == "nft"})
	if err != nil {
		return nil, err
	}
	return &Monitor{options: o, events: events, counter: newCounter(k)}, nil
}

// Close stops listening.
func (m *Monitor) Close() error { return m.events.Close() }

// CountActive sets whether later samples contain the connections that have not ended. In mode nft,
// the kernel then walks the connection-tracking table about every ten seconds.
func (m *Monitor) CountActive(count bool) { m.countActive.Store(count) }

// errDone ends Run without an error.
var errDone = errors.New("no more samples wanted")

// Run passes a sample of each interval to deliver, until deliver returns false or ctx is done.
func (m *Monitor) Run(ctx context.Context, deliver func(Sample) bool) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return m.events.Receive(ctx, func(c conntrack.Connection) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.counter.add(c)
		})
	})
	group.Go(func() error {
		for sample, err := range m.samples(ctx) {
			if err != nil {
				return err
			}
			if !deliver(sample) {
				return errDone
			}
		}
		return ctx.Err()
	})
	if err := group.Wait(); !errors.Is(err, errDone) {
		return err
	}
	return nil
}

// samples yields a sample of each interval.
func (m *Monitor) samples(ctx context.Context) func(yield func(Sample, error) bool) {
	return func(yield func(Sample, error) bool) {
		ticker := time.NewTicker(m.options.Interval)
		defer ticker.Stop()
		last, namesRead := time.Now(), time.Now()
		var lostBefore uint64
		counted := false
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
			m.mu.Lock()
			unknown := len(m.counter.unresolved) > 0
			m.mu.Unlock()
			age, active := time.Since(namesRead), m.countActive.Load()
			if unknown && age >= namesMinAge || age >= namesMaxAge || active != counted {
				if err := m.readNames(ctx, active); err != nil {
					yield(Sample{}, err)
					return
				}
				namesRead, counted = time.Now(), active
			}
			lost, err := m.events.Lost()
			if err != nil {
				yield(Sample{}, err)
				return
			}
			now := time.Now()
			m.mu.Lock()
			sample := m.counter.sample(now, now.Sub(last), lost-lostBefore)
			m.mu.Unlock()
			last, lostBefore = now, lost
			if !yield(sample, nil) {
				return
			}
		}
	}
}

func (m *Monitor) readNames(ctx context.Context, active bool) error {
	o := inspect.Options{NetNS: m.options.NetNS, Mode: m.options.Mode}
	if active {
		o.Connections = inspect.CountAlways
	}
	k, err := inspect.Read(ctx, o)
	if err != nil {
		return fmt.Errorf("read the names of the Services: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counter.setKernel(k)
	return nil
}
