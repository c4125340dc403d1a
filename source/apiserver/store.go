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
	kind    kind
	box     *mailbox
	pending func(*mailbox) gathered[T]
	trim    func(T)
	// same, if not nil, says that two trimmed objects differ in nothing that
	// matters. The last objects are kept then.
	same func(a, b T) bool
	// guard delays mass removals; it may be nil.
	guard *guard
	// service, where there is a guard, returns the name of the Service that the
	// object belongs to, if the kernel can hold something for it.
	service func(T) (types.NamespacedName, bool)
	// progress, if not nil, counts what arrives.
	progress *progress

	known  map[types.NamespacedName]seen[T]
	listed bool // a list was taken over
	seed   maphash.Seed
	buffer []byte
}

// seen is what is known of an object that there is.
type seen[T any] struct {
	// content is the hash of the whole trimmed object, and uid that of its UID.
	content, uid uint64
	object       T
}

var (
	_ cache.TransformingStore      = (*store[protobufObject])(nil)
	_ cache.ReflectorBookmarkStore = (*store[protobufObject])(nil)
	_ cache.ResourceVersionUpdater = (*store[protobufObject])(nil)
)

func newStore[T protobufObject](k kind, box *mailbox, pending func(*mailbox) gathered[T], trim func(T), same func(a, b T) bool) *store[T] {
	return &store[T]{
		kind: k, box: box, pending: pending, trim: trim, same: same,
		known: map[types.NamespacedName]seen[T]{}, seed: maphash.MakeSeed(),
	}
}

// Add takes over an object that is new, or may be.
func (s *store[T]) Add(object any) error { return s.put(object) }

// Update takes over an object that has changed.
func (s *store[T]) Update(object any) error { return s.put(object) }

func (s *store[T]) put(item any) error {
	object, ok := item.(T)
	if !ok {
		return fmt.Errorf("%s: the API server sent a %T", s.kind, item)
	}
	s.progress.event()
	s.trim(object)
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	uid := s.uid(object)
	if before, known := s.known[nameOf(object)]; known && before.uid != uid && s.guard.holds() {
		return nil // The removal of the object with the other UID is held.
	}
	s.upsert(object, uid)
	s.box.signal()
	return nil
}

func nameOf(object metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetName()}
}

// upsert is for those who hold the mailbox's lock.
func (s *store[T]) upsert(object T, uid uint64) {
	name := nameOf(object)
	before, known := s.known[name]
	content, hashed := s.hash(object)
	if known && hashed && content == before.content {
		return
	}
	after := seen[T]{content: content, uid: uid}
	if s.same != nil {
		after.object = object
	}
	s.known[name] = after
	s.progress.changed(name, object.GetResourceVersion())
	if known && s.same != nil && s.same(before.object, object) {
		return
	}
	s.pending(s.box).put(name, object, known)
}

// hash returns the hash of an object with its UID and resource version. It reports
// false if the object can't be written.
func (s *store[T]) hash(object T) (uint64, bool) {
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

func (s *store[T]) uid(object T) uint64 { return maphash.String(s.seed, string(object.GetUID())) }

// Delete takes over that an object is gone, or is no longer selected.
func (s *store[T]) Delete(item any) error {
	object, ok := item.(T)
	if !ok {
		return fmt.Errorf("%s: the API server sent a %T", s.kind, item)
	}
	s.progress.event()
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	name := nameOf(object)
	if before, known := s.known[name]; known && before.uid != s.uid(object) && s.guard.holds() {
		return nil // Another object of the name is gone, and the removal of ours is held.
	}
	s.remove(name)
	s.box.signal()
	return nil
}

func (s *store[T]) remove(name types.NamespacedName) {
	if _, known := s.known[name]; !known {
		return
	}
	delete(s.known, name)
	s.pending(s.box).drop(name)
}

// Replace takes over a complete list. An object whose UID is another one than
// before counts as removed and created again. If the list would remove most of the
// objects, the guard may delay the removals; everything else is taken over at once.
func (s *store[T]) Replace(items []any, version string) error {
	objects := make([]T, 0, len(items))
	for _, item := range items {
		object, ok := item.(T)
		if !ok {
			return fmt.Errorf("%s: the API server sent a %T", s.kind, item)
		}
		s.trim(object)
		objects = append(objects, object)
	}
	s.progress.replaced(version)
	s.box.mu.Lock()
	listed := make(map[types.NamespacedName]struct{}, len(objects))
	var replaced map[types.NamespacedName]struct{}
	gone := len(s.known)
	for _, object := range objects {
		name := nameOf(object)
		listed[name] = struct{}{}
		before, known := s.known[name]
		switch {
		case !known:
		case before.uid == s.uid(object):
			gone--
		default:
			if replaced == nil {
				replaced = map[types.NamespacedName]struct{}{}
			}
			replaced[name] = struct{}{}
		}
	}
	removal := removal{before: len(s.known), gone: gone, listed: len(objects)}
	if !s.listed {
		removal = s.firstRemoval(objects)
	}
	held := s.guard.hold(removal)
	for _, object := range objects {
		if _, other := replaced[nameOf(object)]; !held || !other {
			s.upsert(object, s.uid(object))
		}
	}
	if !held {
		for name := range s.known {
			if _, ok := listed[name]; !ok {
				s.remove(name)
			}
		}
	}
	if s.listed = s.listed || !held; s.listed {
		// A first list that is held is as good as none.
		s.box.completed(s.kind)
	}
	s.box.mu.Unlock()
	s.guard.report()
	return nil
}

// firstRemoval returns what the first list would remove of what an earlier run of
// the program has left in the kernel.
func (s *store[T]) firstRemoval(objects []T) removal {
	programmed := s.guard.takeProgrammed()
	r := removal{before: len(programmed), listed: len(objects)}
	if len(programmed) == 0 {
		return r
	}
	listed := make(map[types.NamespacedName]struct{}, len(objects))
	for _, object := range objects {
		if name, ok := s.service(object); ok {
			listed[name] = struct{}{}
		}
	}
	for name := range programmed {
		if _, ok := listed[name]; !ok {
			r.gone++
		}
	}
	return r
}

// Resync does nothing: whoever receives objects keeps them.
func (s *store[T]) Resync() error { return nil }

// Bookmark notes that the API server has nothing else up to the version.
func (s *store[T]) Bookmark(version string) error {
	s.progress.bookmark(version)
	return nil
}

// UpdateResourceVersion notes the version up to which everything has arrived.
func (s *store[T]) UpdateResourceVersion(version string) { s.progress.reached(version) }

// Transformer has objects trimmed while a list is still arriving.
func (s *store[T]) Transformer() cache.TransformFunc {
	return func(item any) (any, error) {
		s.progress.event()
		if object, ok := item.(T); ok {
			s.trim(object)
		}
		return item, nil
	}
}
