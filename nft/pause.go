package nft

import (
	"errors"
	"fmt"

	"fairlead.io/fairlead/dataplane"
)

// notificationPause is a time in which the watch is not subscribed to announcements: that of
// a Replace that makes both tables. If anybody is, in whatever network namespace, the
// kernel puts every element that it adds into an announcement (nf_tables_api.c,
// nf_tables_setelem_notify). That is half of what a commit costs it, and those of our
// own changes the watch's filter drops.
//
// Every commit that changes anything in any table of the network namespace begins a
// generation, and these are numbered. So if in the end the generation is the one
// before anything was read, and one more for each commit of ours, then nobody else
// has committed anything.
type notificationPause struct {
	generation uint32 // of the kernel, if all commits are ours
	uncertain  bool   // whether they are
}

// pauseNotifications ends the subscription until listen. What the kernel holds must have been
// read in this generation or later. If the watch cannot unsubscribe, nothing changes.
func (d *Dataplane) pauseNotifications(generation uint32) {
	if err := d.watch.unsubscribe(); err != nil {
		d.log.Debug("the kernel announces our own changes", "error", err)
		return
	}
	d.pause = &notificationPause{generation: generation}
}

// resumeNotifications ends silence, if there is one. It signals drift if somebody else may have
// committed anything, be it to tables that do not concern us: nobody knows which.
// The Replace that follows finds the tables, so it is not silent.
func (d *Dataplane) resumeNotifications() error {
	s := d.pause
	if s == nil {
		return nil
	}
	d.pause = nil
	if err := d.watch.subscribe(); err != nil {
		d.watch.signalLoss()
		return err
	}
	// In this order: a commit begins its generation before it looks for subscribers
	// (nf_tables_api.c, nf_tables_commit), so one that is not in the generation that
	// is read now is announced.
	if s.uncertain || !d.isGeneration(s.generation) {
		d.watch.signalLoss()
	}
	return nil
}

// submit commits the transaction, in which there must be something that changes
// what the kernel holds: then a commit that succeeds is one generation.
func (d *Dataplane) submit() error {
	return d.recordCommit(d.flush())
}

// recordCommit records that a transaction was committed, or failed with an error.
func (d *Dataplane) recordCommit(err error) error {
	d.prefetched = nil // the watch ignores our own commits
	if err == nil {
		d.generation++
	}
	s := d.pause
	switch {
	case s == nil:
	case err == nil:
		// The kernel leaves out 0 when the number starts over. That looks like a
		// commit of somebody else's, and does no harm.
		s.generation++
	case !d.isGeneration(s.generation):
		s.uncertain = true // the kernel may have taken it all the same
	}
	return err
}

// isGeneration reports whether the kernel is certainly in this generation.
func (d *Dataplane) isGeneration(generation uint32) bool {
	now, err := d.currentGeneration()
	return err == nil && now == generation
}

// wrapConflict returns an error of a transaction, and wraps [dataplane.ErrConflict] if
// others have committed since the tables were read.
func (d *Dataplane) wrapConflict(err error) error {
	if err == nil || errors.Is(err, dataplane.ErrConflict) || d.isGeneration(d.generation) {
		return err
	}
	return fmt.Errorf("%w: %w", dataplane.ErrConflict, err)
}

// currentGeneration asks the kernel for its generation.
func (d *Dataplane) currentGeneration() (uint32, error) {
	g, err := d.conn.GetGen()
	if err != nil {
		return 0, fmt.Errorf("ask the kernel for its generation: %w", err)
	}
	return g.ID, nil
}
