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

// Options configure a [Cleaner]. The zero value is ready to use.
type Options struct {
	// NetNS is a file descriptor of the network namespace to clean. 0 means the namespace in
	// which the process started.
	NetNS int
	// Logger receives a Warn when entries cannot be dumped or deleted, an Info when this works
	// again, and a Debug for each scan. Nil disables logging.
	Logger *slog.Logger
	// OnScan, if not nil, is called from the goroutine of Run after each scan of a family.
	OnScan func(ScanResult)
}

// ScanResult is the result of one scan of the entries of a family.
type ScanResult struct {
	Family dataplane.Family
	// Duration is the time spent dumping and deleting.
	Duration time.Duration
	// Deleted is the number of deleted entries.
	Deleted int
	// Err, if not nil, is the reason why stale entries may remain. The Cleaner retries the
	// scan.
	Err error
}

// The delays of scans, see [Cleaner.Run].
const (
	rescanDelay = time.Second
	retryMin    = time.Second
	retryMax    = time.Minute
	// verifyDelay limits how long a stale entry lives that has no event. The kernel makes none if it
	// lacks memory, or if rules of another program omit it (nft's ct event set).
	verifyDelay = 10 * time.Second
)

// scanPause returns the minimum pause after a scan with the given duration. The pauses leave
// four fifths of a processor to others while Services keep changing. If a scan takes up to 50 ms, the
// pause is at most 100 ms, which is too short for clients to notice.
func scanPause(took time.Duration) time.Duration {
	return min(4*took, max(100*time.Millisecond, 2*took), time.Second/2)
}

// maxLaterFrontends is the maximum number of frontends recorded for a later scan. With more, that
// scan considers all entries.
const maxLaterFrontends = 10_000

// Cleaner deletes stale entries. Create one with [New].
type Cleaner struct {
	opts Options
	log  *slog.Logger
	open func() (table, error)
	wake chan struct{} // capacity one: pending is not empty

	mu      stdsync.Mutex
	pending pendingUpdates
	// tcp holds the TCP frontends of the programmed Services.
	tcp map[dataplane.Frontend]struct{}

	// The remaining fields belong to Run.
	index serviceIndex
	// rescan holds the candidates to scan again at rescanAt; a zero time means never.
	// nextRescan holds newer candidates, for the rescan after that.
	rescan, nextRescan candidates
	rescanAt           time.Time
	// pausedUntil is the earliest time of the next scan. scanPending reports that a scan waits for this time.
	pausedUntil time.Time
	scanPending bool
	// failed holds the candidates of failed scans. failedScans counts consecutive failures.
	failed      candidates
	retryAt     time.Time
	failedScans int
	lastLogged  string // last error logged, or empty
	follower    follower
	// unverified holds candidates without entries according to the follower. They are scanned
	// nevertheless at verifyAt; a zero time means never.
	unverified candidates
	verifyAt   time.Time
	// attemptScanAt is the time of the next TCP scan; a zero time means never.
	// attemptScanNotBefore is its earliest time. attemptScanFailed reports that the last TCP
	// scan failed.
	attemptScanAt, attemptScanNotBefore time.Time
	attemptScanFailed                   bool
}

// pendingUpdates holds the updates received since the last scan.
type pendingUpdates struct {
	services   map[dataplane.Key]*dataplane.Service // nil if deleted
	candidates candidates
	attempts   connAttempts // kept until the next TCP scan
	node       *dataplane.Node
}

// New returns a Cleaner. Call [Cleaner.Run] to start it.
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
		tcp:   map[dataplane.Frontend]struct{}{},
		index: newServiceIndex(),

		follower: follower{log: log},
	}
}

// SetNode sets the addresses of node ports. Call it before passing the same Node to the
// syncer, whose Replace then triggers a scan. SetNode does not block and may be called
// concurrently.
func (c *Cleaner) SetNode(node dataplane.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending.node = &node
}

