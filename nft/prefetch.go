package nft

import (
	"context"
	"fmt"

	"fairlead.io/fairlead/dataplane"
)

// prefetched contains the contents of the tables at the last successful Prefetch.
type prefetched struct {
	have       [2]*tableContent
	generation uint32
	// changes is the watch's change count before the tables were read.
	changes uint64
}

var _ dataplane.Prefetcher = (*Dataplane)(nil)

// Prefetch implements [dataplane.Prefetcher]. It reads the tables if no notification of a
// change arrived between two calls.
func (d *Dataplane) Prefetch(ctx context.Context) error {
	changes := d.watch.changeCount()
	if p := d.prefetched; p != nil && p.changes == changes {
		return nil
	}
	d.prefetched = nil
	if d.lastPrefetchChanges != changes {
		d.lastPrefetchChanges = changes
		return nil
	}
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
		d.prefetched = p
	}
	return nil
}

// usePrefetched returns the result of Prefetch and the kernel's generation, if the result
// is still up to date.
func (d *Dataplane) usePrefetched(ctx context.Context) (have [2]*tableContent, generation uint32, ok bool) {
	p := d.prefetched
	d.prefetched = nil
	if p == nil {
		return have, 0, false
	}
	generation, err := d.currentGeneration()
	if err != nil {
		return have, 0, false
	}
	if generation != p.generation && !d.tablesUnchanged(p.changes, generation) || !d.refreshTables(ctx, p.have) {
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
