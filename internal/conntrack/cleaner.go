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
	// OnLook is called after each look at the entries of a family, from the
	// goroutine of Run. Nil means that nobody wants to know.
	OnLook func(Look)
}

// Look is one look at the entries of a family.
type Look struct {
	Family dataplane.Family
	// Took is the time that listing and deleting took.
	Took time.Duration
	// Deleted is the number of entries deleted.
	Deleted int
	// Err is why stale entries may be left, or nil. Those that are are looked
	// for again.
	Err error
}

// The delays of looks, see [Cleaner.Run].
const (
	secondLook = time.Second
	retryMin   = time.Second
	retryMax   = time.Minute
)

// rest is how long nothing is looked at after a look that took so long: enough to
// leave four fifths of a processor to others while Services keep changing, but
// not so long that clients would notice.
func rest(took time.Duration) time.Duration { return min(4*took, time.Second/2) }

// maxRemembered is for how many frontends it is remembered, while entries can't
// be listed or deleted, which endpoints have left.
const maxRemembered = 10_000

// Cleaner deletes stale entries. Make one with [New].
type Cleaner struct {
	opts Options
	log  *slog.Logger
	open func() (table, error)
	wake chan struct{} // one slot: the mailbox has something

	mu  stdsync.Mutex
	box mailbox

	// The rest belongs to Run.
	programmed programmed
	// second are those to look at once more at secondAt; zero for never. later
	// are those after them, so that every second look is as late as it must be.
	second, later suspects
	secondAt      time.Time
	// restsUntil is when the next look may be, and due says that there is one
	// that waits for it.
	restsUntil time.Time
	due        bool
	// failed are those of a look that has failed, after attempts looks that did.
	failed   suspects
	failedAt time.Time
	attempts int
	reported string // the error that was logged last; empty for none
	// attemptsAt is when to look at the attempts of TCP, zero for never, and
	// attemptsFrom is when the next such look may be. attemptsFailed says that the
	// last one did.
	attemptsAt, attemptsFrom time.Time
	attemptsFailed           bool
}

// mailbox is what was told since Run last looked.
type mailbox struct {
	services map[dataplane.Key]*dataplane.Service // nil for those that are gone
	suspects suspects
	attempts attempts // stay here until they are looked at
	node     *dataplane.Node
}

// New returns a Cleaner. It starts nothing: call [Cleaner.Run].
func New(opts Options) *Cleaner {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Cleaner{
		opts:       opts,
		log:        log,
		open:       func() (table, error) { return openKernel(opts.NetNS) },
		wake:       make(chan struct{}, 1),
		programmed: newProgrammed(),
	}
}

// SetNode tells on which addresses node ports are served. It is to be called
// before the syncer is told of the same Node: entries are looked at after the
// Replace that this leads to. It does not block and may be called from any
// goroutine.
func (c *Cleaner) SetNode(node dataplane.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.box.node = &node
}

// Committed tells of a call to the dataplane that has ended, as sync.Options has
// it. It must not be called twice at a time. It does not block, and costs as much
// as the changes: the TCP Services among them are compared, and no more.
func (c *Cleaner) Committed(commit sync.Commit) {
	var found suspects
	// A Replace reads the kernel because nobody knew what it holds: at the start,
	// after an error, or when somebody else has changed it. Clients have met
	// that, whatever it was.
	found.all = commit.Kind == sync.KindReplace && commit.Err == nil
	for _, change := range commit.Changes {
		found.change(change)
	}
	c.mu.Lock()
	hadAttempts := len(c.box.attempts) > 0
	for _, change := range commit.Changes {
		if isTracked(change.Old) || isTracked(change.New) {
			if c.box.services == nil {
				c.box.services = map[dataplane.Key]*dataplane.Service{}
			}
			c.box.services[change.Key()] = change.New
		}
		// What a Replace found in the kernel may be older than change.Old.
		if commit.Kind != sync.KindReplace {
			c.box.attempts.note(change)
		}
	}
	c.box.suspects.merge(found)
	firstAttempts := !hadAttempts && len(c.box.attempts) > 0
	c.mu.Unlock()
	if found.none() && !firstAttempts {
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
		if next := c.next(); next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(next))
		}
	}
}

// next returns when there is something to do if nothing new is told; zero for
// never.
func (c *Cleaner) next() time.Time {
	if c.due {
		return c.restsUntil
	}
	return earlier(earlier(c.secondAt, c.failedAt), c.attemptsAt)
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
	if c.due = now.Before(c.restsUntil); c.due {
		return
	}
	due := func(at time.Time) bool { return !at.IsZero() && !at.After(now) }
	fresh := c.take()
	c.lookAtAttempts(ctx, now)
	var all suspects
	all.merge(fresh)
	if due(c.secondAt) {
		all.merge(c.second)
		c.second, c.later, c.secondAt = c.later, suspects{}, time.Time{}
		if !c.second.none() {
			c.secondAt = now.Add(secondLook)
		}
	}
	if due(c.failedAt) {
		all.merge(c.failed)
		c.failed, c.failedAt = suspects{}, time.Time{}
	}
	if all.none() {
		return
	}
	err := c.look(ctx, c.programmed.queries(&all), func(f flow) bool { return c.programmed.stale(f, &all) })
	if ctx.Err() != nil {
		return
	}
	end := time.Now()
	c.restsUntil = end.Add(rest(end.Sub(now)))
	switch {
	case fresh.none():
	case c.secondAt.IsZero():
		c.second.merge(fresh)
		c.secondAt = end.Add(secondLook)
	default:
		c.later.merge(fresh)
	}
	c.settle(ctx, err, all, now)
}

