package nft

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// Replace implements [dataplane.Dataplane]. It is split into commits of some
// [editSize] elements, each of which completes the Services it touches; but a
// Service that has more by itself is carried out in steps, see batch.steps.
func (d *Dataplane) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) (err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.node = node
	if err := d.watch.join(); err != nil { // in case that the end of an earlier silence failed to
		return fmt.Errorf("replace: %w", err)
	}
	defer func() {
		if failure := d.listen(); failure != nil {
			err = errors.Join(err, fmt.Errorf("replace: %w", failure))
		}
	}()
	have, services, err := d.repair(ctx, node, services)
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	for i, t := range d.tables {
		for b := range have[i].branches {
			d.use(i, b, 0)
		}
		for s, found := range have[i].addrs {
			for addr := range found {
				d.addrs[i][s][addr] = 0
			}
		}
		maps.Copy(d.ports[i], t.renderer.foundPorts(have[i]))
		d.rangeBits[i] = have[i].rangeBits
		for n := range have[i].lists {
			d.lists[i].reserve(n)
		}
		for _, r := range have[i].rows {
			if r.list != 0 {
				d.lists[i].reserve(r.list)
			}
		}
	}
	r := replacement{Dataplane: d, have: have, progress: progress, failed: map[dataplane.Key]error{}}
	r.taken = [2]map[listID]bool{{}, {}}
	for s := range services {
		if err := d.renderer.supported(s); err != nil {
			r.failed[s.Key] = err
			continue
		}
		if err := r.add(ctx, s); err != nil {
			return fmt.Errorf("replace: %w", d.conflict(err))
		}
	}
	if err := r.finish(ctx); err != nil {
		return fmt.Errorf("replace: %w", d.conflict(err))
	}
	if err := d.removeLeftovers(ctx, have); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	d.removeUnusedBranches()
	if len(r.failed) > 0 {
		return &dataplane.Error{Op: "replace", Failed: r.failed}
	}
	return nil
}

// repairAttempts is how often Replace repairs a table in place if that fails although
// no other process commits, and then how often it rebuilds the table, before it removes
// it. conflictAttempts limits both while another process commits.
const (
	repairAttempts   = 3
	conflictAttempts = 5
)

// repair reads the tables and repairs their structure, from a fresh read each time that
// fails. It returns what the tables hold then, and the Services, which can be read
// once only.
func (d *Dataplane) repair(
	ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service],
) (have [2]*content, _ iter.Seq[*dataplane.Service], err error) {
	var failures, rebuilds [2]int // of a table
	var removed [2]bool
	for conflicts := 0; ; {
		d.forget()
		if err := d.awaitOwners(ctx); err != nil {
			return have, nil, err
		}
		have, generation, err := d.readTables(ctx)
		if d.generation = generation; err != nil {
			return have, nil, d.conflict(err)
		}
		if d.silence == nil && have[0].isNew() && have[1].isNew() {
			d.silent(generation)
		}
		again := false
		for i, t := range d.tables {
			reason := d.rebuildReason(have[i])
			if failures[i] >= repairAttempts {
				reason = "repairs failed"
			}
			switch {
			case reason == "" || removed[i]:
				err = d.repairStructure(t, node, have[i])
			case rebuilds[i] < repairAttempts:
				rebuilds[i]++
				d.log.WarnContext(ctx, "table is rebuilt", "table", t.String(), "reason", reason)
				d.reportRebuild(t, reason)
				list := slices.Collect(services)
				services = slices.Values(list)
				if err, again = d.rebuild(ctx, i, node, list), true; err == nil {
					failures[i] = 0
				}
			default:
				removed[i] = true
				d.log.WarnContext(ctx, "table is removed and made anew", "table", t.String(), "reason", reason)
				d.reportRebuild(t, reason)
				err, again = removeTable(d.conn, d.submit, t), true
			}
			if err == nil && !again {
				d.skipEmptyCommit()
				continue
			}
			if err == nil {
				break
			}
			err = fmt.Errorf("set up table %s: %w", t, d.conflict(err))
			switch {
			case ctx.Err() != nil:
				return have, nil, ctx.Err()
			case errors.Is(err, dataplane.ErrConflict):
				if conflicts++; conflicts >= conflictAttempts {
					return have, nil, err
				}
				rebuilds[i] = 0 // the kernel has refused none
			default:
				if failures[i]++; removed[i] || have[i].table == nil {
					return have, nil, err
				}
			}
			d.log.DebugContext(ctx, "table is read again, because its repair failed", "error", err)
			again = true
			break
		}
		if again {
			continue
		}
		current, err := d.currentGeneration()
		if err != nil {
			return have, nil, err
		}
		// A later generation has somebody else's commit, which an error of ours may be
		// due to. An earlier one is that some repairs had nothing to write.
		if int32(current-d.generation) < 0 { //nolint:gosec // the number starts over
			d.generation = current
		}
		return have, services, nil
	}
}

