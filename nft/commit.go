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

// transactionSize is how many elements go into one commit, give or take as many. A commit
// holds up every other user of nftables on the node, and this one is some 10 ms.
// Larger ones save nothing: the kernel takes more than proportional time for them.
const transactionSize = 2048

// verdictElementWeight is as how many elements a branch counts that comes or goes, with
// its chain and rules.
const verdictElementWeight = 16

// unusedClassDelay is for how long a class stays when nothing is in it any more: longer
// than any packet is on its way, and so long that a Service that goes from one
// size to another and back doesn't make chains come and go.
const unusedClassDelay = time.Second

// batch is what is committed together.
type batch struct{ tables [2]tableDiff }

// tableDiff is what is done to one table.
type tableDiff struct {
	elementDiff
	// verdictElements is by how much the number of frontends that need each branch
	// changes, addrs by how much that with each address does.
	verdictElements map[verdictElement]int
	addrs           addrCounts
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

// diffFrontend adds what turns one row of a frontend into another; see elementDiff.diffFrontendElements.
func (b *batch) diffFrontend(f dataplane.Frontend, have, want *frontendElements) {
	e := b.tableOf(f)
	if have != nil && want != nil && have.sameVerdictElements(want) {
		e.diffFrontendElements(f, have, want)
		return
	}
	if have != nil {
		e.countFrontend(f, have, -1)
	}
	b.diffFrontendFromKernel(f, have, want)
}

// diffFrontendFromKernel is change for a row that was found in the kernel, whose branches have not
// been counted.
func (b *batch) diffFrontendFromKernel(f dataplane.Frontend, have, want *frontendElements) {
	e := b.tableOf(f)
	if want != nil {
		e.countFrontend(f, want, 1)
	}
	e.diffFrontendElements(f, have, want)
}

// diffSharedList adds what turns the list of a Service into another.
func (b *batch) diffSharedList(family dataplane.Family, l listChange) {
	e := &b.tables[familyIndex(family)]
	var have, want sharedListWithID
	if l.have != nil {
		have = sharedListWithID{l.have.listID, l.have.sharedList}
	}
	if l.want != nil {
		want = sharedListWithID{l.want.listID, l.want.sharedList}
	}
	if have.id == want.id {
		e.diffSharedList(want.id, have.sharedList, want.sharedList)
		return
	}
	if have.id != 0 {
		e.diffSharedList(have.id, have.sharedList, nil)
	}
	if want.id != 0 {
		e.diffSharedList(want.id, nil, want.sharedList)
	}
}

// tableOf returns the edit of the table that a frontend is in.
func (b *batch) tableOf(f dataplane.Frontend) *tableDiff {
	return &b.tables[familyIndex(dataplane.FamilyOf(f.Addr.Addr()))]
}

func (e *tableDiff) countFrontend(f dataplane.Frontend, r *frontendElements, n int) {
	for _, b := range r.verdictElements() {
		e.countVerdictElement(b, n)
	}
	e.addrs.add(f.Addr.Addr(), r.addrs, n)
}

func (e *tableDiff) countVerdictElement(b verdictElement, n int) {
	if e.verdictElements == nil {
		e.verdictElements = map[verdictElement]int{}
	}
	e.verdictElements[b] += n
}

func familyIndex(f dataplane.Family) int {
	if f == dataplane.IPv6 {
		return 1
	}
	return 0
}

// tooLarge reports whether a batch can't be one commit.
func (d *Dataplane) tooLarge(b *batch) bool { return b.elements() > 2*d.transactionSize }

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
		return d.commitTransaction(b)
	}
	for step := range b.steps(d.transactionSize) {
		if err := d.commitTransaction(step); err != nil {
			return err
		}
	}
	return nil
}

// commitTransaction carries out a batch, or a step of one, in one transaction.
func (d *Dataplane) commitTransaction(b *batch) error {
	something := false
	for i := range b.tables {
		written, err := d.encodeDiff(i, &b.tables[i])
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
		for branch, n := range b.tables[i].verdictElements {
			d.addReferences(i, branch, n)
		}
		d.addrs[i].merge(b.tables[i].addrs)
		d.ports[i].merge(b.tables[i].ports)
	}
	return nil
}

