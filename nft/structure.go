package nft

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// repairStructure brings the table, its sets, chains and rules to what they must be,
// in one transaction, and have up to date with it. It writes nothing if they are.
// Named objects, such as counters, that somebody has added are left alone: without a
// rule they do nothing.
func (d *Dataplane) repairStructure(t *table, node dataplane.Node, have *tableContent) error {
	if have.table == nil {
		*have = tableContent{}
		return d.repairTable(t, node, have)
	}
	if err := d.deleteUnexpected(t, have); err != nil {
		return err
	}
	return d.repairTable(t, node, have)
}

// repairTable changes rules first, because they refer to chains and sets; then what maps
// refer to; then sets, because maps refer to chains; then chains.
func (d *Dataplane) repairTable(t *table, node dataplane.Node, have *tableContent) error {
	if have.table == nil {
		if err := d.createTable(t); err != nil {
			return err
		}
	} else if flags := d.desiredFlags(have.table.Flags); flags != have.table.Flags || d.ownTables && have.table.Owner != d.portID {
		// The owner may have ended since the table was read: that is no generation.
		d.conn.AddTable(&nftables.Table{Name: t.nf.Name, Family: t.nf.Family, Flags: flags})
	}
	wanted := t.chains(node, have.rangePrefixLengths)
	if t.detached {
		wanted = slices.DeleteFunc(wanted, func(ch chain) bool { return ch.Hooknum != nil })
	}
	for b, intact := range have.verdictElements {
		if intact && b.hasOwnChain() {
			wanted = append(wanted, t.verdictElementChain(b))
		}
	}
	gone := t.obsoleteSets(have)
	wrong := have.mistypedCounters()
	changed, remove := d.flushChains(t, have, wanted, len(gone) > 0 || len(wrong) > 0)
	// Elements that go to a chain hold on to it as rules do.
	for b, intact := range have.verdictElements {
		if !intact {
			_ = d.conn.SetDeleteElements(t.verdicts[b.vmap], []element{{Key: t.encodeClass(b.serviceClass)}})
			delete(have.verdictElements, b)
		}
	}
	for _, s := range gone {
		d.conn.DelSet(s)
		delete(have.sets, s.Name)
	}
	for _, ch := range remove {
		d.conn.DelChain(ch)
		delete(have.chains, ch.Name)
	}
	for _, o := range wrong {
		o.Table = t.nf
		d.conn.DeleteObject(o)
	}
	for _, c := range allCounters() {
		if typ, ok := have.objects[string(c)]; !ok || typ != nftables.ObjTypeCounter {
			d.conn.AddObj(t.counterObject(c))
		}
	}
	newPorts := have.sets[t.endpointPorts.Name] == nil
	for _, s := range t.desiredSets(have) {
		if have.sets[s.Name] == nil {
			_ = d.conn.AddSet(s, nil)
		}
	}
	if newPorts && len(have.ports) > 0 { // there may have been one, in use
		_ = d.conn.SetAddElements(t.endpointPorts, portElements(maps.Keys(have.ports)))
	}
	for _, ch := range wanted {
		if have.chains[ch.Name] == nil {
			d.conn.AddChain(ch.Chain)
		}
		if changed[ch.Name] {
			d.addRules(t, ch)
		}
	}
	d.repairNodeSets(t, node, have)
	if err := d.submit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	if newPorts {
		have.portSet = map[uint16]bool{}
		for port := range have.ports {
			have.portSet[port] = true
		}
	}
	return d.repairEndpointPorts(t, have)
}

func portElements(ports iter.Seq[uint16]) []element {
	var all []element
	for port := range ports {
		all = append(all, element{Key: encodePort(port)})
	}
	return all
}

// desiredSets returns the sets that must be there.
func (t *table) desiredSets(have *tableContent) []*nftables.Set {
	wanted := t.sets()
	for _, bits := range have.rangePrefixLengths {
		wanted = append(wanted, t.sourceRangeSet(bits), t.sharedSourceRangeSet(bits))
	}
	return wanted
}

// obsoleteSets returns the sets that must go: those of others, and those of ours that
// are defined otherwise. Anonymous sets go with their rules.
func (t *table) obsoleteSets(have *tableContent) []*nftables.Set {
	wanted := t.desiredSets(have)
	var gone []*nftables.Set
	for name, found := range have.sets {
		i := slices.IndexFunc(wanted, func(s *nftables.Set) bool { return s.Name == name })
		if found.Anonymous || i >= 0 && sameSet(found, wanted[i]) {
			continue
		}
		found.Table = t.nf
		gone = append(gone, found)
	}
	return gone
}

// mistypedCounters returns the objects with the name of one of our counters that are
// none.
func (c *tableContent) mistypedCounters() []*nftables.NamedObj {
	var wrong []*nftables.NamedObj
	for _, name := range allCounters() {
		if typ, ok := c.objects[string(name)]; ok && typ != nftables.ObjTypeCounter {
			wrong = append(wrong, &nftables.NamedObj{Name: string(name), Type: typ})
		}
	}
	return wrong
}

