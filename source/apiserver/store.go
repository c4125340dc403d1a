package apiserver

import (
	"fmt"
	"hash/maphash"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
)

// protobufObject is an API object that can be written as protobuf.
type protobufObject interface {
	metav1.Object
	Size() int
	MarshalToSizedBuffer(data []byte) (int, error)
}

// store is what a reflector writes to. Of each object it keeps hashes only, which
// tell whether an event or a later list has something else: the objects themselves
// are with whom they are delivered to.
//
// Resource versions are not compared. Two objects can have the same name and
// version and yet differ, after etcd was restored from a backup.
type store[T protobufObject] struct {
	resource resource
	queue    *deltaQueue
	pending  func(*deltaQueue) pendingChanges[T]
	trim     func(T)
	// same, if not nil, says that two trimmed objects differ in nothing that
	// matters. The last objects are kept then.
	equal func(a, b T) bool
	// hold delays mass removals; it may be nil.
	hold *removalHold
	// service, where there is a guard, returns the name of the Service that the
	// object belongs to, if the kernel can hold something for it.
	serviceName func(T) (types.NamespacedName, bool)
	// progress, if not nil, counts what arrives.
	progress *progress

	fingerprints map[types.NamespacedName]fingerprint[T]
	synced       bool // a list was taken over
	seed         maphash.Seed
	buffer       []byte
}

// fingerprint is what is known of an object that there is.
type fingerprint[T any] struct {
	// contentHash is the hash of the whole trimmed object, and uid that of its UID.
	contentHash, uidHash uint64
	object               T
}

var (
	_ cache.TransformingStore      = (*store[protobufObject])(nil)
	_ cache.ReflectorBookmarkStore = (*store[protobufObject])(nil)
	_ cache.ResourceVersionUpdater = (*store[protobufObject])(nil)
)

func newStore[T protobufObject](k resource, box *deltaQueue, pending func(*deltaQueue) pendingChanges[T], trim func(T), same func(a, b T) bool) *store[T] {
	return &store[T]{
		resource: k, queue: box, pending: pending, trim: trim, equal: same,
		fingerprints: map[types.NamespacedName]fingerprint[T]{}, seed: maphash.MakeSeed(),
	}
}

// Add takes over an object that is new, or may be.
func (s *store[T]) Add(object any) error { return s.put(object) }

// Update takes over an object that has changed.
func (s *store[T]) Update(object any) error { return s.put(object) }

func (s *store[T]) put(item any) error {
	object, ok := item.(T)
	if !ok {
		return fmt.Errorf("%s: the API server sent a %T", s.resource, item)
	}
	s.progress.countEvent()
	s.trim(object)
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	uid := s.hashUID(object)
	if before, known := s.fingerprints[namespacedName(object)]; known && before.uidHash != uid && s.hold.active() {
		return nil // The removal of the object with the other UID is held.
	}
	s.upsert(object, uid)
	s.queue.signal()
	return nil
}

func namespacedName(object metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetName()}
}

// upsert is for those who hold the mailbox's lock.
func (s *store[T]) upsert(object T, uid uint64) {
	name := namespacedName(object)
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
	s.progress.onObjectChange(name, object.GetResourceVersion())
	if known && s.equal != nil && s.equal(before.object, object) {
		return
	}
	s.pending(s.queue).put(name, object, known)
}

// hashContent returns the hash of an object with its UID and resource version. It reports
// false if the object can't be written.
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

// maxHashBuffer is the size from which a buffer is not kept for the next object.
const maxHashBuffer = 64 << 10

func (s *store[T]) hashUID(object T) uint64 { return maphash.String(s.seed, string(object.GetUID())) }

// Delete takes over that an object is gone, or is no longer selected.
func (s *store[T]) Delete(item any) error {
	object, ok := item.(T)
	if !ok {
		return fmt.Errorf("%s: the API server sent a %T", s.resource, item)
	}
	s.progress.countEvent()
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	name := namespacedName(object)
	if before, known := s.fingerprints[name]; known && before.uidHash != s.hashUID(object) && s.hold.active() {
		return nil // Another object of the name is gone, and the removal of ours is held.
	}
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

// Replace takes over a complete list. An object whose UID is another one than
// before counts as removed and created again. If the list would remove most of the
// objects, the guard may delay the removals; everything else is taken over at once.
func (s *store[T]) Replace(items []any, version string) error {
	objects := make([]T, 0, len(items))
	for _, item := range items {
		object, ok := item.(T)
		if !ok {
			return fmt.Errorf("%s: the API server sent a %T", s.resource, item)
		}
		s.trim(object)
		objects = append(objects, object)
	}
	s.progress.onReplace(version)
	s.queue.mu.Lock()
	listed := make(map[types.NamespacedName]struct{}, len(objects))
	var replaced map[types.NamespacedName]struct{}
	gone := len(s.fingerprints)
	for _, object := range objects {
		name := namespacedName(object)
		listed[name] = struct{}{}
		before, known := s.fingerprints[name]
		switch {
		case !known:
		case before.uidHash == s.hashUID(object):
			gone--
		default:
			if replaced == nil {
				replaced = map[types.NamespacedName]struct{}{}
			}
			replaced[name] = struct{}{}
		}
	}
	removal := removal{before: len(s.fingerprints), removed: gone, listed: len(objects)}
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
		// A first list that is held is as good as none.
		s.queue.completeListLocked(s.resource)
	}
	s.queue.mu.Unlock()
	s.hold.logDecisions()
	return nil
}

// firstRemoval returns what the first list would remove of what an earlier run of
// the program has left in the kernel.
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

// Resync does nothing: whoever receives objects keeps them.
func (s *store[T]) Resync() error { return nil }

// Bookmark notes that the API server has nothing else up to the version.
func (s *store[T]) Bookmark(version string) error {
	s.progress.onBookmark(version)
	return nil
}

// UpdateResourceVersion notes the version up to which everything has arrived.
func (s *store[T]) UpdateResourceVersion(version string) { s.progress.setVersion(version) }

// Transformer has objects trimmed while a list is still arriving.
func (s *store[T]) Transformer() cache.TransformFunc {
	return func(item any) (any, error) {
		s.progress.countEvent()
		if object, ok := item.(T); ok {
			s.trim(object)
		}
		return item, nil
	}
}
