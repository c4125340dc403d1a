package dataplane

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
)

// Change is the change of one Service: created where Old is nil, deleted where
// New is nil. At least one of them is set, and where both are, they have the
// same key.
type Change struct{ Old, New *Service }

// Key returns the key of the Service that changes.
func (c Change) Key() Key {
	if c.New != nil {
		return c.New.Key
	}
	return c.Old.Key
}

// Dataplane programs one node's kernel. Its methods block until the kernel has
// answered. They are called from one goroutine; only the channel of Drift is
// read elsewhere.
type Dataplane interface {
	// Replace makes the kernel hold exactly these Services for this Node. It
	// reads the kernel first and writes only what differs, so connections and
	// equal Services are not disturbed. It may be called with the same
	// Services again, and needs no memory of earlier calls.
	//
	// Each Service is complete as soon as any of it can be seen; a backend may
	// take several steps for all of them, and begins with those that come first.
	// After each step it calls progress, unless that is nil, with the number of
	// Services that are complete so far.
	//
	// The error is nil, an *[Error] with the keys that did not take, or any
	// other error, after which nothing is known. An *Error may be wrapped; one
	// that is joined with other errors counts as any other error.
	Replace(ctx context.Context, node Node, services iter.Seq[*Service], progress func(complete int)) error

	// Apply carries out changes, at most one for each key, at a cost that
	// follows their number. It trusts each Old to be what the kernel holds. It
	// is called only after a Replace, and errors are as with Replace.
	Apply(ctx context.Context, changes []Change) error

	// Read returns what the kernel holds now. It changes nothing.
	Read(ctx context.Context) (State, error)

	// Drift returns a channel on which a value arrives when somebody else has
	// changed what this Dataplane programmed, or may have. Values that are
	// not received merge into one. The answer to drift is a Replace.
	Drift() <-chan struct{}

	// Close releases the connection to the kernel and leaves everything that
	// was programmed in place.
	Close() error
}

// LossNotifier is implemented by a Dataplane that can tell drift that packets may
// suffer from, such as the loss of a table, from other drift.
type LossNotifier interface {
	// Lost returns a channel on which a value arrives, besides the value on that of
	// Drift, when something that was programmed is gone, or may be.
	Lost() <-chan struct{}
}

// Prefetcher is implemented by a Dataplane that can read in advance what the next
// Replace compares with, so that this takes less time.
type Prefetcher interface {
	// Prefetch reads what the kernel holds, unless that was read before and has not
	// changed, or still changes. It changes nothing in the kernel. It must not be
	// called while another method but Drift runs.
	Prefetch(ctx context.Context) error
}

// ErrConflict is wrapped by the error of a call that failed as a whole because
// somebody else changed the kernel at the same time. The answer is another Replace,
// without delay.
var ErrConflict = errors.New("somebody else changes the kernel at the same time")

// Binding is what a kernel does with the connections to one Frontend.
type Binding struct {
	// Service is [Key.Service] of the owner, possibly shortened, or empty
	// where a backend has no place to keep it.
	Service string
	ServiceSpec
}

// Equal reports whether b and o treat connections alike. The name of the
// Service takes no part.
func (b Binding) Equal(o Binding) bool { return b.ServiceSpec.Equal(o.ServiceSpec) }

// State is what a kernel holds, by frontend: the form that can be read back
// whatever the backend.
type State map[Frontend]Binding

// StateOf returns the State that a kernel has when it holds these Services.
func StateOf(services iter.Seq[*Service]) State {
	state := State{}
	for s := range services {
		for _, f := range s.Frontends {
			state[f] = Binding{Service: s.Key.Service(), ServiceSpec: s.ServiceSpec}
		}
	}
	return state
}

// Equal reports whether s and o treat all connections alike.
func (s State) Equal(o State) bool { return maps.EqualFunc(s, o, Binding.Equal) }

// Diff describes, a line for each frontend that differs, how got deviates from
// s; it is empty when they are equal.
func (s State) Diff(got State) string {
	frontends := slices.Collect(maps.Keys(s))
	for f := range got {
		if _, ok := s[f]; !ok {
			frontends = append(frontends, f)
		}
	}
	slices.SortFunc(frontends, Frontend.Compare)
	var b strings.Builder
	for _, f := range frontends {
		w, inWant := s[f]
		g, inGot := got[f]
		switch {
		case !inGot:
			fmt.Fprintf(&b, "%s of %s: missing, want %s\n", f, w.Service, w.ServiceSpec)
		case !inWant:
			fmt.Fprintf(&b, "%s: unexpected, has %s\n", f, g.ServiceSpec)
		case !w.Equal(g):
			fmt.Fprintf(&b, "%s of %s: has %s, want %s\n", f, w.Service, g.ServiceSpec, w.ServiceSpec)
		}
	}
	return b.String()
}

// Error says which keys of a call did not take. What the kernel holds for them
// is unknown; all other keys of the call took.
type Error struct {
	// Op is what was being done: "replace" or "apply".
	Op string
	// Failed has an entry for each key that did not take.
	Failed map[Key]error
}

// Error names the first failed keys and counts the rest.
func (e *Error) Error() string {
	const named = 3
	keys := slices.SortedFunc(maps.Keys(e.Failed), Key.Compare)
	parts := make([]string, 0, named+1)
	for i, k := range keys {
		if i == named {
			parts = append(parts, fmt.Sprintf("and %d more", len(keys)-named))
			break
		}
		parts = append(parts, fmt.Sprintf("%s: %v", k, e.Failed[k]))
	}
	return fmt.Sprintf("%s: %d failed: %s", e.Op, len(keys), strings.Join(parts, "; "))
}

// Unwrap returns the errors of all failed keys.
func (e *Error) Unwrap() []error { return slices.Collect(maps.Values(e.Failed)) }

// ErrUnsupported is wrapped by the error of a key that the backend can never
// program as it is: trying again without changing the Service is of no use.
// The kernel holds nothing for such a key after a Replace, and after an Apply.
var ErrUnsupported = errors.New("not supported by this backend")
