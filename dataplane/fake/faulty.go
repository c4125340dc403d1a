package fake

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// ErrInjected is wrapped by the errors of random faults of a [Faulty].
var ErrInjected = errors.New("injected fault")

// Faults defines how a [Faulty] disturbs Replace and Apply. The zero value injects no faults. The
// first five fields are probabilities for each call, from 0 to 1.
type Faults struct {
	// Reject fails the whole call and applies nothing.
	Reject float64
	// Lose applies the whole call and returns an error, as if the kernel's answer were lost.
	Lose float64
	// Partial fails the whole call. Some keys are applied; the others keep their old state or a
	// mix of old and new state.
	Partial float64
	// Keys fails some keys of the call with a *dataplane.Error and applies the others. A failed
	// key has its Old, its New or a mix of both.
	Keys float64
	// Drift edits the kernel after the call and announces drift. The wrapped dataplane must have
	// the Edit method of [Dataplane].
	Drift float64

	// MaxDelay delays each call by a random duration below this limit.
	MaxDelay time.Duration
	// Down fails every call as a whole with this error. The call applies nothing.
	Down error
	// Broken returns an error for a Service that fails in every call. The kernel keeps its state
	// for the Service.
	Broken func(*dataplane.Service) error
}

// Faulty wraps a dataplane and injects faults into its calls. A seed determines the random
// faults, so that a history can be repeated. Read, Drift and Close are passed to the wrapped
// dataplane unchanged.
//
// To leave a failed key in a mixed state, Faulty passes a modified Service to the wrapped
// dataplane. Later calls may then contain an Old that the kernel does not hold, so the wrapped
// dataplane must not be strict.
type Faulty struct {
	dataplane.Dataplane

	mu     sync.Mutex
	rand   *rand.Rand
	faults Faults
	hold   chan struct{}
}

// NewFaulty returns a Faulty that wraps dp.
func NewFaulty(dp dataplane.Dataplane, seed uint64, faults Faults) *Faulty {
	return &Faulty{Dataplane: dp, rand: rand.New(rand.NewPCG(seed, 0)), faults: faults}
}

// Set replaces the faults for all calls that begin later.
func (f *Faulty) Set(faults Faults) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = faults
}

// Hold blocks calls until release is called or their context ends. A call whose context ends
// applies nothing.
func (f *Faulty) Hold() (release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	hold := make(chan struct{})
	f.hold = hold
	return sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		close(hold)
		if f.hold == hold {
			f.hold = nil
		}
	})
}

// outcome describes the faults that one call meets.
type outcome struct {
	down                        error
	reject, lose, partial, keys bool
	drift                       bool
	broken                      func(*dataplane.Service) error
}

// begin waits for the hold and the random delay, and then selects the outcome of a call.
func (f *Faulty) begin(ctx context.Context) (outcome, error) {
	f.mu.Lock()
	hold := f.hold
	var delay time.Duration
	if f.faults.MaxDelay > 0 {
		delay = time.Duration(f.rand.Int64N(int64(f.faults.MaxDelay)))
	}
	f.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return outcome{}, ctx.Err()
		}
	}
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return outcome{}, ctx.Err()
		}
	}

	f.mu.Lock()
	defer f.mu.Unlock()
	chance := func(p float64) bool { return p > 0 && f.rand.Float64() < p }
	out := outcome{down: f.faults.Down, broken: f.faults.Broken}
	out.drift = chance(f.faults.Drift)
	switch {
	case chance(f.faults.Reject):
		out.reject = true
	case chance(f.faults.Lose):
		out.lose = true
	case chance(f.faults.Partial):
		out.partial = true
	case chance(f.faults.Keys):
		out.keys = true
	}
	return out, nil
}

