package sync

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// callWeight is the weight of the changes in one call of Apply: the number of frontends,
// endpoints and source ranges. The kernel needs about 10 ms for it. Further changes stay in the
// queue, so that a later change does not have to wait for them.
const callWeight = 4096

// queue contains the changes that wait for Apply. It serves Kubernetes Services like a fair queue
// serves flows: in the order in which their changes would finish if all were processed
// concurrently. Small changes therefore come first, a Service with many ports or frontends does
// not delay others, and no change starves.
//
// Changes that move a frontend from one Service to another stay together.
type queue struct {
	entries map[dataplane.Key]*entry
	weight  int // of all entries
	// arrived contains the entries in order of arrival. A removed entry stays until it reaches
	// the front.
	arrived []*entry
	// groups is sorted by compare. ungrouped contains the entries that arrived since the last
	// call and have no group yet.
	groups    []*group
	ungrouped []*entry
	// movingGroups contains the group of each frontend that is added to or removed from a
	// Service.
	movingGroups map[dataplane.Frontend]*group
	// servedWeight is the total weight served so far. finishByService is the value of
	// servedWeight at which the last change of a Service will be complete.
	servedWeight    uint64
	finishByService map[serviceName]uint64
	groupSeq        uint64
}

type serviceName struct{ namespace, name string }

// entry is the queued change of one key.
type entry struct {
	dataplane.Change

	updatedAt time.Time // time of the update
	prevSeq   uint64    // sequence number of the input before this change
	weight    int
	group     *group // nil while ungrouped
	removed   bool
}

// group is a set of changes that must be in the same call.
type group struct {
	entries    []*entry
	finish     uint64
	seq        uint64
	mergedInto *group // the group that this one was merged into, or nil
}

func newQueue() queue {
	return queue{
		entries: map[dataplane.Key]*entry{}, movingGroups: map[dataplane.Frontend]*group{}, finishByService: map[serviceName]uint64{},
	}
}

func (g *group) compare(o *group) int {
	return cmp.Or(cmp.Compare(g.finish, o.finish), cmp.Compare(g.seq, o.seq))
}

// root returns the group that g has been merged into, or g.
func (g *group) root() *group {
	for g.mergedInto != nil {
		g = g.mergedInto
	}
	return g
}

// put adds a change, or replaces the change of the same key.
func (q *queue) put(c dataplane.Change, updatedAt time.Time, prevSeq uint64) {
	e := q.entries[c.Key()]
	if e == nil {
		e = &entry{updatedAt: updatedAt, prevSeq: prevSeq}
		q.entries[c.Key()] = e
		q.arrived = append(q.arrived, e)
		q.ungrouped = append(q.ungrouped, e)
	} else if e.group != nil { // the set of moving frontends may have changed
		q.ungroup(e.group.root())
	}
	q.weight -= e.weight
	e.Change, e.weight = c, weightOf(c)
	q.weight += e.weight
}

// weightOf returns the weight of a change, at least 1. With session affinity, backends may have
// one element for each pair of frontend and endpoint.
func weightOf(c dataplane.Change) int {
	weight := 1
	for _, s := range []*dataplane.Service{c.Old, c.New} {
		if s == nil {
			continue
		}
		endpoints := len(s.Endpoints) + len(s.LocalEndpoints)
		if s.Affinity != 0 {
			endpoints *= len(s.Frontends)
		}
		weight = max(weight, len(s.Frontends)+endpoints+len(s.SourceRanges))
	}
	return weight
}

// remove removes the change of a key, if any.
func (q *queue) remove(k dataplane.Key) {
	if e := q.entries[k]; e != nil {
		q.removeEntry(e)
	}
}

func (q *queue) removeEntry(e *entry) {
	e.removed = true
	q.weight -= e.weight
	delete(q.entries, e.Key())
}

// clear removes all changes.
func (q *queue) clear() {
	served := q.servedWeight
	*q = newQueue()
	q.servedWeight = served
}

