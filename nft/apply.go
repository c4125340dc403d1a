package nft

import (
	"context"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// Apply implements [dataplane.Dataplane]. It commits all changes in one transaction, after
// separate transactions for new verdict elements. Apply splits a call between Services if
// it changes more than about [transactionSize] elements. A single Service with more
// elements is committed in steps; see batch.steps.
func (d *Dataplane) Apply(_ context.Context, changes []dataplane.Change) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.apply("apply", changes)
}

// apply implements Apply. op is the operation for the error.
func (d *Dataplane) apply(op string, changes []dataplane.Change) error {
	failed := map[dataplane.Key]error{}
	// Deletions come first: the change that deletes a shared list must come after every
	// change that moves a frontend away from the list.
	changes = slices.Clone(changes)
	slices.SortStableFunc(changes, func(a, b dataplane.Change) int { return compareBool(a.New != nil, b.New != nil) })
	p := d.planChanges(changes, failed)
	b, first := d.takeBatch(), 0
	for i, c := range changes {
		if p.addChange(b, c); b.elements() >= d.transactionSize {
			d.applyBatch(p, b, changes[first:i+1], failed)
			d.recycleBatch(b)
			b, first = d.takeBatch(), i+1
		}
	}
	d.applyBatch(p, b, changes[first:], failed)
	d.recycleBatch(b)
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
		return &dataplane.Error{Op: op, Failed: failed}
	}
	return nil
}

// compareBool orders false before true.
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

// applyBatch commits a batch that contains these changes. If the batch is too large for one
// commit, or the kernel rejects it, applyBatch retries each half. A single Service that is
// too large is committed in steps. A single Service that the kernel rejects is recorded in
// failed.
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

// changePlan is the combined effect of all changes of an Apply. A frontend may move from
// one Service to another.
type changePlan struct {
	have, want map[dataplane.Frontend]ownedElements
	// assignments contains the new slot assignment of each Service that changes.
	assignments map[dataplane.Key]newAssignment
	// listChanges contains the changes of shared lists by the Service whose change includes
	// them.
	listChanges map[dataplane.Key][]listChange
	// sharing contains the Services whose frontends share a list after their change.
	sharing map[dataplane.Key]bool
}

// listChange contains the rendered elements of a Service before and after its change. At
// least one of them has a shared list.
type listChange struct{ have, want *frontendElements }

// ownedElements are the rendered elements of a frontend, with the key of its Service.
type ownedElements struct {
	key dataplane.Key
	*frontendElements
}

// planChanges renders the old and new Services of all changes. It treats unsupported
// Services as deleted and records them in failed.
func (d *Dataplane) planChanges(changes []dataplane.Change, failed map[dataplane.Key]error) changePlan {
	p := changePlan{
		have:        make(map[dataplane.Frontend]ownedElements, len(changes)),
		want:        make(map[dataplane.Frontend]ownedElements, len(changes)),
		assignments: make(map[dataplane.Key]newAssignment, len(changes)),
		listChanges: map[dataplane.Key][]listChange{}, sharing: map[dataplane.Key]bool{},
	}
	changed := map[dataplane.Key]listChange{}
	users := newTurnUsers()
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
		a := d.assignTurns(c.New, before, d.renderer.assignSlots(before, c.New), users)
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

// assignListChanges assigns each list change to the change of a Service. Usually, this is
// the Service of the list. If that Service is deleted, it is the last Service that takes
// frontends from it, because a list must not be deleted before the frontends that refer to
// it.
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

// addChange adds the frontends of a change to a batch. A frontend that moves belongs to the
// change of the Service that receives it.
func (p changePlan) addChange(b *batch, c dataplane.Change) {
	if c.New != nil {
		for _, f := range c.New.Frontends {
			if want, ok := p.want[f]; ok { // unsupported Services have no rendered elements
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

// affectedKeys returns the keys whose state is unknown if a change failed: its own key, and
// the keys of the Services that it takes frontends from.
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

// storeAssignment stores the slot assignment of a Service that is programmed, or deletes it
// if the Service needs none.
func (d *Dataplane) storeAssignment(key dataplane.Key, a newAssignment) {
	if a.mustStore {
		d.slotAssignments[key] = a.slotAssignment
	} else {
		delete(d.slotAssignments, key)
	}
}
