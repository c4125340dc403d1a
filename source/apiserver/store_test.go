package apiserver

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// storeHistory has a changing set of Services (server), the store that is updated with it,
// and the state of a receiver (delivered).
type storeHistory struct {
	t         *testing.T
	queue     *deltaQueue
	store     *store[*corev1.Service, deliveredService]
	version   int
	server    map[string]string // resource version by name
	delivered map[string]string
}

func newHistory(t *testing.T) *storeHistory {
	t.Helper()
	queue := newDeltaQueue()
	for _, res := range []resource{endpointSlices, nodes, serviceCIDRs} {
		queue.completeList(res)
	}
	return &storeHistory{
		t: t, queue: queue, server: map[string]string{}, delivered: map[string]string{},
		store: newStore(services, queue, func(m *deltaQueue) pendingChanges[deliveredService] { return m.services }, newTrimmer().trimService, whole, nil),
	}
}

func newObject(name, version string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", ResourceVersion: version}}
}

// withOtherUID returns an object with the same name and another UID.
func withOtherUID(name, version string) *corev1.Service {
	svc := newObject(name, version)
	svc.UID = "other"
	return svc
}

// withOtherContent returns an object with the same name and other content.
func withOtherContent(name, version string) *corev1.Service {
	svc := newObject(name, version)
	svc.Spec.ClusterIP = "10.0.0.1"
	return svc
}

func (h *storeHistory) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// bump creates a new version of the object on the server without updating the store.
func (h *storeHistory) bump(name string) *corev1.Service {
	h.version++
	h.server[name] = strconv.Itoa(h.version)
	return newObject(name, h.server[name])
}

func (h *storeHistory) put(name string) { h.must(h.store.Update(h.bump(name))) }
func (h *storeHistory) remove(name string) {
	delete(h.server, name)
	h.must(h.store.Delete(newObject(name, "999")))
}

func (h *storeHistory) replace() {
	var items []any
	for name, version := range h.server {
		items = append(items, newObject(name, version))
	}
	h.must(h.store.Replace(items, ""))
}

// deliver applies pending changes to the receiver. It reports false if nothing has changed.
func (h *storeHistory) deliver() bool {
	h.t.Helper()
	d, ok := h.queue.pop()
	if !ok {
		return false
	}
	for _, name := range d.DeletedServices {
		if _, there := h.delivered[name.Name]; !there {
			h.t.Errorf("%s is deleted but was not delivered", name)
		}
		delete(h.delivered, name.Name)
	}
	for _, svc := range d.Services {
		if h.delivered[svc.Name] == svc.ResourceVersion {
			h.t.Errorf("%s is delivered again without a change", svc.Name)
		}
		h.delivered[svc.Name] = svc.ResourceVersion
	}
	return true
}