// oldest returns the entry that has waited longest, or nil.
func (q *queue) oldest() *entry {
	for len(q.arrived) > 0 && q.arrived[0].removed {
		q.arrived = q.arrived[1:]
	}
	if len(q.arrived) == 0 {
		return nil
	}
	return q.arrived[0]
}

// dequeue removes and returns the changes of the next call: groups with about this weight in
// total, or a single heavier group.
func (q *queue) dequeue(weight int) []*entry {
	if q.weight <= weight {
		all := slices.Collect(maps.Values(q.entries))
		slices.SortFunc(all, func(a, b *entry) int {
			return cmp.Or(cmp.Compare(a.weight, b.weight), a.Key().Compare(b.Key()))
		})
		q.servedWeight += uint64(q.weight) //nolint:gosec // a length
		q.clear()
		return all
	}
	for _, e := range q.ungrouped {
		if !e.removed && e.group == nil {
			q.addToGroup(e)
		}
	}
	q.ungrouped = nil
	var dequeued []*entry
	for n := 0; n < weight && len(q.groups) > 0; {
		g := q.groups[0]
		q.groups = q.groups[1:]
		q.unindexFrontends(g)
		for _, e := range g.entries {
			if e.removed {
				continue
			}
			n += e.weight
			q.servedWeight += uint64(e.weight) //nolint:gosec // a length
			q.removeEntry(e)
			dequeued = append(dequeued, e)
		}
	}
	return dequeued
}

// addToGroup creates a group for an entry and merges the groups that share a moving frontend
// into it.
func (q *queue) addToGroup(e *entry) {
	q.groupSeq++
	g := &group{seq: q.groupSeq, entries: []*entry{e}}
	e.group = g
	for f := range e.movedFrontends() {
		other, ok := q.movingGroups[f]
		q.movingGroups[f] = g
		if !ok || other.root() == g {
			continue
		}
		other = other.root()
		q.removeGroup(other)
		g.entries = append(g.entries, other.entries...)
		g.finish = max(g.finish, other.finish)
		other.mergedInto, other.entries = g, nil
	}
	k := e.Key()
	name := serviceName{k.Namespace, k.Name}
	g.finish = max(g.finish, q.servedWeight, q.finishByService[name]) + uint64(e.weight) //nolint:gosec // a length
	q.finishByService[name] = g.finish
	i, _ := slices.BinarySearchFunc(q.groups, g, (*group).compare)
	q.groups = slices.Insert(q.groups, i, g)
}

// movedFrontends yields the frontends that are added to or removed from the Service.
func (e *entry) movedFrontends() func(yield func(dataplane.Frontend) bool) {
	return func(yield func(dataplane.Frontend) bool) {
		var before, after []dataplane.Frontend
		if e.Old != nil {
			before = e.Old.Frontends
		}
		if e.New != nil {
			after = e.New.Frontends
		}
		for len(before) > 0 || len(after) > 0 {
			switch {
			case len(after) == 0 || len(before) > 0 && before[0].Compare(after[0]) < 0:
				if !yield(before[0]) {
					return
				}
				before = before[1:]
			case len(before) == 0 || before[0] != after[0]:
				if !yield(after[0]) {
					return
				}
				after = after[1:]
			default:
				before, after = before[1:], after[1:]
			}
		}
	}
}

// removeGroup removes a group from the sorted list.
func (q *queue) removeGroup(g *group) {
	if i, ok := slices.BinarySearchFunc(q.groups, g, (*group).compare); ok {
		q.groups = slices.Delete(q.groups, i, i+1)
	}
}

// ungroup dissolves a group and makes its entries ungrouped.
func (q *queue) ungroup(g *group) {
	q.removeGroup(g)
	q.unindexFrontends(g)
	for _, e := range g.entries {
		e.group = nil
		q.ungrouped = append(q.ungrouped, e)
	}
}

// unindexFrontends removes the frontends of a group from movingGroups.
func (q *queue) unindexFrontends(g *group) {
	for _, e := range g.entries {
		for f := range e.movedFrontends() {
			delete(q.movingGroups, f)
		}
	}
}
