// Package fake has a [Dataplane] in memory, for tests and benchmarks of what
// stands on the contract, and [Faulty], which makes any dataplane misbehave in
// the ways the contract allows.
//
// A Dataplane without options takes each call as a whole or not at all, as
// nftables does. [Options.PerObject] makes it program every frontend and every
// endpoint by itself, as IPVS does: some can fail, and leave mixes behind.
package fake

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"

	"fairlead.io/fairlead/dataplane"
)

// ErrClosed is returned by all calls after Close.
var ErrClosed = errors.New("the fake is closed")

// Options choose the kernel that a [Dataplane] imitates. The zero value is an
// atomic one that never fails.
type Options struct {
	// Strict makes an Apply fail that was told something wrong about the past:
	// an Old that the kernel does not hold, or a New with a frontend that a
	// Service outside the call has. Nothing of the call is taken, and all of
	// its keys are named in the error. A kernel without Strict overwrites what
	// it finds. Strict takes no part when PerObject is set.
	Strict bool

	// PerObject makes each frontend and each endpoint a write of its own. Apply
	// writes the difference between Old and New without looking at what the
	// kernel holds.
	PerObject bool

	// WriteFault is asked before each write of a PerObject kernel. An error
	// fails that write, and with it the key that owns the frontend, but no
	// other write.
	WriteFault func(Write) error

	// Unsupported returns an error for a Service that this backend can never
	// program; the Dataplane wraps it with dataplane.ErrUnsupported. Nil means
	// that all are supported.
	Unsupported func(*dataplane.Service) error
}

// Write is one write of a PerObject kernel: of a frontend, or of one of its
// endpoints.
type Write struct {
	Frontend dataplane.Frontend
	Endpoint dataplane.Endpoint // the zero Endpoint for the frontend itself
	Delete   bool
}

// Dataplane is a kernel in memory. Its methods may be called from any
// goroutine.
type Dataplane struct {
	opts  Options
	drift chan struct{}

	mu     sync.Mutex
	state  dataplane.State
	counts Counts
	closed bool
}

var _ dataplane.Dataplane = (*Dataplane)(nil)

// Counts are what has happened so far.
type Counts struct {
	// Replaces, Applies and Reads are calls.
	Replaces, Applies, Reads int
	// Writes are frontends and endpoints of frontends that were added, changed
	// or removed in the kernel. An edit by somebody else does not count.
	Writes int
}

// New returns a kernel that holds nothing.
func New(opts Options) *Dataplane {
	return &Dataplane{opts: opts, drift: make(chan struct{}, 1), state: dataplane.State{}}
}

// Counts returns what has happened so far.
func (d *Dataplane) Counts() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts
}

// Edit lets edit change the kernel as somebody else would, and announces the
// drift. Endpoints must be replaced, not changed in place.
func (d *Dataplane) Edit(edit func(dataplane.State)) {
	d.mu.Lock()
	edit(d.state)
	d.mu.Unlock()
	select {
	case d.drift <- struct{}{}:
	default:
	}
}

// Drift implements [dataplane.Dataplane]: a value arrives after each Edit.
func (d *Dataplane) Drift() <-chan struct{} { return d.drift }

// Close implements [dataplane.Dataplane].
func (d *Dataplane) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	return nil
}

// Read implements [dataplane.Dataplane].
func (d *Dataplane) Read(ctx context.Context) (dataplane.State, error) {
	if err := d.lock(ctx); err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	defer d.mu.Unlock()
	d.counts.Reads++
	return maps.Clone(d.state), nil
}

// Replace implements [dataplane.Dataplane].
func (d *Dataplane) Replace(ctx context.Context, _ dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	if err := d.lock(ctx); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	defer d.mu.Unlock()
	d.counts.Replaces++
	c := newCall("replace")
	c.old = d.state
	n := 0
	for s := range services {
		if err := c.addNew(s, d.opts.Unsupported); err != nil {
			return err
		}
		n++
	}
	err := d.execute(c)
	if progress != nil {
		progress(n - len(c.failed))
	}
	return err
}

// Apply implements [dataplane.Dataplane].
func (d *Dataplane) Apply(ctx context.Context, changes []dataplane.Change) error {
	if err := d.lock(ctx); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	defer d.mu.Unlock()
	d.counts.Applies++
	c := newCall("apply")
	for _, ch := range changes {
		if err := c.addOld(ch.Old); err != nil {
			return err
		}
		if err := c.addNew(ch.New, d.opts.Unsupported); err != nil {
			return err
		}
	}
	if d.opts.Strict && !d.opts.PerObject {
		if err := d.checkOld(c); err != nil {
			for _, ch := range changes {
				c.failed[ch.Key()] = err
			}
			return c.err()
		}
	}
	return d.execute(c)
}

