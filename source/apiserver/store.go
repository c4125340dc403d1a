package apiserver

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
)

// store is what a reflector writes to. It keeps of each object no more than what
// tells whether a later list has something else: the objects themselves are with
// whom they are delivered to.
type store[T metav1.Object] struct {
	kind    kind
	box     *mailbox
	pending func(*mailbox) gathered[T]
	trim    func(T)
	// same, if not nil, says that two trimmed objects differ in nothing that
	// matters. The last objects are kept then.
	same  func(a, b T) bool
	known map[types.NamespacedName]seen[T]
}

// seen is what is known of an object that there is.
type seen[T any] struct {
	version string
	object  T
}

var _ cache.TransformingStore = (*store[metav1.Object])(nil)

// Add takes over an object that is new, or may be.
func (s *store[T]) Add(object any) error { return s.put(object) }

// Update takes over an object that has changed.
func (s *store[T]) Update(object any) error { return s.put(object) }

func (s *store[T]) put(item any) error {
	object, ok := item.(T)
	if !ok {
		return fmt.Errorf("%s: the API server sent a %T", s.kind, item)
	}
	s.trim(object)
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	s.upsert(object)
	s.box.signal()
	return nil
}

// upsert is for those who hold the mailbox's lock.
func (s *store[T]) upsert(object T) types.NamespacedName {
	name := types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetName()}
	before, known := s.known[name]
	version := object.GetResourceVersion()
	if known && version != "" && version == before.version {
		return name
	}
	after := seen[T]{version: version}
	if s.same != nil {
		after.object = object
	}
	s.known[name] = after
	if known && s.same != nil && s.same(before.object, object) {
		return name
	}
	s.pending(s.box).put(name, object, known)
	return name
}

// Delete takes over that an object is gone, or is no longer selected.
func (s *store[T]) Delete(item any) error {
	object, ok := item.(T)
	if !ok {
		return fmt.Errorf("%s: the API server sent a %T", s.kind, item)
	}
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	s.remove(types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetName()})
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

// Replace takes over a complete list.
func (s *store[T]) Replace(items []any, _ string) error {
	objects := make([]T, 0, len(items))
	for _, item := range items {
		object, ok := item.(T)
		if !ok {
			return fmt.Errorf("%s: the API server sent a %T", s.kind, item)
		}
		s.trim(object)
		objects = append(objects, object)
	}
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	listed := make(map[types.NamespacedName]struct{}, len(objects))
	for _, object := range objects {
		listed[s.upsert(object)] = struct{}{}
	}
	for name := range s.known {
		if _, ok := listed[name]; !ok {
			s.remove(name)
		}
	}
	s.box.completed(s.kind)
	return nil
}

// Resync does nothing: whoever receives objects keeps them.
func (s *store[T]) Resync() error { return nil }

// Transformer has objects trimmed while a list is still arriving.
func (s *store[T]) Transformer() cache.TransformFunc {
	return func(item any) (any, error) {
		if object, ok := item.(T); ok {
			s.trim(object)
		}
		return item, nil
	}
}