// repairEndpointPorts makes the ports of endpoints those of the endpoints that there are, in
// commits of their own, as there may be many.
func (d *Dataplane) repairEndpointPorts(t *table, have *tableContent) error {
	found := t.renderer.requiredPorts(have)
	var gone, come []element
	for port := range have.portSet {
		if _, ok := found[port]; !ok {
			gone = append(gone, element{Key: encodePort(port)})
		}
	}
	for port := range found {
		if !have.portSet[port] {
			come = append(come, element{Key: encodePort(port)})
		}
	}
	change := func(how func(*nftables.Set, []element) error, elements []element) error {
		for part := range slices.Chunk(elements, d.transactionSize) {
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

// flushChains removes the rules of chains that are not as wanted, or of all chains. It
// returns the names of the chains that need their rules, and the chains to delete.
func (d *Dataplane) flushChains(t *table, have *tableContent, wanted []chain, all bool) (map[string]bool, []*nftables.Chain) {
	changed := map[string]bool{}
	keep := map[string]bool{}
	for _, ch := range wanted {
		found := have.chains[ch.Name]
		if found == nil || !sameChain(found, ch.Chain) {
			changed[ch.Name] = true
			continue
		}
		keep[ch.Name] = true
		if all || !sameRules(t, have.rules[ch.Name], ch.rules) {
			changed[ch.Name] = true
			d.conn.FlushChain(found)
		}
	}
	var remove []*nftables.Chain
	for name, found := range have.chains {
		if !keep[name] && !isBindingChain(name) {
			d.conn.FlushChain(found)
			remove = append(remove, found)
		}
	}
	return changed, remove
}

// isBindingChain reports whether a chain belongs to a rule, with which it comes and goes
// (nf_tables_api.c, nf_tables_addchain, NFT_CHAIN_BINDING).
func isBindingChain(chain string) bool { return strings.HasPrefix(chain, "__chain") }

// deleteUnexpected removes elements that we would never make, in commits of their own,
// before anything is added that might have the same key. Elements that have got a
// statement are replaced by the same without it.
func (d *Dataplane) deleteUnexpected(t *table, have *tableContent) error {
	sets := t.sets()
	for _, bits := range have.rangePrefixLengths {
		sets = append(sets, t.sourceRangeSet(bits), t.sharedSourceRangeSet(bits))
	}
	ofNode := t.nodeSetElements(dataplane.Node{}) // repairNodeSets does these
	for _, set := range sets {
		if _, ok := ofNode[set]; ok {
			continue
		}
		foreign := have.unexpected[set.Name]
		if slices.ContainsFunc(foreign, isCatchAll) {
			if err := d.deleteCatchAll(t, set); err != nil {
				return err
			}
			foreign = slices.DeleteFunc(foreign, isCatchAll)
		}
		for part := range slices.Chunk(foreign, d.transactionSize) {
			_ = d.conn.SetDeleteElements(set, elementKeys(part)) // the library keeps the error for Flush
			if err := d.submit(); err != nil {
				return fmt.Errorf("delete foreign elements from set %s: %w", set.Name, err)
			}
		}
		for part := range slices.Chunk(have.extended[set.Name], d.transactionSize) {
			_ = d.conn.SetDeleteElements(set, elementKeys(part))
			_ = d.conn.SetAddElements(set, t.plainElements(set, part))
			if err := d.submit(); err != nil {
				return fmt.Errorf("remove statements from elements of set %s: %w", set.Name, err)
			}
		}
	}
	return nil
}

// isCatchAll reports whether an element is a set's catch-all (`*`).
func isCatchAll(e element) bool { return len(e.Key) == 0 }

// elementKeys returns elements as the kernel needs them to be deleted.
func elementKeys(elements []element) []element {
	keys := make([]element, len(elements))
	for i, e := range elements {
		keys[i] = element{Key: e.Key, IntervalEnd: e.IntervalEnd}
	}
	return keys
}

// plainElements returns elements that were read as they are added. Elements of verdict maps
// that go elsewhere than ours are left out.
func (t *table) plainElements(set *nftables.Set, elements []element) []element {
	m := slices.Index(t.verdicts[:], set)
	if m < 0 {
		return elements
	}
	var all []element
	for _, e := range elements {
		class, err := t.parseClass(e.Key)
		if b := (verdictElement{verdictMap(m), class}); err == nil && isVerdict(e.Val, b.verdict()) {
			all = append(all, element{Key: e.Key, VerdictData: b.verdict(), Comment: e.Comment})
		}
	}
	return all
}

func (d *Dataplane) addRules(t *table, ch chain) {
	for _, r := range ch.rules {
		d.conn.AddRule(&nftables.Rule{Table: t.nf, Chain: ch.Chain, Exprs: r.exprs, UserData: r.userData()})
	}
}

// repairNodeSets makes the sets that follow the node what they must be.
func (d *Dataplane) repairNodeSets(t *table, node dataplane.Node, have *tableContent) {
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
	for set, want := range t.nodeSetElements(node) {
		found := have.nodeElements[set.Name]
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
