package conntrack

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	stdsync "sync"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/sync"
)

// Options adjust a [Cleaner]. The zero value is ready to use.
type Options struct {
	// NetNS is a file descriptor of the network namespace whose entries are
	// looked at; zero is the one that the process started in.
	NetNS int
	// Logger gets a Warn when entries can't be listed or deleted, an Info when
	// they can be again, and a Debug for each look. Nil means no logging.
	Logger *slog.Logger
	// OnScan is called after each look at the entries of a family, from the
	// goroutine of Run. Nil means that nobody wants to know.
	OnScan func(ScanResult)
}

// ScanResult is one look at the entries of a family.
type ScanResult struct {
	Family dataplane.Family
	// Duration is the time that listing and deleting took.
	Duration time.Duration
	// Deleted is the number of entries deleted.
	Deleted int
	// Err is why stale entries may be left, or nil. Those that are are looked
	// for again.
	Err error
}

// The delays of looks, see [Cleaner.Run].
const (
	rescanDelay = time.Second
	retryMin    = time.Second
	retryMax    = time.Minute
)

// scanPause is how long nothing is looked at after a look that took so long: enough to
// leave four fifths of a processor to others while Services keep changing, but
// not so long that clients would notice.
func scanPause(took time.Duration) time.Duration { return min(4*took, time.Second/2) }

// maxFailedFrontends is for how many frontends it is remembered, while entries can't
// be listed or deleted, which endpoints have left.
const maxFailedFrontends = 10_000

// Cleaner deletes stale entries. Make one with [New].
type Cleaner struct {
	opts Options
	log  *slog.Logger
	open func() (table, error)
	wake chan struct{} // one slot: the mailbox has something

	mu      stdsync.Mutex
	pending pendingUpdates

	// The rest belongs to Run.
	index serviceIndex
	// rescan are those to look at once more at rescanAt; zero for never. later
	// are those after them, so that every second look is as late as it must be.
	rescan, nextRescan candidates
	rescanAt           time.Time
	// pausedUntil is when the next look may be, and due says that there is one
	// that waits for it.
	pausedUntil time.Time
	scanPending bool
	// failed are those of a look that has failed, after attempts looks that did.
	failed      candidates
	retryAt     time.Time
	failedScans int
	lastLogged  string // the error that was logged last; empty for none
	// attemptScanAt is when to look at the attempts of TCP, zero for never, and
	// attemptScanNotBefore is when the next such look may be. attemptScanFailed says that the
	// last one did.
	attemptScanAt, attemptScanNotBefore time.Time
	attemptScanFailed                   bool
}

// pendingUpdates is what was told since Run last looked.
type pendingUpdates struct {
	services   map[dataplane.Key]*dataplane.Service // nil for those that are gone
	candidates candidates
	attempts   connAttempts // stay here until they are looked at
	node       *dataplane.Node
}

// New returns a Cleaner. It starts nothing: call [Cleaner.Run].
func New(opts Options) *Cleaner {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Cleaner{
		opts:  opts,
		log:   log,
		open:  func() (table, error) { return openNetlinkTable(opts.NetNS) },
		wake:  make(chan struct{}, 1),
		index: newServiceIndex(),
	}
}

// SetNode tells on which addresses node ports are served. It is to be called
// before the syncer is told of the same Node: entries are looked at after the
// Replace that this leads to. It does not block and may be called from any
// goroutine.
func (c *Cleaner) SetNode(node dataplane.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending.node = &node
}

