package nft

import (
	"fmt"
	"slices"

	"fairlead/dataplane"

	"github.com/google/nftables"
)

// repairStructure brings the table, its sets, chains and rules to what they
// must be, and have up to date with it. It writes nothing if they are. Named
// objects, such as counters, that somebody has added are left alone: without a
// rule they do nothing.
//
// What can be mended in place is. If the kernel refuses that, as when a set of
// another type is in use by a rule, or somebody's own set refers to ours, the
// table is made anew.
func (d *Dataplane) repairStructure(t *table, node dataplane.Node, have *content) error {
	if have.table != nil {
		err := have.mendable()
		if err == nil {
			err = d.deleteForeign(t, have)
		}
		if err == nil {
			err = d.mend(t, node, have)
		}
		if err == nil {
			return nil
		}
		d.log.Warn("table is made anew, as it can't be mended", "table", t.String(), "error", err)
		if err := removeTable(d.conn, d.flush, t); err != nil {
			return err
		}
	}
	*have = content{}
	return d.mend(t, node, have)
}

// mendable returns an error if there is something that can't be removed by
// itself: an element without a key is a set's catch-all (`*`), and those the
// library cannot delete.
func (c *content) mendable() error {
	for _, name := range counters() {
		if typ, ok := c.objects[string(name)]; ok && typ != nftables.ObjTypeCounter {
			return fmt.Errorf("%s is no counter", name)
		}
	}
	for set, elements := range c.foreign {
		if slices.ContainsFunc(elements, func(e element) bool { return len(e.Key) == 0 }) {
			return fmt.Errorf("set %s has a catch-all element", set)
		}
	}
	return nil
}

func (d *Dataplane) mend(t *table, node dataplane.Node, have *content) error {
	if have.table == nil || have.table.Flags != t.nf.Flags {
		d.conn.AddTable(t.nf)
	}
	for _, c := range counters() {
		if _, ok := have.objects[string(c)]; !ok {
			d.conn.AddObj(t.object(c))
		}
	}
	wanted := t.chains(node, have.rangeBits)
	for b, intact := range have.branches {
		if intact && b.own() {
			wanted = append(wanted, t.branchChain(b))
		}
	}
	// Rules first: they hold on to chains and sets.
	changed := d.flushChains(t, have, wanted)
	d.mendSets(t, have)
	for _, ch := range wanted {
		if have.chains[ch.Name] == nil {
			d.conn.AddChain(ch.Chain)
		}
		if changed[ch.Name] {
			d.addRules(t, ch)
		}
	}
	d.mendNodeSets(t, node, have)
	if err := d.submit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return d.mendPorts(t, have)
}

// mendPorts makes the ports of endpoints those of the endpoints that there are, in
// commits of their own, as there may be many.
func (d *Dataplane) mendPorts(t *table, have *content) error {
	if t.virtual { // the Services tell, and not what was read
		return nil
	}
	var gone, come []element
	for port := range have.portSet {
		if have.ports[port] == 0 {
			gone = append(gone, element{Key: portElement(port)})
		}
	}
	for port := range have.ports {
		if !have.portSet[port] {
			come = append(come, element{Key: portElement(port)})
		}
	}
	change := func(how func(*nftables.Set, []element) error, elements []element) error {
		for part := range slices.Chunk(elements, d.editSize) {
			_ = how(t.endpointPorts, part) // the library keeps the error for Flush
			if err := d.submit(); err != nil {
				return fmt.Errorf("mend set %s: %w", t.endpointPorts.Name, err)
			}
		}
		return nil
	}
	if err := change(d.conn.SetDeleteElements, gone); err != nil {
		return err
	}
	return change(d.conn.SetAddElements, come)
}

// flushChains removes chains that are not wanted, and the rules of those that
// are not as wanted. It returns the names of the chains that need their rules.
func (d *Dataplane) flushChains(t *table, have *content, wanted []chain) map[string]bool {
	changed := map[string]bool{}
	keep := map[string]bool{}
	for _, ch := range wanted {
		found := have.chains[ch.Name]
		if found == nil || !sameChain(found, ch.Chain) {
			changed[ch.Name] = true
			continue
		}
		keep[ch.Name] = true
		if !sameRules(t, have.rules[ch.Name], ch.rules) {
			changed[ch.Name] = true
			d.conn.FlushChain(found)
		}
	}
	var remove []*nftables.Chain
	for name, found := range have.chains {
		if !keep[name] {
			d.conn.FlushChain(found)
			remove = append(remove, found)
		}
	}
	// Elements that go to a chain hold on to it as rules do.
	for b, intact := range have.branches {
		if !intact {
			_ = d.conn.SetDeleteElements(t.verdicts[b.in], []element{{Key: t.classElement(b.class)}})
			delete(have.branches, b)
		}
	}
	for _, found := range remove {
		d.conn.DelChain(found)
		delete(have.chains, found.Name)
	}
	return changed
}

