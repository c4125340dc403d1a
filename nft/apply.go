package nft

import (
	"context"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// Apply implements [dataplane.Dataplane]. All changes are one commit, after
// others for the branches that are new. Only a call with more than some
// [editSize] elements is split, between Services, and a change of a Service that
// has more by itself is carried out in steps, see batch.steps.
func (d *Dataplane) Apply(_ context.Context, changes []dataplane.Change) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	failed := map[dataplane.Key]error{}
	// A list goes with the last Service that takes a frontend from its own, so
	// frontends that nobody takes must be gone by then.
	changes = slices.Clone(changes)
	slices.SortStableFunc(changes, func(a, b dataplane.Change) int { return falseFirst(a.New != nil, b.New != nil) })
	p := d.plan(changes, failed)
	b, first := d.newBatch(), 0
	for i, c := range changes {
		if p.add(b, c); b.elements() >= d.editSize {
			d.applyTogether(p, b, changes[first:i+1], failed)
			b, first = d.newBatch(), i+1
		}
	}
	d.applyTogether(p, b, changes[first:], failed)
	for key, a := range p.after {
		if failed[key] == nil {
			d.keep(key, a)
			if !p.shares[key] {
				d.lists[index(key.Family)].release(key)
			}
		}
	}
	d.removeUnusedBranches()
	if len(failed) > 0 {
		return &dataplane.Error{Op: "apply", Failed: failed}
	}
	return nil
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// applyTogether commits a batch made of these changes. If it is too large for one
// commit, or the kernel rejects it, each half is tried, down to the Service that
// is large, or to blame.
func (d *Dataplane) applyTogether(p plan, b *batch, changes []dataplane.Change, failed map[dataplane.Key]error) {
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
				p.add(b, c)
			}
			d.applyTogether(p, b, part, failed)
		}
		return
	}
	for _, c := range changes {
		for _, key := range p.concerned(c) {
			failed[key] = err
		}
	}
}

// plan is what the changes of an Apply come to, over all of them at once: a
// frontend may leave one Service and join another.
type plan struct {
	have, want map[dataplane.Frontend]owned
	// after has the arrangement of each Service that changes.
	after map[dataplane.Key]arranged
	// lists has, by Service with whose change it is made, how lists that frontends
	// share change.
	lists map[dataplane.Key][]listChange
	// shares has the Services whose frontends share a list after their change.
	shares map[dataplane.Key]bool
}

// listChange has the row of a Service before and after, of which one shares a list.
type listChange struct{ have, want *row }

// owned is a row with the Service that it is of.
type owned struct {
	key dataplane.Key
	*row
}

// plan renders both sides of all changes. Services that this backend does not
// support count as deleted and are noted in failed.
func (d *Dataplane) plan(changes []dataplane.Change, failed map[dataplane.Key]error) plan {
	p := plan{
		have:  make(map[dataplane.Frontend]owned, len(changes)),
		want:  make(map[dataplane.Frontend]owned, len(changes)),
		after: make(map[dataplane.Key]arranged, len(changes)),
		lists: map[dataplane.Key][]listChange{}, shares: map[dataplane.Key]bool{},
	}
	changed := map[dataplane.Key]listChange{}
	for _, c := range changes {
		key := c.Key()
		var before arrangement
		var list listChange
		if c.Old != nil && d.renderer.supported(c.Old) == nil {
			before = d.arrangementOf(c.Old)
			r := owned{key, d.render(c.Old, before, d.lists[index(key.Family)].byKey[key])}
			list.have = r.row
			for _, f := range c.Old.Frontends {
				p.have[f] = r
			}
		}
		p.after[key] = arranged{}
		if list.have != nil && list.have.list != 0 {
			changed[key] = list
		}
		if c.New == nil {
			continue
		}
		if err := d.renderer.supported(c.New); err != nil {
			failed[key] = err
			continue
		}
		a := d.renderer.arrange(before, c.New)
		p.after[key] = a
		r := owned{key, d.render(c.New, a.arrangement, d.listOf(c.New))}
		if list.want = r.row; r.list != 0 || changed[key].have != nil {
			changed[key] = list
		}
		for _, f := range c.New.Frontends {
			p.want[f] = r
		}
	}
	if len(changed) > 0 {
		p.placeLists(changes, changed)
	}
	return p
}

// placeLists decides with which change each list changes: with its Service's, or, if
// that is deleted, with the last one that takes frontends from it, as a list must not
// go before the frontends that share it.
func (p plan) placeLists(changes []dataplane.Change, changed map[dataplane.Key]listChange) {
	with := map[dataplane.Key]dataplane.Key{}
	for _, c := range changes {
		if c.New == nil {
			continue
		}
		for _, f := range c.New.Frontends {
			have := p.have[f]
			if have.row == nil || have.list == 0 || have.key == c.New.Key || p.want[f].row == nil {
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
		p.lists[to] = append(p.lists[to], l)
		p.shares[key] = l.want != nil && l.want.list != 0
	}
}

// add puts the frontends of a change into a batch. One that moves belongs to the
// change of the Service that gets it.
func (p plan) add(b *batch, c dataplane.Change) {
	if c.New != nil {
		for _, f := range c.New.Frontends {
			if want, ok := p.want[f]; ok { // not of a Service that is not supported
				b.change(f, p.have[f].row, want.row)
			}
		}
	}
	if c.Old != nil {
		for _, f := range c.Old.Frontends {
			if have, had := p.have[f]; had && p.want[f].row == nil {
				b.change(f, have.row, nil)
			}
		}
	}
	for _, l := range p.lists[c.Key()] {
		b.changeList(c.Key().Family, l)
	}
}

// concerned returns the keys that are in doubt if a change did not take: its
// own, and those of the Services it takes frontends from.
func (p plan) concerned(c dataplane.Change) []dataplane.Key {
	keys := []dataplane.Key{c.Key()}
	if c.New == nil {
		return keys
	}
	for _, f := range c.New.Frontends {
		if have := p.have[f]; have.row != nil && have.key != keys[0] {
			keys = append(keys, have.key)
		}
	}
	return keys
}

// keep notes the arrangement of a Service that is programmed, or gone.
func (d *Dataplane) keep(key dataplane.Key, a arranged) {
	if a.keep {
		d.arrangements[key] = a.arrangement
	} else {
		delete(d.arrangements, key)
	}
}
