package servicecounters

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"

	"github.com/google/nftables"

	"fairlead.io/fairlead/dataplane"
)

// MaxCounters is the default of [Options.MaxCounters].
const MaxCounters = 20_000

// Options configure [New].
type Options struct {
	// NetNS is a file descriptor of the network namespace, 0 for the namespace of the calling thread.
	NetNS int
	// Services selects the Services to count.
	Services []Selector
	// TranslatedOnly makes connections that nftables does not translate skip the counters. It must not
	// be set if IPVS translates.
	TranslatedOnly bool
	// MaxCounters is the maximum number of counters in the kernel: one for each frontend, and one for
	// each of its endpoints. A Service that needs more than the remaining ones is not counted. 0 means
	// the constant.
	MaxCounters int
	Logger      *slog.Logger
}

// Dataplane wraps the Dataplane of a backend. Failures to write counters do not affect Services.
type Dataplane struct {
	dataplane.Wrapper

	options  Options
	log      *slog.Logger
	families map[dataplane.Family]*family

	// mu protects the remaining fields. It is not held during calls of the inner Dataplane.
	mu   sync.Mutex
	conn *nftables.Conn
	// desired contains the selected Services that are counted, limited the ones that are not because
	// of MaxCounters.
	desired map[dataplane.Key]*dataplane.Service
	limited map[dataplane.Key]struct{}
	// elements contains the elements in the kernel.
	elements map[element]dataplane.Key
	// removed contains the counts of removed elements of existing series.
	removed map[Series]uint64
	// intact is set while the tables have the structure and the elements of this process.
	intact  bool
	failing bool
}

var (
	_ dataplane.Dataplane    = (*Dataplane)(nil)
	_ dataplane.LossNotifier = (*Dataplane)(nil)
	_ dataplane.Prefetcher   = (*Dataplane)(nil)
)

// New returns a Dataplane that counts the connections of the selected Services and passes all calls to
// inner.
func New(inner dataplane.Dataplane, o Options) (*Dataplane, error) {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(o.NetNS))
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for the counters of Services: %w", err)
	}
	o.MaxCounters = cmp.Or(o.MaxCounters, MaxCounters)
	log := o.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Dataplane{
		Wrapper: dataplane.Wrapper{Dataplane: inner}, options: o, log: log, conn: conn,
		families: map[dataplane.Family]*family{dataplane.IPv4: newFamily(dataplane.IPv4), dataplane.IPv6: newFamily(dataplane.IPv6)},
		desired:  map[dataplane.Key]*dataplane.Service{}, limited: map[dataplane.Key]struct{}{},
		elements: map[element]dataplane.Key{}, removed: map[Series]uint64{},
	}, nil
}

func (d *Dataplane) selects(k dataplane.Key) bool {
	return slices.ContainsFunc(d.options.Services, func(s Selector) bool { return s.matches(k.Namespace, k.Name) })
}

// Replace implements [dataplane.Dataplane].
func (d *Dataplane) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	obsolete := d.beforeReplace(ctx, services)
	err := d.Dataplane.Replace(ctx, node, services, progress)
	var partial *dataplane.Error
	if err == nil || errors.As(err, &partial) {
		d.remove(ctx, obsolete)
	}
	return err
}

func (d *Dataplane) beforeReplace(ctx context.Context, services iter.Seq[*dataplane.Service]) (obsolete []element) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.desired)
	clear(d.limited)
	for s := range services {
		if d.selects(s.Key) {
			d.desired[s.Key] = s
		}
	}
	obsolete, err := d.compare(ctx)
	d.report(ctx, err)
	return obsolete
}

// Apply implements [dataplane.Dataplane].
func (d *Dataplane) Apply(ctx context.Context, changes []dataplane.Change) error {
	obsolete := d.beforeApply(ctx, changes)
	err := d.Dataplane.Apply(ctx, changes)
	var partial *dataplane.Error
	if err == nil || errors.As(err, &partial) {
		d.remove(ctx, obsolete)
	}
	return err
}

func (d *Dataplane) beforeApply(ctx context.Context, changes []dataplane.Change) (obsolete []element) {
	d.mu.Lock()
	defer d.mu.Unlock()
	touched := map[dataplane.Key]bool{}
	for _, c := range changes {
		key := c.Key()
		if !d.selects(key) {
			continue
		}
		touched[key] = true
		delete(d.limited, key)
		if c.New == nil {
			delete(d.desired, key)
		} else {
			d.desired[key] = c.New
		}
	}
	if len(touched) == 0 {
		return nil
	}
	want := d.want(func(yield func(*dataplane.Service) bool) {
		for key := range touched {
			if s := d.desired[key]; s != nil && !yield(s) {
				return
			}
		}
	})
	obsolete, err := d.program(ctx, want, func(k dataplane.Key) bool { return touched[k] })
	d.report(ctx, err)
	return obsolete
}

// want returns the elements of Services. It leaves out Services that exceed the limit.
func (d *Dataplane) want(services iter.Seq[*dataplane.Service]) map[element]dataplane.Key {
	want := map[element]dataplane.Key{}
	sorted := slices.SortedFunc(services, func(a, b *dataplane.Service) int { return a.Key.Compare(b.Key) })
	included := map[dataplane.Key]bool{}
	for _, s := range sorted {
		included[s.Key] = true
	}
	used := 0
	for _, key := range d.elements {
		if !included[key] {
			used++
		}
	}
	for _, s := range sorted {
		elements := elementsOf(s)
		if used+len(elements) > d.options.MaxCounters {
			if _, logged := d.limited[s.Key]; !logged {
				d.log.Warn("connections of a Service are not counted, because its counters exceed the limit: select fewer Services with --service-metrics",
					"service", s.Key.String(), "counters", len(elements), "limit", d.options.MaxCounters)
			}
			d.limited[s.Key] = struct{}{}
			delete(d.desired, s.Key)
			continue
		}
		used += len(elements)
		for _, e := range sortedElements(elements) {
			want[e] = s.Key
		}
	}
	return want
}

