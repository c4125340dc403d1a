package nft

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// ruleset reads and changes nftables. *nftables.Conn implements it.
type ruleset interface {
	GetGen() (*nftables.Gen, error)
	ListTablesOfFamily(nftables.TableFamily) ([]*nftables.Table, error)
	ListChainsOfTableFamily(nftables.TableFamily) ([]*nftables.Chain, error)
	GetRules(*nftables.Table, *nftables.Chain) ([]*nftables.Rule, error)
	GetNamedObjects(*nftables.Table) ([]nftables.Obj, error)
	GetSets(*nftables.Table) ([]*nftables.Set, error)

	AddTable(*nftables.Table) *nftables.Table
	DelTable(*nftables.Table)
	AddChain(*nftables.Chain) *nftables.Chain
	FlushChain(*nftables.Chain)
	DelChain(*nftables.Chain)
	AddRule(*nftables.Rule) *nftables.Rule
	AddObj(nftables.Obj) nftables.Obj
	DeleteObject(nftables.Obj)
	AddSet(*nftables.Set, []element) error
	FlushSet(*nftables.Set)
	DelSet(*nftables.Set)
	SetAddElements(*nftables.Set, []element) error
	SetDeleteElements(*nftables.Set, []element) error

	Flush() error
	CloseLasting() error
}

// dryRunRuleset reads the kernel, and records changes instead of making them.
type dryRunRuleset struct {
	*nftables.Conn

	dryRun *dataplane.DryRun
}

var _, _ ruleset = (*nftables.Conn)(nil), dryRunRuleset{}

// Flush sends nothing.
func (r dryRunRuleset) Flush() error { return nil }

func (r dryRunRuleset) AddTable(t *nftables.Table) *nftables.Table {
	r.record(dataplane.Add, "table", t, "")
	return t
}

func (r dryRunRuleset) DelTable(t *nftables.Table) { r.record(dataplane.Delete, "table", t, "") }

func (r dryRunRuleset) AddChain(c *nftables.Chain) *nftables.Chain {
	r.record(dataplane.Add, "chain", c.Table, c.Name)
	return c
}

func (r dryRunRuleset) FlushChain(c *nftables.Chain) {
	r.record(dataplane.Modify, "chain", c.Table, c.Name)
}

func (r dryRunRuleset) DelChain(c *nftables.Chain) {
	r.record(dataplane.Delete, "chain", c.Table, c.Name)
}

func (r dryRunRuleset) AddRule(rule *nftables.Rule) *nftables.Rule {
	r.record(dataplane.Add, "rule", rule.Table, rule.Chain.Name)
	return rule
}

func (r dryRunRuleset) AddObj(o nftables.Obj) nftables.Obj {
	if o, ok := o.(*nftables.NamedObj); ok {
		r.record(dataplane.Add, "counter", o.Table, o.Name)
	}
	return o
}

func (r dryRunRuleset) DeleteObject(o nftables.Obj) {
	if o, ok := o.(*nftables.NamedObj); ok {
		r.record(dataplane.Delete, "counter", o.Table, o.Name)
	}
}

func (r dryRunRuleset) AddSet(s *nftables.Set, elements []element) error {
	r.record(dataplane.Add, "set", s.Table, s.Name)
	return r.SetAddElements(s, elements)
}

func (r dryRunRuleset) FlushSet(s *nftables.Set) { r.record(dataplane.Modify, "set", s.Table, s.Name) }

func (r dryRunRuleset) DelSet(s *nftables.Set) { r.record(dataplane.Delete, "set", s.Table, s.Name) }

func (r dryRunRuleset) SetAddElements(s *nftables.Set, elements []element) error {
	r.dryRun.Record(dataplane.Add, "element", objectName(s.Table, s.Name), len(elements))
	return nil
}

func (r dryRunRuleset) SetDeleteElements(s *nftables.Set, elements []element) error {
	r.dryRun.Record(dataplane.Delete, "element", objectName(s.Table, s.Name), len(elements))
	return nil
}

func (r dryRunRuleset) record(op, object string, t *nftables.Table, name string) {
	r.dryRun.Record(op, object, objectName(t, name), 1)
}

// objectName identifies an object of a table, or the table itself if name is empty.
func objectName(t *nftables.Table, name string) string {
	family := "ip"
	if t.Family == nftables.TableFamilyIPv6 {
		family = "ip6"
	}
	if name == "" {
		return family + " " + t.Name
	}
	return fmt.Sprintf("%s in table %s %s", name, family, t.Name)
}