// skipEmptyCommit corrects the generation after a repair that had nothing to write.
func (d *Dataplane) skipEmptyCommit() {
	if now, err := d.currentGeneration(); err == nil && now == d.generation-1 {
		d.generation = now
	}
}

// isNew reports whether there is neither a table nor one of an interrupted rebuild.
func (c *content) isNew() bool { return c.table == nil && !c.leftover }

// replacement is a Replace under way.
type replacement struct {
	*Dataplane
	have     [2]*content
	pending  []*dataplane.Service
	elements int // of those pending, if the kernel has none
	complete int // Services
	progress func(complete int)
	failed   map[dataplane.Key]error
	// taken has, by table, the list IDs of this call's Services.
	taken [2]map[listID]bool
}

// add puts a Service into the next commit, and commits when that is full.
func (r *replacement) add(ctx context.Context, s *dataplane.Service) error {
	endpoints := r.renderer.endpointElements(s)
	elements := len(s.Frontends) * (endpoints + len(s.SourceRanges) + 1)
	if r.shares(s) {
		elements = 2*len(s.Frontends) + endpoints + len(s.SourceRanges)
	}
	if elements >= r.editSize { // others need not wait for a large one
		if err := r.commitPending(ctx); err != nil {
			return err
		}
	}
	r.pending = append(r.pending, s)
	if r.elements += elements; r.elements < r.editSize {
		return nil
	}
	return r.commitPending(ctx)
}

func (r *replacement) commitPending(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	services := r.pending
	r.pending, r.elements = nil, 0
	return r.commitServices(services)
}

// commitServices commits Services together. If that is too large for one commit,
// or the kernel rejects it, it tries each half, down to the Service that is large,
// or to blame.
func (r *replacement) commitServices(services []*dataplane.Service) error {
	if len(services) == 0 {
		return nil
	}
	b := r.newBatch()
	after := make([]arranged, len(services))
	for n, s := range services {
		have := r.have[index(s.Key.Family)].rows
		after[n] = r.renderer.arrange(arrangementFound(s, have), s)
		want := r.render(s, after[n].arrangement, r.listFor(s))
		for _, f := range s.Frontends {
			b.found(f, have[f], want)
		}
		if want.list != 0 {
			i := index(s.Key.Family)
			b.tables[i].foundList(want.list, r.have[i].lists[want.list], want.shared)
		}
	}
	var err error
	if len(services) == 1 || !r.tooLarge(b) {
		if err = r.commit(b); err == nil {
			r.completed(services, after)
			return nil
		}
	}
	if err != nil && !isRejection(err) {
		return err
	}
	if err := r.conflict(err); errors.Is(err, dataplane.ErrConflict) {
		return err
	}
	if len(services) == 1 {
		r.leave(services[0], err)
		return nil
	}
	half := len(services) / 2
	return errors.Join(r.commitServices(services[:half]), r.commitServices(services[half:]))
}

// listFor returns the list ID that a Service gets: the one that its frontends have in
// the kernel, unless another Service has got that in this call.
func (r *replacement) listFor(s *dataplane.Service) listID {
	ids, have := &r.lists[index(s.Key.Family)], r.have[index(s.Key.Family)]
	if _, ok := ids.byKey[s.Key]; ok || !r.shares(s) {
		return r.listOf(s)
	}
	for _, f := range s.Frontends {
		row := have.rows[f]
		if row == nil || row.list == 0 || !row.inServices || row.service != comment(s.Key) {
			continue
		}
		if !r.taken[index(s.Key.Family)][row.list] {
			ids.claim(s.Key, row.list)
			break
		}
	}
	n := r.listOf(s)
	r.taken[index(s.Key.Family)][n] = true
	return n
}