// encodeDiff adds the edit of the i-th table to the transaction, and reports whether that
// is anything.
func (d *Dataplane) encodeDiff(i int, e *tableDiff) (bool, error) {
	if e.elements == 0 && e.addrs.size() == 0 && len(e.ports) == 0 {
		return false, nil
	}
	shared := d.sharedSetDiffs(i, e)
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
	for s, set := range e.table.frontendSets {
		del(set, e.del[s])
	}
	for set, elements := range e.delRanges {
		del(e.table.rangeSetByKey(set), elements)
	}
	for _, s := range shared {
		del(s.set, s.gone)
	}
	for s, set := range e.table.frontendSets {
		add(set, e.add[s])
	}
	for set, elements := range e.addRanges {
		add(e.table.rangeSetByKey(set), elements)
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
		bits := d.addSourceRangeSets(e, d.rangePrefixLengths[i])
		var added []verdictElement
		for branch, n := range e.verdictElements {
			if _, exists := d.verdictElements[i][branch]; !exists && n > 0 {
				added = append(added, branch)
			}
		}
		if len(added) == 0 && len(bits) == len(d.rangePrefixLengths[i]) {
			continue
		}
		slices.SortFunc(added, verdictElement.compare)
		for {
			now := added[:min(len(added), d.verdictElementsPerCommit())]
			if err := d.addVerdictElements(e.table, now); err != nil {
				return err
			}
			d.rangePrefixLengths[i] = bits
			for _, branch := range now {
				d.addReferences(i, branch, 0)
			}
			if added = added[len(now):]; len(added) == 0 {
				break
			}
		}
	}
	return nil
}

// verdictElementsPerCommit is how many branches come, or go, in one commit.
func (d *Dataplane) verdictElementsPerCommit() int {
	return max(1, d.transactionSize/verdictElementWeight)
}

// addVerdictElements commits new branches, with whatever else is in the transaction.
func (d *Dataplane) addVerdictElements(t *table, branches []verdictElement) error {
	for _, b := range branches {
		if b.hasOwnChain() {
			ch := t.verdictElementChain(b)
			d.conn.AddChain(ch.Chain)
			d.addRules(t, ch)
		}
		// The library keeps the error for Flush.
		_ = d.conn.SetAddElements(t.verdicts[b.vmap], []element{{Key: t.encodeClass(b.serviceClass), VerdictData: b.verdict()}})
	}
	if err := d.submit(); err != nil {
		return fmt.Errorf("add classes: %w", err)
	}
	return nil
}

// addSourceRangeSets adds sets for the lengths of source ranges that there are none for
// yet, and the rules that look into them. They stay: there can't be many.
func (d *Dataplane) addSourceRangeSets(e *tableDiff, have []int) []int {
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
			_ = d.conn.AddSet(e.table.sourceRangeSet(bits), nil)
			_ = d.conn.AddSet(e.table.sharedSourceRangeSet(bits), nil)
		}
	}
	for _, by := range allAddressings() {
		ch := e.table.sourceRangesChain(by, want)
		d.conn.FlushChain(ch.Chain)
		d.addRules(e.table, ch)
	}
	ch := e.table.sharedSourceRangesChain(want)
	d.conn.FlushChain(ch.Chain)
	d.addRules(e.table, ch)
	return want
}

// addReferences counts n more frontends that need a branch of the i-th table.
func (d *Dataplane) addReferences(i int, b verdictElement, n int) {
	d.verdictElements[i][b] += n
	if d.verdictElements[i][b] > 0 {
		delete(d.unusedSince[i], b)
		return
	}
	if _, resting := d.unusedSince[i][b]; !resting {
		d.unusedSince[i][b] = d.now()
	}
}

// removeUnusedVerdictElements removes the branches that no frontend has needed for a
// while. What can't be removed now, as some kernels before 6.2 hold on to a
// chain for a moment longer, is tried again after a later commit.
func (d *Dataplane) removeUnusedVerdictElements() {
	for i, t := range d.tables {
		var unused []verdictElement
		for b, since := range d.unusedSince[i] {
			if d.now().Sub(since) >= unusedClassDelay {
				unused = append(unused, b)
			}
		}
		for part := range slices.Chunk(unused, d.verdictElementsPerCommit()) {
			if err := d.removeVerdictElements(t, part); err != nil {
				d.log.Debug("unused classes stay for now", "table", t.String(), "classes", len(part), "error", err)
				continue
			}
			for _, b := range part {
				delete(d.verdictElements[i], b)
				delete(d.unusedSince[i], b)
			}
		}
	}
}

func (d *Dataplane) removeVerdictElements(t *table, branches []verdictElement) error {
	for _, b := range branches {
		_ = d.conn.SetDeleteElements(t.verdicts[b.vmap], []element{{Key: t.encodeClass(b.serviceClass)}})
		if b.hasOwnChain() {
			ch := &nftables.Chain{Name: b.chainName(), Table: t.nf}
			d.conn.FlushChain(ch)
			d.conn.DelChain(ch)
		}
	}
	return d.submit()
}

func (d *Dataplane) removeElements(set *nftables.Set, gone []element) error {
	for part := range slices.Chunk(gone, d.transactionSize) {
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
