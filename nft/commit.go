package nft

import (
	"errors"
	"fmt"
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
