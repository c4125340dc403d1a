package dataplane

import "context"

// Wrapper passes all calls to a Dataplane, including the methods of [LossNotifier] and [Prefetcher]. Types
// that add something to the Dataplane of any backend embed it.
type Wrapper struct{ Dataplane }

var (
	_ Dataplane    = Wrapper{}
	_ LossNotifier = Wrapper{}
	_ Prefetcher   = Wrapper{}
)

// Lost implements [LossNotifier]. If the Dataplane is not a LossNotifier, the channel never receives.
func (w Wrapper) Lost() <-chan struct{} {
	if n, ok := w.Dataplane.(LossNotifier); ok {
		return n.Lost()
	}
	return nil
}

// Prefetch implements [Prefetcher]. If the Dataplane is not a Prefetcher, it does nothing.
func (w Wrapper) Prefetch(ctx context.Context, desired Desired) error {
	if p, ok := w.Dataplane.(Prefetcher); ok {
		return p.Prefetch(ctx, desired)
	}
	return nil
}