// OnCommit receives a completed call of the dataplane, see [sync.Options]. It must not be called
// concurrently. It does not block, and its cost is proportional to the changes. For TCP it
// only compares Services and records frontends.
func (c *Cleaner) OnCommit(commit sync.Commit) {
	var added candidates
	// A Replace follows a start, an error or a change by another program. Until then the kernel
	// may have translated connections in any way.
	added.all = commit.Op == sync.OpReplace && commit.Err == nil
	for _, change := range commit.Changes {
		added.addChange(change)
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
		// The kernel's state before a Replace may be older than change.Old.
		if commit.Op != sync.OpReplace {
			c.pending.attempts.record(change)
		}
	}
	c.updateTCP(commit.Changes)
	c.pending.candidates.merge(added)
	firstAttempts := !hadAttempts && len(c.pending.attempts) > 0
	c.mu.Unlock()
	if added.empty() && !firstAttempts {
		return
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// updateTCP updates the TCP frontends. The caller holds mu.
func (c *Cleaner) updateTCP(changes []dataplane.Change) {
	// Frontends may move between Services, so remove all old ones before adding new ones.
	moved := func(change dataplane.Change) (old, now []dataplane.Frontend) {
		if old, now = tcpFrontends(change.Old), tcpFrontends(change.New); slices.Equal(old, now) {
			return nil, nil
		}
		return old, now
	}
	for _, change := range changes {
		old, _ := moved(change)
		for _, f := range old {
			delete(c.tcp, f)
		}
	}
	for _, change := range changes {
		_, now := moved(change)
		for _, f := range now {
			c.tcp[f] = struct{}{}
		}
	}
}

// isUntranslatedAttempt reports whether a flow is a TCP connection attempt to a Service that the
// kernel did not translate and that has no reply.
func (c *Cleaner) isUntranslatedAttempt(f flow) bool {
	if f.protocol != dataplane.TCP || f.replied || f.translated() {
		return false
	}
	frontend := f.frontend()
	nodePort, isNodePort := c.index.nodePortFrontend(frontend)
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.tcp[frontend]
	if !ok && isNodePort {
		_, ok = c.tcp[nodePort]
	}
	return ok
}

// addAttemptQueries adds the dumps that find untranslated TCP connection attempts.
func (c *Cleaner) addAttemptQueries(queries map[dataplane.Family][]query) {
	c.mu.Lock()
	defer c.mu.Unlock()
	added := map[dataplane.Family]bool{}
	for f := range c.tcp {
		family := dataplane.FamilyOf(f.Addr.Addr())
		if added[family] {
			continue
		}
		added[family] = true
		queries[family] = append(queries[family], query{family: family, protocol: dataplane.TCP, unreplied: true})
		if len(added) == 2 { // all families
			return
		}
	}
}

// Run scans the entries after each commit that may make entries stale, and once more after a
// second, until ctx is done. It then returns nil. It retries failed scans, first after a
// second, later once a minute. While commits are frequent, it scans only for frontends and endpoints
// that have entries according to the kernel's events.
func (c *Cleaner) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	defer c.follower.stop(ctx, time.Now(), nil)
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

// nextWakeup returns the time of the next scan if no update arrives; a zero time means never.
func (c *Cleaner) nextWakeup() time.Time {
	if c.scanPending {
		return c.pausedUntil
	}
	next := earlier(earlier(c.rescanAt, c.retryAt), c.attemptScanAt)
	return earlier(earlier(next, c.verifyAt), c.follower.nextReceive())
}

// earlier returns the earlier of two times. A zero time means never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// step scans new candidates and candidates that are due.
func (c *Cleaner) step(ctx context.Context, now time.Time) {
	if c.scanPending = now.Before(c.pausedUntil); c.scanPending {
		return
	}
	due := func(at time.Time) bool { return !at.IsZero() && !at.After(now) }
	added := c.takePending()
	c.scanAttempts(ctx, now)
	if !added.empty() {
		c.follower.recordChange(ctx, now, c.open)
	}
	var changed candidates
	changed.merge(added)
	if due(c.rescanAt) {
		changed.merge(c.rescan)
		c.rescan, c.nextRescan, c.rescanAt = c.nextRescan, candidates{}, time.Time{}
		if !c.rescan.empty() {
			c.rescanAt = now.Add(rescanDelay)
		}
	}
	// The follower receives the entries that preceded the changes.
	c.follower.receive(ctx, now)
	scanned, without := c.follower.split(changed)
	if due(c.verifyAt) {
		scanned.merge(c.unverified)
		c.unverified, c.verifyAt = candidates{}, time.Time{}
	}
	if !without.empty() {
		c.unverified.merge(without)
		c.unverified.limit()
		if c.verifyAt.IsZero() {
			c.verifyAt = now.Add(verifyDelay)
		}
	}
	if due(c.retryAt) {
		scanned.merge(c.failed)
		c.failed, c.retryAt = candidates{}, time.Time{}
	}
	if scanned.empty() {
		c.scheduleRescan(added, now)
		return
	}
	queries := c.index.queries(&scanned)
	c.follower.widen(queries, now)
	if scanned.all {
		c.addAttemptQueries(queries)
	}
	err := c.scan(ctx, queries, func(f flow) bool {
		c.follower.visit(f)
		return c.index.isStale(f, &scanned) || scanned.all && c.isUntranslatedAttempt(f)
	})
	if ctx.Err() != nil {
		return
	}
	end := time.Now()
	c.pausedUntil = end.Add(scanPause(end.Sub(now)))
	c.scheduleRescan(added, end)
	c.recordResult(ctx, err, scanned, now)
}

// scheduleRescan schedules a second scan of candidates rescanDelay after the first one.
func (c *Cleaner) scheduleRescan(added candidates, scanned time.Time) {
	switch {
	case added.empty():
	case c.rescanAt.IsZero():
		c.rescan.merge(added)
		c.rescanAt = scanned.Add(rescanDelay)
	default:
		c.nextRescan.merge(added)
	}
}

// recordResult logs the result of a scan and schedules a retry.
func (c *Cleaner) recordResult(ctx context.Context, err error, scanned candidates, now time.Time) {
	if err == nil {
		if c.failed.empty() && c.lastLogged != "" {
			c.log.InfoContext(ctx, "removing stale connection-tracking entries works again", "attempts", c.failedScans)
		}
		if c.failed.empty() {
			c.failedScans, c.lastLogged = 0, ""
		}
		return
	}
	c.failed.merge(scanned)
	c.failed.limit()
	delay := retryMax
	if c.failedScans < 6 { // 64 s
		delay = min(retryMin<<c.failedScans, retryMax)
	}
	c.failedScans++
	c.retryAt = earlier(c.retryAt, now.Add(delay))
	if text := err.Error(); text != c.lastLogged {
		c.lastLogged = text
		c.log.WarnContext(ctx, "cannot remove stale connection-tracking entries: UDP and SCTP clients may stay with removed endpoints",
			"retry_in", delay, "error", err)
	}
}

// takePending applies the pending updates and returns the new candidates.
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

// scanAttempts deletes stale TCP connection attempts if a scan is due, and otherwise schedules
// a scan if there are any.
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
			c.log.WarnContext(ctx, "cannot redirect connection attempts from removed endpoints: they continue until the clients time out",
				"error", err)
		}
	}
}

