package nft

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"time"

	"fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// editSize is how many elements go into one commit of a Replace, give or take
// one Service. A commit holds up every other user of nftables on the node, so
// it is kept to some 20 ms.
const editSize = 8192

// classRest is for how long a class stays when nothing is in it any more: longer
// than any packet is on its way, and so long that a Service that goes from one
// size to another and back doesn't make chains come and go.
const classRest = time.Second

// Apply implements [dataplane.Dataplane]. All changes are one commit, after
// another one for the classes that are new.
func (d *Dataplane) Apply(_ context.Context, changes []dataplane.Change) error {
	failed := map[dataplane.Key]error{}
	edits, after := d.plan(changes, failed)
	if err := d.commit(edits); err != nil {
		for _, c := range changes {
			failed[c.Key()] = err
		}
		return &dataplane.Error{Op: "apply", Failed: failed}
	}
	d.record(changes, edits, after)
	d.removeUnusedClasses()
	if len(failed) > 0 {
		return &dataplane.Error{Op: "apply", Failed: failed}
	}
	return nil
}

// tableEdit is what one commit does to one table.
type tableEdit struct {
	edit
	// classes is by how much the number of frontends in each class changes.
	classes map[class]int
}

// plan computes the edits of a call, over all of its changes at once: a
// frontend may leave one Service and join another. It returns as well the
// slots of each changed Service. Services that this backend does not support
// count as deleted and are noted in failed.
func (d *Dataplane) plan(changes []dataplane.Change, failed map[dataplane.Key]error) ([2]*tableEdit, map[dataplane.Key][]netip.AddrPort) {
	var have, want [2]map[dataplane.Frontend]*row
	var edits [2]*tableEdit
	after := make(map[dataplane.Key][]netip.AddrPort, len(changes))
	for _, c := range changes {
		key := c.Key()
		i := index(key.Family)
		if edits[i] == nil {
			edits[i] = &tableEdit{edit: edit{table: d.tables[i]}, classes: map[class]int{}}
			have[i], want[i] = map[dataplane.Frontend]*row{}, map[dataplane.Frontend]*row{}
		}
		var before []netip.AddrPort
		if c.Old != nil && supported(c.Old) == nil {
			before = d.slotsOf(c.Old)
			r := render(c.Old, before)
			for _, f := range c.Old.Frontends {
				have[i][f] = r
			}
		}
		if c.New == nil {
			continue
		}
		if err := supported(c.New); err != nil {
			failed[key] = err
			continue
		}
		after[key] = arrange(before, c.New.Endpoints)
		r := render(c.New, after[key])
		for _, f := range c.New.Frontends {
			want[i][f] = r
		}
	}
	for i, e := range edits {
		if e == nil {
			continue
		}
		for f, h := range have[i] {
			e.change(f, h, want[i][f])
		}
		for f, w := range want[i] {
			if _, seen := have[i][f]; !seen {
				e.change(f, nil, w)
			}
		}
	}
	return edits, after
}

// change is edit.change, and counts classes.
func (e *tableEdit) change(f dataplane.Frontend, have, want *row) {
	if have != nil && have.class != 0 {
		e.classes[have.class]--
	}
	if want != nil && want.class != 0 {
		e.classes[want.class]++
	}
	e.edit.change(f, have, want)
}

func index(f dataplane.Family) int {
	if f == dataplane.IPv6 {
		return 1
	}
	return 0
}

// slotsOf returns the slots of a Service that is programmed.
func (d *Dataplane) slotsOf(s *dataplane.Service) []netip.AddrPort {
	if slots, ok := d.slots[s.Key]; ok {
		return slots
	}
	return arrange(nil, s.Endpoints)
}