// lock locks the kernel for a call, or says why there can be none.
func (d *Dataplane) lock(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return ErrClosed
	}
	return nil
}

// checkOld compares what a call assumes with what is there.
func (d *Dataplane) checkOld(c *call) error {
	for f, b := range c.old {
		if got, ok := d.state[f]; !ok || !got.Equal(b) {
			return fmt.Errorf("%s is not as Old says", f)
		}
	}
	for f, w := range c.desired {
		if _, ok := c.old[f]; ok {
			continue
		}
		if got, ok := d.state[f]; ok {
			return fmt.Errorf("%s of %s is held by %s already", f, w.key, got.Service)
		}
	}
	return nil
}

// execute makes the kernel hold what c wants of the frontends that c knows.
func (d *Dataplane) execute(c *call) error {
	for f, w := range maybeSorted(c.desired, d.opts.PerObject) {
		if d.opts.PerObject {
			if err := d.writeFrontend(f, c, w.binding); err != nil {
				c.fail(w.key, err)
			}
			continue
		}
		d.counts.Writes += countWrites(d.state, f, w.binding)
		d.state[f] = w.binding
	}
	var ownerless error
	for f := range maybeSorted(c.old, d.opts.PerObject) {
		if _, ok := c.desired[f]; ok {
			continue
		}
		if err := d.injectFault(Write{Frontend: f, Delete: true}); err != nil {
			if owner, ok := c.oldOwners[f]; ok {
				c.fail(owner, err)
			} else {
				ownerless = fmt.Errorf("%s: leftover %w", c.op, err)
			}
			continue
		}
		d.counts.Writes += countRemovalWrites(d.state, f, d.opts.PerObject)
		delete(d.state, f)
	}
	if ownerless != nil {
		return ownerless
	}
	return c.err()
}

// maybeSorted returns all of m, sorted if that matters: a WriteFault may count.
func maybeSorted[V any](m map[dataplane.Frontend]V, sorted bool) iter.Seq2[dataplane.Frontend, V] {
	if !sorted {
		return maps.All(m)
	}
	return func(yield func(dataplane.Frontend, V) bool) {
		for _, f := range slices.SortedFunc(maps.Keys(m), dataplane.Frontend.Compare) {
			if !yield(f, m[f]) {
				return
			}
		}
	}
}

// countWrites counts the writes that make frontend f of an atomic kernel b.
func countWrites(state dataplane.State, f dataplane.Frontend, b dataplane.Binding) int {
	old, ok := state[f]
	n := 0
	if !ok || old.Service != b.Service || !equalExceptEndpoints(old.ServiceSpec, b.ServiceSpec) {
		n++
	}
	for _, e := range b.Endpoints {
		if !containsEndpoint(old.Endpoints, e) {
			n++
		}
	}
	for _, e := range old.Endpoints {
		if !containsEndpoint(b.Endpoints, e) {
			n++
		}
	}
	return n
}

// countRemovalWrites counts the writes that remove frontend f.
func countRemovalWrites(state dataplane.State, f dataplane.Frontend, perObject bool) int {
	old, ok := state[f]
	switch {
	case !ok:
		return 0
	case perObject:
		return 1 // The endpoints go with it.
	default:
		return 1 + len(old.Endpoints)
	}
}

// writeFrontend makes frontend f of a PerObject kernel b, write by write. What
// differs is known from the call; the kernel is not asked.
func (d *Dataplane) writeFrontend(f dataplane.Frontend, c *call, b dataplane.Binding) error {
	old, had := c.old[f]
	if !had || old.Service != b.Service || !equalExceptEndpoints(old.ServiceSpec, b.ServiceSpec) {
		if err := d.injectFault(Write{Frontend: f}); err != nil {
			return err
		}
		d.counts.Writes++
		now := b
		now.Endpoints = d.state[f].Endpoints
		d.state[f] = now
	}
	var errs []error
	// Adding comes before removing, so that the frontend has endpoints all the
	// time.
	for _, e := range b.Endpoints {
		if !containsEndpoint(old.Endpoints, e) {
			errs = append(errs, d.writeEndpoint(Write{Frontend: f, Endpoint: e}))
		}
	}
	for _, e := range old.Endpoints {
		if !containsEndpoint(b.Endpoints, e) {
			errs = append(errs, d.writeEndpoint(Write{Frontend: f, Endpoint: e, Delete: true}))
		}
	}
	return errors.Join(errs...)
}

