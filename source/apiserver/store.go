package apiserver

import (
	"fmt"
	"hash/maphash"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/consistencydetector"
)

// protobufObject is an API object with a protobuf encoding.
type protobufObject interface {
	metav1.Object
	Size() int
	MarshalToSizedBuffer(data []byte) (int, error)
}

// store receives the objects of a reflector and passes changes to the delta queue. It keeps
// only hashes of each object, to detect changes by events and later lists.
//
// It does not compare resource versions: after etcd is restored from a backup, two
// different objects can have the same name and version.
//
// T is the type of the objects, and P the type in which they are delivered.
type store[T protobufObject, P any] struct {
	resource resource
	queue    *deltaQueue
	pending  func(*deltaQueue) pendingChanges[P]
	trim     func(T)
	// convert returns the form in which a trimmed object is delivered.
	convert func(T) P
	// equal, if not nil, reports whether two trimmed objects differ only in fields that
	// Fairlead does not read. The store then keeps the last objects.
	equal func(a, b P) bool
	// hold delays mass removals; it may be nil.
	hold *removalHold
	// serviceName returns the Service that the object belongs to. It reports false if the
	// object leaves nothing in the kernel. It is set whenever hold is set.
	serviceName func(T) (types.NamespacedName, bool)
	// progress, if not nil, counts events.
	progress *progress
	// onChange is called after a change outside of a list.
	onChange func()

	fingerprints map[types.NamespacedName]fingerprint[P]
	synced       bool // a list has been applied
	seed         maphash.Seed
	buffer       []byte
}

// fingerprint identifies the state of a known object.
type fingerprint[P any] struct {
	// contentHash is the hash of the whole trimmed object, uidHash of its UID.
	contentHash, uidHash uint64
	object               P
}

// received is an object from the API server in the form in which it is delivered.
type received[P any] struct {
	name    types.NamespacedName
	version string
	// contentHash and uidHash are the values for the fingerprint. contentUnknown is set if the
	// object can't be encoded.
	contentHash, uidHash uint64
	contentUnknown       bool
	// service is the name of the Service that the object belongs to, in the object's namespace.
	// It is empty if the object leaves nothing in the kernel, and without a removalHold.
	service string
	object  P
}

var (
	_ cache.TransformingStore      = (*store[protobufObject, any])(nil)
	_ cache.ReflectorBookmarkStore = (*store[protobufObject, any])(nil)
	_ cache.ResourceVersionUpdater = (*store[protobufObject, any])(nil)
)

func newStore[T protobufObject, P any](
	res resource, queue *deltaQueue, pending func(*deltaQueue) pendingChanges[P], trim func(T), convert func(T) P, equal func(a, b P) bool,
) *store[T, P] {
	return &store[T, P]{
		resource: res, queue: queue, pending: pending, trim: trim, convert: convert, equal: equal,
		fingerprints: map[types.NamespacedName]fingerprint[P]{}, seed: maphash.MakeSeed(), onChange: queue.signal,
	}
}

// unconverted is the convert function of objects that are delivered as they are.
func unconverted[T any](object T) T { return object }

// Add stores an object that may be new.
func (s *store[T, P]) Add(object any) error { return s.put(object) }

// Update stores a changed object.
func (s *store[T, P]) Update(object any) error { return s.put(object) }

func (s *store[T, P]) put(item any) error {
	object, ok := item.(T)
	if !ok {
		return s.errUnexpected(item)
	}
	s.progress.countEvent()
	r := s.receive(object)
	if s.change(func() bool {
		if before, known := s.fingerprints[r.name]; known && before.uidHash != r.uidHash && s.hold.active() {
			return false // the removal of the object with the previous UID is held
		}
		s.upsert(&r)
		return true
	}) {
		s.onChange()
	}
	return nil
}

func (s *store[T, P]) errUnexpected(item any) error {
	return fmt.Errorf("%s: unexpected type %T from the API server", s.resource, item)
}

// receive trims and converts an object. The reflector calls it, like all other methods, from one
// goroutine.
func (s *store[T, P]) receive(object T) received[P] {
	s.trim(object)
	r := received[P]{name: namespacedName(object), version: object.GetResourceVersion(), uidHash: s.hashUID(object)}
	var hashed bool
	r.contentHash, hashed = s.hashContent(object)
	r.contentUnknown = !hashed
	if s.serviceName != nil {
		if service, ok := s.serviceName(object); ok {
			r.service = service.Name
		}
	}
	r.object = s.convert(object)
	return r
}

func namespacedName(object metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetName()}
}

// upsert stores an object. The caller holds the queue's lock.
func (s *store[T, P]) upsert(r *received[P]) {
	s.progress.onObjectChange(r.name, r.version, false)
	before, known := s.fingerprints[r.name]
	if known && !r.contentUnknown && r.contentHash == before.contentHash {
		return
	}
	after := fingerprint[P]{contentHash: r.contentHash, uidHash: r.uidHash}
	if s.equal != nil {
		after.object = r.object
	}
	s.fingerprints[r.name] = after
	if known && s.equal != nil && s.equal(before.object, r.object) {
		return
	}
	s.pending(s.queue).put(r.name, r.object, known)
}

// hashContent returns the hash of an object, including its UID and resource version. It
// reports false if the object can't be encoded.
func (s *store[T, P]) hashContent(object T) (uint64, bool) {
	size := object.Size()
	if cap(s.buffer) < size {
		s.buffer = make([]byte, size, 2*size)
	}
	buffer := s.buffer[:size]
	n, err := object.MarshalToSizedBuffer(buffer)
	if cap(s.buffer) > maxHashBuffer {
		s.buffer = nil
	}
	return maphash.Bytes(s.seed, buffer[size-min(n, size):]), err == nil
}

