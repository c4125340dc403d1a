package nft

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// content is what the kernel holds in one table.
type content struct {
	// table is nil if there is none.
	table  *nftables.Table
	sets   map[string]*nftables.Set
	chains map[string]*nftables.Chain
	rules  map[string][]*nftables.Rule
	rows   map[dataplane.Frontend]*row
	// classes has the elements of that map by class, and whether each goes
	// where it should.
	classes map[class]bool
	// foreign are elements that we would never make, by set.
	foreign  map[string][]element
	podCIDRs []element
}

// read reads all of a table. That takes time in proportion to the number of
// Services: some 0.1 s for 10,000 with 10 endpoints each.
func (d *Dataplane) read(ctx context.Context, t *table) (*content, error) {
	c := &content{
		sets:    map[string]*nftables.Set{},
		chains:  map[string]*nftables.Chain{},
		rules:   map[string][]*nftables.Rule{},
		rows:    map[dataplane.Frontend]*row{},
		classes: map[class]bool{},
		foreign: map[string][]element{},
	}
	var err error
	if c.table, err = findTable(d.conn, t); err != nil || c.table == nil {
		return c, err
	}
	sets, err := d.conn.GetSets(t.nf)
	if err != nil {
		return nil, fmt.Errorf("list the sets of table %s: %w", t, err)
	}
	for _, s := range sets {
		c.sets[s.Name] = s
	}
	chains, err := d.conn.ListChainsOfTableFamily(t.nf.Family)
	if err != nil {
		return nil, fmt.Errorf("list the %s chains: %w", t.family, err)
	}
	for _, ch := range chains {
		if ch.Table.Name != TableName {
			continue
		}
		c.chains[ch.Name] = ch
		if c.rules[ch.Name], err = d.conn.GetRules(t.nf, ch); err != nil {
			return nil, fmt.Errorf("list the rules of chain %s in table %s: %w", ch.Name, t, err)
		}
	}
	type reading struct {
		set   *nftables.Set
		parse func(element) error
	}
	readings := []reading{
		{t.services, func(e element) error { return c.parseService(t, e) }},
		{t.noEndpoints, func(e element) error { return c.parseNoEndpoints(t, e) }},
		{t.hairpin, func(e element) error { return c.parseHairpin(t, e) }},
		{t.classes, func(e element) error { return c.parseClass(t, e) }},
		{t.podCIDRs, func(e element) error { c.podCIDRs = append(c.podCIDRs, e); return nil }},
	}
	for shard, set := range t.endpoints {
		readings = append(readings, reading{set, func(e element) error { return c.parseEndpoint(t, shard, e) }})
	}
	for _, read := range readings {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		found, ok := c.sets[read.set.Name]
		if !ok || !sameSet(found, read.set) {
			continue
		}
		err := d.dump.elements(read.set, func(e element) {
			if err := read.parse(e); err != nil {
				c.foreign[read.set.Name] = append(c.foreign[read.set.Name], e)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("list the elements of set %s in table %s: %w", read.set.Name, t, err)
		}
	}
	for _, r := range c.rows {
		slices.SortFunc(r.hairpins, netip.Addr.Compare)
	}
	return c, nil
}

func (c *content) row(f dataplane.Frontend) *row {
	r, ok := c.rows[f]
	if !ok {
		r = &row{}
		c.rows[f] = r
	}
	return r
}

func (c *content) parseService(t *table, e element) error {
	f, _, err := t.parseFrontend(e.Key)
	if err != nil {
		return err
	}
	class, err := t.parseClass(e.Val)
	if err != nil {
		return err
	}
	r := c.row(f)
	r.service, r.class = e.Comment, class
	return nil
}

func (c *content) parseEndpoint(t *table, shard int, e element) error {
	f, slot, err := t.parseSlot(e.Key)
	if err != nil {
		return err
	}
	if shardOf(f) != shard {
		return errForeign
	}
	addr, err := t.parseAddrPort(e.Val)
	if err != nil {
		return err
	}
	r := c.row(f)
	for len(r.slots) <= slot {
		r.slots = append(r.slots, netip.AddrPort{})
	}
	r.slots[slot] = addr
	return nil
}

func (c *content) parseNoEndpoints(t *table, e element) error {
	f, _, err := t.parseFrontend(e.Key)
	if err != nil {
		return err
	}
	r := c.row(f)
	r.service, r.rejected = e.Comment, true
	return nil
}

func (c *content) parseHairpin(t *table, e element) error {
	addr, f, err := t.parseHairpin(e.Key)
	if err != nil {
		return err
	}
	r := c.row(f)
	r.hairpins = append(r.hairpins, addr)
	return nil
}

func (c *content) parseClass(t *table, e element) error {
	class, err := t.parseClass(e.Key)
	if err != nil {
		return err
	}
	c.classes[class] = isGoto(e.Val, class.chainName())
	return nil
}

// isGoto reports whether the value of a verdict map's element, which the
// library leaves as the kernel's attributes, is a goto to the chain.
func isGoto(val []byte, chain string) bool {
	attrs, err := netlink.NewAttributeDecoder(val)
	if err != nil {
		return false
	}
	attrs.ByteOrder = binary.BigEndian
	var code int32
	var to string
	for attrs.Next() {
		switch attrs.Type() {
		case unix.NFTA_VERDICT_CODE:
			code = attrs.Int32()
		case unix.NFTA_VERDICT_CHAIN:
			to = attrs.String()
		}
	}
	return attrs.Err() == nil && code == unix.NFT_GOTO && to == chain
}

// sameSet reports whether a set in the kernel can take our elements.
func sameSet(have, want *nftables.Set) bool {
	return have.KeyType.GetNFTMagic() == want.KeyType.GetNFTMagic() &&
		have.DataType.GetNFTMagic() == want.DataType.GetNFTMagic() &&
		have.IsMap == want.IsMap && have.Interval == want.Interval &&
		have.Constant == want.Constant && have.HasTimeout == want.HasTimeout && have.Dynamic == want.Dynamic &&
		have.Size == want.Size
}

// sameChain reports whether a chain in the kernel is where ours must be.
func sameChain(have, want *nftables.Chain) bool {
	if want.Hooknum == nil {
		return have.Hooknum == nil
	}
	return have.Hooknum != nil && *have.Hooknum == *want.Hooknum && *have.Priority == *want.Priority &&
		have.Type == want.Type && have.Policy != nil && *have.Policy == *want.Policy
}

// sameRules reports whether a chain in the kernel has exactly our rules.
func sameRules(t *table, have []*nftables.Rule, want []rule) bool {
	return slices.EqualFunc(have, want, func(h *nftables.Rule, w rule) bool {
		return bytes.Equal(h.UserData, w.userData()) && slices.EqualFunc(h.Exprs, w.exprs, t.sameExpr)
	})
}

func (t *table) sameExpr(have, want expr.Any) bool {
	fam := byte(t.nf.Family)
	h, errHave := expr.Marshal(fam, have)
	w, errWant := expr.Marshal(fam, want)
	return errHave == nil && errWant == nil && bytes.Equal(h, w)
}

// Read implements [dataplane.Dataplane].
func (d *Dataplane) Read(ctx context.Context) (dataplane.State, error) {
	state := dataplane.State{}
	for _, t := range d.tables {
		c, err := d.read(ctx, t)
		if err != nil {
			return nil, err
		}
		for f, r := range c.rows {
			state[f] = r.binding()
		}
	}
	return state, nil
}

// binding returns what the kernel does with connections to the row's frontend.
func (r *row) binding() dataplane.Binding {
	b := dataplane.Binding{Service: r.service}
	for i := range min(int(r.class), len(r.slots)) {
		if addr := r.slots[i]; addr.IsValid() {
			_, local := slices.BinarySearchFunc(r.hairpins, addr.Addr(), netip.Addr.Compare)
			b.Endpoints = append(b.Endpoints, dataplane.Endpoint{Addr: addr, Local: local})
		}
	}
	slices.SortFunc(b.Endpoints, func(x, y dataplane.Endpoint) int { return x.Addr.Compare(y.Addr) })
	return b
}
