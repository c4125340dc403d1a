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

// historyLength is the number of past changes that a watch can still read. A client that is
// further behind must list again.
const historyLength = 1 << 15

// selector selects the objects that a client requests.
type selector struct {
	namespace string // empty: all namespaces
	labels    labels.Selector
	fields    fields.Selector
}

func (s selector) matches(v *Version) bool {
	return v != nil && (s.namespace == "" || s.namespace == v.name.Namespace) &&
		s.labels.Matches(labels.Set(v.object.GetLabels())) && s.fields.Matches(v.fields())
}

// change is one step in the history of a collection.
type change struct {
	previous *Version // nil for a new object
	current  *Version // the new version; for a deletion, the version that the client receives
	// deleted reports whether the object was deleted.
	deleted bool
}

// event returns the type of event that a watch with the selector receives, and false if it
// receives none.
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

// collection contains the objects of one resource and the recent changes.
type collection struct {
	mu              sync.Mutex
	objects         map[types.NamespacedName]*Version
	resourceVersion uint64 // resource version of the last change
	changes         []change
	dropped         int           // number of changes removed from the history
	changed         chan struct{} // closed and replaced with each change
}

func newCollection() *collection {
	return &collection{objects: map[types.NamespacedName]*Version{}, changed: make(chan struct{})}
}

// apply stores a version of an object, or deletes the object, and wakes all watches.
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
	if n := len(c.changes) - historyLength; n > historyLength { // rarely true, so that copying costs little
		c.changes = slices.Clone(c.changes[n:])
		c.dropped += n
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// list returns the selected objects sorted by name, the resource version of the collection, and
// the position of that version in the history.
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

// get returns an object, or nil if the object does not exist.
func (c *collection) get(name types.NamespacedName) *Version {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.objects[name]
}

// indexOf returns the position of a resource version in the history, and false if the history no
// longer contains it.
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

// changesFrom returns the changes from a position in the history, the position after them, and a
// channel that is closed at the next change. It returns false if the history no longer contains
// the position.
func (c *collection) changesFrom(at int) (changes []change, next int, changed <-chan struct{}, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at < c.dropped {
		return nil, 0, nil, false
	}
	return slices.Clone(c.changes[at-c.dropped:]), c.dropped + len(c.changes), c.changed, true
}