// startDryRun makes d record its changes instead of making them.
func (d *Dataplane) startDryRun(conn *nftables.Conn, r *dataplane.DryRun) {
	d.dryRun, d.conn = r, dryRunRuleset{conn, r}
	d.flush = d.conn.Flush
}

// prepareDryRun replaces what cannot be repaired in place by an empty table, and records it.
func (d *Dataplane) prepareDryRun(t *table, have *tableContent) {
	reason := d.rebuildReason(have)
	switch {
	case have.table == nil:
		d.dryRun.Differ("table "+t.String(), dataplane.Missing, nil, nil)
	case reason != "":
		d.dryRun.Differ("table "+t.String(), reason, nil, nil)
		d.dryRun.Record(dataplane.Delete, "table", t.String(), 1)
		*have = tableContent{}
	case have.table.Flags&nftables.TableFlagDormant != 0:
		d.dryRun.Differ("table "+t.String(), "dormant", nil, nil)
		d.dryRun.Record(dataplane.Modify, "table", t.String(), 1)
	}
	if have.leftover {
		d.dryRun.Differ(fmt.Sprintf("table %s%s", t, nextSuffix), dataplane.Unexpected, nil, nil)
		d.dryRun.Record(dataplane.Delete, "table", t.String()+nextSuffix, 1)
		have.leftover = false
	}
}

// differ records a difference of an object in a table. It does nothing for a table that does not
// exist.
func (d *Dataplane) differ(t *table, have *tableContent, object, problem string, values ...[]string) {
	if d.dryRun == nil || have.table == nil {
		return
	}
	values = append(values, nil, nil)
	d.dryRun.Differ(fmt.Sprintf("%s in table %s", object, t), problem, values[0], values[1])
}

// rulesProblem describes the first difference between the rules of a chain.
func rulesProblem(t *table, have []*nftables.Rule, want []rule) string {
	for i := range min(len(have), len(want)) {
		if sameRules(t, have[i:i+1], want[i:i+1]) {
			continue
		}
		if want[i].comment != "" {
			return fmt.Sprintf("rule %d of %d differs: want %q", i+1, len(want), want[i].comment)
		}
		return fmt.Sprintf("rule %d of %d differs", i+1, len(want))
	}
	return fmt.Sprintf("%d rules instead of %d", len(have), len(want))
}

// formatElements describes elements by their keys.
func (t *table) formatElements(set *nftables.Set, elements []element) []string {
	texts := make([]string, 0, len(elements))
	for i, e := range elements {
		switch {
		case e.IntervalEnd:
			continue
		case isCatchAll(e):
			texts = append(texts, "*")
		case set.Interval && len(e.Key) == t.addrLen:
			texts = append(texts, t.formatInterval(elements, i))
		default:
			texts = append(texts, t.formatKey(e.Key))
		}
	}
	return texts
}

// formatPorts describes the elements of the set of endpoint ports.
func formatPorts(elements []element) []string {
	texts := make([]string, 0, len(elements))
	for _, e := range elements {
		texts = append(texts, strconv.Itoa(int(binary.BigEndian.Uint16(e.Key))))
	}
	return texts
}

// formatInterval describes an interval of addresses as a network, or as its first address.
func (t *table) formatInterval(elements []element, i int) string {
	first, _ := netip.AddrFromSlice(elements[i].Key)
	if i+1 < len(elements) && elements[i+1].IntervalEnd {
		end, _ := netip.AddrFromSlice(elements[i+1].Key)
		for bits := range first.BitLen() + 1 {
			if p := netip.PrefixFrom(first, bits); p.Masked().Addr() == first && p.Contains(end.Prev()) && !p.Contains(end) {
				return p.String()
			}
		}
	}
	return first.String()
}

// formatKey describes a key: an address, an address followed by other values, or bytes.
func (t *table) formatKey(key []byte) string {
	addr, ok := netip.AddrFromSlice(key[:min(len(key), t.addrLen)])
	if !ok {
		return "0x" + hex.EncodeToString(key)
	}
	if f, _, err := t.parseFrontend(key); err == nil {
		return f.String()
	}
	rest := strings.TrimRight(hex.EncodeToString(key[t.addrLen:]), "0")
	if rest == "" {
		return addr.String()
	}
	return addr.String() + " . 0x" + rest
}
