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
// [transactionSize] elements, each of which completes the Services it touches; but a
// Service that has more by itself is carried out in steps, see batch.steps.
func (d *Dataplane) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) (err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.node = node
	if err := d.watch.subscribe(); err != nil { // in case that the end of an earlier silence failed to
		return fmt.Errorf("replace: %w", err)
	}
	defer func() {
		if failure := d.resumeNotifications(); failure != nil {
			err = errors.Join(err, fmt.Errorf("replace: %w", failure))
		}
	}()
	have, services, err := d.repair(ctx, node, services)
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	for i, t := range d.tables {
		for b := range have[i].verdictElements {
			d.addReferences(i, b, 0)
		}
		for s, found := range have[i].addrs {
			for addr := range found {
				d.addrs[i][s][addr] = 0
			}
		}
		maps.Copy(d.ports[i], t.renderer.requiredPorts(have[i]))
		d.rangePrefixLengths[i] = have[i].rangePrefixLengths
		for n := range have[i].sharedLists {
			d.listIDs[i].reserve(n)
		}
		for _, r := range have[i].frontends {
			if r.listID != 0 {
				d.listIDs[i].reserve(r.listID)
			}
		}
	}
	r := replaceOperation{Dataplane: d, have: have, progress: progress, failed: map[dataplane.Key]error{}}
	r.assignedLists = [2]map[listID]bool{{}, {}}
	for s := range services {
		if err := d.renderer.checkSupported(s); err != nil {
			r.failed[s.Key] = err
			continue
		}
		if err := r.addService(ctx, s); err != nil {
			return fmt.Errorf("replace: %w", d.wrapConflict(err))
		}
	}
	if err := r.finish(ctx); err != nil {
		return fmt.Errorf("replace: %w", d.wrapConflict(err))
	}
	if err := d.removeLeftovers(ctx, have); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	d.removeUnusedVerdictElements()
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
) (have [2]*tableContent, _ iter.Seq[*dataplane.Service], err error) {
	var failures, rebuilds [2]int // of a table
	var removed [2]bool
	for conflicts := 0; ; {
		d.resetState()
		if err := d.waitForOwners(ctx); err != nil {
			return have, nil, err
		}
		have, generation, err := d.readTables(ctx)
		if d.generation = generation; err != nil {
			return have, nil, d.wrapConflict(err)
		}
		if d.pause == nil && have[0].isAbsent() && have[1].isAbsent() {
			d.pauseNotifications(generation)
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
			err = fmt.Errorf("set up table %s: %w", t, d.wrapConflict(err))
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

// isAbsent reports whether there is neither a table nor one of an interrupted rebuild.
func (c *tableContent) isAbsent() bool { return c.table == nil && !c.leftover }

// replaceOperation is a Replace under way.
type replaceOperation struct {
	*Dataplane
	have     [2]*tableContent
	pending  []*dataplane.Service
	elements int // of those pending, if the kernel has none
	complete int // Services
	progress func(complete int)
	failed   map[dataplane.Key]error
	// assignedLists has, by table, the list IDs of this call's Services.
	assignedLists [2]map[listID]bool
}

// addService puts a Service into the next commit, and commits when that is full.
func (r *replaceOperation) addService(ctx context.Context, s *dataplane.Service) error {
	endpoints := r.renderer.endpointElements(s)
	elements := len(s.Frontends) * (endpoints + len(s.SourceRanges) + 1)
	if r.usesSharedList(s) {
		elements = 2*len(s.Frontends) + endpoints + len(s.SourceRanges)
	}
	if elements >= r.transactionSize { // others need not wait for a large one
		if err := r.commitPending(ctx); err != nil {
			return err
		}
	}
	r.pending = append(r.pending, s)
	if r.elements += elements; r.elements < r.transactionSize {
		return nil
	}
	return r.commitPending(ctx)
}

func (r *replaceOperation) commitPending(ctx context.Context) error {
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
func (r *replaceOperation) commitServices(services []*dataplane.Service) error {
	if len(services) == 0 {
		return nil
	}
	b := r.newBatch()
	after := make([]newAssignment, len(services))
	for n, s := range services {
		have := r.have[familyIndex(s.Key.Family)].frontends
		after[n] = r.renderer.assignSlots(assignmentFromKernel(s, have), s)
		want := r.render(s, after[n].slotAssignment, r.assignListID(s))
		for _, f := range s.Frontends {
			b.diffFrontendFromKernel(f, have[f], want)
		}
		if want.listID != 0 {
			i := familyIndex(s.Key.Family)
			b.tables[i].diffSharedListFromKernel(want.listID, r.have[i].sharedLists[want.listID], want.sharedList)
		}
	}
	var err error
	if len(services) == 1 || !r.tooLarge(b) {
		if err = r.commit(b); err == nil {
			r.recordSuccess(services, after)
			return nil
		}
	}
	if err != nil && !isRejection(err) {
		return err
	}
	if err := r.wrapConflict(err); errors.Is(err, dataplane.ErrConflict) {
		return err
	}
	if len(services) == 1 {
		r.recordFailure(services[0], err)
		return nil
	}
	half := len(services) / 2
	return errors.Join(r.commitServices(services[:half]), r.commitServices(services[half:]))
}

// assignListID returns the list ID that a Service gets: the one that its frontends have in
// the kernel, unless another Service has got that in this call.
func (r *replaceOperation) assignListID(s *dataplane.Service) listID {
	ids, have := &r.listIDs[familyIndex(s.Key.Family)], r.have[familyIndex(s.Key.Family)]
	if _, ok := ids.byKey[s.Key]; ok || !r.usesSharedList(s) {
		return r.allocateListID(s)
	}
	for _, f := range s.Frontends {
		row := have.frontends[f]
		if row == nil || row.listID == 0 || !row.inServices || row.service != serviceComment(s.Key) {
			continue
		}
		if !r.assignedLists[familyIndex(s.Key.Family)][row.listID] {
			ids.assign(s.Key, row.listID)
			break
		}
	}
	n := r.allocateListID(s)
	r.assignedLists[familyIndex(s.Key.Family)][n] = true
	return n
}

// assignmentFromKernel returns the arrangement that rows show of a Service: that of its first
// frontend which was its own, or else of the first one that was there. The others
// have the same, unless somebody was interrupted.
func assignmentFromKernel(s *dataplane.Service, have map[dataplane.Frontend]*frontendElements) slotAssignment {
	var first *frontendElements
	for _, f := range s.Frontends {
		r := have[f]
		if r != nil && r.inServices && r.service == serviceComment(s.Key) {
			return r.slotAssignment()
		}
		if first == nil {
			first = r
		}
	}
	if first == nil {
		return slotAssignment{}
	}
	return first.slotAssignment()
}

// recordSuccess notes that Services are as wanted.
func (r *replaceOperation) recordSuccess(services []*dataplane.Service, after []newAssignment) {
	for n, s := range services {
		r.storeAssignment(s.Key, after[n])
		i := familyIndex(s.Key.Family)
		for _, f := range s.Frontends {
			delete(r.have[i].frontends, f)
		}
		if list, ok := r.listIDs[i].byKey[s.Key]; ok {
			delete(r.have[i].sharedLists, list)
		}
	}
	r.complete += len(services)
	if r.progress != nil {
		r.progress(r.complete)
	}
}

// recordFailure notes that a Service failed, and leaves what the kernel holds for it to
// the next Replace.
func (r *replaceOperation) recordFailure(s *dataplane.Service, err error) {
	r.failed[s.Key] = err
	i := familyIndex(s.Key.Family)
	use := func(branches []verdictElement) {
		for _, b := range branches {
			if _, exists := r.verdictElements[i][b]; exists {
				r.addReferences(i, b, 1)
			}
		}
	}
	for _, f := range s.Frontends {
		if row := r.have[i].frontends[f]; row != nil {
			use(row.verdictElements())
			if list := r.have[i].sharedLists[row.listID]; list != nil {
				use(list.verdictElements())
				delete(r.have[i].sharedLists, row.listID)
				r.assignedLists[i][row.listID] = true
			}
			for set, in := range addrSetMembershipOf(s.Key.Kind, row.class, row.externalClass, r.node) {
				if n, there := r.addrs[i][set][f.Addr.Addr()]; in && there {
					r.addrs[i][set][f.Addr.Addr()] = n + 1
				}
			}
		}
		delete(r.have[i].frontends, f)
	}
}

// finish commits what is pending, then removes everything that nobody wants.
func (r *replaceOperation) finish(ctx context.Context) error {
	if err := r.commitPending(ctx); err != nil {
		return err
	}
	b := r.newBatch()
	for i := range r.tables {
		for f, row := range r.have[i].frontends {
			if b.diffFrontendFromKernel(f, row, nil); b.elements() < r.transactionSize {
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
		for n, list := range r.have[i].sharedLists {
			if b.tables[i].diffSharedListFromKernel(n, list, nil); b.elements() < r.transactionSize {
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
	return r.removeUnusedShared()
}

// removeUnusedShared takes addresses and ports out of the sets that no frontend needs
// them in. Ports stay if a Service has failed, as nobody knows whether they are
// those of its endpoints.
func (r *replaceOperation) removeUnusedShared() error {
	for i, t := range r.tables {
		for s, set := range t.addrSets {
			if err := r.removeElements(set, takeUnused(r.addrs[i][s], netip.Addr.AsSlice)); err != nil {
				return err
			}
		}
		if len(r.failed) > 0 {
			continue
		}
		if err := r.removeElements(t.endpointPorts, takeUnused(r.ports[i], encodePort)); err != nil {
			return err
		}
	}
	return nil
}

// takeUnused returns the elements that are counted as nobody's, and forgets them.
func takeUnused[K comparable](counts map[K]int, encode func(K) []byte) []element {
	var gone []element
	for k, n := range counts {
		if n == 0 {
			gone = append(gone, element{Key: encode(k)})
			delete(counts, k)
		}
	}
	return gone
}
