package apiserver

import (
	"slices"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// historyLength is how many changes a watch can be behind. Who is further behind
// lists again.
const historyLength = 1 << 15

// selector says which objects a client wants.
type selector struct {
	namespace string // empty for all
	labels    labels.Selector
	fields    fields.Selector
}

func (s selector) matches(v *Version) bool {
	return v != nil && (s.namespace == "" || s.namespace == v.name.Namespace) &&
		s.labels.Matches(labels.Set(v.object.GetLabels())) && s.fields.Matches(v.fields())
}

// change is one step in a collection's history.
type change struct {
	previous *Version // nil for a new object
	current  *Version // what there is, or for a deletion the last there was
	// deleted says that the object is gone.
	deleted bool
}

// event returns what the change is to somebody who sees the selection alone.
func (c change) event(s selector) (watch.EventType, bool) {
	was, is := s.matches(c.previous), !c.deleted && s.matches(c.current)
	switch {
	case is && was:
		return watch.Modified, true
	case is:
		return watch.Added, true
	case was:
		return watch.Deleted, true
	default:
		return "", false
	}
}

// collection has the objects of one resource and the last changes of them.
type collection struct {
	mu              sync.Mutex
	objects         map[types.NamespacedName]*Version
	resourceVersion uint64 // of the last change
	changes         []change
	dropped         int           // how many changes are no longer remembered
	changed         chan struct{} // closed and replaced with each change
}

func newCollection() *collection {
	return &collection{objects: map[types.NamespacedName]*Version{}, changed: make(chan struct{})}
}

// apply records one change.
func (c *collection) apply(v *Version, deleted bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes = append(c.changes, change{previous: c.objects[v.name], current: v, deleted: deleted})
	if deleted {
		delete(c.objects, v.name)
	} else {
		c.objects[v.name] = v
	}
	c.resourceVersion = max(c.resourceVersion, v.resourceVersion)
	if n := len(c.changes) - historyLength; n > historyLength { // seldom, so that it costs little
		c.changes = slices.Clone(c.changes[n:])
		c.dropped += n
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// list returns the selection in the order of names, the version of the whole,
// and where in the history that is.
func (c *collection) list(s selector) (items []*Version, number uint64, at int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, v := range c.objects {
		if s.matches(v) {
			items = append(items, v)
		}
	}
	slices.SortFunc(items, func(a, b *Version) int {
		if d := strings.Compare(a.name.Namespace, b.name.Namespace); d != 0 {
			return d
		}
		return strings.Compare(a.name.Name, b.name.Name)
	})
	return items, c.resourceVersion, c.dropped + len(c.changes)
}

// get returns one object, or nil.
func (c *collection) get(name types.NamespacedName) *Version {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.objects[name]
}

// indexOf returns where in the history a version is, and false if that is no
// longer remembered.
func (c *collection) indexOf(number uint64) (at int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, _ := slices.BinarySearchFunc(c.changes, number, func(ch change, n uint64) int {
		if ch.current.resourceVersion <= n {
			return -1
		}
		return 1
	})
	return c.dropped + i, i > 0 || c.dropped == 0
}

// changesFrom returns the changes after a place in the history, the place behind them,
// and what is closed when there are more. False means that they are no longer
// remembered.
func (c *collection) changesFrom(at int) (changes []change, next int, more <-chan struct{}, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at < c.dropped {
		return nil, 0, nil, false
	}
	return slices.Clone(c.changes[at-c.dropped:]), c.dropped + len(c.changes), c.changed, true
}
