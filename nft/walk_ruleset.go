package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// kernelRuleset reads rules and elements from the kernel on demand.
type kernelRuleset struct {
	conn   *nftables.Conn
	table  *table
	base   []*nftables.Chain
	chains map[string][]rule
	// found contains elements that change with a new generation only.
	found map[string]map[string]*element
	// intervals contains the elements of interval sets.
	intervals map[string][]element
}

func newKernelRuleset(conn *nftables.Conn, t *table) *kernelRuleset {
	return &kernelRuleset{
		conn: conn, table: t,
		chains: map[string][]rule{}, found: map[string]map[string]*element{}, intervals: map[string][]element{},
	}
}

func (r *kernelRuleset) baseChains() ([]*nftables.Chain, error) {
	if r.base == nil {
		chains, err := r.conn.ListChainsOfTableFamily(r.table.nf.Family)
		if err != nil {
			return nil, fmt.Errorf("list the chains of table %s: %w", r.table, err)
		}
		r.base = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != r.table.nf.Name || c.Hooknum == nil })
	}
	return r.base, nil
}

func (r *kernelRuleset) rules(chain string) ([]rule, error) {
	if rules, ok := r.chains[chain]; ok {
		return rules, nil
	}
	read, err := r.conn.GetRules(r.table.nf, &nftables.Chain{Name: chain})
	if err != nil {
		return nil, err
	}
	rules := make([]rule, 0, len(read))
	for _, n := range read {
		comment, _ := userdata.GetString(n.UserData, userdata.TypeComment)
		rules = append(rules, rule{comment: comment, exprs: n.Exprs})
	}
	r.chains[chain] = rules
	return rules, nil
}

func (r *kernelRuleset) find(set string, key []byte) (element, bool, error) {
	if r.table.isInterval(set) {
		elements, ok := r.intervals[set]
		if !ok {
			var err error
			if elements, err = r.conn.GetSetElements(&nftables.Set{Table: r.table.nf, Name: set}); err != nil {
				return element{}, false, err
			}
			slices.SortStableFunc(elements, func(a, b element) int { return slices.Compare(a.Key, b.Key) })
			r.intervals[set] = elements
		}
		return element{Key: key}, intervalsContain(elements, key), nil
	}
	if e, ok := r.found[set][string(key)]; ok {
		if e == nil {
			return element{}, false, nil
		}
		return *e, true, nil
	}
	elements, err := r.conn.FindSetElements(&nftables.Set{Table: r.table.nf, Name: set}, []element{{Key: key}})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return element{}, false, err
	}
	if r.found[set] == nil {
		r.found[set] = map[string]*element{}
	}
	dynamic := strings.HasPrefix(set, affinityPrefix) || set == r.table.ahead.Name
	if err != nil || len(elements) == 0 {
		if !dynamic {
			r.found[set][string(key)] = nil
		}
		return element{}, false, nil
	}
	e := elements[0]
	if dynamic {
		return e, true, nil
	}
	if r.table.isVerdictMap(set) {
		if e.VerdictData, err = parseVerdict(e.Val); err != nil {
			return element{}, false, err
		}
	}
	r.found[set][string(key)] = &e
	return e, true, nil
}

// parseVerdict decodes the value of a verdict map's element.
func parseVerdict(val []byte) (*expr.Verdict, error) {
	attrs, err := netlink.NewAttributeDecoder(val)
	if err != nil {
		return nil, fmt.Errorf("decode a verdict: %w", err)
	}
	attrs.ByteOrder = binary.BigEndian
	v := &expr.Verdict{}
	for attrs.Next() {
		switch attrs.Type() {
		case unix.NFTA_VERDICT_CODE:
			v.Kind = expr.VerdictKind(attrs.Int32())
		case unix.NFTA_VERDICT_CHAIN:
			v.Chain = attrs.String()
		}
	}
	if err := attrs.Err(); err != nil {
		return nil, fmt.Errorf("decode a verdict: %w", err)
	}
	return v, nil
}

func (t *table) isInterval(set string) bool {
	return slices.ContainsFunc([]*nftables.Set{t.nodePortNetworks, t.podCIDRs, t.localPods, t.serviceCIDRs},
		func(s *nftables.Set) bool { return s.Name == set })
}

func (t *table) isVerdictMap(set string) bool {
	return slices.ContainsFunc(t.verdicts[:], func(s *nftables.Set) bool { return s.Name == set })
}

// renderedRuleset contains the rules and elements that a Dataplane would program.
type renderedRuleset struct {
	table    *table
	base     []*nftables.Chain
	chains   map[string][]rule
	elements map[string]map[string]element
	nodeSets map[string][]element
}

// renderRuleset renders the table of one family with the functions that Apply and Replace use.
func renderRuleset(t *table, node dataplane.Node, services []*dataplane.Service) *renderedRuleset {
	d := &Dataplane{
		tables: [2]*table{newTable(dataplane.IPv4), newTable(dataplane.IPv6)}, renderer: endpointRenderer{}, node: node,
		minSharedFrontends: minSharedFrontends,
	}
	d.resetState()
	changes := make([]dataplane.Change, 0, len(services))
	for _, s := range services {
		if !isSupportedScheduler(s.Scheduler) {
			plain := *s
			plain.Scheduler = ""
			s = &plain
		}
		changes = append(changes, dataplane.Change{New: s})
	}
	failed := map[dataplane.Key]error{}
	p, b := d.planChanges(changes, failed), d.newBatch()
	for _, c := range changes {
		p.addChange(b, c)
	}
	r := &renderedRuleset{table: t, chains: map[string][]rule{}, elements: map[string]map[string]element{}, nodeSets: map[string][]element{}}
	i := familyIndex(t.family)
	e := &b.tables[i]
	for set, elements := range e.add {
		r.add(e.table.frontendSets[set].Name, elements)
	}
	var bits []int
	for set, elements := range e.addRanges {
		r.add(e.table.rangeSetByKey(set).Name, elements)
		bits = append(bits, set.bits)
	}
	for _, diff := range d.sharedSetDiffs(i, e) {
		r.add(diff.set.Name, diff.added)
	}
	slices.Sort(bits)
	chains := e.table.chains(node, slices.Compact(bits))
	for v := range e.verdictElements {
		if v.hasOwnChain() {
			chains = append(chains, e.table.verdictElementChain(v))
		}
		r.add(v.vmap.String(), []element{{Key: e.table.encodeClass(v.serviceClass), VerdictData: v.verdict()}})
	}
	for _, c := range chains {
		r.chains[c.Name] = c.rules
		if c.Hooknum != nil {
			r.base = append(r.base, c.Chain)
		}
	}
	for set, elements := range e.table.nodeSetElements(node) {
		if set.Interval {
			r.nodeSets[set.Name] = elements
		} else {
			r.add(set.Name, elements)
		}
	}
	return r
}

func (r *renderedRuleset) add(set string, elements []element) {
	if r.elements[set] == nil {
		r.elements[set] = map[string]element{}
	}
	for _, e := range elements {
		r.elements[set][string(e.Key)] = e
	}
}

func (r *renderedRuleset) baseChains() ([]*nftables.Chain, error) { return r.base, nil }

func (r *renderedRuleset) rules(chain string) ([]rule, error) { return r.chains[chain], nil }

func (r *renderedRuleset) find(set string, key []byte) (element, bool, error) {
	if elements, ok := r.nodeSets[set]; ok {
		return element{Key: key}, intervalsContain(elements, key), nil
	}
	e, ok := r.elements[set][string(key)]
	return e, ok, nil
}
