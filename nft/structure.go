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

// repairStructure repairs the table, its sets, chains and rules, and updates have. It
// deletes unexpected elements in separate commits first. It writes nothing if the structure
// is correct. It keeps named objects of other programs, such as counters: without a rule,
// they have no effect.
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

// repairTable creates the table if necessary and repairs its structure. It changes rules
// first, because they refer to chains and sets; then the elements of maps, because they
// refer to chains; then sets; then chains.
func (d *Dataplane) repairTable(t *table, node dataplane.Node, have *tableContent) error {
	if have.table == nil {
		if err := d.createTable(t); err != nil {
			return err
		}
	} else if flags := d.desiredFlags(have.table.Flags); d.dryRun == nil && (flags != have.table.Flags || d.ownTables && have.table.Owner != d.portID) {
		// The owner may have exited since the table was read, without a new generation.
		d.conn.AddTable(&nftables.Table{Name: t.nf.Name, Family: t.nf.Family, Flags: flags})
	}
	desired := t.chains(node, have.rangePrefixLengths)
	if t.detached {
		desired = slices.DeleteFunc(desired, func(ch chain) bool { return ch.Hooknum != nil })
	}
	for b, intact := range have.verdictElements {
		if intact && b.hasOwnChain() {
			desired = append(desired, t.verdictElementChain(b))
		}
	}
	obsolete := t.obsoleteSets(have)
	mistyped := have.mistypedCounters()
	changed, obsoleteChains := d.flushChains(t, have, desired, len(obsolete) > 0 || len(mistyped) > 0)
	// Elements that refer to a chain keep it in use, as rules do.
	for b, intact := range have.verdictElements {
		if !intact {
			d.differ(t, have, fmt.Sprintf("element %s of map %s", b.serviceClass, t.verdicts[b.vmap].Name), "wrong chain")
			_ = d.conn.SetDeleteElements(t.verdicts[b.vmap], []element{{Key: t.encodeClass(b.serviceClass)}})
			delete(have.verdictElements, b)
		}
	}
	for _, s := range obsolete {
		problem := dataplane.Unexpected
		if slices.ContainsFunc(t.desiredSets(have), func(want *nftables.Set) bool { return want.Name == s.Name }) {
			problem = dataplane.Differs
		}
		d.differ(t, have, "set "+s.Name, problem)
		d.conn.DelSet(s)
		delete(have.sets, s.Name)
	}
	for _, ch := range obsoleteChains {
		d.conn.DelChain(ch)
		delete(have.chains, ch.Name)
	}
	for _, o := range mistyped {
		d.differ(t, have, "object "+o.Name, dataplane.Differs)
		o.Table = t.nf
		d.conn.DeleteObject(o)
	}
	for _, c := range allCounters() {
		if typ, ok := have.objects[string(c)]; !ok || typ != nftables.ObjTypeCounter {
			if !ok {
				d.differ(t, have, "counter "+string(c), dataplane.Missing)
			}
			d.conn.AddObj(t.counterObject(c))
		}
	}
	for _, s := range t.desiredSets(have) {
		if have.sets[s.Name] == nil && !slices.ContainsFunc(obsolete, func(o *nftables.Set) bool { return o.Name == s.Name }) {
			d.differ(t, have, "set "+s.Name, dataplane.Missing)
		}
	}
	newPorts := have.sets[t.endpointPorts.Name] == nil
	for _, s := range t.desiredSets(have) {
		if have.sets[s.Name] == nil {
			_ = d.conn.AddSet(s, nil)
		}
	}
	if newPorts && len(have.ports) > 0 { // the old set may have been in use
		_ = d.conn.SetAddElements(t.endpointPorts, portElements(maps.Keys(have.ports)))
	}
	for _, ch := range desired {
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

// desiredSets returns the sets that must exist.
func (t *table) desiredSets(have *tableContent) []*nftables.Set {
	desired := t.sets()
	for _, bits := range have.rangePrefixLengths {
		desired = append(desired, t.sourceRangeSet(bits), t.sharedSourceRangeSet(bits))
	}
	return desired
}

// obsoleteSets returns the sets to delete: sets of other programs, and our sets with a
// different definition. The kernel deletes anonymous sets with their rules.
func (t *table) obsoleteSets(have *tableContent) []*nftables.Set {
	desired := t.desiredSets(have)
	var obsolete []*nftables.Set
	for name, found := range have.sets {
		i := slices.IndexFunc(desired, func(s *nftables.Set) bool { return s.Name == name })
		if found.Anonymous || i >= 0 && sameSet(found, desired[i]) {
			continue
		}
		found.Table = t.nf
		obsolete = append(obsolete, found)
	}
	return obsolete
}

// mistypedCounters returns the objects that have the name of one of our counters but
// another type.
func (c *tableContent) mistypedCounters() []*nftables.NamedObj {
	var mistyped []*nftables.NamedObj
	for _, name := range allCounters() {
		if typ, ok := c.objects[string(name)]; ok && typ != nftables.ObjTypeCounter {
			mistyped = append(mistyped, &nftables.NamedObj{Name: string(name), Type: typ})
		}
	}
	return mistyped
}

// repairEndpointPorts makes the set endpoint-ports match the endpoints, in separate
// commits, because there may be many ports.
func (d *Dataplane) repairEndpointPorts(t *table, have *tableContent) error {
	required := t.renderer.requiredPorts(have)
	var removed, added []element
	for port := range have.portSet {
		if _, ok := required[port]; !ok {
			removed = append(removed, element{Key: encodePort(port)})
		}
	}
	for port := range required {
		if !have.portSet[port] {
			added = append(added, element{Key: encodePort(port)})
		}
	}
	if len(removed)+len(added) > 0 && have.sets[t.endpointPorts.Name] != nil {
		d.differ(t, have, "set "+t.endpointPorts.Name, dataplane.Differs, formatPorts(removed), formatPorts(added))
	}
	change := func(write func(*nftables.Set, []element) error, elements []element) error {
		for part := range slices.Chunk(elements, d.transactionSize) {
			_ = write(t.endpointPorts, part) // the library keeps the error for Flush
			if err := d.submit(); err != nil {
				return fmt.Errorf("repair set %s: %w", t.endpointPorts.Name, err)
			}
		}
		return nil
	}
	if err := change(d.conn.SetDeleteElements, removed); err != nil {
		return err
	}
	return change(d.conn.SetAddElements, added)
}

// flushChains flushes the chains whose rules differ from the desired ones, or all chains.
// It returns the names of the chains that need their rules, and the chains to delete.
func (d *Dataplane) flushChains(t *table, have *tableContent, desired []chain, all bool) (map[string]bool, []*nftables.Chain) {
	changed := map[string]bool{}
	keep := map[string]bool{}
	for _, ch := range desired {
		found := have.chains[ch.Name]
		switch {
		case found == nil:
			d.differ(t, have, "chain "+ch.Name, dataplane.Missing)
		case !sameChain(found, ch.Chain):
			d.differ(t, have, "chain "+ch.Name, dataplane.Differs)
		}
		if found == nil || !sameChain(found, ch.Chain) {
			changed[ch.Name] = true
			continue
		}
		keep[ch.Name] = true
		same := sameRules(t, have.rules[ch.Name], ch.rules)
		if !same {
			d.differ(t, have, "chain "+ch.Name, rulesProblem(t, have.rules[ch.Name], ch.rules))
		}
		if all || !same {
			changed[ch.Name] = true
			d.conn.FlushChain(found)
		}
	}
	var remove []*nftables.Chain
	for name, found := range have.chains {
		if !keep[name] && !isBindingChain(name) {
			if !slices.ContainsFunc(desired, func(ch chain) bool { return ch.Name == name }) {
				d.differ(t, have, "chain "+name, dataplane.Unexpected)
			}
			d.conn.FlushChain(found)
			remove = append(remove, found)
		}
	}
	return changed, remove
}

// isBindingChain reports whether a chain belongs to a rule, which creates and deletes it
// (nf_tables_api.c, nf_tables_addchain, NFT_CHAIN_BINDING).
func isBindingChain(chain string) bool { return strings.HasPrefix(chain, "__chain") }

// deleteUnexpected deletes elements that this package never writes, in separate commits,
// before elements with the same keys are added. It replaces elements to which another
// program has added a statement.
func (d *Dataplane) deleteUnexpected(t *table, have *tableContent) error {
	sets := t.sets()
	for _, bits := range have.rangePrefixLengths {
		sets = append(sets, t.sourceRangeSet(bits), t.sharedSourceRangeSet(bits))
	}
	nodeSets := t.nodeSetElements(dataplane.Node{}) // repairNodeSets repairs these
	for _, set := range sets {
		if _, ok := nodeSets[set]; ok {
			continue
		}
		unexpected := have.unexpected[set.Name]
		if len(unexpected) > 0 {
			d.differ(t, have, "elements of set "+set.Name, dataplane.Unexpected, t.formatElements(set, unexpected))
		}
		if extended := have.extended[set.Name]; len(extended) > 0 {
			d.differ(t, have, "elements of set "+set.Name, "a statement was added", t.formatElements(set, extended))
		}
		if slices.ContainsFunc(unexpected, isCatchAll) {
			if err := d.deleteCatchAll(t, set); err != nil {
				return err
			}
			unexpected = slices.DeleteFunc(unexpected, isCatchAll)
		}
		for part := range slices.Chunk(unexpected, d.transactionSize) {
			_ = d.conn.SetDeleteElements(set, elementKeys(part)) // the library keeps the error for Flush
			if err := d.submit(); err != nil {
				return fmt.Errorf("delete unexpected elements from set %s: %w", set.Name, err)
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

// isCatchAll reports whether an element is the catch-all element (`*`) of a set.
func isCatchAll(e element) bool { return len(e.Key) == 0 }

// elementKeys returns elements in the form that the kernel needs for their deletion.
func elementKeys(elements []element) []element {
	keys := make([]element, len(elements))
	for i, e := range elements {
		keys[i] = element{Key: e.Key, IntervalEnd: e.IntervalEnd}
	}
	return keys
}

// plainElements returns elements that were read in the form in which they are added. It
// leaves out elements of verdict maps that refer to a wrong chain.
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

// repairNodeSets makes the sets that depend on the node match the node.
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
			d.differ(t, have, "set "+set.Name, dataplane.Differs, t.formatElements(set, found), t.formatElements(set, want))
			d.conn.FlushSet(set)
		}
		_ = d.conn.SetAddElements(set, want)
	}
}