// settle notes what became of a look.
func (c *Cleaner) settle(ctx context.Context, err error, looked suspects, now time.Time) {
	if err == nil {
		if c.failed.none() && c.reported != "" {
			c.log.InfoContext(ctx, "stale connection-tracking entries are removed again", "attempts", c.attempts)
		}
		if c.failed.none() {
			c.attempts, c.reported = 0, ""
		}
		return
	}
	c.failed.merge(looked)
	if len(c.failed.frontends) > maxRemembered {
		c.failed = suspects{all: true}
	}
	delay := retryMax
	if c.attempts < 6 { // 64 s
		delay = min(retryMin<<c.attempts, retryMax)
	}
	c.attempts++
	c.failedAt = earlier(c.failedAt, now.Add(delay))
	if text := err.Error(); text != c.reported {
		c.reported = text
		c.log.WarnContext(ctx, "stale connection-tracking entries are not removed: clients of UDP and SCTP may stay with endpoints that have left",
			"retry_in", delay, "error", err)
	}
}

// take empties the mailbox.
func (c *Cleaner) take() suspects {
	c.mu.Lock()
	box := c.box
	c.box = mailbox{attempts: box.attempts}
	c.mu.Unlock()
	if box.node != nil {
		c.programmed.setNode(*box.node)
	}
	c.programmed.take(box.services)
	return box.suspects
}

// lookAtAttempts deletes the entries of connection attempts of TCP that lead
// nowhere, if it is time, and otherwise sees to it that it will be.
func (c *Cleaner) lookAtAttempts(ctx context.Context, now time.Time) {
	c.mu.Lock()
	attempts := c.box.attempts
	none := len(attempts) == 0
	due := !c.attemptsAt.IsZero() && !c.attemptsAt.After(now)
	if due {
		c.box.attempts = nil
	}
	c.mu.Unlock()
	switch {
	case none:
		c.attemptsAt = time.Time{}
		return
	case c.attemptsAt.IsZero():
		c.attemptsAt = now.Add(firstAttemptLook)
		if c.attemptsAt.Before(c.attemptsFrom) {
			c.attemptsAt = c.attemptsFrom
		}
		return
	case !due:
		return
	}
	err := c.look(ctx, attempts.queries(), func(f flow) bool {
		nodePort, ok := c.programmed.nodePort(f.frontend())
		return attempts.stale(f, nodePort, ok)
	})
	end := time.Now()
	c.attemptsAt, c.attemptsFrom = time.Time{}, end.Add(attemptRest)
	c.restsUntil = end.Add(rest(end.Sub(now)))
	if failed := err != nil && ctx.Err() == nil; failed != c.attemptsFailed {
		if c.attemptsFailed = failed; failed {
			c.log.WarnContext(ctx, "connection attempts to endpoints that have left are not redirected: they go on until their clients give up",
				"error", err)
		}
	}
}

// catchUp takes only the Services from the mailbox.
func (c *Cleaner) catchUp() {
	c.mu.Lock()
	services := c.box.services
	c.box.services = nil
	c.mu.Unlock()
	c.programmed.take(services)
}

// look deletes the entries among the answers to queries that are stale.
func (c *Cleaner) look(ctx context.Context, queries map[dataplane.Family][]query, stale func(flow) bool) error {
	if len(queries) == 0 {
		return nil
	}
	t, err := c.open()
	if err != nil {
		return err
	}
	var errs []error
	for _, family := range families(queries) {
		start := time.Now()
		deleted, err := c.lookAt(ctx, t, queries[family], stale)
		look := Look{Family: family, Took: time.Since(start), Deleted: deleted, Err: err}
		if ctx.Err() != nil {
			break
		}
		c.log.DebugContext(ctx, "looked for stale connection-tracking entries", "family", family.String(), "dumps", len(queries[family]),
			"deleted", deleted, "took", look.Took)
		if c.opts.OnLook != nil {
			c.opts.OnLook(look)
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, t.close())...)
}

// lookAt looks at one family.
func (c *Cleaner) lookAt(ctx context.Context, t table, queries []query, stale func(flow) bool) (deleted int, err error) {
	var found []entry
	var errs []error
	for _, q := range queries {
		entries, narrowed, err := t.list(ctx, q, stale)
		found = append(found, entries...)
		errs = append(errs, err)
		if err != nil || !narrowed {
			break // What is not narrowed is everything.
		}
	}
	// What was told meanwhile: an endpoint may be back. One that is being
	// programmed just now, and has its first flow already, may still be taken
	// for none after a Replace; its client is then sent somewhere again.
	c.catchUp()
	found = slices.DeleteFunc(found, func(e entry) bool { return !stale(e.flow) })
	if len(found) > 0 {
		deleted, err = t.delete(ctx, found)
		errs = append(errs, err)
	}
	return deleted, errors.Join(errs...)
}