// OnCommit tells of a call to the dataplane that has ended, as sync.Options has
// it. It must not be called twice at a time. It does not block, and costs as much
// as the changes: the TCP Services among them are compared, and no more.
func (c *Cleaner) OnCommit(commit sync.Commit) {
	var found candidates
	// A Replace reads the kernel because nobody knew what it holds: at the start,
	// after an error, or when somebody else has changed it. Clients have met
	// that, whatever it was.
	found.all = commit.Op == sync.OpReplace && commit.Err == nil
	for _, change := range commit.Changes {
		found.addChange(change)
	}
	c.mu.Lock()
	hadAttempts := len(c.pending.attempts) > 0
	for _, change := range commit.Changes {
		if isTracked(change.Old) || isTracked(change.New) {
			if c.pending.services == nil {
				c.pending.services = map[dataplane.Key]*dataplane.Service{}
			}
			c.pending.services[change.Key()] = change.New
		}
		// What a Replace found in the kernel may be older than change.Old.
		if commit.Op != sync.OpReplace {
			c.pending.attempts.record(change)
		}
	}
	c.pending.candidates.merge(found)
	firstAttempts := !hadAttempts && len(c.pending.attempts) > 0
	c.mu.Unlock()
	if found.empty() && !firstAttempts {
		return
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run looks at the entries after each commit that may have left stale ones
// behind, and once more a second later, until ctx ends; then it returns nil.
// Where that fails it tries again, after a second at first and a minute at last:
// without access to connection tracking everything else goes on.
func (c *Cleaner) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-timer.C:
		}
		c.step(ctx, time.Now())
		if next := c.nextWakeup(); next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(next))
		}
	}
}

// nextWakeup returns when there is something to do if nothing new is told; zero for
// never.
func (c *Cleaner) nextWakeup() time.Time {
	if c.scanPending {
		return c.pausedUntil
	}
	return earlier(earlier(c.rescanAt, c.retryAt), c.attemptScanAt)
}

// earlier returns the earlier of two times, of which a zero one means none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// step looks at what is new and at what is due.
func (c *Cleaner) step(ctx context.Context, now time.Time) {
	if c.scanPending = now.Before(c.pausedUntil); c.scanPending {
		return
	}
	due := func(at time.Time) bool { return !at.IsZero() && !at.After(now) }
	fresh := c.takePending()
	c.scanAttempts(ctx, now)
	var all candidates
	all.merge(fresh)
	if due(c.rescanAt) {
		all.merge(c.rescan)
		c.rescan, c.nextRescan, c.rescanAt = c.nextRescan, candidates{}, time.Time{}
		if !c.rescan.empty() {
			c.rescanAt = now.Add(rescanDelay)
		}
	}
	if due(c.retryAt) {
		all.merge(c.failed)
		c.failed, c.retryAt = candidates{}, time.Time{}
	}
	if all.empty() {
		return
	}
	err := c.scan(ctx, c.index.queries(&all), func(f flow) bool { return c.index.isStale(f, &all) })
	if ctx.Err() != nil {
		return
	}
	end := time.Now()
	c.pausedUntil = end.Add(scanPause(end.Sub(now)))
	switch {
	case fresh.empty():
	case c.rescanAt.IsZero():
		c.rescan.merge(fresh)
		c.rescanAt = end.Add(rescanDelay)
	default:
		c.nextRescan.merge(fresh)
	}
	c.recordResult(ctx, err, all, now)
}

// recordResult notes what became of a look.
func (c *Cleaner) recordResult(ctx context.Context, err error, looked candidates, now time.Time) {
	if err == nil {
		if c.failed.empty() && c.lastLogged != "" {
			c.log.InfoContext(ctx, "stale connection-tracking entries are removed again", "attempts", c.failedScans)
		}
		if c.failed.empty() {
			c.failedScans, c.lastLogged = 0, ""
		}
		return
	}
	c.failed.merge(looked)
	if len(c.failed.frontends) > maxFailedFrontends {
		c.failed = candidates{all: true}
	}
	delay := retryMax
	if c.failedScans < 6 { // 64 s
		delay = min(retryMin<<c.failedScans, retryMax)
	}
	c.failedScans++
	c.retryAt = earlier(c.retryAt, now.Add(delay))
	if text := err.Error(); text != c.lastLogged {
		c.lastLogged = text
		c.log.WarnContext(ctx, "stale connection-tracking entries are not removed: clients of UDP and SCTP may stay with endpoints that have left",
			"retry_in", delay, "error", err)
	}
}

