package nft

import (
	"context"
	"fmt"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// nextSuffix is the suffix of the table that is active while the original table is rebuilt.
const nextSuffix = "-next"

// maxPacketTransit exceeds the time that any packet needs to pass a table.
const maxPacketTransit = 100 * time.Millisecond

// rebuildReason returns why a table cannot be repaired in place, or an empty string if it
// can.
func (d *Dataplane) rebuildReason(have *tableContent) string {
	if have.table == nil {
		return ""
	}
	if have.schema != d.schema {
		return fmt.Sprintf("schema is %d, want %d", have.schema, d.schema)
	}
	if d.ownTables && have.table.Flags&nftables.TableFlagPersist == 0 {
		return noOwnerReason
	}
	return have.unreadReason
}

func (d *Dataplane) reportRebuild(t *table, reason string) {
	if d.onRebuild != nil {
		d.onRebuild(Rebuild{Family: t.family, Table: t.String(), Reason: reason})
	}
}

// rebuild re-creates a table while all packets pass a complete table. It first creates the
// table under another name without base chains. Then, in one transaction, it adds the base
// chains and deletes the base chains of the old table. It repeats both steps with the
// original name.
//
// The kernel registers hooks when a chain is added, and unregisters the hooks of deleted
// chains after the commit (nf_tables_api.c). So a NAT hook always exists, and connection
// tracking continues for established connections. The stored clients of session affinity
// are lost.
func (d *Dataplane) rebuild(ctx context.Context, i int, node dataplane.Node, services []*dataplane.Service) error {
	name := d.tables[i].nf.Name
	names := []string{name + nextSuffix, name}
	next := d.newTables(name + nextSuffix)[i]
	hooks, err := d.baseChains(next)
	if err != nil {
		return err
	}
	if len(hooks) > 0 { // it is complete, possibly the only complete table, after an interrupted rebuild
		d.tables[i], names = next, names[1:]
	}
	for _, to := range names {
		if err := d.moveTable(ctx, i, to, node, services); err != nil {
			d.tables[i] = d.newTables(name)[i]
			return fmt.Errorf("rebuild table %s: %w", d.tables[i], err)
		}
	}
	return nil
}

// moveTable creates the i-th table under another name and removes the table that it
// replaces. If it succeeds, d.tables contains the new table.
func (d *Dataplane) moveTable(ctx context.Context, i int, name string, node dataplane.Node, services []*dataplane.Service) error {
	from, to := d.tables[i], d.newTables(name)[i]
	if err := d.removeTableIfExists(to); err != nil {
		return err
	}
	d.resetTableState(i)
	d.tables[i] = to
	to.detached = true
	have := &tableContent{}
	if err := d.repairTable(to, node, have); err != nil {
		return err
	}
	r := replaceOperation{
		Dataplane: d, have: [2]*tableContent{{}, {}}, failed: map[dataplane.Key]error{},
		assignedLists: [2]map[listID]bool{{}, {}}, users: newTurnUsers(),
	}
	for _, s := range services {
		if familyIndex(s.Key.Family) != i || d.renderer.checkSupported(s) != nil {
			continue
		}
		if err := r.addService(ctx, s); err != nil {
			return err
		}
	}
	if err := r.commitPending(ctx); err != nil {
		return err
	}
	to.detached = false
	if err := d.switchBaseChains(to, from, node, i); err != nil {
		return err
	}
	return d.removeDetached(ctx, from)
}

// removeDetached removes a table without base chains, after the last packet has passed it.
func (d *Dataplane) removeDetached(ctx context.Context, t *table) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(maxPacketTransit):
	}
	return removeTable(d.conn, d.submit, t)
}

// switchBaseChains adds the base chains of one table and deletes the base chains of the
// other table in one transaction.
func (d *Dataplane) switchBaseChains(to, from *table, node dataplane.Node, i int) error {
	for _, ch := range to.chains(node, d.rangePrefixLengths[i]) {
		if ch.Hooknum != nil {
			d.conn.AddChain(ch.Chain)
			d.addRules(to, ch)
		}
	}
	if err := d.deleteBaseChains(from); err != nil {
		return err
	}
	if err := d.submit(); err != nil {
		return fmt.Errorf("switch from table %s to %s: %w", from, to, err)
	}
	return nil
}

// deleteBaseChains adds the deletion of a table's base chains to the transaction.
func (d *Dataplane) deleteBaseChains(t *table) error {
	chains, err := d.baseChains(t)
	for _, ch := range chains {
		d.conn.FlushChain(ch)
		d.conn.DelChain(ch)
	}
	return err
}

// baseChains returns the base chains of a table in the kernel.
func (d *Dataplane) baseChains(t *table) ([]*nftables.Chain, error) {
	chains, err := d.conn.ListChainsOfTableFamily(t.nf.Family)
	if err != nil {
		return nil, fmt.Errorf("list the %s chains: %w", t.family, err)
	}
	return slices.DeleteFunc(chains, func(ch *nftables.Chain) bool {
		return ch.Table.Name != t.nf.Name || ch.Hooknum == nil
	}), nil
}

// removeTableIfExists removes a table if it exists.
func (d *Dataplane) removeTableIfExists(t *table) error {
	found, err := findTable(d.conn, t)
	if err != nil || found == nil {
		return err
	}
	return removeTable(d.conn, d.submit, t)
}

// removeLeftovers removes the tables of an interrupted rebuild. The original tables must be
// complete, because until then packets may depend on the leftovers.
func (d *Dataplane) removeLeftovers(ctx context.Context, have [2]*tableContent) error {
	for i, t := range d.tables {
		if !have[i].leftover {
			continue
		}
		next := d.newTables(t.nf.Name + nextSuffix)[i]
		chains, err := d.baseChains(next)
		if err == nil && len(chains) > 0 {
			if err = d.deleteBaseChains(next); err == nil {
				err = d.submit()
			}
		}
		if err == nil {
			err = d.removeDetached(ctx, next)
		}
		if err != nil {
			return fmt.Errorf("remove table %s of an interrupted rebuild: %w", next, err)
		}
	}
	return nil
}
