package apiserver

import (
	"fmt"
	"hash/maphash"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
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
type store[T protobufObject] struct {
	resource resource
	queue    *deltaQueue
	pending  func(*deltaQueue) pendingChanges[T]
	trim     func(T)
	// equal, if not nil, reports whether two trimmed objects differ only in fields that
	// Fairlead does not read. The store then keeps the last objects.
	equal func(a, b T) bool
	// hold delays mass removals; it may be nil.
	hold *removalHold
	// serviceName returns the Service that the object belongs to. It reports false if the
	// object leaves nothing in the kernel. It is set whenever hold is set.
	serviceName func(T) (types.NamespacedName, bool)
	// progress, if not nil, counts events.
	progress *progress

	fingerprints map[types.NamespacedName]fingerprint[T]
	synced       bool // a list has been applied
	seed         maphash.Seed
	buffer       []byte
}

// fingerprint identifies the state of a known object.
type fingerprint[T any] struct {
	// contentHash is the hash of the whole trimmed object, uidHash of its UID.
	contentHash, uidHash uint64
	object               T
}

var (
	_ cache.TransformingStore      = (*store[protobufObject])(nil)
	_ cache.ReflectorBookmarkStore = (*store[protobufObject])(nil)
	_ cache.ResourceVersionUpdater = (*store[protobufObject])(nil)
)

func newStore[T protobufObject](res resource, queue *deltaQueue, pending func(*deltaQueue) pendingChanges[T], trim func(T), equal func(a, b T) bool) *store[T] {
	return &store[T]{
		resource: res, queue: queue, pending: pending, trim: trim, equal: equal,
		fingerprints: map[types.NamespacedName]fingerprint[T]{}, seed: maphash.MakeSeed(),
	}
}

// Add stores an object that may be new.
func (s *store[T]) Add(object any) error { return s.put(object) }

// Update stores a changed object.
func (s *store[T]) Update(object any) error { return s.put(object) }

func (s *store[T]) put(item any) error {
	object, ok := item.(T)
	if !ok {
		return fmt.Errorf("%s: unexpected type %T from the API server", s.resource, item)
	}
	s.progress.countEvent()
	s.trim(object)
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	uid := s.hashUID(object)
	if before, known := s.fingerprints[namespacedName(object)]; known && before.uidHash != uid && s.hold.active() {
		return nil // the removal of the object with the previous UID is held
	}
	s.upsert(object, uid)
	s.queue.signal()
	return nil
}

func namespacedName(object metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetName()}
}

// upsert stores an object. The caller holds the queue's lock.
func (s *store[T]) upsert(object T, uid uint64) {
	name := namespacedName(object)
	s.progress.onObjectChange(name, object.GetResourceVersion(), false)
	before, known := s.fingerprints[name]
	content, hashed := s.hashContent(object)
	if known && hashed && content == before.contentHash {
		return
	}
	after := fingerprint[T]{contentHash: content, uidHash: uid}
	if s.equal != nil {
		after.object = object
	}
	s.fingerprints[name] = after
	if known && s.equal != nil && s.equal(before.object, object) {
		return
	}
	s.pending(s.queue).put(name, object, known)
}

// hashContent returns the hash of an object, including its UID and resource version. It
// reports false if the object can't be encoded.
func (s *store[T]) hashContent(object T) (uint64, bool) {
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

func (s *store[T]) hashUID(object T) uint64 { return maphash.String(s.seed, string(object.GetUID())) }

// Delete removes an object that was deleted or no longer matches the selectors.
func (s *store[T]) Delete(item any) error {
	object, ok := item.(T)
	if !ok {
		return fmt.Errorf("%s: unexpected type %T from the API server", s.resource, item)
	}
	s.progress.countEvent()
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	name := namespacedName(object)
	if before, known := s.fingerprints[name]; known && before.uidHash != s.hashUID(object) && s.hold.active() {
		return nil // the removal of the object with the previous UID is held
	}
	s.progress.onObjectChange(name, object.GetResourceVersion(), true)
	s.remove(name)
	s.queue.signal()
	return nil
}

func (s *store[T]) remove(name types.NamespacedName) {
	if _, known := s.fingerprints[name]; !known {
		return
	}
	delete(s.fingerprints, name)
	s.pending(s.queue).remove(name)
}

// Replace applies a complete list. An object whose UID has changed counts as removed and
// added. If the list removes most of the objects, the removals may be held; all other
// changes apply at once.
func (s *store[T]) Replace(items []any, version string) error {
	objects := make([]T, 0, len(items))
	for _, item := range items {
		object, ok := item.(T)
		if !ok {
			return fmt.Errorf("%s: unexpected type %T from the API server", s.resource, item)
		}
		s.trim(object)
		objects = append(objects, object)
	}
	s.progress.checkListed(func(yield func(metav1.Object) bool) {
		for _, object := range objects {
			if !yield(object) {
				return
			}
		}
	})
	s.progress.onReplace(version)
	s.queue.mu.Lock()
	listed := make(map[types.NamespacedName]struct{}, len(objects))
	var replaced map[types.NamespacedName]struct{}
	removed := len(s.fingerprints)
	for _, object := range objects {
		name := namespacedName(object)
		listed[name] = struct{}{}
		before, known := s.fingerprints[name]
		switch {
		case !known:
		case before.uidHash == s.hashUID(object):
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
	for _, object := range objects {
		if _, other := replaced[namespacedName(object)]; !held || !other {
			s.upsert(object, s.hashUID(object))
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
func (s *store[T]) firstRemoval(objects []T) removal {
	programmed := s.hold.readProgrammed()
	r := removal{before: len(programmed), listed: len(objects)}
	if len(programmed) == 0 {
		return r
	}
	listed := make(map[types.NamespacedName]struct{}, len(objects))
	for _, object := range objects {
		if name, ok := s.serviceName(object); ok {
			listed[name] = struct{}{}
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
func (s *store[T]) Resync() error { return nil }

// Bookmark records that no other changes up to version exist.
func (s *store[T]) Bookmark(version string) error {
	s.progress.onBookmark(version)
	return nil
}

// UpdateResourceVersion records that all changes up to version have arrived.
func (s *store[T]) UpdateResourceVersion(version string) { s.progress.setVersion(version) }

// Transformer trims objects while a list is still arriving.
func (s *store[T]) Transformer() cache.TransformFunc {
	return func(item any) (any, error) {
		s.progress.countEvent()
		if object, ok := item.(T); ok {
			s.trim(object)
		}
		return item, nil
	}
}
