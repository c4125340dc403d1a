package sync

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// callWeight is how much one call of Apply is given, in frontends, endpoints and
// source ranges: some 10 ms of the kernel's time. More waits in the queue, so that a
// change which comes later need not wait for it.
const callWeight = 4096

// queue has the changes that wait for a call of Apply. Calls serve Kubernetes Services
// as a fair queue serves flows: in the order in which their changes would be
// complete if all of them were carried out side by side. So small ones come
// first, one with very many ports or frontends delays no other, and none starves.
//
// Changes between which a frontend moves stay together.
type queue struct {
	entries map[dataplane.Key]*entry
	weight  int // of all entries
	// arrived has the entries in order of arrival; those that are gone are dropped when
	// they come first.
	arrived []*entry
	// groups are sorted by compare. Entries that came since the last call are in fresh,
	// and in no group.
	groups    []*group
	ungrouped []*entry
	// movingGroups has the group of each frontend that joins or leaves a Service.
	movingGroups map[dataplane.Frontend]*group
	// servedWeight is the weight of all that was served, and finish, by Service, where in
	// this count its last change will be complete.
	servedWeight    uint64
	finishByService map[serviceName]uint64
	groupSeq        uint64
}

type serviceName struct{ namespace, name string }

// entry is a change of one key that waits.
type entry struct {
	dataplane.Change

	updatedAt time.Time // when it was handed over
	prevSeq   uint64    // the last input before the one that it came with
	weight    int
	group     *group // nil while fresh
	removed   bool
}

// group is a set of changes that go together.
type group struct {
	entries    []*entry
	finish     uint64
	seq        uint64
	mergedInto *group // that it has become part of, or nil
}

func newQueue() queue {
	return queue{
		entries: map[dataplane.Key]*entry{}, movingGroups: map[dataplane.Frontend]*group{}, finishByService: map[serviceName]uint64{},
	}
}

func (g *group) compare(o *group) int {
	return cmp.Or(cmp.Compare(g.finish, o.finish), cmp.Compare(g.seq, o.seq))
}

// root returns the group that g is part of by now.
func (g *group) root() *group {
	for g.mergedInto != nil {
		g = g.mergedInto
	}
	return g
}

// put adds a change, or replaces the one of the same key.
func (q *queue) put(c dataplane.Change, at time.Time, after uint64) {
	e := q.entries[c.Key()]
	if e == nil {
		e = &entry{updatedAt: at, prevSeq: after}
		q.entries[c.Key()] = e
		q.arrived = append(q.arrived, e)
		q.ungrouped = append(q.ungrouped, e)
	} else if e.group != nil { // other frontends may move now
		q.ungroup(e.group.root())
	}
	q.weight -= e.weight
	e.Change, e.weight = c, weightOf(c)
	q.weight += e.weight
}

// weightOf returns at least 1. With session affinity backends may have as much for each
// frontend as there are endpoints.
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

// remove drops the change of a key, if there is one.
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

// clear drops all changes.
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

// dequeue takes the changes for one call off the queue: some of this weight together, or
// one group that has more.
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
	var taken []*entry
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
			taken = append(taken, e)
		}
	}
	return taken
}

// addToGroup puts an entry into a group: a new one, with all those in it that a frontend
// moves from or to.
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

// movedFrontends yields the frontends that join or leave the Service.
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

// removeGroup takes a group off the list.
func (q *queue) removeGroup(g *group) {
	if i, ok := slices.BinarySearchFunc(q.groups, g, (*group).compare); ok {
		q.groups = slices.Delete(q.groups, i, i+1)
	}
}

// ungroup makes the entries of a group fresh again.
func (q *queue) ungroup(g *group) {
	q.removeGroup(g)
	q.unindexFrontends(g)
	for _, e := range g.entries {
		e.group = nil
		q.ungrouped = append(q.ungrouped, e)
	}
}

// unindexFrontends drops what moving has of a group.
func (q *queue) unindexFrontends(g *group) {
	for _, e := range g.entries {
		for f := range e.movedFrontends() {
			delete(q.movingGroups, f)
		}
	}
}
