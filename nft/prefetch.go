package nft

import (
	"context"
	"errors"
	"fmt"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// prefetched contains the contents of the tables at the last successful Prefetch.
type prefetched struct {
	have       [2]*tableContent
	generation uint32
	// changes is the watch's change count before the tables were read.
	changes uint64
	// differs is set if a Replace would have to write to these tables.
	differs bool
}

// prepared describes a Replace that has nothing to write, because the tables were as desired
// at the last successful Prefetch. The caches of the Dataplane are those after that Replace.
type prepared struct {
	node     dataplane.Node
	services map[dataplane.Key]*dataplane.Service
	// generation and changes are those of the read, as in prefetched.
	generation uint32
	changes    uint64
}

// prefetchState contains the results of Prefetch. At most one pointer is set.
type prefetchState struct {
	prefetched *prefetched
	prepared   *prepared
	// changes is the watch's change count at the last Prefetch that had something to read.
	changes uint64
}

// invalidate discards the results.
func (s *prefetchState) invalidate() { s.prefetched, s.prepared = nil, nil }

var _ dataplane.Prefetcher = (*Dataplane)(nil)

// Prefetch implements [dataplane.Prefetcher]. It reads the tables if no notification of a
// change arrived between two calls. If the tables are as desired, it keeps the result of
// the Replace instead of the contents.
func (d *Dataplane) Prefetch(ctx context.Context, desired dataplane.Desired) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := &d.prefetch
	changes := d.watch.changeCount()
	if p := s.prepared; p != nil && p.changes == changes && (desired.Services == nil || desired.Node.Equal(p.node)) {
		return nil
	}
	s.prepared = nil
	if p := s.prefetched; p == nil || p.changes != changes {
		s.prefetched = nil
		if s.changes != changes {
			s.changes = changes
			return nil
		}
		if err := d.readAhead(ctx); err != nil {
			return err
		}
	}
	p := s.prefetched
	if p == nil || p.differs || desired.Services == nil {
		return nil
	}
	if d.prepareReplace(ctx, p, desired); s.prepared != nil || ctx.Err() != nil {
		return nil
	}
	if err := d.readAhead(ctx); err != nil { // the contents are used up
		return err
	}
	if again := s.prefetched; again != nil {
		again.differs = again.changes == p.changes
	}
	return nil
}

