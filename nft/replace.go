package nft

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// editSize is how many elements go into one commit, give or take as many. A commit
// holds up every other user of nftables on the node, and this one is some 10 ms.
// Larger ones save nothing: the kernel takes more than proportional time for them.
const editSize = 2048

// branchWeight is as how many elements a branch counts that comes or goes, with
// its chain and rules.
const branchWeight = 16

// classRest is for how long a class stays when nothing is in it any more: longer
// than any packet is on its way, and so long that a Service that goes from one
// size to another and back doesn't make chains come and go.
const classRest = time.Second

// Apply implements [dataplane.Dataplane]. All changes are one commit, after
// others for the branches that are new. Only a call with more than some
// [editSize] elements is split, between Services, and a change of a Service that
// has more by itself is carried out in steps, see batch.steps.
func (d *Dataplane) Apply(_ context.Context, changes []dataplane.Change) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	failed := map[dataplane.Key]error{}
	// A list goes with the last Service that takes a frontend from its own, so
	// frontends that nobody takes must be gone by then.
	changes = slices.Clone(changes)
	slices.SortStableFunc(changes, func(a, b dataplane.Change) int { return falseFirst(a.New != nil, b.New != nil) })
	p := d.plan(changes, failed)
	b, first := d.newBatch(), 0
	for i, c := range changes {
		if p.add(b, c); b.elements() >= d.editSize {
			d.applyTogether(p, b, changes[first:i+1], failed)
			b, first = d.newBatch(), i+1
		}
	}
	d.applyTogether(p, b, changes[first:], failed)
	for key, a := range p.after {
		if failed[key] == nil {
			d.keep(key, a)
			if !p.shares[key] {
				d.lists[index(key.Family)].release(key)
			}
		}
	}
	d.removeUnusedBranches()
	if len(failed) > 0 {
		return &dataplane.Error{Op: "apply", Failed: failed}
	}
	return nil
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// applyTogether commits a batch made of these changes. If it is too large for one
// commit, or the kernel rejects it, each half is tried, down to the Service that
// is large, or to blame.
func (d *Dataplane) applyTogether(p plan, b *batch, changes []dataplane.Change, failed map[dataplane.Key]error) {
	var err error
	if len(changes) < 2 || !d.tooLarge(b) {
		if err = d.commit(b); err == nil {
			return
		}
	}
	if len(changes) > 1 && (err == nil || isRejection(err)) {
		half := len(changes) / 2
		for _, part := range [][]dataplane.Change{changes[:half], changes[half:]} {
			b := d.newBatch()
			for _, c := range part {
				p.add(b, c)
			}
			d.applyTogether(p, b, part, failed)
		}
		return
	}
	for _, c := range changes {
		for _, key := range p.concerned(c) {
			failed[key] = err
		}
	}
}

// plan is what the changes of an Apply come to, over all of them at once: a
// frontend may leave one Service and join another.
type plan struct {
	have, want map[dataplane.Frontend]owned
	// after has the arrangement of each Service that changes.
	after map[dataplane.Key]arranged
	// lists has, by Service with whose change it is made, how lists that frontends
	// share change.
	lists map[dataplane.Key][]listChange
	// shares has the Services whose frontends share a list after their change.
	shares map[dataplane.Key]bool
}

// listChange has the row of a Service before and after, of which one shares a list.
type listChange struct{ have, want *row }

// owned is a row with the Service that it is of.
type owned struct {
	key dataplane.Key
	*row
}

// arranged is the arrangement of a Service, and whether it needs to be kept, as it
// is not what arrangeService makes from nothing.
type arranged struct {
	arrangement
	keep bool
}