// TestCoalescing checks the result of several changes to one name.
func TestCoalescing(t *testing.T) {
	t.Parallel()
	const a, b = "a", "b" // a exists and was delivered, b does not exist
	for _, tt := range []struct {
		name    string
		do      func(h *storeHistory)
		objects string
		deleted string
	}{
		{name: "a change", do: func(h *storeHistory) { h.put(a) }, objects: "a@3"},
		{name: "two changes become the last", do: func(h *storeHistory) { h.put(a); h.put(a) }, objects: "a@4"},
		{name: "an addition", do: func(h *storeHistory) { h.put(b) }, objects: "b@3"},
		{name: "a deletion", do: func(h *storeHistory) { h.remove(a) }, deleted: "a"},
		{name: "a deletion after a change", do: func(h *storeHistory) { h.put(a); h.remove(a) }, deleted: "a"},
		{name: "recreated", do: func(h *storeHistory) { h.remove(a); h.put(a) }, objects: "a@3"},
		{name: "recreated and deleted", do: func(h *storeHistory) { h.remove(a); h.put(a); h.remove(a) }, deleted: "a"},
		{name: "added and deleted", do: func(h *storeHistory) { h.put(b); h.remove(b) }},
		{name: "added, deleted and added", do: func(h *storeHistory) { h.put(b); h.remove(b); h.put(b) }, objects: "b@4"},
		{name: "deletion of an unknown object", do: func(h *storeHistory) { h.remove(b) }},
		{name: "the same version", do: func(h *storeHistory) { h.must(h.store.Update(newObject(a, h.server[a]))) }},
		{name: "the same version of another object", do: func(h *storeHistory) { h.must(h.store.Update(withOtherUID(a, h.server[a]))) }, objects: "a@1"},
		{name: "the same version with other content", do: func(h *storeHistory) { h.must(h.store.Update(withOtherContent(a, h.server[a]))) }, objects: "a@1"},
		{name: "a list with the same version of another object", do: func(h *storeHistory) {
			h.must(h.store.Replace([]any{withOtherUID(a, h.server[a]), newObject("other", h.server["other"])}, ""))
		}, objects: "a@1"},
		{name: "recreated with the same version", do: func(h *storeHistory) { h.remove(a); h.must(h.store.Add(withOtherUID(a, "1"))) }, objects: "a@1"},
		{name: "the same list", do: func(h *storeHistory) { h.replace() }},
		{name: "a list with a change", do: func(h *storeHistory) { h.bump(a); h.replace() }, objects: "a@3"},
		{name: "a list without the object", do: func(h *storeHistory) { delete(h.server, a); h.replace() }, deleted: "a"},
		{name: "an empty list and a full list", do: func(h *storeHistory) { was := h.server; h.server = nil; h.replace(); h.server = was; h.replace() }, objects: "a@1 other@2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHistory(t)
			h.bump(a)
			h.bump("other")
			h.replace()
			if !h.deliver() || len(h.delivered) != 2 {
				t.Fatalf("first Delta has %v", h.delivered)
			}
			h.delivered = map[string]string{a: "1", "other": "2"}
			tt.do(h)
			d, ok := h.queue.pop()
			objects := map[string]bool{}
			for _, svc := range d.Services {
				objects[svc.Name+"@"+svc.ResourceVersion] = true
			}
			want := map[string]bool{}
			for object := range strings.FieldsSeq(tt.objects) {
				want[object] = true
			}
			var deleted string
			for _, name := range d.DeletedServices {
				deleted += name.Name
			}
			if diff := cmp.Diff(want, objects); diff != "" || deleted != tt.deleted || ok != (len(want)+len(deleted) > 0) {
				t.Errorf("delivered %v (%v), deleted %q, want %q and %q", objects, ok, deleted, tt.objects, tt.deleted)
			}
		})
	}
}

// TestRandomChanges checks that the sum of all Deltas is the state of the server.
func TestRandomChanges(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		h := newHistory(t)
		for range 3 {
			h.bump(fmt.Sprint(r.IntN(5)))
		}
		if h.deliver() {
			t.Fatal("a Delta before the first list")
		}
		h.replace()
		if !h.deliver() {
			t.Fatal("a complete list was not delivered")
		}
		for range 60 {
			name := fmt.Sprint(r.IntN(5))
			switch r.IntN(8) {
			case 0, 1, 2:
				h.put(name)
			case 3, 4:
				h.remove(name)
			case 5:
				h.bump(name) // the store sees it at the next list
				h.replace()
			case 6:
				delete(h.server, name)
				h.replace()
			case 7:
				h.deliver()
			}
		}
		h.deliver()
		if diff := cmp.Diff(h.server, h.delivered); diff != "" {
			t.Fatalf("seed %d: (-server +delivered):\n%s", seed, diff)
		}
		if len(h.store.fingerprints) != len(h.server) || len(h.queue.services) != 0 {
			t.Fatalf("seed %d: the store has %d fingerprints and %d pending changes of %d objects", seed, len(h.store.fingerprints), len(h.queue.services), len(h.server))
		}
	}
}

// TestEmptyFirstDelta checks that the first Delta of an empty cluster is delivered, so that
// the receiver knows that the cluster is empty.
func TestEmptyFirstDelta(t *testing.T) {
	t.Parallel()
	h := newHistory(t)
	h.replace()
	if !h.deliver() {
		t.Error("no first Delta of an empty cluster")
	}
	if h.deliver() {
		t.Error("an empty second Delta")
	}
}