// equalExceptEndpoints reports whether a and b are the same but for their Endpoints, which
// are written one by one.
func equalExceptEndpoints(a, b dataplane.ServiceSpec) bool {
	a.Endpoints, b.Endpoints = nil, nil
	return a.Equal(b)
}

// writeEndpoint adds an endpoint that may be there, or removes one that may
// not be.
func (d *Dataplane) writeEndpoint(w Write) error {
	if err := d.injectFault(w); err != nil {
		return err
	}
	now, ok := d.state[w.Frontend]
	if !ok {
		if w.Delete {
			return nil
		}
		return fmt.Errorf("add endpoint %s to %s: no such frontend", w.Endpoint.Addr, w.Frontend)
	}
	d.counts.Writes++
	i, found := slices.BinarySearchFunc(now.Endpoints, w.Endpoint, compareEndpoints)
	switch {
	case w.Delete && found:
		now.Endpoints = slices.Concat(now.Endpoints[:i], now.Endpoints[i+1:])
	case !w.Delete && !found:
		now.Endpoints = slices.Concat(now.Endpoints[:i], []dataplane.Endpoint{w.Endpoint}, now.Endpoints[i:])
	}
	d.state[w.Frontend] = now
	return nil
}

func (d *Dataplane) injectFault(w Write) error {
	if !d.opts.PerObject || d.opts.WriteFault == nil {
		return nil
	}
	err := d.opts.WriteFault(w)
	if err == nil {
		return nil
	}
	verb := "add"
	if w.Delete {
		verb = "remove"
	}
	if w.Endpoint == (dataplane.Endpoint{}) {
		return fmt.Errorf("%s frontend %s: %w", verb, w.Frontend, err)
	}
	return fmt.Errorf("%s endpoint %s of %s: %w", verb, w.Endpoint.Addr, w.Frontend, err)
}

func containsEndpoint(endpoints []dataplane.Endpoint, e dataplane.Endpoint) bool {
	_, ok := slices.BinarySearchFunc(endpoints, e, compareEndpoints)
	return ok
}

func compareEndpoints(a, b dataplane.Endpoint) int {
	if c := a.Addr.Compare(b.Addr); c != 0 || a.Local == b.Local {
		return c
	}
	if a.Local {
		return -1
	}
	return 1
}

// call is one call: what is held before it, as far as it knows, what is wanted
// after it, and who failed. The two are maps over the whole call, so it does
// not matter in which order its Services come.
type call struct {
	op        string
	old       dataplane.State
	oldOwners map[dataplane.Frontend]dataplane.Key // of have, where known
	desired   map[dataplane.Frontend]desiredBinding
	failed    map[dataplane.Key]error
}

// desiredBinding is a frontend that a Service wants.
type desiredBinding struct {
	key     dataplane.Key
	binding dataplane.Binding
}

func newCall(op string) *call {
	return &call{
		op:        op,
		old:       dataplane.State{},
		oldOwners: map[dataplane.Frontend]dataplane.Key{},
		desired:   map[dataplane.Frontend]desiredBinding{},
		failed:    map[dataplane.Key]error{},
	}
}

// addOld adds what a Service had. It may be nil.
func (c *call) addOld(s *dataplane.Service) error {
	if s == nil {
		return nil
	}
	for _, f := range s.Frontends {
		if other, ok := c.oldOwners[f]; ok {
			return fmt.Errorf("%s: frontend %s is in the Old of %s and of %s", c.op, f, other, s.Key)
		}
		c.oldOwners[f] = s.Key
		c.old[f] = dataplane.Binding{Service: s.Key.Service(), ServiceSpec: s.ServiceSpec}
	}
	return nil
}

// addNew adds what a Service wants. It may be nil.
func (c *call) addNew(s *dataplane.Service, unsupported func(*dataplane.Service) error) error {
	if s == nil {
		return nil
	}
	if unsupported != nil {
		if err := unsupported(s); err != nil {
			c.failed[s.Key] = fmt.Errorf("%w: %w", dataplane.ErrUnsupported, err)
			return nil
		}
	}
	for _, f := range s.Frontends {
		if other, ok := c.desired[f]; ok {
			return fmt.Errorf("%s: frontend %s belongs to %s and to %s", c.op, f, other.key, s.Key)
		}
		c.desired[f] = desiredBinding{s.Key, dataplane.Binding{Service: s.Key.Service(), ServiceSpec: s.ServiceSpec}}
	}
	return nil
}

func (c *call) fail(k dataplane.Key, err error) {
	c.failed[k] = errors.Join(c.failed[k], err)
}

func (c *call) err() error {
	if len(c.failed) == 0 {
		return nil
	}
	return &dataplane.Error{Op: c.op, Failed: c.failed}
}
