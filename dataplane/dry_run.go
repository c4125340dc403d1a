package dataplane

import (
	"cmp"
	"slices"
)

// DryRun collects what a Dataplane would write. A backend that supports dry runs opens its
// Dataplane with one: Replace and Apply then read the kernel and record, but write nothing.
type DryRun struct {
	// Differences lists the objects in the kernel, other than the frontends and endpoints of
	// Services, that are not as the backend programs them.
	Differences []Difference
	// Writes counts the writes of each kind.
	Writes map[Write]int
}

// Difference describes an object of the kernel that is not as the backend programs it.
type Difference struct {
	// Object identifies the object: "table ip fairlead", "sysctl net.ipv4.vs.conntrack".
	Object string `json:"object"`
	// Problem describes the difference: "missing", "unexpected", "rules differ".
	Problem string `json:"problem"`
	// Have and Want contain the values in the kernel and the desired ones that are not in both
	// lists. They are empty if the object has no values.
	Have []string `json:"have,omitempty"`
	Want []string `json:"want,omitempty"`
}

// Problems of a [Difference].
const (
	Missing    = "missing"
	Unexpected = "unexpected"
	Differs    = "different"
)

// Write is a kind of write.
type Write struct {
	// Op is "add", "change" or "delete".
	Op string
	// Object is the kind of object: "element", "chain", "virtual server".
	Object string
	// Name identifies the object, or the set of an element: "classes in table ip fairlead".
	Name string
}

// Operations of a [Write].
const (
	Add    = "add"
	Modify = "change"
	Delete = "delete"
)

// Record counts writes. Record on a nil DryRun does nothing.
func (r *DryRun) Record(op, object, name string, count int) {
	if r == nil || count == 0 {
		return
	}
	if r.Writes == nil {
		r.Writes = map[Write]int{}
	}
	r.Writes[Write{op, object, name}] += count
}

// Differ records a difference. have and want may have common values, which Differ leaves out.
// Differ on a nil DryRun does nothing.
func (r *DryRun) Differ(object, problem string, have, want []string) {
	if r == nil {
		return
	}
	r.Differences = append(r.Differences, Difference{
		Object: object, Problem: problem, Have: without(have, want), Want: without(want, have),
	})
}

// without returns the sorted values of a that are not in b.
func without(a, b []string) []string {
	var rest []string
	for _, value := range a {
		if !slices.Contains(b, value) {
			rest = append(rest, value)
		}
	}
	slices.Sort(rest)
	return rest
}

// Compare orders writes by object, name and operation.
func (w Write) Compare(o Write) int {
	return cmp.Or(cmp.Compare(w.Object, o.Object), cmp.Compare(w.Name, o.Name), cmp.Compare(w.Op, o.Op))
}
