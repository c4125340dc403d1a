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

// Change describes how one Service changes. Old is nil for a new Service and New is nil for a
// deleted one. At least one is set; if both are, their keys are equal.
type Change struct{ Old, New *Service }

// Key returns the key of the changed Service.
func (c Change) Key() Key {
	if c.New != nil {
		return c.New.Key
	}
	return c.Old.Key
}

// Dataplane programs the kernel of one node. Its methods block until the kernel has answered. One
// goroutine calls them; only the channel returned by Drift may be read from another.
type Dataplane interface {
	// Replace makes the kernel hold exactly these Services for this Node. It reads the kernel
	// first and writes only the difference, so established connections and unchanged Services are
	// not disturbed. Replace needs no state from earlier calls and may be repeated with the same
	// Services.
	//
	// Packets never see a partially programmed Service. A backend may program the Services in several
	// steps, in the order of the sequence. After each step it calls progress, if not nil, with
	// the number of Services completed so far.
	//
	// Replace returns nil, an *[Error] with the keys that failed, or any other error, after which
	// the state of every key is unknown. The *Error may be wrapped. An *Error that is joined with
	// other errors counts as any other error.
	Replace(ctx context.Context, node Node, services iter.Seq[*Service], progress func(complete int)) error

	// Apply programs the changes, at most one per key, at a cost proportional to their number. It
	// trusts each Old to be what the kernel holds. It may only be called after Replace, and
	// returns errors in the same way.
	Apply(ctx context.Context, changes []Change) error

	// Read returns the state that the kernel holds now. It changes nothing.
	Read(ctx context.Context) (State, error)

	// Drift returns a channel that receives a value when another program has changed, or may have
	// changed, the state that this Dataplane programmed. Unreceived values are merged into one.
	// The caller repairs drift with Replace.
	Drift() <-chan struct{}

	// Close releases the connection to the kernel. The programmed state stays in place.
	Close() error
}

// LossNotifier is implemented by a Dataplane that distinguishes drift that can drop packets, for
// example the deletion of a table, from other drift.
type LossNotifier interface {
	// Lost returns a channel that receives a value, in addition to the value on the Drift
	// channel, when programmed state is gone or may be gone.
	Lost() <-chan struct{}
}

// Prefetcher is implemented by a Dataplane that can prepare the first Replace, which shortens that
// call.
type Prefetcher interface {
	// Prefetch reads the state of the kernel and compares it with the desired state. It does nothing
	// if an earlier result is still valid or if the kernel is still changing. It writes nothing to
	// the kernel. If desired.Services is nil, the desired state is not known yet, and Prefetch only
	// reads. Prefetch must not run concurrently with any method except Drift.
	Prefetch(ctx context.Context, desired Desired) error
}

// Desired contains the arguments of [Dataplane.Replace].
type Desired struct {
	Node     Node
	Services iter.Seq[*Service]
}

// ErrConflict is wrapped by the error of a call that failed as a whole because another program
// changed the kernel at the same time. The caller retries with Replace without delay.
var ErrConflict = errors.New("another program changed the kernel at the same time")

// Binding describes how a kernel handles the connections to one Frontend.
type Binding struct {
	// Service is [Key.Service] of the owner. A backend may shorten it, or leave it empty if it
	// has no room to store it.
	Service string
	ServiceSpec
}

// Equal reports whether b and o handle connections in the same way. It ignores the name of the
// Service.
func (b Binding) Equal(o Binding) bool { return b.ServiceSpec.Equal(o.ServiceSpec) }

// State maps each programmed frontend to its Binding. Every backend can read this form back from
// the kernel.
type State map[Frontend]Binding

// StateOf returns the State of a kernel that holds these Services.
func StateOf(services iter.Seq[*Service]) State {
	state := State{}
	for s := range services {
		for _, f := range s.Frontends {
			state[f] = Binding{Service: s.Key.Service(), ServiceSpec: s.ServiceSpec}
		}
	}
	return state
}

// Equal reports whether s and o have the same frontends with equal bindings.
func (s State) Equal(o State) bool { return maps.EqualFunc(s, o, Binding.Equal) }

// Diff describes how got differs from s, one line for each frontend. It returns an empty string
// if they are equal.
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

// Error lists the keys of a call that failed. Their state in the kernel is unknown. The call
// succeeded for all other keys.
type Error struct {
	// Op is the operation that failed: "replace" or "apply".
	Op string
	// Failed contains the error of each key that failed.
	Failed map[Key]error
}

// Error returns a message with the first failed keys and the number of the remaining ones.
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

// ErrUnsupported is wrapped by the error of a key that the backend can never program in its
// current form. Retrying is useless until the Service changes. After Replace or Apply returns
// this error, the kernel holds nothing for the key.
var ErrUnsupported = errors.New("not supported by this backend")
