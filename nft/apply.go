package nft

import (
	"context"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// Apply implements [dataplane.Dataplane]. All changes are one commit, after
// others for the branches that are new. Only a call with more than some
// [transactionSize] elements is split, between Services, and a change of a Service that
// has more by itself is carried out in steps, see batch.steps.
func (d *Dataplane) Apply(_ context.Context, changes []dataplane.Change) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	failed := map[dataplane.Key]error{}
	// A list goes with the last Service that takes a frontend from its own, so
	// frontends that nobody takes must be gone by then.
	changes = slices.Clone(changes)
	slices.SortStableFunc(changes, func(a, b dataplane.Change) int { return compareBool(a.New != nil, b.New != nil) })
	p := d.planChanges(changes, failed)
	b, first := d.newBatch(), 0
	for i, c := range changes {
		if p.addChange(b, c); b.elements() >= d.transactionSize {
			d.applyBatch(p, b, changes[first:i+1], failed)
			b, first = d.newBatch(), i+1
		}
	}
	d.applyBatch(p, b, changes[first:], failed)
	for key, a := range p.assignments {
		if failed[key] == nil {
			d.storeAssignment(key, a)
			if !p.sharing[key] {
				d.listIDs[familyIndex(key.Family)].release(key)
			}
		}
	}
	d.removeUnusedVerdictElements()
	if len(failed) > 0 {
		return &dataplane.Error{Op: "apply", Failed: failed}
	}
	return nil
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// applyBatch commits a batch made of these changes. If it is too large for one
// commit, or the kernel rejects it, each half is tried, down to the Service that
// is large, or to blame.
func (d *Dataplane) applyBatch(p changePlan, b *batch, changes []dataplane.Change, failed map[dataplane.Key]error) {
	var err error
	if len(changes) < 2 || !d.tooLarge(b) {
		if err = d.commit(b); err == nil {
			return
		}
	}
	if len(changes) > 1 && (err == nil || isRejection(err)) {
		half := len(changes) / 2
		for _, part := range [][]dataplane.Change{changes[:half], changes[half:]} {
			b := d.newBatch()
			for _, c := range part {
				p.addChange(b, c)
			}
			d.applyBatch(p, b, part, failed)
		}
		return
	}
	for _, c := range changes {
		for _, key := range p.affectedKeys(c) {
			failed[key] = err
		}
	}
}

// changePlan is what the changes of an Apply come to, over all of them at once: a
// frontend may leave one Service and join another.
type changePlan struct {
	have, want map[dataplane.Frontend]ownedElements
	// assignments has the arrangement of each Service that changes.
	assignments map[dataplane.Key]newAssignment
	// listChanges has, by Service with whose change it is made, how lists that frontends
	// share change.
	listChanges map[dataplane.Key][]listChange
	// sharing has the Services whose frontends share a list after their change.
	sharing map[dataplane.Key]bool
}

// listChange has the row of a Service before and after, of which one shares a list.
type listChange struct{ have, want *frontendElements }

// ownedElements is a row with the Service that it is of.
type ownedElements struct {
	key dataplane.Key
	*frontendElements
}

// planChanges renders both sides of all changes. Services that this backend does not
// support count as deleted and are noted in failed.
func (d *Dataplane) planChanges(changes []dataplane.Change, failed map[dataplane.Key]error) changePlan {
	p := changePlan{
		have:        make(map[dataplane.Frontend]ownedElements, len(changes)),
		want:        make(map[dataplane.Frontend]ownedElements, len(changes)),
		assignments: make(map[dataplane.Key]newAssignment, len(changes)),
		listChanges: map[dataplane.Key][]listChange{}, sharing: map[dataplane.Key]bool{},
	}
	changed := map[dataplane.Key]listChange{}
	for _, c := range changes {
		key := c.Key()
		var before slotAssignment
		var list listChange
		if c.Old != nil && d.renderer.checkSupported(c.Old) == nil {
			before = d.slotAssignmentFor(c.Old)
			r := ownedElements{key, d.render(c.Old, before, d.listIDs[familyIndex(key.Family)].byKey[key])}
			list.have = r.frontendElements
			for _, f := range c.Old.Frontends {
				p.have[f] = r
			}
		}
		p.assignments[key] = newAssignment{}
		if list.have != nil && list.have.listID != 0 {
			changed[key] = list
		}
		if c.New == nil {
			continue
		}
		if err := d.renderer.checkSupported(c.New); err != nil {
			failed[key] = err
			continue
		}
		a := d.renderer.assignSlots(before, c.New)
		p.assignments[key] = a
		r := ownedElements{key, d.render(c.New, a.slotAssignment, d.allocateListID(c.New))}
		if list.want = r.frontendElements; r.listID != 0 || changed[key].have != nil {
			changed[key] = list
		}
		for _, f := range c.New.Frontends {
			p.want[f] = r
		}
	}
	if len(changed) > 0 {
		p.assignListChanges(changes, changed)
	}
	return p
}

// assignListChanges decides with which change each list changes: with its Service's, or, if
// that is deleted, with the last one that takes frontends from it, as a list must not
// go before the frontends that share it.
func (p changePlan) assignListChanges(changes []dataplane.Change, changed map[dataplane.Key]listChange) {
	with := map[dataplane.Key]dataplane.Key{}
	for _, c := range changes {
		if c.New == nil {
			continue
		}
		for _, f := range c.New.Frontends {
			have := p.have[f]
			if have.frontendElements == nil || have.listID == 0 || have.key == c.New.Key || p.want[f].frontendElements == nil {
				continue
			}
			if changed[have.key].want == nil {
				with[have.key] = c.New.Key
			}
		}
	}
	for key, l := range changed {
		to, moved := with[key]
		if !moved {
			to = key
		}
		p.listChanges[to] = append(p.listChanges[to], l)
		p.sharing[key] = l.want != nil && l.want.listID != 0
	}
}

// addChange puts the frontends of a change into a batch. One that moves belongs to the
// change of the Service that gets it.
func (p changePlan) addChange(b *batch, c dataplane.Change) {
	if c.New != nil {
		for _, f := range c.New.Frontends {
			if want, ok := p.want[f]; ok { // not of a Service that is not supported
				b.diffFrontend(f, p.have[f].frontendElements, want.frontendElements)
			}
		}
	}
	if c.Old != nil {
		for _, f := range c.Old.Frontends {
			if have, had := p.have[f]; had && p.want[f].frontendElements == nil {
				b.diffFrontend(f, have.frontendElements, nil)
			}
		}
	}
	for _, l := range p.listChanges[c.Key()] {
		b.diffSharedList(c.Key().Family, l)
	}
}

// affectedKeys returns the keys that are in doubt if a change did not take: its
// own, and those of the Services it takes frontends from.
func (p changePlan) affectedKeys(c dataplane.Change) []dataplane.Key {
	keys := []dataplane.Key{c.Key()}
	if c.New == nil {
		return keys
	}
	for _, f := range c.New.Frontends {
		if have := p.have[f]; have.frontendElements != nil && have.key != keys[0] {
			keys = append(keys, have.key)
		}
	}
	return keys
}

// storeAssignment notes the arrangement of a Service that is programmed, or gone.
func (d *Dataplane) storeAssignment(key dataplane.Key, a newAssignment) {
	if a.mustStore {
		d.slotAssignments[key] = a.slotAssignment
	} else {
		delete(d.slotAssignments, key)
	}
}