// arrangementFound returns the arrangement that rows show of a Service: that of its first
// frontend which was its own, or else of the first one that was there. The others
// have the same, unless somebody was interrupted.
func arrangementFound(s *dataplane.Service, have map[dataplane.Frontend]*row) arrangement {
	var first *row
	for _, f := range s.Frontends {
		r := have[f]
		if r != nil && r.inServices && r.service == comment(s.Key) {
			return r.arrangement()
		}
		if first == nil {
			first = r
		}
	}
	if first == nil {
		return arrangement{}
	}
	return first.arrangement()
}

// completed notes that Services are as wanted.
func (r *replacement) completed(services []*dataplane.Service, after []arranged) {
	for n, s := range services {
		r.keep(s.Key, after[n])
		i := index(s.Key.Family)
		for _, f := range s.Frontends {
			delete(r.have[i].rows, f)
		}
		if list, ok := r.lists[i].byKey[s.Key]; ok {
			delete(r.have[i].lists, list)
		}
	}
	r.complete += len(services)
	if r.progress != nil {
		r.progress(r.complete)
	}
}

// leave notes that a Service failed, and leaves what the kernel holds for it to
// the next Replace.
func (r *replacement) leave(s *dataplane.Service, err error) {
	r.failed[s.Key] = err
	i := index(s.Key.Family)
	use := func(branches []branch) {
		for _, b := range branches {
			if _, exists := r.branches[i][b]; exists {
				r.use(i, b, 1)
			}
		}
	}
	for _, f := range s.Frontends {
		if row := r.have[i].rows[f]; row != nil {
			use(row.branches())
			if list := r.have[i].lists[row.list]; list != nil {
				use(list.branches())
				delete(r.have[i].lists, row.list)
				r.taken[i][row.list] = true
			}
			for set, in := range addrSetsOf(s.Key.Kind, row.class, row.external, r.node) {
				if n, there := r.addrs[i][set][f.Addr.Addr()]; in && there {
					r.addrs[i][set][f.Addr.Addr()] = n + 1
				}
			}
		}
		delete(r.have[i].rows, f)
	}
}

// finish commits what is pending, then removes everything that nobody wants.
func (r *replacement) finish(ctx context.Context) error {
	if err := r.commitPending(ctx); err != nil {
		return err
	}
	b := r.newBatch()
	for i := range r.tables {
		for f, row := range r.have[i].rows {
			if b.found(f, row, nil); b.elements() < r.editSize {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := r.commit(b); err != nil {
				return err
			}
			b = r.newBatch()
		}
	}
	for i := range r.tables {
		for n, list := range r.have[i].lists {
			if b.tables[i].foundList(n, list, nil); b.elements() < r.editSize {
				continue
			}
			if err := r.commit(b); err != nil {
				return err
			}
			b = r.newBatch()
		}
	}
	if err := r.commit(b); err != nil {
		return err
	}
	return r.removeShared()
}

// removeShared takes addresses and ports out of the sets that no frontend needs
// them in. Ports stay if a Service has failed, as nobody knows whether they are
// those of its endpoints.
func (r *replacement) removeShared() error {
	for i, t := range r.tables {
		for s, set := range t.addrSets {
			if err := r.removeElements(set, unneeded(r.addrs[i][s], netip.Addr.AsSlice)); err != nil {
				return err
			}
		}
		if len(r.failed) > 0 {
			continue
		}
		if err := r.removeElements(t.endpointPorts, unneeded(r.ports[i], portElement)); err != nil {
			return err
		}
	}
	return nil
}

// unneeded returns the elements that are counted as nobody's, and forgets them.
func unneeded[K comparable](counts map[K]int, encode func(K) []byte) []element {
	var gone []element
	for k, n := range counts {
		if n == 0 {
			gone = append(gone, element{Key: encode(k)})
			delete(counts, k)
		}
	}
	return gone
}
