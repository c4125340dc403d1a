// Package fake provides an in-memory [Dataplane] for tests and benchmarks. [Faulty] wraps any
// dataplane and makes it fail in the ways that the contract allows.
//
// By default a Dataplane applies each call completely or not at all, like nftables. With
// [Options.PerObject] it programs every frontend and every endpoint in a separate write, like
// IPVS. Single writes can then fail and leave a mix of old and new state.
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

// ErrClosed is returned by every call after Close.
var ErrClosed = errors.New("the fake is closed")

// Options selects the behavior of the kernel that a [Dataplane] simulates. The zero value is an
// atomic kernel that never fails.
type Options struct {
	// Strict makes Apply fail if the kernel does not hold an Old, or if a New has a frontend
	// that belongs to a Service outside the call. Such an Apply changes nothing, and its error
	// names every key. Without Strict, Apply overwrites existing state. Strict has no effect if
	// PerObject is set.
	Strict bool

	// PerObject makes each frontend and each endpoint a separate write. Apply writes the
	// difference between Old and New and does not read the kernel.
	PerObject bool

	// WriteFault is called before each write of a PerObject kernel. If it returns an error, that
	// write and the key that owns the frontend fail. Other writes continue.
	WriteFault func(Write) error

	// Unsupported returns an error for a Service that this backend can never program. The
	// Dataplane wraps the error with dataplane.ErrUnsupported. If Unsupported is nil, all
	// Services are supported.
	Unsupported func(*dataplane.Service) error
}

// Write is one write of a PerObject kernel, to a frontend or to an endpoint of a frontend.
type Write struct {
	Frontend dataplane.Frontend
	Endpoint dataplane.Endpoint // zero for a write to the frontend
	Delete   bool
}

// Dataplane is an in-memory kernel. Its methods are safe for concurrent use.
type Dataplane struct {
	opts  Options
	drift chan struct{}

	mu     sync.Mutex
	state  dataplane.State
	counts Counts
	closed bool
}

var _ dataplane.Dataplane = (*Dataplane)(nil)

// Counts contains the number of calls and writes so far.
type Counts struct {
	// Replaces, Applies and Reads count calls.
	Replaces, Applies, Reads int
	// Writes counts the frontends, and the endpoints of frontends, that calls added, changed or
	// removed. Edit does not count.
	Writes int
}

// New returns an empty kernel.
func New(opts Options) *Dataplane {
	return &Dataplane{opts: opts, drift: make(chan struct{}, 1), state: dataplane.State{}}
}

// Counts returns the number of calls and writes so far.
func (d *Dataplane) Counts() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts
}

// Edit runs edit on the kernel's state, like another program would change it, and announces
// drift. The function must replace lists of endpoints and not modify them in place.
func (d *Dataplane) Edit(edit func(dataplane.State)) {
	d.mu.Lock()
	edit(d.state)
	d.mu.Unlock()
	select {
	case d.drift <- struct{}{}:
	default:
	}
}

// Drift implements [dataplane.Dataplane]. The channel receives a value after each Edit.
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

// lock checks that ctx and the Dataplane are usable and locks the kernel for a call.
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

// checkOld compares the state that a call assumes with the state of the kernel.
func (d *Dataplane) checkOld(c *call) error {
	for f, b := range c.old {
		if got, ok := d.state[f]; !ok || !got.Equal(b) {
			return fmt.Errorf("%s differs from Old", f)
		}
	}
	for f, w := range c.desired {
		if _, ok := c.old[f]; ok {
			continue
		}
		if got, ok := d.state[f]; ok {
			return fmt.Errorf("%s of %s already belongs to %s", f, w.key, got.Service)
		}
	}
	return nil
}

// execute programs c.desired and removes the frontends of c.old that are not desired.
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

// maybeSorted returns all entries of m, in sorted order if a WriteFault may count writes.
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

// countWrites returns the number of writes that bring frontend f of an atomic kernel to b.
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

// countRemovalWrites returns the number of writes that remove frontend f.
func countRemovalWrites(state dataplane.State, f dataplane.Frontend, perObject bool) int {
	old, ok := state[f]
	switch {
	case !ok:
		return 0
	case perObject:
		return 1 // The kernel removes the endpoints with the frontend.
	default:
		return 1 + len(old.Endpoints)
	}
}

// writeFrontend brings frontend f of a PerObject kernel to b in single writes. It takes the old
// state from the call and does not read the kernel.
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
	// Endpoints are added before others are removed, so that the frontend always has endpoints.
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

// equalExceptEndpoints reports whether a and b are equal, ignoring their Endpoints, which are
// written one by one.
func equalExceptEndpoints(a, b dataplane.ServiceSpec) bool {
	a.Endpoints, b.Endpoints = nil, nil
	return a.Equal(b)
}

// writeEndpoint adds or removes an endpoint. It is not an error if the endpoint exists or is gone
// already.
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

// call contains the old and the desired state of one call and its failed keys. Both states are
// maps over the whole call, so the order of its Services does not matter.
type call struct {
	op        string
	old       dataplane.State
	oldOwners map[dataplane.Frontend]dataplane.Key // owners of old, where known
	desired   map[dataplane.Frontend]desiredBinding
	failed    map[dataplane.Key]error
}

// desiredBinding is the desired state of a frontend and the key of its owner.
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

// addOld adds the old value of a Service, which may be nil.
func (c *call) addOld(s *dataplane.Service) error {
	if s == nil {
		return nil
	}
	for _, f := range s.Frontends {
		if other, ok := c.oldOwners[f]; ok {
			return fmt.Errorf("%s: frontend %s is in the Old of both %s and %s", c.op, f, other, s.Key)
		}
		c.oldOwners[f] = s.Key
		c.old[f] = dataplane.Binding{Service: s.Key.Service(), ServiceSpec: s.ServiceSpec}
	}
	return nil
}

// addNew adds the desired value of a Service, which may be nil.
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
			return fmt.Errorf("%s: frontend %s belongs to both %s and %s", c.op, f, other.key, s.Key)
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
