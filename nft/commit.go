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

// transactionSize is the target number of elements in one commit; a commit can have up to
// twice as many. A commit blocks every other user of nftables on the node, for about 10 ms
// at this size. Larger commits save nothing, because the kernel's time grows faster than
// the number of elements.
const transactionSize = 2048

// verdictElementWeight is the number of elements that a verdict element with its chain and
// rules counts as.
const verdictElementWeight = 16

// unusedClassDelay is how long a class stays after its last use. It exceeds the time that
// any packet needs to pass the rules. It also avoids creating and deleting chains when a
// Service changes its size back and forth.
const unusedClassDelay = time.Second

// batch contains changes that are committed together.
type batch struct{ tables [2]tableDiff }

// tableDiff contains the changes of one table.
type tableDiff struct {
	elementDiff
	// verdictElements counts the change in the number of frontends that need each verdict
	// element. addrs does the same for the elements of address sets.
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

// takeBatch returns an empty batch, which the caller passes to recycleBatch after the commit.
func (d *Dataplane) takeBatch() *batch {
	b := d.spareBatch
	if d.spareBatch = nil; b == nil {
		return d.newBatch()
	}
	for i, t := range d.tables { // a rebuild may have replaced them
		b.tables[i].table = t
	}
	return b
}

// maxSpareElements is the largest capacity of a list of elements that is kept for the next batch.
const maxSpareElements = 2 * transactionSize

// recycleBatch keeps the memory of a batch for the next takeBatch.
func (d *Dataplane) recycleBatch(b *batch) {
	spare := func(elements []element) []element {
		if cap(elements) > maxSpareElements {
			return nil
		}
		clear(elements)
		return elements[:0]
	}
	for i := range b.tables {
		e := &b.tables[i]
		var empty tableDiff
		for set := range e.add {
			empty.del[set], empty.add[set] = spare(e.del[set]), spare(e.add[set])
		}
		*e = empty
	}
	d.spareBatch = b
}

func (b *batch) elements() int {
	n := 0
	for i := range b.tables {
		n += b.tables[i].elements + b.tables[i].addrs.size() + len(b.tables[i].ports)
	}
	return n
}

// diffFrontend adds the difference between two states of a frontend, either of which may be
// nil; see elementDiff.diffFrontendElements.
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

// diffFrontendFromKernel is diffFrontend for a frontend that was read from the kernel and
// whose verdict elements are not counted yet.
func (b *batch) diffFrontendFromKernel(f dataplane.Frontend, have, want *frontendElements) {
	e := b.tableOf(f)
	if want != nil {
		e.countFrontend(f, want, 1)
	}
	e.diffFrontendElements(f, have, want)
}

// diffSharedList adds the difference between two states of a Service's shared list.
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

// tableOf returns the diff of the table that a frontend belongs to.
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

// tooLarge reports whether a batch is too large for one commit.
func (d *Dataplane) tooLarge(b *batch) bool { return b.elements() > 2*d.transactionSize }

// commit commits a batch in one transaction and counts its verdict elements. It writes
// nothing if the batch is empty.
//
// A batch that is too large is committed in steps. If a step fails, the earlier steps stay.
// A new batch that is made from the previous state is then wrong, so a batch in steps
// should contain one Service only.
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

// commitTransaction commits a batch, or a step of one, in one transaction.
func (d *Dataplane) commitTransaction(b *batch) error {
	anyWritten := false
	for i := range b.tables {
		written, err := d.encodeDiff(i, &b.tables[i])
		if err != nil {
			return err
		}
		anyWritten = anyWritten || written
	}
	if anyWritten {
		if err := d.submit(); err != nil {
			return err
		}
	}
	for i := range b.tables {
		for v, n := range b.tables[i].verdictElements {
			d.addReferences(i, v, n)
		}
		d.addrs[i].merge(b.tables[i].addrs)
		d.ports[i].merge(b.tables[i].ports)
	}
	return nil
}

// encodeDiff adds the diff of the i-th table to the transaction, and reports whether it has
// added anything.
func (d *Dataplane) encodeDiff(i int, e *tableDiff) (bool, error) {
	if e.elements == 0 && e.addrs.size() == 0 && len(e.ports) == 0 {
		return false, nil
	}
	sharedDiffs := d.sharedSetDiffs(i, e)
	written := false
	var errs []error
	addElements, deleteElements := d.conn.SetAddElements, d.conn.SetDeleteElements
	if bulk, ok := d.conn.(bulkWriter); ok {
		addElements, deleteElements = bulk.addBulk, bulk.deleteBulk
	}
	del := func(set *nftables.Set, elements []element) {
		written = written || len(elements) > 0
		if err := deleteElements(set, elements); err != nil {
			errs = append(errs, fmt.Errorf("encode deletions from set %s: %w", set.Name, err))
		}
	}
	add := func(set *nftables.Set, elements []element) {
		written = written || len(elements) > 0
		if err := addElements(set, elements); err != nil {
			errs = append(errs, fmt.Errorf("encode additions to set %s: %w", set.Name, err))
		}
	}
	for s, set := range e.table.frontendSets {
		del(set, e.del[s])
	}
	for set, elements := range e.delRanges {
		del(e.table.rangeSetByKey(set), elements)
	}
	for _, s := range sharedDiffs {
		del(s.set, s.removed)
	}
	for s, set := range e.table.frontendSets {
		add(set, e.add[s])
	}
	for set, elements := range e.addRanges {
		add(e.table.rangeSetByKey(set), elements)
	}
	for _, s := range sharedDiffs {
		add(s.set, s.added)
	}
	return written, errors.Join(errs...)
}

// prepare creates the verdict elements and source range sets that the batch needs and that
// do not exist yet, in separate transactions. No packet uses them yet, so they do no harm
// if a later commit fails.
func (d *Dataplane) prepare(b *batch) error {
	for i := range b.tables {
		e := &b.tables[i]
		bits := d.addSourceRangeSets(e, d.rangePrefixLengths[i])
		var added []verdictElement
		for v, n := range e.verdictElements {
			if _, exists := d.verdictElements[i][v]; !exists && n > 0 {
				added = append(added, v)
			}
		}
		if len(added) == 0 && len(bits) == len(d.rangePrefixLengths[i]) {
			continue
		}
		slices.SortFunc(added, verdictElement.compare)
		for {
			part := added[:min(len(added), d.verdictElementsPerCommit())]
			if err := d.addVerdictElements(e.table, part); err != nil {
				return err
			}
			d.rangePrefixLengths[i] = bits
			for _, v := range part {
				d.addReferences(i, v, 0)
			}
			if added = added[len(part):]; len(added) == 0 {
				break
			}
		}
	}
	return nil
}

// verdictElementsPerCommit returns how many verdict elements one commit adds or removes.
func (d *Dataplane) verdictElementsPerCommit() int {
	return max(1, d.transactionSize/verdictElementWeight)
}

// addVerdictElements commits new verdict elements, together with the rest of the
// transaction.
func (d *Dataplane) addVerdictElements(t *table, elements []verdictElement) error {
	for _, b := range elements {
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

// addSourceRangeSets adds the missing sets for prefix lengths of source ranges, and the
// rules that look them up. It returns all prefix lengths. The sets are never removed,
// because their number is small.
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

// addReferences adds n to the number of frontends that need a verdict element of the i-th
// table.
func (d *Dataplane) addReferences(i int, b verdictElement, n int) {
	d.verdictElements[i][b] += n
	if d.verdictElements[i][b] > 0 {
		delete(d.unusedSince[i], b)
		return
	}
	if _, unused := d.unusedSince[i][b]; !unused {
		d.unusedSince[i][b] = d.now()
	}
}

// removeUnusedVerdictElements removes verdict elements that no frontend has needed for
// unusedClassDelay. Some kernels before 6.2 keep a chain for a moment longer; a later call
// retries these.
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
				d.log.Debug("cannot remove unused classes yet, will retry", "table", t.String(), "classes", len(part), "error", err)
				continue
			}
			for _, b := range part {
				delete(d.verdictElements[i], b)
				delete(d.unusedSince[i], b)
			}
		}
	}
}

func (d *Dataplane) removeVerdictElements(t *table, elements []verdictElement) error {
	for _, b := range elements {
		_ = d.conn.SetDeleteElements(t.verdicts[b.vmap], []element{{Key: t.encodeClass(b.serviceClass)}})
		if b.hasOwnChain() {
			ch := &nftables.Chain{Name: b.chainName(), Table: t.nf}
			d.conn.FlushChain(ch)
			d.conn.DelChain(ch)
		}
	}
	return d.submit()
}

func (d *Dataplane) removeElements(set *nftables.Set, elements []element) error {
	for part := range slices.Chunk(elements, d.transactionSize) {
		if err := d.conn.SetDeleteElements(set, part); err != nil {
			return fmt.Errorf("encode deletions from set %s: %w", set.Name, err)
		}
		if err := d.submit(); err != nil {
			return err
		}
	}
	return nil
}

// isRejection reports whether the kernel rejected the content of a commit, and not the
// commit as a whole.
func isRejection(err error) bool {
	for _, e := range []error{unix.EPERM, unix.ENOBUFS, unix.EMSGSIZE, unix.ENOENT} {
		if errors.Is(err, e) {
			return false
		}
	}
	return true
}