// takePending empties the mailbox.
func (c *Cleaner) takePending() candidates {
	c.mu.Lock()
	box := c.pending
	c.pending = pendingUpdates{attempts: box.attempts}
	c.mu.Unlock()
	if box.node != nil {
		c.index.setNode(*box.node)
	}
	c.index.update(box.services)
	return box.candidates
}

// scanAttempts deletes the entries of connection attempts of TCP that lead
// nowhere, if it is time, and otherwise sees to it that it will be.
func (c *Cleaner) scanAttempts(ctx context.Context, now time.Time) {
	c.mu.Lock()
	attempts := c.pending.attempts
	none := len(attempts) == 0
	due := !c.attemptScanAt.IsZero() && !c.attemptScanAt.After(now)
	if due {
		c.pending.attempts = nil
	}
	c.mu.Unlock()
	switch {
	case none:
		c.attemptScanAt = time.Time{}
		return
	case c.attemptScanAt.IsZero():
		c.attemptScanAt = now.Add(attemptScanDelay)
		if c.attemptScanAt.Before(c.attemptScanNotBefore) {
			c.attemptScanAt = c.attemptScanNotBefore
		}
		return
	case !due:
		return
	}
	err := c.scan(ctx, attempts.queries(), func(f flow) bool {
		nodePort, ok := c.index.nodePortFrontend(f.frontend())
		return attempts.isStale(f, nodePort, ok)
	})
	end := time.Now()
	c.attemptScanAt, c.attemptScanNotBefore = time.Time{}, end.Add(attemptScanInterval)
	c.pausedUntil = end.Add(scanPause(end.Sub(now)))
	if failed := err != nil && ctx.Err() == nil; failed != c.attemptScanFailed {
		if c.attemptScanFailed = failed; failed {
			c.log.WarnContext(ctx, "connection attempts to endpoints that have left are not redirected: they go on until their clients give up",
				"error", err)
		}
	}
}

// updateIndex takes only the Services from the mailbox.
func (c *Cleaner) updateIndex() {
	c.mu.Lock()
	services := c.pending.services
	c.pending.services = nil
	c.mu.Unlock()
	c.index.update(services)
}

// scan deletes the entries among the answers to queries that are stale.
func (c *Cleaner) scan(ctx context.Context, queries map[dataplane.Family][]query, stale func(flow) bool) error {
	if len(queries) == 0 {
		return nil
	}
	t, err := c.open()
	if err != nil {
		return err
	}
	var errs []error
	for _, family := range sortedFamilies(queries) {
		start := time.Now()
		deleted, err := c.scanFamily(ctx, t, queries[family], stale)
		look := ScanResult{Family: family, Duration: time.Since(start), Deleted: deleted, Err: err}
		if ctx.Err() != nil {
			break
		}
		c.log.DebugContext(ctx, "looked for stale connection-tracking entries", "family", family.String(), "dumps", len(queries[family]),
			"deleted", deleted, "took", look.Duration)
		if c.opts.OnScan != nil {
			c.opts.OnScan(look)
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, t.close())...)
}

// scanFamily looks at one family.
func (c *Cleaner) scanFamily(ctx context.Context, t table, queries []query, stale func(flow) bool) (deleted int, err error) {
	var found []entry
	var errs []error
	for _, q := range queries {
		entries, narrowed, err := t.dump(ctx, q, stale)
		found = append(found, entries...)
		errs = append(errs, err)
		if err != nil || !narrowed {
			break // What is not narrowed is everything.
		}
	}
	// What was told meanwhile: an endpoint may be back. One that is being
	// programmed just now, and has its first flow already, may still be taken
	// for none after a Replace; its client is then sent somewhere again.
	c.updateIndex()
	found = slices.DeleteFunc(found, func(e entry) bool { return !stale(e.flow) })
	if len(found) > 0 {
		deleted, err = t.delete(ctx, found)
		errs = append(errs, err)
	}
	return deleted, errors.Join(errs...)
}