// readAhead reads the tables. There is no result if they change meanwhile.
func (d *Dataplane) readAhead(ctx context.Context) error {
	p := &prefetched{}
	generation, verified, err := d.readConsistentlyAttempts(ctx, 1, func() (err error) {
		// A notification that arrives after this point invalidates the read.
		p.changes = d.watch.changeCount()
		p.have, err = d.readTablesOnce(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("prefetch: %w", err)
	}
	if p.generation = generation; verified {
		d.prefetch.prefetched = p
	}
	return nil
}

// errWouldWrite is the error of the kernel connection during prepareReplace.
var errWouldWrite = errors.New("the tables differ")

// prepareReplace computes a Replace from the contents and keeps the result, if it has
// nothing to write. It uses up the contents.
func (d *Dataplane) prepareReplace(ctx context.Context, p *prefetched, desired dataplane.Desired) {
	d.prefetch.prefetched = nil
	r := &prepared{node: desired.Node, services: map[dataplane.Key]*dataplane.Service{}, generation: p.generation, changes: p.changes}
	if d.ownTables { // this process will be the owner
		return
	}
	for _, have := range p.have {
		if have.table == nil || have.leftover || have.table.Flags != 0 ||
			len(have.unexpected)+len(have.extended) > 0 || d.rebuildReason(have) != "" {
			return
		}
	}
	// A connection that fails when it has something to send. The library sends nothing for an
	// empty transaction.
	dry, err := nftables.New(
		nftables.WithTestDial(func([]netlink.Message) ([]netlink.Message, error) { return nil, errWouldWrite }),
		nftables.WithSockOptions(func(*netlink.Conn) error { return errWouldWrite }))
	if err != nil {
		return
	}
	conn, flush, generation := d.conn, d.flush, d.generation
	d.conn, d.flush = dry, dry.Flush
	defer func() { d.conn, d.flush, d.generation = conn, flush, generation }()
	d.resetState()
	for i, t := range d.tables {
		if err := d.repairStructure(t, desired.Node, p.have[i]); err != nil {
			return
		}
	}
	d.node = desired.Node
	err = d.replaceServices(ctx, p.have, func(yield func(*dataplane.Service) bool) {
		for s := range desired.Services {
			if r.services[s.Key] = s; !yield(s) {
				return
			}
		}
	}, nil)
	if err == nil {
		d.prefetch.prepared = r
	}
}

// replacePrepared performs a Replace whose result Prefetch has prepared, and programs the
// Services that have changed since. It returns false if there is no result or if it is out
// of date.
func (d *Dataplane) replacePrepared(ctx context.Context, node dataplane.Node, services []*dataplane.Service) (bool, error) {
	p := d.prefetch.prepared
	d.prefetch.prepared = nil
	if p == nil || !p.node.Equal(node) {
		return false, nil
	}
	var current bool
	if d.generation, current = d.isCurrent(p.generation, p.changes); !current || !d.haveTables(ctx) {
		d.log.DebugContext(ctx, "tables have changed since the Replace was prepared")
		return false, nil
	}
	var changes []dataplane.Change
	for _, s := range services {
		if old := p.services[s.Key]; !s.Equal(old) {
			changes = append(changes, dataplane.Change{Old: old, New: s})
		}
		delete(p.services, s.Key)
	}
	for _, old := range p.services {
		changes = append(changes, dataplane.Change{Old: old})
	}
	if len(changes) == 0 {
		return true, nil
	}
	return true, d.wrapConflict(d.apply("replace", changes))
}

// isCurrent returns the kernel's generation. It reports whether the tables are as they were in
// an earlier generation, when the watch's change count had this value.
func (d *Dataplane) isCurrent(read uint32, changes uint64) (generation uint32, current bool) {
	generation, err := d.currentGeneration()
	return generation, err == nil && (generation == read || d.tablesUnchanged(changes, generation))
}

// haveTables reports whether both tables exist without flags, and no table of an interrupted
// rebuild does.
func (d *Dataplane) haveTables(ctx context.Context) bool {
	for _, t := range d.tables {
		tables, err := d.dump.listTables(ctx, t.nf.Family)
		if err != nil {
			return false
		}
		_, leftover := tables[t.nf.Name+nextSuffix]
		if info, ok := tables[t.nf.Name]; leftover || !ok || info.flags != 0 {
			return false
		}
	}
	return true
}

// usePrefetched returns the result of Prefetch and the kernel's generation, if the result
// is still up to date.
func (d *Dataplane) usePrefetched(ctx context.Context) (have [2]*tableContent, generation uint32, ok bool) {
	p := d.prefetch.prefetched
	d.prefetch.invalidate()
	if p == nil {
		return have, 0, false
	}
	generation, current := d.isCurrent(p.generation, p.changes)
	if !current || !d.refreshTables(ctx, p.have) {
		d.log.DebugContext(ctx, "tables have changed since they were prefetched")
		return have, 0, false
	}
	return p.have, generation, true
}

// refreshTables updates the table properties that can change without a notification. When
// an owner exits, the flag owner disappears without a new generation. Notifications of an
// interrupted rebuild's table have a different table name. refreshTables reports whether
// everything except the flags is unchanged.
func (d *Dataplane) refreshTables(ctx context.Context, have [2]*tableContent) bool {
	for i, t := range d.tables {
		tables, err := d.dump.listTables(ctx, t.nf.Family)
		if err != nil {
			return false
		}
		_, leftover := tables[t.nf.Name+nextSuffix]
		info, ok := tables[t.nf.Name]
		if leftover != have[i].leftover || ok != (have[i].table != nil) {
			return false
		}
		if ok {
			have[i].table.Flags = info.flags
		}
	}
	return true
}