// maxHashBuffer is the largest buffer in bytes that is kept for the next object.
const maxHashBuffer = 64 << 10

func (s *store[T, P]) hashUID(object T) uint64 {
	return maphash.String(s.seed, string(object.GetUID()))
}

// Delete removes an object that was deleted or no longer matches the selectors.
func (s *store[T, P]) Delete(item any) error {
	object, ok := item.(T)
	if !ok {
		return s.errUnexpected(item)
	}
	s.progress.countEvent()
	name := namespacedName(object)
	if s.change(func() bool {
		if before, known := s.fingerprints[name]; known && before.uidHash != s.hashUID(object) && s.hold.active() {
			return false // the removal of the object with the previous UID is held
		}
		s.progress.onObjectChange(name, object.GetResourceVersion(), true)
		s.remove(name)
		return true
	}) {
		s.onChange()
	}
	return nil
}

// change calls f with the queue's lock.
func (s *store[T, P]) change(f func() bool) bool {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	return f()
}

func (s *store[T, P]) remove(name types.NamespacedName) {
	if _, known := s.fingerprints[name]; !known {
		return
	}
	delete(s.fingerprints, name)
	s.pending(s.queue).remove(name)
}

// Replace applies a complete list. An object whose UID has changed counts as removed and
// added. If the list removes most of the objects, the removals may be held; all other
// changes apply at once.
func (s *store[T, P]) Replace(items []any, version string) error {
	objects := make([]received[P], 0, len(items))
	for _, item := range items {
		switch item := item.(type) {
		case *received[P]: // of a streamed list
			objects = append(objects, *item)
		case T:
			objects = append(objects, s.receive(item))
		default:
			return s.errUnexpected(item)
		}
	}
	s.progress.checkListed(func(yield func(types.NamespacedName, string) bool) {
		for i := range objects {
			if !yield(objects[i].name, objects[i].version) {
				return
			}
		}
	})
	s.progress.onReplace(version)
	s.queue.mu.Lock()
	if len(s.fingerprints) == 0 {
		s.fingerprints = make(map[types.NamespacedName]fingerprint[P], len(objects))
	}
	listed := make(map[types.NamespacedName]struct{}, len(objects))
	var replaced map[types.NamespacedName]struct{}
	removed := len(s.fingerprints)
	for i := range objects {
		name := objects[i].name
		listed[name] = struct{}{}
		before, known := s.fingerprints[name]
		switch {
		case !known:
		case before.uidHash == objects[i].uidHash:
			removed--
		default:
			if replaced == nil {
				replaced = map[types.NamespacedName]struct{}{}
			}
			replaced[name] = struct{}{}
		}
	}
	removal := removal{before: len(s.fingerprints), removed: removed, listed: len(objects)}
	if !s.synced {
		removal = s.firstRemoval(objects)
	}
	held := s.hold.decide(removal)
	for i := range objects {
		if _, other := replaced[objects[i].name]; !held || !other {
			s.upsert(&objects[i])
		}
	}
	if !held {
		for name := range s.fingerprints {
			if _, ok := listed[name]; !ok {
				s.remove(name)
			}
		}
	}
	if s.synced = s.synced || !held; s.synced {
		// While the removals of the first list are held, the list does not count as complete.
		s.queue.completeListLocked(s.resource)
	}
	s.queue.mu.Unlock()
	s.hold.logDecisions()
	return nil
}

// firstRemoval compares the first list with the Services that an earlier run left in the
// kernel.
func (s *store[T, P]) firstRemoval(objects []received[P]) removal {
	programmed := s.hold.readProgrammed()
	r := removal{before: len(programmed), listed: len(objects)}
	if len(programmed) == 0 {
		return r
	}
	listed := make(map[types.NamespacedName]struct{}, len(objects))
	for i := range objects {
		if o := &objects[i]; o.service != "" {
			listed[types.NamespacedName{Namespace: o.name.Namespace, Name: o.service}] = struct{}{}
		}
	}
	for name := range programmed {
		if _, ok := listed[name]; !ok {
			r.removed++
		}
	}
	return r
}

// Resync does nothing: the receiver keeps the objects.
func (s *store[T, P]) Resync() error { return nil }

// Bookmark records that no other changes up to version exist.
func (s *store[T, P]) Bookmark(version string) error {
	s.progress.onBookmark(version)
	return nil
}

// UpdateResourceVersion records that all changes up to version have arrived.
func (s *store[T, P]) UpdateResourceVersion(version string) { s.progress.setVersion(version) }

// Transformer converts the objects of a streamed list while the list is still arriving, so that
// only the list's converted objects are in memory at the same time.
//
// client-go's check of streamed lists (KUBE_WATCHLIST_INCONSISTENCY_DETECTOR) panics if an item is
// not an object, so the items are only trimmed while it is active. Items of the second list that it
// compares are trimmed as well.
func (s *store[T, P]) Transformer() cache.TransformFunc {
	if consistencydetector.IsDataConsistencyDetectionForWatchListEnabled() {
		return func(item any) (any, error) {
			s.progress.countEvent()
			if object, ok := item.(T); ok {
				s.trim(object)
			}
			return item, nil
		}
	}
	return func(item any) (any, error) {
		s.progress.countEvent()
		if object, ok := item.(T); ok {
			r := s.receive(object)
			return &r, nil
		}
		return item, nil
	}
}