// plan renders both sides of all changes. Services that this backend does not
// support count as deleted and are noted in failed.
func (d *Dataplane) plan(changes []dataplane.Change, failed map[dataplane.Key]error) plan {
	p := plan{
		have:  make(map[dataplane.Frontend]owned, len(changes)),
		want:  make(map[dataplane.Frontend]owned, len(changes)),
		after: make(map[dataplane.Key]arranged, len(changes)),
		lists: map[dataplane.Key][]listChange{}, shares: map[dataplane.Key]bool{},
	}
	changed := map[dataplane.Key]listChange{}
	for _, c := range changes {
		key := c.Key()
		var before arrangement
		var list listChange
		if c.Old != nil && d.supported(c.Old) == nil {
			before = d.arrangementOf(c.Old)
			r := owned{key, d.render(c.Old, before, d.lists[index(key.Family)].byKey[key])}
			list.have = r.row
			for _, f := range c.Old.Frontends {
				p.have[f] = r
			}
		}
		p.after[key] = arranged{}
		if list.have != nil && list.have.list != 0 {
			changed[key] = list
		}
		if c.New == nil {
			continue
		}
		if err := d.supported(c.New); err != nil {
			failed[key] = err
			continue
		}
		a := d.arrange(before, c.New)
		p.after[key] = a
		r := owned{key, d.render(c.New, a.arrangement, d.listOf(c.New))}
		if list.want = r.row; r.list != 0 || changed[key].have != nil {
			changed[key] = list
		}
		for _, f := range c.New.Frontends {
			p.want[f] = r
		}
	}
	if len(changed) > 0 {
		p.placeLists(changes, changed)
	}
	return p
}

// placeLists decides with which change each list changes: with its Service's, or, if
// that is deleted, with the last one that takes frontends from it, as a list must not
// go before the frontends that share it.
func (p plan) placeLists(changes []dataplane.Change, changed map[dataplane.Key]listChange) {
	with := map[dataplane.Key]dataplane.Key{}
	for _, c := range changes {
		if c.New == nil {
			continue
		}
		for _, f := range c.New.Frontends {
			have := p.have[f]
			if have.row == nil || have.list == 0 || have.key == c.New.Key || p.want[f].row == nil {
				continue
			}
			if changed[have.key].want == nil {
				with[have.key] = c.New.Key
			}
		}
	}
	for key, l := range changed {
		to, moved := with[key]
		if !moved {
			to = key
		}
		p.lists[to] = append(p.lists[to], l)
		p.shares[key] = l.want != nil && l.want.list != 0
	}
}

// add puts the frontends of a change into a batch. One that moves belongs to the
// change of the Service that gets it.
func (p plan) add(b *batch, c dataplane.Change) {
	if c.New != nil {
		for _, f := range c.New.Frontends {
			if want, ok := p.want[f]; ok { // not of a Service that is not supported
				b.change(f, p.have[f].row, want.row)
			}
		}
	}
	if c.Old != nil {
		for _, f := range c.Old.Frontends {
			if have, had := p.have[f]; had && p.want[f].row == nil {
				b.change(f, have.row, nil)
			}
		}
	}
	for _, l := range p.lists[c.Key()] {
		b.changeList(c.Key().Family, l)
	}
}

// concerned returns the keys that are in doubt if a change did not take: its
// own, and those of the Services it takes frontends from.
func (p plan) concerned(c dataplane.Change) []dataplane.Key {
	keys := []dataplane.Key{c.Key()}
	if c.New == nil {
		return keys
	}
	for _, f := range c.New.Frontends {
		if have := p.have[f]; have.row != nil && have.key != keys[0] {
			keys = append(keys, have.key)
		}
	}
	return keys
}

// batch is what is committed together.
type batch struct{ tables [2]tableEdit }

// tableEdit is what is done to one table.
type tableEdit struct {
	edit
	// branches is by how much the number of frontends that need each branch
	// changes, addrs by how much that with each address does.
	branches map[branch]int
	addrs    addrCounts
}

func (d *Dataplane) newBatch() *batch {
	b := &batch{}
	for i, t := range d.tables {
		b.tables[i].table = t
	}
	return b
}

func (b *batch) elements() int {
	n := 0
	for i := range b.tables {
		n += b.tables[i].elements + b.tables[i].addrs.size() + len(b.tables[i].ports)
	}
	return n
}