// Apply implements [dataplane.Dataplane].
func (f *Faulty) Apply(ctx context.Context, changes []dataplane.Change) error {
	out, err := f.begin(ctx)
	if err != nil {
		return err
	}
	if out.drift {
		defer f.edit()
	}
	switch {
	case out.down != nil:
		return out.down
	case out.reject:
		return injectedError("apply", "call rejected")
	case out.lose:
		return unknownResult("apply", "answer lost", f.Dataplane.Apply(ctx, changes))
	}
	changes = slices.SortedFunc(slices.Values(changes), func(a, b dataplane.Change) int {
		return a.Key().Compare(b.Key())
	})
	fk := f.newFailingKeys(out)
	for i, c := range changes {
		s := c.New
		if s == nil {
			s = c.Old
		}
		fk.add(i, s, c.New)
	}
	if len(fk.failed) == 0 {
		return f.Dataplane.Apply(ctx, changes)
	}
	taken := make([]dataplane.Change, 0, len(changes))
	for i, c := range changes {
		if keep, bad := fk.keepsOld[i]; bad {
			c.New = fk.mix(c.Key(), keep, c.Old, c.New)
		}
		if c.Old != nil || c.New != nil {
			taken = append(taken, c)
		}
	}
	return fk.result("apply", f.Dataplane.Apply(ctx, taken))
}

// Replace implements [dataplane.Dataplane].
func (f *Faulty) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	out, err := f.begin(ctx)
	if err != nil {
		return err
	}
	if out.drift {
		defer f.edit()
	}
	switch {
	case out.down != nil:
		return out.down
	case out.reject:
		return injectedError("replace", "call rejected")
	case out.lose:
		return unknownResult("replace", "answer lost", f.Dataplane.Replace(ctx, node, services, progress))
	case !out.partial && !out.keys && out.broken == nil:
		return f.Dataplane.Replace(ctx, node, services, progress)
	}
	sorted := slices.SortedFunc(services, func(a, b *dataplane.Service) int { return a.Key.Compare(b.Key) })
	fk := f.newFailingKeys(out)
	for i, s := range sorted {
		fk.add(i, s, s)
	}
	if len(fk.failed) == 0 {
		return f.Dataplane.Replace(ctx, node, slices.Values(sorted), progress)
	}
	held, err := f.Read(ctx)
	if err != nil {
		return err
	}
	taken := make([]*dataplane.Service, 0, len(sorted))
	for i, s := range sorted {
		if keep, bad := fk.keepsOld[i]; bad {
			s = fk.mix(s.Key, keep, serviceFromState(held, s.Key), s)
		}
		if s != nil {
			taken = append(taken, s)
		}
	}
	return fk.result("replace", f.Dataplane.Replace(ctx, node, slices.Values(taken), progress))
}

