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

// Replace implements [dataplane.Dataplane]. It splits the work into commits of about
// [transactionSize] elements, each of which completes its Services. A single Service with
// more elements is committed in steps; see batch.steps.
func (d *Dataplane) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) (err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.node = node
	if err := d.watch.subscribe(); err != nil { // subscribing may have failed at the end of an earlier pause
		return fmt.Errorf("replace: %w", err)
	}
	defer func() {
		if failure := d.resumeNotifications(); failure != nil {
			err = errors.Join(err, fmt.Errorf("replace: %w", failure))
		}
	}()
	if d.prefetch.prepared != nil {
		list := slices.Collect(services)
		if done, err := d.replacePrepared(ctx, node, list); done {
			if err == nil && progress != nil {
				progress(len(list))
			}
			return err
		}
		services = slices.Values(list)
	}
	have, services, err := d.repair(ctx, node, services)
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	return d.replaceServices(ctx, have, services, progress)
}

// replaceServices makes tables whose structure is correct contain exactly these Services.
func (d *Dataplane) replaceServices(ctx context.Context, have [2]*tableContent, services iter.Seq[*dataplane.Service], progress func(int)) error {
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
	r := replaceOperation{Dataplane: d, have: have, progress: progress, failed: map[dataplane.Key]error{}, users: newTurnUsers()}
	r.assignedLists = [2]map[listID]bool{{}, {}}
	for i := range have {
		for _, e := range have[i].frontends {
			r.users.add(i, e)
		}
	}
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

// Replace repairs a table in place up to repairAttempts times, then rebuilds it up to
// repairAttempts times, then removes it. Attempts that fail because another process commits
// do not count; conflictAttempts limits these.
const (
	repairAttempts   = 3
	conflictAttempts = 5
)

// repair reads the tables and repairs their structure, reading again after each failure. It
// returns the resulting contents and the Services, because a caller can iterate over its
// Services only once.
func (d *Dataplane) repair(
	ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service],
) (have [2]*tableContent, _ iter.Seq[*dataplane.Service], err error) {
	var failures, rebuilds [2]int // by table
	var removed [2]bool
	for conflicts := 0; ; {
		d.resetState()
		if d.dryRun == nil {
			if err := d.waitForOwners(ctx); err != nil {
				return have, nil, err
			}
		}
		have, generation, err := d.readTables(ctx)
		if d.generation = generation; err != nil {
			return have, nil, d.wrapConflict(err)
		}
		if d.dryRun == nil && d.pause == nil && have[0].isAbsent() && have[1].isAbsent() {
			d.pauseNotifications(generation)
		}
		again := false
		for i, t := range d.tables {
			if d.dryRun != nil {
				d.prepareDryRun(t, have[i])
			}
			reason := d.rebuildReason(have[i])
			if failures[i] >= repairAttempts {
				reason = "repairs failed"
			}
			switch {
			case reason == "" || removed[i]:
				err = d.repairStructure(t, node, have[i])
			case rebuilds[i] < repairAttempts:
				rebuilds[i]++
				d.log.WarnContext(ctx, "rebuilding table", "table", t.String(), "reason", reason)
				d.reportRebuild(t, reason)
				list := slices.Collect(services)
				services = slices.Values(list)
				if err, again = d.rebuild(ctx, i, node, list), true; err == nil {
					failures[i] = 0
				}
			default:
				removed[i] = true
				d.log.WarnContext(ctx, "removing and re-creating table", "table", t.String(), "reason", reason)
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
				rebuilds[i] = 0 // conflicts do not count
			default:
				if failures[i]++; removed[i] || have[i].table == nil {
					return have, nil, err
				}
			}
			d.log.DebugContext(ctx, "repair of table failed, reading it again", "error", err)
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
		// A later generation contains a commit of another process, which can be the cause of
		// an error. An earlier generation means that some repairs had nothing to write.
		if int32(current-d.generation) < 0 { //nolint:gosec // the number wraps around
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

// isAbsent reports whether neither the table nor a table of an interrupted rebuild exists.
func (c *tableContent) isAbsent() bool { return c.table == nil && !c.leftover }

// replaceOperation is the state of a Replace call.
type replaceOperation struct {
	*Dataplane
	have     [2]*tableContent
	pending  []*dataplane.Service
	elements int // estimate for pending, if the kernel has none of them
	complete int // number of Services
	progress func(complete int)
	failed   map[dataplane.Key]error
	// assignedLists contains, by table, the list IDs of this call's Services.
	assignedLists [2]map[listID]bool
	// users counts the users of counters in the kernel, and those of this call's Services.
	users turnUsers
}

// addService adds a Service to the next commit, and commits when the transaction is full.
func (r *replaceOperation) addService(ctx context.Context, s *dataplane.Service) error {
	endpoints := r.renderer.endpointElements(s)
	elements := len(s.Frontends) * (endpoints + len(s.SourceRanges) + 1)
	if r.usesSharedList(s) {
		elements = 2*len(s.Frontends) + endpoints + len(s.SourceRanges)
	}
	if elements >= r.transactionSize { // commit others before a large Service
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

// commitServices commits Services together. If they are too large for one commit, or the
// kernel rejects the commit, commitServices retries each half. A single Service that is too
// large is committed in steps. A single Service that the kernel rejects is recorded in
// failed.
func (r *replaceOperation) commitServices(services []*dataplane.Service) error {
	if len(services) == 0 {
		return nil
	}
	b := r.takeBatch()
	defer r.recycleBatch(b)
	after := make([]newAssignment, len(services))
	for n, s := range services {
		have := r.have[familyIndex(s.Key.Family)].frontends
		before := assignmentFromKernel(s, have)
		after[n] = r.assignTurns(s, before, r.renderer.assignSlots(before, s), r.users)
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

// assignListID returns the list ID for a Service: the ID of its frontends in the kernel,
// unless this call has assigned that ID to another Service.
func (r *replaceOperation) assignListID(s *dataplane.Service) listID {
	ids, have := &r.listIDs[familyIndex(s.Key.Family)], r.have[familyIndex(s.Key.Family)]
	if _, ok := ids.byKey[s.Key]; ok || !r.usesSharedList(s) {
		return r.allocateListID(s)
	}
	for _, f := range s.Frontends {
		current := have.frontends[f]
		if current == nil || current.listID == 0 || !current.inServices || !current.belongsTo(s.Key) {
			continue
		}
		if !r.assignedLists[familyIndex(s.Key.Family)][current.listID] {
			ids.assign(s.Key, current.listID)
			break
		}
	}
	n := r.allocateListID(s)
	r.assignedLists[familyIndex(s.Key.Family)][n] = true
	return n
}

// assignmentFromKernel returns the slot assignment of a Service in the kernel. It uses the
// first frontend that belongs to the Service, or else the first frontend that exists. All
// frontends of a Service have the same assignment, unless a commit in steps was
// interrupted.
func assignmentFromKernel(s *dataplane.Service, have map[dataplane.Frontend]*frontendElements) slotAssignment {
	var first *frontendElements
	for _, f := range s.Frontends {
		r := have[f]
		if r != nil && r.inServices && r.belongsTo(s.Key) {
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

// recordSuccess records that Services are programmed as desired.
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

// recordFailure records that a Service failed, and keeps its elements in the kernel for the
// next Replace.
func (r *replaceOperation) recordFailure(s *dataplane.Service, err error) {
	r.failed[s.Key] = err
	i := familyIndex(s.Key.Family)
	addAll := func(elements []verdictElement) {
		for _, v := range elements {
			if _, exists := r.verdictElements[i][v]; exists {
				r.addReferences(i, v, 1)
			}
		}
	}
	for _, f := range s.Frontends {
		if current := r.have[i].frontends[f]; current != nil {
			addAll(current.verdictElements())
			if list := r.have[i].sharedLists[current.listID]; list != nil {
				addAll(list.verdictElements())
				delete(r.have[i].sharedLists, current.listID)
				r.assignedLists[i][current.listID] = true
			}
			for set, in := range addrSetMembershipOf(s.Key.Kind, current.class, current.externalClass, r.node) {
				if n, exists := r.addrs[i][set][f.Addr.Addr()]; in && exists {
					r.addrs[i][set][f.Addr.Addr()] = n + 1
				}
			}
		}
		delete(r.have[i].frontends, f)
	}
}

// finish commits the pending Services, then removes all elements that belong to no Service.
func (r *replaceOperation) finish(ctx context.Context) error {
	if err := r.commitPending(ctx); err != nil {
		return err
	}
	b := r.newBatch()
	for i := range r.tables {
		for f, current := range r.have[i].frontends {
			if b.diffFrontendFromKernel(f, current, nil); b.elements() < r.transactionSize {
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

// removeUnusedShared removes addresses and ports that no frontend needs from the shared
// sets. It keeps ports if a Service has failed, because they may be ports of its endpoints.
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

// takeUnused returns the elements with a count of 0 and removes them from counts.
func takeUnused[K comparable](counts map[K]int, encode func(K) []byte) []element {
	var unused []element
	for k, n := range counts {
		if n == 0 {
			unused = append(unused, element{Key: encode(k)})
			delete(counts, k)
		}
	}
	return unused
}