// change adds what turns one row of a frontend into another; see edit.change.
func (b *batch) change(f dataplane.Frontend, have, want *row) {
	e := b.of(f)
	if have != nil && want != nil && have.sameBranches(want) {
		e.change(f, have, want)
		return
	}
	if have != nil {
		e.count(f, have, -1)
	}
	b.found(f, have, want)
}

// found is change for a row that was found in the kernel, whose branches have not
// been counted.
func (b *batch) found(f dataplane.Frontend, have, want *row) {
	e := b.of(f)
	if want != nil {
		e.count(f, want, 1)
	}
	e.change(f, have, want)
}

// changeList adds what turns the list of a Service into another.
func (b *batch) changeList(family dataplane.Family, l listChange) {
	e := &b.tables[index(family)]
	var have, want sharedRow
	if l.have != nil {
		have = sharedRow{l.have.list, l.have.shared}
	}
	if l.want != nil {
		want = sharedRow{l.want.list, l.want.shared}
	}
	if have.list == want.list {
		e.changeList(want.list, have.shared, want.shared)
		return
	}
	if have.list != 0 {
		e.changeList(have.list, have.shared, nil)
	}
	if want.list != 0 {
		e.changeList(want.list, nil, want.shared)
	}
}

// of returns the edit of the table that a frontend is in.
func (b *batch) of(f dataplane.Frontend) *tableEdit {
	return &b.tables[index(dataplane.FamilyOf(f.Addr.Addr()))]
}

func (e *tableEdit) count(f dataplane.Frontend, r *row, n int) {
	for _, b := range r.branches() {
		e.countBranch(b, n)
	}
	e.addrs.add(f.Addr.Addr(), r.addrs, n)
}

func (e *tableEdit) countBranch(b branch, n int) {
	if e.branches == nil {
		e.branches = map[branch]int{}
	}
	e.branches[b] += n
}

func index(f dataplane.Family) int {
	if f == dataplane.IPv6 {
		return 1
	}
	return 0
}

// arrangementOf returns the arrangement of a Service that is programmed.
func (d *Dataplane) arrangementOf(s *dataplane.Service) arrangement {
	if a, ok := d.arrangements[s.Key]; ok || d.translator != nil {
		return a
	}
	return arrangeService(arrangement{}, s)
}

// arrange returns the next arrangement of a Service. Where there is a Translator,
// there is nothing to arrange.
func (d *Dataplane) arrange(current arrangement, s *dataplane.Service) arranged {
	if d.translator != nil {
		return arranged{}
	}
	a := arrangeService(current, s)
	return arranged{a, !a.natural(s)}
}

// render returns what the maps hold for each frontend of the Service, and for the
// list that they share if they have a list ID.
func (d *Dataplane) render(s *dataplane.Service, a arrangement, n listID) *row {
	var r *row
	if d.translator != nil {
		r = renderVirtual(s, d.translator, d.node)
	} else {
		r = render(s, a, d.node)
	}
	if n != 0 && !r.class.has(through) {
		r.share(s, n)
	}
	return r
}

// supported is as the function of this name. A Translator has no limits.
func (d *Dataplane) supported(s *dataplane.Service) error {
	if d.translator != nil {
		return nil
	}
	return supported(s)
}

// tooLarge reports whether a batch can't be one commit.
func (d *Dataplane) tooLarge(b *batch) bool { return b.elements() > 2*d.editSize }

// commit carries out a batch in one transaction, and counts its branches. It
// writes nothing if the batch is empty.
//
// A batch that is too large is carried out in steps. If one of them fails, what
// was written before stays, and another batch that is made from what the kernel
// had before will not do: it should be of one Service then.
func (d *Dataplane) commit(b *batch) error {
	if err := d.prepare(b); err != nil {
		return err
	}
	if !d.tooLarge(b) {
		return d.transact(b)
	}
	for step := range b.steps(d.editSize) {
		if err := d.transact(step); err != nil {
			return err
		}
	}
	return nil
}