// edit makes one random change to the kernel, like another program would.
func (f *Faulty) edit() {
	inside, ok := f.Dataplane.(interface{ Edit(func(dataplane.State)) })
	if !ok {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	inside.Edit(func(state dataplane.State) {
		frontends := slices.SortedFunc(maps.Keys(state), dataplane.Frontend.Compare)
		if len(frontends) == 0 {
			return
		}
		fe := frontends[f.rand.IntN(len(frontends))]
		b := state[fe]
		switch f.rand.IntN(3) {
		case 0:
			clear(state)
		case 1:
			delete(state, fe)
		case 2:
			b.Endpoints = b.Endpoints[:f.rand.IntN(len(b.Endpoints)+1)]
			state[fe] = b
		}
	})
}

// serviceFromState reconstructs the Service of a key from the kernel's state. It uses the
// endpoints of the first frontend.
func serviceFromState(state dataplane.State, k dataplane.Key) *dataplane.Service {
	s := &dataplane.Service{Key: k}
	for fe, b := range state {
		if b.Service == k.Service() && dataplane.FamilyOf(fe.Addr.Addr()) == k.Family {
			s.Frontends = append(s.Frontends, fe)
		}
	}
	if s.Frontends == nil {
		return nil
	}
	slices.SortFunc(s.Frontends, dataplane.Frontend.Compare)
	s.Endpoints = state[s.Frontends[0]].Endpoints
	return s
}

// failingKeys selects the keys of one call that fail.
type failingKeys struct {
	outcome
	rand   *rand.Rand
	failed map[dataplane.Key]error
	// keepsOld contains the index of each failing key in the call. The value is true if the key
	// keeps its old state and false if it may have any state.
	keepsOld map[int]bool
	// takenFrontends are the frontends of other keys in this call.
	takenFrontends map[dataplane.Frontend]bool
}

func (f *Faulty) newFailingKeys(out outcome) *failingKeys {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &failingKeys{
		outcome:        out,
		rand:           rand.New(rand.NewPCG(f.rand.Uint64(), 0)),
		failed:         map[dataplane.Key]error{},
		keepsOld:       map[int]bool{},
		takenFrontends: map[dataplane.Frontend]bool{},
	}
}

// add decides whether s, at index i of the call, fails. If it succeeds, the frontends of want are
// taken; want may be nil.
func (fk *failingKeys) add(i int, s, want *dataplane.Service) {
	if fk.broken != nil {
		if err := fk.broken(s); err != nil {
			fk.failed[s.Key], fk.keepsOld[i] = err, true
			return
		}
	}
	if (fk.keys || fk.partial) && fk.rand.IntN(3) == 0 {
		fk.failed[s.Key], fk.keepsOld[i] = injectedError("program", s.Key.String()), false
		return
	}
	fk.markTaken(want)
}

func (fk *failingKeys) markTaken(s *dataplane.Service) {
	if s != nil {
		for _, fe := range s.Frontends {
			fk.takenFrontends[fe] = true
		}
	}
}

// mix returns the state that a failing key has after the call: old, new or a mix of them, without
// the frontends that other keys have taken.
func (fk *failingKeys) mix(k dataplane.Key, keep bool, old, want *dataplane.Service) *dataplane.Service {
	got := &dataplane.Service{Key: k}
	kind := fk.rand.IntN(4)
	for i, s := range []*dataplane.Service{old, want} {
		if s == nil || keep && i == 1 || !keep && kind == 1-i {
			continue
		}
		for _, fe := range s.Frontends {
			if !fk.takenFrontends[fe] && (keep || kind < 2 || fk.rand.IntN(2) == 0) {
				got.Frontends = append(got.Frontends, fe)
			}
		}
		for _, e := range s.Endpoints {
			if keep || kind < 2 || fk.rand.IntN(2) == 0 {
				got.Endpoints = append(got.Endpoints, e)
			}
		}
	}
	slices.SortFunc(got.Frontends, dataplane.Frontend.Compare)
	got.Frontends = slices.Compact(got.Frontends)
	slices.SortFunc(got.Endpoints, compareEndpoints)
	got.Endpoints = slices.Compact(got.Endpoints)
	if len(got.Frontends) == 0 {
		return nil
	}
	fk.markTaken(got)
	return got
}

// result returns the error of a call for which the wrapped dataplane returned err.
func (fk *failingKeys) result(op string, err error) error {
	if fk.partial {
		return unknownResult(op, "partly applied", err)
	}
	var inside *dataplane.Error
	switch {
	case errors.As(err, &inside):
		for k, e := range inside.Failed {
			fk.failed[k] = errors.Join(fk.failed[k], e)
		}
	case err != nil:
		return err
	}
	return &dataplane.Error{Op: op, Failed: fk.failed}
}

func injectedError(op, what string) error { return fmt.Errorf("%s: %w: %s", op, ErrInjected, what) }

// unknownResult returns the error of a call whose effect is unknown. It does not wrap the inner
// error, because that may name keys.
func unknownResult(op, what string, err error) error {
	if err != nil {
		what = fmt.Sprintf("%s (%v)", what, err)
	}
	return injectedError(op, what)
}