// commit carries out the edits in one transaction; it writes nothing if they
// are empty.
func (d *Dataplane) commit(edits [2]*tableEdit) error {
	if err := d.addClasses(edits); err != nil {
		return err
	}
	for _, e := range edits {
		if e == nil {
			continue
		}
		sets := e.table.rowSets()
		for s, set := range sets {
			if err := d.conn.SetDeleteElements(set, e.del[s]); err != nil {
				return fmt.Errorf("encode deletions from set %s: %w", set.Name, err)
			}
		}
		for s, set := range sets {
			if err := d.conn.SetAddElements(set, e.add[s]); err != nil {
				return fmt.Errorf("encode additions to set %s: %w", set.Name, err)
			}
		}
	}
	return d.flush()
}

// addClasses makes the chains of classes that have none yet, in a transaction of
// its own. They are in use by nobody, so it does no harm if what follows fails.
func (d *Dataplane) addClasses(edits [2]*tableEdit) error {
	var added [2][]class
	for i, e := range edits {
		if e == nil {
			continue
		}
		for c, n := range e.classes {
			if _, exists := d.classes[i][c]; exists || n <= 0 {
				continue
			}
			added[i] = append(added[i], c)
			d.addChain(e.table, e.table.classChain(c))
			// The library keeps the error for Flush.
			_ = d.conn.SetAddElements(e.table.classes, []element{gotoElement(e.table, c)})
		}
	}
	if len(added[0])+len(added[1]) == 0 {
		return nil
	}
	if err := d.flush(); err != nil {
		return fmt.Errorf("add classes: %w", err)
	}
	for i := range added {
		for _, c := range added[i] {
			d.use(i, c, 0)
		}
	}
	return nil
}

// gotoElement is the element of classes that sends a class to its chain.
func gotoElement(t *table, c class) element {
	return element{
		Key:         t.classElement(c),
		VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: c.chainName()},
	}
}

func (d *Dataplane) addChain(t *table, ch chain) {
	d.conn.AddChain(ch.Chain)
	d.addRules(t, ch)
}

// record notes what a commit has programmed.
func (d *Dataplane) record(changes []dataplane.Change, edits [2]*tableEdit, after map[dataplane.Key][]netip.AddrPort) {
	for _, c := range changes {
		key := c.Key()
		slots, programmed := after[key]
		if !programmed || inOrder(slots, c.New.Endpoints) {
			delete(d.slots, key)
			continue
		}
		d.slots[key] = slots
	}
	for i, e := range edits {
		if e == nil {
			continue
		}
		for c, n := range e.classes {
			d.use(i, c, n)
		}
	}
}

// use counts n more frontends in a class that has a chain in the i-th table.
func (d *Dataplane) use(i int, c class, n int) {
	d.classes[i][c] += n
	if d.classes[i][c] > 0 {
		delete(d.resting[i], c)
		return
	}
	if _, resting := d.resting[i][c]; !resting {
		d.resting[i][c] = d.now()
	}
}

// removeUnusedClasses removes the chains of classes that no frontend has been in
// for a while. What can't be removed now, as some kernels before 6.2 hold on to a
// chain for a moment longer, is tried again after a later commit.
func (d *Dataplane) removeUnusedClasses() {
	for i, t := range d.tables {
		var unused []class
		for c, since := range d.resting[i] {
			if d.now().Sub(since) >= classRest {
				unused = append(unused, c)
			}
		}
		if len(unused) == 0 {
			continue
		}
		for _, c := range unused {
			_ = d.conn.SetDeleteElements(t.classes, []element{{Key: t.classElement(c)}})
			ch := &nftables.Chain{Name: c.chainName(), Table: t.nf}
			d.conn.FlushChain(ch)
			d.conn.DelChain(ch)
		}
		if err := d.flush(); err != nil {
			d.log.Debug("unused classes stay for now", "table", t.String(), "classes", len(unused), "error", err)
			continue
		}
		for _, c := range unused {
			delete(d.classes[i], c)
			delete(d.resting[i], c)
		}
	}
}