// transact carries out a batch, or a step of one, in one transaction.
func (d *Dataplane) transact(b *batch) error {
	something := false
	for i := range b.tables {
		written, err := d.write(i, &b.tables[i])
		if err != nil {
			return err
		}
		something = something || written
	}
	if something {
		if err := d.submit(); err != nil {
			return err
		}
	}
	for i := range b.tables {
		for branch, n := range b.tables[i].branches {
			d.use(i, branch, n)
		}
		d.addrs[i].commit(b.tables[i].addrs)
		d.ports[i].commit(b.tables[i].ports)
	}
	return nil
}

// write adds the edit of the i-th table to the transaction, and reports whether that
// is anything.
func (d *Dataplane) write(i int, e *tableEdit) (bool, error) {
	if e.elements == 0 && e.addrs.size() == 0 && len(e.ports) == 0 {
		return false, nil
	}
	shared := d.sharedEdits(i, e)
	something := false
	var errs []error
	del := func(set *nftables.Set, elements []element) {
		something = something || len(elements) > 0
		if err := d.conn.SetDeleteElements(set, elements); err != nil {
			errs = append(errs, fmt.Errorf("encode deletions from set %s: %w", set.Name, err))
		}
	}
	add := func(set *nftables.Set, elements []element) {
		something = something || len(elements) > 0
		if err := d.conn.SetAddElements(set, elements); err != nil {
			errs = append(errs, fmt.Errorf("encode additions to set %s: %w", set.Name, err))
		}
	}
	for s, set := range e.table.rowSets {
		del(set, e.del[s])
	}
	for set, elements := range e.delRanges {
		del(e.table.rangeSet(set), elements)
	}
	for _, s := range shared {
		del(s.set, s.gone)
	}
	for s, set := range e.table.rowSets {
		add(set, e.add[s])
	}
	for set, elements := range e.addRanges {
		add(e.table.rangeSet(set), elements)
	}
	for _, s := range shared {
		add(s.set, s.come)
	}
	return something, errors.Join(errs...)
}

// prepare makes the branches, and sets of source ranges, that the batch needs and
// that are not there yet, in transactions of their own. They are in use by
// nobody, so it does no harm if what follows fails.
func (d *Dataplane) prepare(b *batch) error {
	for i := range b.tables {
		e := &b.tables[i]
		bits := d.addRangeSets(e, d.rangeBits[i])
		var added []branch
		for branch, n := range e.branches {
			if _, exists := d.branches[i][branch]; !exists && n > 0 {
				added = append(added, branch)
			}
		}
		if len(added) == 0 && len(bits) == len(d.rangeBits[i]) {
			continue
		}
		slices.SortFunc(added, branch.compare)
		for {
			now := added[:min(len(added), d.branchesAtOnce())]
			if err := d.addBranches(e.table, now); err != nil {
				return err
			}
			d.rangeBits[i] = bits
			for _, branch := range now {
				d.use(i, branch, 0)
			}
			if added = added[len(now):]; len(added) == 0 {
				break
			}
		}
	}
	return nil
}

// branchesAtOnce is how many branches come, or go, in one commit.
func (d *Dataplane) branchesAtOnce() int { return max(1, d.editSize/branchWeight) }

// addBranches commits new branches, with whatever else is in the transaction.
func (d *Dataplane) addBranches(t *table, branches []branch) error {
	for _, b := range branches {
		if b.own() {
			ch := t.branchChain(b)
			d.conn.AddChain(ch.Chain)
			d.addRules(t, ch)
		}
		// The library keeps the error for Flush.
		_ = d.conn.SetAddElements(t.verdicts[b.in], []element{{Key: t.classElement(b.class), VerdictData: b.verdict()}})
	}
	if err := d.submit(); err != nil {
		return fmt.Errorf("add classes: %w", err)
	}
	return nil
}

