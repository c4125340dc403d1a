package flowoffload

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"fairlead.io/fairlead/internal/conntrack"
)

// activePause is the minimum time between two counts, as a multiple of the time that the last count took.
// It limits counting to 1 % of a processor, however often [Dataplane.Stats] is called. The kernel has no
// counter of the connections in a flowtable, so a count walks the connection-tracking table: 20 ms for
// 100,000 entries.
const activePause = 100

// active counts the connections that are in the flowtable now.
type active struct {
	count func(context.Context) (int, error)
	now   func() time.Time
	log   *slog.Logger

	mu    sync.Mutex
	value int
	err   error
	next  time.Time // the value is current before this time
}

func newActive(netns int, log *slog.Logger) *active {
	return &active{count: func(ctx context.Context) (int, error) { return conntrack.CountOffloaded(ctx, netns) }, now: time.Now, log: log}
}

// read returns the number of connections, which may be some seconds old. It logs the first of consecutive
// failures.
func (a *active) read(ctx context.Context) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	start := a.now()
	if start.Before(a.next) {
		return a.value, a.err
	}
	failed := a.err != nil
	a.value, a.err = a.count(ctx)
	end := a.now()
	if a.err != nil && !failed {
		a.log.WarnContext(ctx, "counting the offloaded connections failed; their metric is missing until it succeeds", "error", a.err)
	}
	a.next = end.Add(activePause * end.Sub(start))
	return a.value, a.err
}