// Replace implements [dataplane.Dataplane]. It is split into commits of some
// [editSize] elements, each of which completes the Services it touches.
func (d *Dataplane) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service]) error {
	d.forget()
	have := [2]*content{}
	for i, t := range d.tables {
		var err error
		if have[i], err = d.read(ctx, t); err != nil {
			return fmt.Errorf("replace: %w", err)
		}
		if err := d.repairStructure(t, node, have[i]); err != nil {
			return fmt.Errorf("replace: set up table %s: %w", t, err)
		}
		for c := range have[i].classes {
			d.use(i, c, 0)
		}
	}
	r := replacement{Dataplane: d, have: have, failed: map[dataplane.Key]error{}}
	for s := range services {
		if err := supported(s); err != nil {
			r.failed[s.Key] = err
			continue
		}
		if err := r.add(ctx, s); err != nil {
			return fmt.Errorf("replace: %w", err)
		}
	}
	if err := r.finish(ctx); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	d.removeUnusedClasses()
	if len(r.failed) > 0 {
		return &dataplane.Error{Op: "replace", Failed: r.failed}
	}
	return nil
}

// replacement is a Replace under way.
type replacement struct {
	*Dataplane
	have     [2]*content
	pending  []*dataplane.Service
	elements int
	failed   map[dataplane.Key]error
}

// add puts a Service into the next commit, and commits when that is full.
func (r *replacement) add(ctx context.Context, s *dataplane.Service) error {
	r.pending = append(r.pending, s)
	if r.elements += len(s.Frontends) * (len(s.Endpoints) + 1); r.elements < editSize {
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

// commitServices commits Services together. If the kernel rejects them, it
// tries each half, down to the one that is to blame.
func (r *replacement) commitServices(services []*dataplane.Service) error {
	if len(services) == 0 {
		return nil
	}
	var edits [2]*tableEdit
	slots := make([][]netip.AddrPort, len(services))
	for n, s := range services {
		i := index(s.Key.Family)
		if edits[i] == nil {
			edits[i] = &tableEdit{edit: edit{table: r.tables[i]}, classes: map[class]int{}}
		}
		var current []netip.AddrPort
		if first := r.have[i].rows[s.Frontends[0]]; first != nil {
			current = first.slots
		}
		slots[n] = arrange(current, s.Endpoints)
		want := render(s, slots[n])
		for _, f := range s.Frontends {
			edits[i].edit.change(f, r.have[i].rows[f], want)
			if want.class != 0 {
				edits[i].classes[want.class]++
			}
		}
	}
	err := r.commit(edits)
	if err == nil {
		changes := make([]dataplane.Change, len(services))
		after := make(map[dataplane.Key][]netip.AddrPort, len(services))
		for n, s := range services {
			changes[n].New = s
			after[s.Key] = slots[n]
			for _, f := range s.Frontends {
				delete(r.have[index(s.Key.Family)].rows, f)
			}
		}
		r.record(changes, edits, after)
		return nil
	}
	if !isRejection(err) {
		return err
	}
	if len(services) == 1 {
		r.leave(services[0], err)
		return nil
	}
	half := len(services) / 2
	return errors.Join(r.commitServices(services[:half]), r.commitServices(services[half:]))
}

// leave notes that a Service failed, and leaves what the kernel holds for it to
// the next Replace.
func (r *replacement) leave(s *dataplane.Service, err error) {
	r.failed[s.Key] = err
	i := index(s.Key.Family)
	for _, f := range s.Frontends {
		if row := r.have[i].rows[f]; row != nil && row.class != 0 {
			r.use(i, row.class, 1)
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
	for i, t := range r.tables {
		e := &tableEdit{edit: edit{table: t}, classes: map[class]int{}}
		send := func() error {
			var edits [2]*tableEdit
			edits[i] = e
			err := r.commit(edits)
			e = &tableEdit{edit: edit{table: t}, classes: map[class]int{}}
			return err
		}
		for f, row := range r.have[i].rows {
			if e.edit.change(f, row, nil); e.elements >= editSize {
				if err := send(); err != nil {
					return err
				}
			}
		}
		for s, set := range t.rowSets() {
			for _, el := range r.have[i].foreign[set.Name] {
				e.delete(s, element{Key: el.Key})
			}
		}
		if err := send(); err != nil {
			return err
		}
	}
	return nil
}
