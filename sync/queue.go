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
	groups []*group
	fresh  []*entry
	// moving has the group of each frontend that joins or leaves a Service.
	moving map[dataplane.Frontend]*group
	// served is the weight of all that was served, and finish, by Service, where in
	// this count its last change will be complete.
	served uint64
	finish map[serviceName]uint64
	groupN uint64
}

type serviceName struct{ namespace, name string }

// entry is a change of one key that waits.
type entry struct {
	dataplane.Change

	at     time.Time // when it was handed over
	after  uint64    // the last input before the one that it came with
	weight int
	group  *group // nil while fresh
	gone   bool
}

// group is a set of changes that go together.
type group struct {
	entries []*entry
	finish  uint64
	number  uint64
	into    *group // that it has become part of, or nil
}

func newQueue() queue {
	return queue{
		entries: map[dataplane.Key]*entry{}, moving: map[dataplane.Frontend]*group{}, finish: map[serviceName]uint64{},
	}
}

func (g *group) compare(o *group) int {
	return cmp.Or(cmp.Compare(g.finish, o.finish), cmp.Compare(g.number, o.number))
}

// root returns the group that g is part of by now.
func (g *group) root() *group {
	for g.into != nil {
		g = g.into
	}
	return g
}

// put adds a change, or replaces the one of the same key.
func (q *queue) put(c dataplane.Change, at time.Time, after uint64) {
	e := q.entries[c.Key()]
	if e == nil {
		e = &entry{at: at, after: after}
		q.entries[c.Key()] = e
		q.arrived = append(q.arrived, e)
		q.fresh = append(q.fresh, e)
	} else if e.group != nil { // other frontends may move now
		q.dissolve(e.group.root())
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
		q.drop(e)
	}
}

func (q *queue) drop(e *entry) {
	e.gone = true
	q.weight -= e.weight
	delete(q.entries, e.Key())
}

// clear drops all changes.
func (q *queue) clear() {
	served := q.served
	*q = newQueue()
	q.served = served
}

// first returns the entry that has waited longest, or nil.
func (q *queue) first() *entry {
	for len(q.arrived) > 0 && q.arrived[0].gone {
		q.arrived = q.arrived[1:]
	}
	if len(q.arrived) == 0 {
		return nil
	}
	return q.arrived[0]
}

// next takes the changes for one call off the queue: some of this weight together, or
// one group that has more.
func (q *queue) next(weight int) []*entry {
	if q.weight <= weight {
		all := slices.Collect(maps.Values(q.entries))
		slices.SortFunc(all, func(a, b *entry) int {
			return cmp.Or(cmp.Compare(a.weight, b.weight), a.Key().Compare(b.Key()))
		})
		q.served += uint64(q.weight) //nolint:gosec // a length
		q.clear()
		return all
	}
	for _, e := range q.fresh {
		if !e.gone && e.group == nil {
			q.join(e)
		}
	}
	q.fresh = nil
	var taken []*entry
	for n := 0; n < weight && len(q.groups) > 0; {
		g := q.groups[0]
		q.groups = q.groups[1:]
		q.forget(g)
		for _, e := range g.entries {
			if e.gone {
				continue
			}
			n += e.weight
			q.served += uint64(e.weight) //nolint:gosec // a length
			q.drop(e)
			taken = append(taken, e)
		}
	}
	return taken
}

// join puts an entry into a group: a new one, with all those in it that a frontend
// moves from or to.
func (q *queue) join(e *entry) {
	q.groupN++
	g := &group{number: q.groupN, entries: []*entry{e}}
	e.group = g
	for f := range e.moving() {
		other, ok := q.moving[f]
		q.moving[f] = g
		if !ok || other.root() == g {
			continue
		}
		other = other.root()
		q.withdraw(other)
		g.entries = append(g.entries, other.entries...)
		g.finish = max(g.finish, other.finish)
		other.into, other.entries = g, nil
	}
	k := e.Key()
	name := serviceName{k.Namespace, k.Name}
	g.finish = max(g.finish, q.served, q.finish[name]) + uint64(e.weight) //nolint:gosec // a length
	q.finish[name] = g.finish
	i, _ := slices.BinarySearchFunc(q.groups, g, (*group).compare)
	q.groups = slices.Insert(q.groups, i, g)
}

// moving yields the frontends that join or leave the Service.
func (e *entry) moving() func(yield func(dataplane.Frontend) bool) {
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

// withdraw takes a group off the list.
func (q *queue) withdraw(g *group) {
	if i, ok := slices.BinarySearchFunc(q.groups, g, (*group).compare); ok {
		q.groups = slices.Delete(q.groups, i, i+1)
	}
}

// dissolve makes the entries of a group fresh again.
func (q *queue) dissolve(g *group) {
	q.withdraw(g)
	q.forget(g)
	for _, e := range g.entries {
		e.group = nil
		q.fresh = append(q.fresh, e)
	}
}

// forget drops what moving has of a group.
func (q *queue) forget(g *group) {
	for _, e := range g.entries {
		for f := range e.moving() {
			delete(q.moving, f)
		}
	}
}
