package nft

import (
	"errors"
	"fmt"

	"fairlead.io/fairlead/dataplane"
)

// notificationPause is a period in which the watch is not subscribed to notifications: a
// Replace that creates both tables. If any process is subscribed, in any network namespace,
// the kernel writes every added element to a notification (nf_tables_api.c,
// nf_tables_setelem_notify). This is half the cost of a commit, and the watch's filter
// drops the notifications of our own changes.
//
// Every commit that changes a table of the network namespace starts a new generation, and
// generations are numbered. If, at the end of the pause, the generation equals the
// generation before the read plus the number of our own commits, no other process has
// committed.
type notificationPause struct {
	generation uint32 // the kernel's, if all commits are ours
	uncertain  bool   // set if this is unknown
}

// pauseNotifications unsubscribes until resumeNotifications. The tables must have been read
// in this generation or later. If unsubscribing fails, notifications continue.
func (d *Dataplane) pauseNotifications(generation uint32) {
	if err := d.watch.unsubscribe(); err != nil {
		d.log.Debug("cannot pause notifications", "error", err)
		return
	}
	d.pause = &notificationPause{generation: generation}
}

// resumeNotifications ends a pause, if there is one. It signals drift if another process
// may have committed anything. The change may be in unrelated tables; the Dataplane cannot
// know. The next Replace finds the tables, so it does not pause notifications.
func (d *Dataplane) resumeNotifications() error {
	p := d.pause
	if p == nil {
		return nil
	}
	d.pause = nil
	if err := d.watch.subscribe(); err != nil {
		d.watch.signalLoss()
		return err
	}
	// Subscribe before reading the generation: a commit starts its generation before it
	// checks for subscribers (nf_tables_api.c, nf_tables_commit). So a commit that is not
	// in the generation read now sends a notification.
	if p.uncertain || !d.isGeneration(p.generation) {
		d.watch.signalLoss()
	}
	return nil
}

// submit commits the transaction. The transaction must change the kernel's state, so that a
// successful commit is exactly one generation.
func (d *Dataplane) submit() error {
	return d.recordCommit(d.flush())
}

// recordCommit records the result of a commit.
func (d *Dataplane) recordCommit(err error) error {
	d.prefetch.invalidate() // the watch does not count our own commits
	if err == nil {
		d.generation++
	}
	p := d.pause
	switch {
	case p == nil:
	case err == nil:
		// The kernel skips 0 when the number wraps around. This looks like a commit of
		// another process and does no harm.
		p.generation++
	case !d.isGeneration(p.generation):
		p.uncertain = true // the kernel may have committed despite the error
	}
	return err
}

// isGeneration reports whether the kernel is in this generation. It returns false if the
// generation is unknown.
func (d *Dataplane) isGeneration(generation uint32) bool {
	now, err := d.currentGeneration()
	return err == nil && now == generation
}

// wrapConflict returns the error of a transaction. The result wraps [dataplane.ErrConflict]
// if another process has committed since the tables were read.
func (d *Dataplane) wrapConflict(err error) error {
	if err == nil || errors.Is(err, dataplane.ErrConflict) || d.isGeneration(d.generation) {
		return err
	}
	return fmt.Errorf("%w: %w", dataplane.ErrConflict, err)
}

// currentGeneration reads the generation from the kernel.
func (d *Dataplane) currentGeneration() (uint32, error) {
	g, err := d.conn.GetGen()
	if err != nil {
		return 0, fmt.Errorf("read the nftables generation: %w", err)
	}
	return g.ID, nil
}
