package nft

import (
	"context"
	"fmt"

	"fairlead.io/fairlead/dataplane"
)

// prefetched is what the tables held when they were last read by Prefetch.
type prefetched struct {
	have       [2]*tableContent
	generation uint32
	// changes is how many announcements concerned the tables before they were read.
	changes uint64
}

var _ dataplane.Prefetcher = (*Dataplane)(nil)

// Prefetch implements [dataplane.Prefetcher]. It reads the tables when no change of them
// was announced between two calls.
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
		// A change that is announced later makes what is read here outdated.
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

// usePrefetched returns what Prefetch has read, if that is what the tables hold, and
// the kernel's generation.
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
		d.log.DebugContext(ctx, "the tables have changed since they were read in advance")
		return have, 0, false
	}
	return p.have, generation, true
}

// refreshTables reads the properties of the tables that change without an announcement to
// us: the flag owner goes with its process, without a generation, and tables of an
// interrupted rebuild have another name. It reports whether all but the flags is as it
// was read.
func (d *Dataplane) refreshTables(ctx context.Context, have [2]*tableContent) bool {
	for i, t := range d.tables {
		tables, err := d.dump.listTables(ctx, t.nf.Family)
		if err != nil {
			return false
		}
		_, leftover := tables[t.nf.Name+nextSuffix]
		info, there := tables[t.nf.Name]
		if leftover != have[i].leftover || there != (have[i].table != nil) {
			return false
		}
		if there {
			have[i].table.Flags = info.flags
		}
	}
	return true
}