// compare makes the kernel's counters contain the desired ones, and returns the obsolete ones. The caller
// holds mu.
func (d *Dataplane) compare(ctx context.Context) (obsolete []element, err error) {
	values, complete, err := d.read(ctx)
	if err != nil {
		return nil, err
	}
	if !complete || !d.intact {
		for _, t := range d.families {
			t.addStructure(d.conn, d.options.TranslatedOnly)
		}
		if err := d.conn.Flush(); err != nil {
			return nil, fmt.Errorf("create the tables of the counters: %w", err)
		}
	}
	// The kernel knows the name of the owner only.
	clear(d.elements)
	want := d.want(func(yield func(*dataplane.Service) bool) {
		for _, s := range d.desired {
			if !yield(s) {
				return
			}
		}
	})
	for e, v := range values {
		if key, ok := want[e]; ok && comment(key) == v.comment {
			d.elements[e] = key
		} else {
			d.elements[e] = dataplane.Key{}
		}
	}
	obsolete, err = d.program(ctx, want, func(dataplane.Key) bool { return true })
	d.intact = err == nil
	return obsolete, err
}

// program adds the wanted elements. It returns the other elements of the Services for which isTouched
// returns true. The caller holds mu.
func (d *Dataplane) program(ctx context.Context, want map[element]dataplane.Key, isTouched func(dataplane.Key) bool) (obsolete []element, err error) {
	var added, moved []element
	for e, key := range want {
		have, ok := d.elements[e]
		switch {
		case !ok:
			added = append(added, e)
		case have != key: // the frontend belongs to another Service now
			moved = append(moved, e)
			added = append(added, e)
		}
	}
	for e, key := range d.elements {
		if _, ok := want[e]; !ok && isTouched(key) {
			obsolete = append(obsolete, e)
		}
	}
	if err := d.write(ctx, moved, d.conn.SetDeleteElements, func(e element) nftables.SetElement { return nftables.SetElement{Key: e.key()} }); err != nil {
		return obsolete, err
	}
	err = d.write(ctx, added, d.conn.SetAddElements, func(e element) nftables.SetElement {
		return nftables.SetElement{Key: e.key(), Comment: comment(want[e])}
	})
	if err == nil {
		for _, e := range added {
			d.elements[e] = want[e]
		}
	}
	return obsolete, err
}

// remove removes elements. It keeps the counts of series that continue. Elements that a later call wants
// again stay.
func (d *Dataplane) remove(ctx context.Context, obsolete []element) {
	if len(obsolete) == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	gone := make(map[element]bool, len(obsolete))
	for _, e := range obsolete {
		gone[e] = true
	}
	remaining := map[Series]bool{}
	for e, key := range d.elements {
		if !gone[e] {
			remaining[seriesOf(e, key)] = true
		}
	}
	continues := slices.ContainsFunc(obsolete, func(e element) bool { return remaining[seriesOf(e, d.elements[e])] })
	var values map[element]counterValue
	if continues {
		var err error
		if values, _, err = d.read(ctx); err != nil {
			d.report(ctx, err)
			return
		}
	}
	err := d.write(ctx, obsolete, d.conn.SetDeleteElements, func(e element) nftables.SetElement { return nftables.SetElement{Key: e.key()} })
	d.report(ctx, err)
	if err != nil {
		return
	}
	for _, e := range obsolete {
		if s := seriesOf(e, d.elements[e]); remaining[s] {
			d.removed[s] += values[e].packets
		} else {
			delete(d.removed, s)
		}
		delete(d.elements, e)
	}
}

// write changes elements in batches.
func (d *Dataplane) write(
	ctx context.Context, elements []element, change func(*nftables.Set, []nftables.SetElement) error, encode func(element) nftables.SetElement,
) error {
	for batch := range slices.Chunk(elements, batchSize) {
		if err := ctx.Err(); err != nil {
			return err
		}
		sets := map[*nftables.Set][]nftables.SetElement{}
		for _, e := range batch {
			s := d.families[dataplane.FamilyOf(e.frontend.Addr.Addr())].setFor(e)
			sets[s] = append(sets[s], encode(e))
		}
		for s, all := range sets {
			_ = change(s, all) // the library keeps the error for Flush
		}
		if err := d.conn.Flush(); err != nil {
			return fmt.Errorf("write the counters of Services: %w", err)
		}
	}
	return nil
}

// read returns the elements in the kernel. complete is false if a table is missing.
func (d *Dataplane) read(ctx context.Context) (values map[element]counterValue, complete bool, err error) {
	values, complete = map[element]counterValue{}, true
	for _, t := range d.families {
		exists, err := t.read(ctx, d.conn, values)
		if err != nil {
			return nil, false, err
		}
		complete = complete && exists
	}
	return values, complete, nil
}

// report logs the first of consecutive failures and the next success. After a failure, the next Replace or
// Counts compares the tables with the desired state.
func (d *Dataplane) report(ctx context.Context, err error) {
	switch {
	case err != nil:
		d.intact = false
		if !d.failing {
			d.log.WarnContext(ctx, "counting connections of Services failed; Services are not affected", "error", err)
		}
	case d.failing && d.intact:
		d.log.InfoContext(ctx, "counting connections of Services works again")
	}
	d.failing = err != nil || d.failing && !d.intact
}

// Close closes the connection to the kernel, but not the inner Dataplane. The counters stay.
func (d *Dataplane) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conn.CloseLasting()
}