// deleteForeign removes elements that we would never make, in commits of their own,
// before anything is added that might have the same key. Elements that have got a
// statement are replaced by the same without it.
func (d *Dataplane) deleteForeign(t *table, have *content) error {
	sets := t.sets()
	for _, bits := range have.rangeBits {
		sets = append(sets, t.ranges(bits), t.sharedRanges(bits))
	}
	ofNode := t.nodeSets(dataplane.Node{}) // mendNodeSets does these
	for _, set := range sets {
		if _, ok := ofNode[set]; ok {
			continue
		}
		for part := range slices.Chunk(have.foreign[set.Name], d.editSize) {
			_ = d.conn.SetDeleteElements(set, deletionKeys(part)) // the library keeps the error for Flush
			if err := d.submit(); err != nil {
				return fmt.Errorf("delete foreign elements from set %s: %w", set.Name, err)
			}
		}
		for part := range slices.Chunk(have.extended[set.Name], d.editSize) {
			_ = d.conn.SetDeleteElements(set, deletionKeys(part))
			_ = d.conn.SetAddElements(set, t.plain(set, part))
			if err := d.submit(); err != nil {
				return fmt.Errorf("remove statements from elements of set %s: %w", set.Name, err)
			}
		}
	}
	return nil
}

// deletionKeys returns elements as the kernel needs them to be deleted.
func deletionKeys(elements []element) []element {
	keys := make([]element, len(elements))
	for i, e := range elements {
		keys[i] = element{Key: e.Key, IntervalEnd: e.IntervalEnd}
	}
	return keys
}

// plain returns elements that were read as they are added. Elements of verdict maps
// that go elsewhere than ours are left out.
func (t *table) plain(set *nftables.Set, elements []element) []element {
	m := slices.Index(t.verdicts[:], set)
	if m < 0 {
		return elements
	}
	var all []element
	for _, e := range elements {
		class, err := t.parseClass(e.Key)
		if b := (branch{verdictMap(m), class}); err == nil && isVerdict(e.Val, b.verdict()) {
			all = append(all, element{Key: e.Key, VerdictData: b.verdict(), Comment: e.Comment})
		}
	}
	return all
}

func (d *Dataplane) mendSets(t *table, have *content) {
	wanted := t.sets()
	for _, bits := range have.rangeBits {
		wanted = append(wanted, t.ranges(bits), t.sharedRanges(bits))
	}
	for name, found := range have.sets {
		i := slices.IndexFunc(wanted, func(s *nftables.Set) bool { return s.Name == name })
		if i < 0 || !sameSet(found, wanted[i]) {
			found.Table = t.nf
			d.conn.DelSet(found)
			delete(have.sets, name)
		}
	}
	for _, s := range wanted {
		if have.sets[s.Name] == nil {
			_ = d.conn.AddSet(s, nil)
		}
	}
}

func (d *Dataplane) addRules(t *table, ch chain) {
	for _, r := range ch.rules {
		d.conn.AddRule(&nftables.Rule{Table: t.nf, Chain: ch.Chain, Exprs: r.exprs, UserData: r.userData()})
	}
}

// mendNodeSets makes the sets that follow the node what they must be.
func (d *Dataplane) mendNodeSets(t *table, node dataplane.Node, have *content) {
	same := func(a, b element) bool { return slices.Equal(a.Key, b.Key) && a.IntervalEnd == b.IntervalEnd }
	byKey := func(a, b element) int {
		if c := slices.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		if a.IntervalEnd {
			return -1
		}
		return 1
	}
	for set, want := range t.nodeSets(node) {
		found := have.node[set.Name]
		slices.SortFunc(found, byKey)
		slices.SortFunc(want, byKey)
		if slices.EqualFunc(found, want, same) && len(have.extended[set.Name]) == 0 {
			continue
		}
		if have.sets[set.Name] != nil {
			d.conn.FlushSet(set)
		}
		_ = d.conn.SetAddElements(set, want)
	}
}