// updateIndex applies only the pending Services.
func (c *Cleaner) updateIndex() {
	c.mu.Lock()
	services := c.pending.services
	c.pending.services = nil
	c.mu.Unlock()
	c.index.update(services)
}

// scan deletes the stale entries among the answers to queries.
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
		result := ScanResult{Family: family, Duration: time.Since(start), Deleted: deleted, Err: err}
		if ctx.Err() != nil {
			break
		}
		c.log.DebugContext(ctx, "scanned for stale connection-tracking entries", "family", family.String(), "dumps", len(queries[family]),
			"deleted", deleted, "took", result.Duration)
		if c.opts.OnScan != nil {
			c.opts.OnScan(result)
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, t.close())...)
}

// scanFamily scans the entries of one family.
func (c *Cleaner) scanFamily(ctx context.Context, t table, queries []query, stale func(flow) bool) (deleted int, err error) {
	var staleEntries []entry
	var errs []error
	for _, q := range queries {
		start := time.Now()
		entries, narrowed, err := t.dump(ctx, q, stale)
		if err == nil {
			c.follower.dumped(q, start)
		}
		staleEntries = append(staleEntries, entries...)
		errs = append(errs, err)
		if err != nil || !narrowed {
			break // an unfiltered dump contains all entries
		}
	}
	// A removed endpoint may have been added again meanwhile. After a Replace, scan may delete
	// the entry of an endpoint that is being added now and already has a flow. Its client is
	// then translated again.
	c.updateIndex()
	staleEntries = slices.DeleteFunc(staleEntries, func(e entry) bool { return !stale(e.flow) })
	if len(staleEntries) > 0 {
		deleted, err = t.delete(ctx, staleEntries)
		errs = append(errs, err)
	}
	return deleted, errors.Join(errs...)
}