// addRangeSets adds sets for the lengths of source ranges that there are none for
// yet, and the rules that look into them. They stay: there can't be many.
func (d *Dataplane) addRangeSets(e *tableEdit, have []int) []int {
	want := slices.Clone(have)
	for set := range e.addRanges {
		if !slices.Contains(want, set.bits) {
			want = append(want, set.bits)
		}
	}
	if len(want) == len(have) {
		return have
	}
	slices.Sort(want)
	for _, bits := range want {
		if !slices.Contains(have, bits) {
			_ = d.conn.AddSet(e.table.ranges(bits), nil)
			_ = d.conn.AddSet(e.table.sharedRanges(bits), nil)
		}
	}
	for _, by := range addressings() {
		ch := e.table.sourceRanges(by, want)
		d.conn.FlushChain(ch.Chain)
		d.addRules(e.table, ch)
	}
	ch := e.table.sharedSourceRanges(want)
	d.conn.FlushChain(ch.Chain)
	d.addRules(e.table, ch)
	return want
}

// keep notes the arrangement of a Service that is programmed, or gone.
func (d *Dataplane) keep(key dataplane.Key, a arranged) {
	if a.keep {
		d.arrangements[key] = a.arrangement
	} else {
		delete(d.arrangements, key)
	}
}

// use counts n more frontends that need a branch of the i-th table.
func (d *Dataplane) use(i int, b branch, n int) {
	d.branches[i][b] += n
	if d.branches[i][b] > 0 {
		delete(d.resting[i], b)
		return
	}
	if _, resting := d.resting[i][b]; !resting {
		d.resting[i][b] = d.now()
	}
}

// removeUnusedBranches removes the branches that no frontend has needed for a
// while. What can't be removed now, as some kernels before 6.2 hold on to a
// chain for a moment longer, is tried again after a later commit.
func (d *Dataplane) removeUnusedBranches() {
	for i, t := range d.tables {
		var unused []branch
		for b, since := range d.resting[i] {
			if d.now().Sub(since) >= classRest {
				unused = append(unused, b)
			}
		}
		for part := range slices.Chunk(unused, d.branchesAtOnce()) {
			if err := d.removeBranches(t, part); err != nil {
				d.log.Debug("unused classes stay for now", "table", t.String(), "classes", len(part), "error", err)
				continue
			}
			for _, b := range part {
				delete(d.branches[i], b)
				delete(d.resting[i], b)
			}
		}
	}
}

func (d *Dataplane) removeBranches(t *table, branches []branch) error {
	for _, b := range branches {
		_ = d.conn.SetDeleteElements(t.verdicts[b.in], []element{{Key: t.classElement(b.class)}})
		if b.own() {
			ch := &nftables.Chain{Name: b.chainName(), Table: t.nf}
			d.conn.FlushChain(ch)
			d.conn.DelChain(ch)
		}
	}
	return d.submit()
}

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
		d.ports[i].commit(have[i].ports)
		if t.virtual {
			for port := range have[i].portSet {
				d.ports[i][port] = 0
			}
		}
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
		if err := d.supported(s); err != nil {
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
	endpoints := len(s.Endpoints) + len(s.LocalEndpoints)
	switch {
	case s.Key.Kind == boundAddress: // has none
	case r.translator != nil:
		endpoints = int(lists) // a virtual server each
	case s.Affinity != 0:
		endpoints *= 2 // by slot and by ID
	}
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
		after[n] = r.arrange(arrangementFound(s, have), s)
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

// isRejection reports whether the kernel refused what a commit says, rather
// than the commit as such.
func isRejection(err error) bool {
	for _, e := range []error{unix.EPERM, unix.ENOBUFS, unix.EMSGSIZE, unix.ENOENT} {
		if errors.Is(err, e) {
			return false
		}
	}
	return true
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

func (d *Dataplane) removeElements(set *nftables.Set, gone []element) error {
	for part := range slices.Chunk(gone, d.editSize) {
		if err := d.conn.SetDeleteElements(set, part); err != nil {
			return fmt.Errorf("encode deletions from set %s: %w", set.Name, err)
		}
		if err := d.submit(); err != nil {
			return err
		}
	}
	return nil
}
