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

// history is a list of Services that changes, a store that is told, and a receiver.
type history struct {
	t       *testing.T
	box     *mailbox
	store   *store[*corev1.Service]
	version int
	there   map[string]string // name to version
	got     map[string]string
}

func newHistory(t *testing.T) *history {
	t.Helper()
	box := newMailbox()
	for _, k := range []kind{endpointSlices, nodes, serviceCIDRs} {
		box.complete(k)
	}
	return &history{
		t: t, box: box, there: map[string]string{}, got: map[string]string{},
		store: newStore(services, box, func(m *mailbox) gathered[*corev1.Service] { return m.services }, newTrimmer().service, nil),
	}
}

func object(name, version string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", ResourceVersion: version}}
}

// other returns another object of the name, and changed one with other content.
func other(name, version string) *corev1.Service {
	svc := object(name, version)
	svc.UID = "other"
	return svc
}

func changed(name, version string) *corev1.Service {
	svc := object(name, version)
	svc.Spec.ClusterIP = "10.0.0.1"
	return svc
}

func (h *history) do(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// next makes a new version of the name, without telling.
func (h *history) next(name string) *corev1.Service {
	h.version++
	h.there[name] = strconv.Itoa(h.version)
	return object(name, h.there[name])
}

func (h *history) put(name string) { h.do(h.store.Update(h.next(name))) }
func (h *history) remove(name string) {
	delete(h.there, name)
	h.do(h.store.Delete(object(name, "999")))
}

func (h *history) list() {
	var items []any
	for name, version := range h.there {
		items = append(items, object(name, version))
	}
	h.do(h.store.Replace(items, ""))
}

// take has what has gathered delivered. It reports whether there was something.
func (h *history) take() bool {
	h.t.Helper()
	d, ok := h.box.take()
	if !ok {
		return false
	}
	for _, name := range d.DeletedServices {
		if _, there := h.got[name.Name]; !there {
			h.t.Errorf("%s is deleted, but was never delivered", name)
		}
		delete(h.got, name.Name)
	}
	for _, svc := range d.Services {
		if h.got[svc.Name] == svc.ResourceVersion {
			h.t.Errorf("%s is delivered again, unchanged", svc.Name)
		}
		h.got[svc.Name] = svc.ResourceVersion
	}
	return true
}

// TestGathering says what changes of one name come to.
func TestGathering(t *testing.T) {
	t.Parallel()
	const a, b = "a", "b" // a is there and was delivered, b is not
	for _, tt := range []struct {
		name    string
		do      func(h *history)
		objects string
		deleted string
	}{
		{name: "a change", do: func(h *history) { h.put(a) }, objects: "a@3"},
		{name: "two changes are the last", do: func(h *history) { h.put(a); h.put(a) }, objects: "a@4"},
		{name: "a new one", do: func(h *history) { h.put(b) }, objects: "b@3"},
		{name: "an end", do: func(h *history) { h.remove(a) }, deleted: "a"},
		{name: "an end after a change", do: func(h *history) { h.put(a); h.remove(a) }, deleted: "a"},
		{name: "made again", do: func(h *history) { h.remove(a); h.put(a) }, objects: "a@3"},
		{name: "made again and gone", do: func(h *history) { h.remove(a); h.put(a); h.remove(a) }, deleted: "a"},
		{name: "new and gone", do: func(h *history) { h.put(b); h.remove(b) }},
		{name: "new, gone and new", do: func(h *history) { h.put(b); h.remove(b); h.put(b) }, objects: "b@4"},
		{name: "the end of what never was", do: func(h *history) { h.remove(b) }},
		{name: "the same version", do: func(h *history) { h.do(h.store.Update(object(a, h.there[a]))) }},
		{name: "the same version of another object", do: func(h *history) { h.do(h.store.Update(other(a, h.there[a]))) }, objects: "a@1"},
		{name: "the same version with other content", do: func(h *history) { h.do(h.store.Update(changed(a, h.there[a]))) }, objects: "a@1"},
		{name: "a list with the same version of another object", do: func(h *history) {
			h.do(h.store.Replace([]any{other(a, h.there[a]), object("other", h.there["other"])}, ""))
		}, objects: "a@1"},
		{name: "made again with the same version", do: func(h *history) { h.remove(a); h.do(h.store.Add(other(a, "1"))) }, objects: "a@1"},
		{name: "the same list", do: func(h *history) { h.list() }},
		{name: "a list with a change", do: func(h *history) { h.next(a); h.list() }, objects: "a@3"},
		{name: "a list without", do: func(h *history) { delete(h.there, a); h.list() }, deleted: "a"},
		{name: "an empty list and a list", do: func(h *history) { was := h.there; h.there = nil; h.list(); h.there = was; h.list() }, objects: "a@1 other@2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHistory(t)
			h.next(a)
			h.next("other")
			h.list()
			if !h.take() || len(h.got) != 2 {
				t.Fatalf("first Delta has %v", h.got)
			}
			h.got = map[string]string{a: "1", "other": "2"}
			tt.do(h)
			d, ok := h.box.take()
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

// TestRandomHistory says that the Deltas add up to what there is.
func TestRandomHistory(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		h := newHistory(t)
		for range 3 {
			h.next(fmt.Sprint(r.IntN(5)))
		}
		if h.take() {
			t.Fatal("delivered without a list")
		}
		h.list()
		if !h.take() {
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
				h.next(name) // missed, until the next list
				h.list()
			case 6:
				delete(h.there, name)
				h.list()
			case 7:
				h.take()
			}
		}
		h.take()
		if diff := cmp.Diff(h.there, h.got); diff != "" {
			t.Fatalf("seed %d: (-there +delivered):\n%s", seed, diff)
		}
		if len(h.store.known) != len(h.there) || len(h.box.services) != 0 {
			t.Fatalf("seed %d: the store knows %d names and holds %d, there are %d", seed, len(h.store.known), len(h.box.services), len(h.there))
		}
	}
}

// TestFirstDeltaMayBeEmpty says that it comes even so: the receiver must know that
// there is nothing.
func TestFirstDeltaMayBeEmpty(t *testing.T) {
	t.Parallel()
	h := newHistory(t)
	h.list()
	if !h.take() {
		t.Error("no first Delta of an empty cluster")
	}
	if h.take() {
		t.Error("a second Delta with nothing in it")
	}
}
