package nft

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// tableContent is the content of one table in the kernel.
type tableContent struct {
	// table is nil if the table does not exist.
	table  *nftables.Table
	schema int
	// unreadReason says which set with elements of Services was not read because its
	// definition differs. It is empty if all sets were read.
	unreadReason string
	// leftover is set if a table of an interrupted rebuild exists.
	leftover    bool
	sets        map[string]*nftables.Set
	chains      map[string]*nftables.Chain
	rules       map[string][]*nftables.Rule
	frontends   map[dataplane.Frontend]*frontendElements
	sharedLists map[listID]*sharedList
	// verdictElements contains the elements of verdict maps. The value is false if the
	// element refers to a wrong chain.
	verdictElements map[verdictElement]bool
	// unexpected contains, by set, elements that this package never writes. extended
	// contains our elements to which another program has added a statement. Packets run the
	// statement when they match the element.
	unexpected, extended map[string][]element
	// objects contains the types of named objects. rangePrefixLengths contains the prefix
	// lengths that have a source range set.
	objects            map[string]nftables.ObjType
	rangePrefixLengths []int
	// addrs contains the elements of address sets. ports counts the elements with an
	// endpoint of each port; it is empty with a Translator. portSet contains the elements
	// of endpoint-ports.
	addrs   [numAddrSets]map[netip.Addr]bool
	ports   portCounts
	portSet map[uint16]bool
	// nodeElements contains the elements of sets that depend on the node, by set name.
	nodeElements map[string][]element
}

// readAttempts is how often the tables are read if another process changes them during the
// read.
const readAttempts = 4

// readConsistently calls read until it sees a single state of the kernel: no other process
// has changed our tables during the read, and no dump was inconsistent. It makes up to
// readAttempts attempts. It returns the last generation. verified is false if the result
// may mix several states.
func (d *Dataplane) readConsistently(ctx context.Context, read func() error) (generation uint32, verified bool, err error) {
	return d.readConsistentlyAttempts(ctx, readAttempts, read)
}

// readConsistentlyAttempts is readConsistently with this number of attempts.
func (d *Dataplane) readConsistentlyAttempts(ctx context.Context, attempts int, read func() error) (generation uint32, verified bool, err error) {
	var readErr error
	for range attempts {
		if err := ctx.Err(); err != nil {
			return 0, false, err
		}
		changes := d.watch.changeCount()
		before, err := d.currentGeneration()
		if err != nil {
			return 0, false, err
		}
		d.dump.inconsistent = false
		readErr = read()
		if generation, err = d.currentGeneration(); err != nil {
			return 0, false, err
		}
		same := before == generation
		if readErr != nil && (same || !isConcurrentChange(readErr)) {
			return 0, false, readErr
		}
		if readErr == nil && !d.dump.inconsistent && (same || d.tablesUnchanged(changes, generation)) {
			return generation, true, nil
		}
	}
	return generation, false, readErr
}

// tablesUnchanged reports whether no commit up to a generation has changed our tables since
// the watch's change count had this value.
func (d *Dataplane) tablesUnchanged(changes uint64, generation uint32) bool {
	return d.watch.waitForGeneration(generation) && d.watch.changeCount() == changes
}

// isConcurrentChange reports whether a read can fail with this error because another
// process commits between two parts of the read, or while the kernel fills a buffer.
func isConcurrentChange(err error) bool {
	for _, e := range []error{unix.ENOENT, unix.EINTR, unix.EAGAIN, unix.EBUSY} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// readTables reads both tables, in a single state if possible. If other processes change
// the tables all the time, readTables signals drift, so that another Replace follows.
func (d *Dataplane) readTables(ctx context.Context) (have [2]*tableContent, generation uint32, err error) {
	if have, generation, ok := d.usePrefetched(ctx); ok {
		return have, generation, nil
	}
	generation, verified, err := d.readConsistently(ctx, func() (err error) {
		have, err = d.readTablesOnce(ctx)
		return err
	})
	if err == nil && !verified {
		d.log.DebugContext(ctx, "tables change while they are read")
		d.watch.signalDrift()
	}
	return have, generation, err
}

// readTablesOnce reads both tables once, possibly in different states.
func (d *Dataplane) readTablesOnce(ctx context.Context) (have [2]*tableContent, err error) {
	for i, t := range d.tables {
		if have[i], err = d.readTable(ctx, t); err != nil {
			return have, err
		}
	}
	return have, nil
}

// readTable reads a whole table. The time is proportional to the number of Services: about
// 0.1 s for 10,000 Services with 10 endpoints each.
func (d *Dataplane) readTable(ctx context.Context, t *table) (*tableContent, error) {
	c, err := d.readSets(ctx, t)
	if err != nil || c.table == nil {
		return c, err
	}
	chains, err := d.conn.ListChainsOfTableFamily(t.nf.Family)
	if err != nil {
		return nil, fmt.Errorf("list the %s chains: %w", t.family, err)
	}
	for _, ch := range chains {
		if ch.Table.Name != t.nf.Name {
			continue
		}
		c.chains[ch.Name] = ch
		if c.rules[ch.Name], err = d.conn.GetRules(t.nf, ch); err != nil {
			return nil, fmt.Errorf("list the rules of chain %s in table %s: %w", ch.Name, t, err)
		}
	}
	objects, err := d.conn.GetNamedObjects(t.nf)
	if err != nil {
		return nil, fmt.Errorf("list the counters of table %s: %w", t, err)
	}
	for _, o := range objects {
		if o, ok := o.(*nftables.NamedObj); ok {
			c.objects[o.Name] = o.Type
		}
	}
	return c, nil
}

func newTableContent() *tableContent {
	return &tableContent{
		sets:            map[string]*nftables.Set{},
		chains:          map[string]*nftables.Chain{},
		rules:           map[string][]*nftables.Rule{},
		frontends:       map[dataplane.Frontend]*frontendElements{},
		sharedLists:     map[listID]*sharedList{},
		verdictElements: map[verdictElement]bool{}, objects: map[string]nftables.ObjType{},
		unexpected: map[string][]element{}, extended: map[string][]element{},
		ports: portCounts{}, portSet: map[uint16]bool{}, nodeElements: map[string][]element{},
	}
}

// readSets reads the sets of a table and their elements.
func (d *Dataplane) readSets(ctx context.Context, t *table) (*tableContent, error) {
	return setsReader{d.conn, d.dump}.read(ctx, t)
}

// setsReader reads the sets of tables and their elements.
type setsReader struct {
	conn ruleset
	dump *dumpConn
}

func (r setsReader) read(ctx context.Context, t *table) (*tableContent, error) {
	c := newTableContent()
	tables, err := r.dump.listTables(ctx, t.nf.Family)
	if err != nil {
		return nil, fmt.Errorf("list the %s tables: %w", t.family, err)
	}
	_, c.leftover = tables[t.nf.Name+nextSuffix]
	info, ok := tables[t.nf.Name]
	if !ok {
		return c, nil
	}
	c.table = &nftables.Table{Name: t.nf.Name, Family: t.nf.Family, Flags: info.flags, Owner: info.owner}
	c.schema = info.schema
	sets, err := r.conn.GetSets(t.nf)
	if err != nil {
		return nil, fmt.Errorf("list the sets of table %s: %w", t, err)
	}
	for _, s := range sets {
		c.sets[s.Name] = s
	}
	var readers []setReader
	var readable []*nftables.Set
	for _, read := range c.setReaders(t) {
		found, ok := c.sets[read.set.Name]
		switch {
		case !ok:
		case sameSet(found, read.set):
			readers, readable = append(readers, read), append(readable, read.set)
		case t.hasServiceElements(read.set):
			c.unreadReason = fmt.Sprintf("set %s has a different definition", read.set.Name)
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err = r.dump.dumpSets(ctx, readable, func(set int, e element, extended bool) {
		name := readable[set].Name
		if err := readers[set].parse(e); err != nil {
			c.unexpected[name] = append(c.unexpected[name], cloneElement(e))
		} else if extended {
			c.extended[name] = append(c.extended[name], cloneElement(e))
		}
	})
	if err != nil {
		return nil, fmt.Errorf("table %s: %w", t, err)
	}
	for _, r := range c.frontends {
		slices.SortFunc(r.hairpins, netip.Addr.Compare)
		slices.SortFunc(r.ranges, netip.Prefix.Compare)
	}
	c.linkSharedLists()
	return c, nil
}

// hasServiceElements reports whether the elements of a set depend on Services, and can be
// derived neither from the node nor from other sets.
func (t *table) hasServiceElements(s *nftables.Set) bool {
	_, ofNode := t.nodeSetElements(dataplane.Node{})[s]
	return !ofNode && s != t.endpointPorts
}

// setReader is a set to read and the function that parses its elements. The function must not
// keep the slices of an element.
type setReader struct {
	set   *nftables.Set
	parse func(element) error
}

func (c *tableContent) setReaders(t *table) []setReader {
	readers := []setReader{
		{t.services, func(e element) error { return c.parseService(t, e) }},
		{t.external, func(e element) error { return c.parseExternal(t, e) }},
		{t.timeouts, func(e element) error { return c.parseTimeout(t, e) }},
		{t.lists, func(e element) error { return c.parseListID(t, e) }},
		{t.listSizes, func(e element) error { return c.parseListSize(t, e) }},
		{t.sharedHairpin, func(e element) error { return c.parseSharedHairpin(t, e) }},
		{t.hairpin, func(e element) error { return c.parseHairpin(t, e) }},
		{t.endpointPorts, c.parsePort},
	}
	for s, set := range t.addrSets {
		c.addrs[s] = map[netip.Addr]bool{}
		readers = append(readers, setReader{set, func(e element) error { return c.parseAddr(t, addrSet(s), e) }})
	}
	for m, set := range t.verdicts {
		readers = append(readers, setReader{set, func(e element) error { return c.parseVerdictElement(t, verdictMap(m), e) }})
	}
	for shard, set := range t.endpoints {
		readers = append(readers,
			setReader{set, func(e element) error { return c.parseEndpoint(t, shard, e) }},
			setReader{t.slots[shard], func(e element) error { return c.parseSlotID(t, shard, e) }},
			setReader{t.stickyEndpoints[shard], func(e element) error { return c.parseSticky(t, shard, e) }},
		)
	}
	for shard, set := range t.sharedEndpoints {
		readers = append(readers, setReader{set, func(e element) error { return c.parseSharedEndpoint(t, shard, e) }})
	}
	for set := range t.nodeSetElements(dataplane.Node{}) {
		readers = append(readers, setReader{set, func(e element) error {
			c.nodeElements[set.Name] = append(c.nodeElements[set.Name], cloneElement(e))
			return nil
		}})
	}
	used := t.sets()
	readers = slices.DeleteFunc(readers, func(r setReader) bool { return !slices.Contains(used, r.set) })
	for name, found := range c.sets {
		text, ok := strings.CutPrefix(name, rangesPrefix)
		bits, err := strconv.Atoi(text)
		if !ok || err != nil || bits < 0 || bits > 8*t.addrLen || strconv.Itoa(bits) != text || !sameSet(found, t.sourceRangeSet(bits)) {
			continue
		}
		c.rangePrefixLengths = append(c.rangePrefixLengths, bits)
		readers = append(readers,
			setReader{t.sourceRangeSet(bits), func(e element) error { return c.parseSourceRange(t, bits, e) }},
			setReader{t.sharedSourceRangeSet(bits), func(e element) error { return c.parseSharedSourceRange(t, bits, e) }},
		)
	}
	slices.Sort(c.rangePrefixLengths)
	return readers
}

func (c *tableContent) frontend(f dataplane.Frontend) *frontendElements {
	r, ok := c.frontends[f]
	if !ok {
		r = &frontendElements{}
		c.frontends[f] = r
	}
	return r
}

func (c *tableContent) parseService(t *table, e element) error {
	f, class, err := t.parseFrontendClass(e)
	if err != nil {
		return err
	}
	r := c.frontend(f)
	r.comment, r.class, r.inServices = e.Comment, class, true
	return nil
}

func (c *tableContent) parseExternal(t *table, e element) error {
	f, class, err := t.parseFrontendClass(e)
	if err != nil {
		return err
	}
	r := c.frontend(f)
	r.externalClass, r.inExternal = class, true
	return nil
}

func (c *tableContent) parseTimeout(t *table, e element) error {
	f, class, err := t.parseFrontendClass(e)
	if err != nil || !class.has(classTimeout) {
		return errUnexpectedElement
	}
	c.frontend(f).timeoutClass = class
	return nil
}

func (t *table) parseFrontendClass(e element) (dataplane.Frontend, serviceClass, error) {
	f, rest, err := t.parseFrontend(e.Key)
	if err != nil || len(rest) > 0 {
		return f, 0, errUnexpectedElement
	}
	class, err := t.parseClass(e.Val)
	return f, class, err
}

// maxExpectedSlots limits the memory for slots that a class promises before they are read.
const maxExpectedSlots = 64

func (c *tableContent) parseEndpoint(t *table, shard int, e element) error {
	f, l, slot, err := t.parseSlot(e.Key)
	if err != nil {
		return err
	}
	if shardOf(f) != shard {
		return errUnexpectedElement
	}
	addr, err := t.parseAddrPort(e.Val)
	if err != nil {
		return err
	}
	r := c.frontend(f)
	s := &r.slots[l]
	if s.endpoints == nil {
		// The classes have been read before, unless another dump was faster.
		class := r.class
		if l == localEndpoints {
			class = r.externalClass
		}
		s.endpoints = make([]netip.AddrPort, 0, max(slot+1, min(class.size(), maxExpectedSlots)))
	}
	for len(s.endpoints) <= slot {
		s.endpoints = append(s.endpoints, netip.AddrPort{})
	}
	s.endpoints[slot] = addr
	c.countEndpointPort(t, addr)
	return nil
}

// countEndpointPort counts the port of an address in a slot, if the address is an endpoint.
func (c *tableContent) countEndpointPort(t *table, addr netip.AddrPort) {
	if port, ok := t.renderer.endpointPort(addr); ok {
		c.ports[port]++
	}
}

func (c *tableContent) parseSlotID(t *table, shard int, e element) error {
	f, l, slot, err := t.parseSlot(e.Key)
	if err != nil {
		return err
	}
	if shardOf(f) != shard {
		return errUnexpectedElement
	}
	n, err := t.parseID(e.Val)
	if err != nil {
		return err
	}
	s := &c.frontend(f).slots[l]
	for len(s.ids) <= slot {
		s.ids = append(s.ids, noEndpointID)
	}
	s.ids[slot] = int(n)
	return nil
}

func (c *tableContent) parseSticky(t *table, shard int, e element) error {
	f, n, err := t.parseSticky(e.Key)
	if err != nil {
		return err
	}
	if shardOf(f) != shard {
		return errUnexpectedElement
	}
	addr, err := t.parseAddrPort(e.Val)
	if err != nil {
		return err
	}
	r := c.frontend(f)
	if r.byID == nil {
		r.byID = map[endpointID]netip.AddrPort{}
	}
	r.byID[n] = addr
	c.ports[addr.Port()]++
	return nil
}

func (c *tableContent) parseSourceRange(t *table, bits int, e element) error {
	f, p, err := t.parseSourceRangeKey(e.Key, bits)
	if err != nil {
		return err
	}
	r := c.frontend(f)
	switch {
	case e.Comment == "":
		r.ranges = append(r.ranges, p)
	case e.Comment == selfComment && p == frontendPrefix(f):
		r.allowSelf = true
	default:
		return errUnexpectedElement
	}
	return nil
}

func (c *tableContent) parseAddr(t *table, s addrSet, e element) error {
	addr, ok := netip.AddrFromSlice(e.Key)
	if !ok || len(e.Key) != t.addrLen {
		return errUnexpectedElement
	}
	c.addrs[s][addr] = true
	return nil
}

func (c *tableContent) parsePort(e element) error {
	if len(e.Key) != 2 {
		return errUnexpectedElement
	}
	c.portSet[binary.BigEndian.Uint16(e.Key)] = true
	return nil
}

func (c *tableContent) parseHairpin(t *table, e element) error {
	addr, f, err := t.parseHairpin(e.Key)
	if err != nil {
		return err
	}
	r := c.frontend(f)
	r.hairpins = append(r.hairpins, addr)
	return nil
}

func (c *tableContent) parseVerdictElement(t *table, m verdictMap, e element) error {
	class, err := t.parseClass(e.Key)
	if err != nil {
		return err
	}
	b := verdictElement{m, class}
	c.verdictElements[b] = isVerdict(e.Val, b.verdict())
	return nil
}

// isVerdict reports whether the value of a verdict map's element equals a verdict. The
// library returns the value as netlink attributes.
func isVerdict(val []byte, want *expr.Verdict) bool {
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
	return attrs.Err() == nil && code == int32(want.Kind) && to == want.Chain //nolint:gosec // a small number
}

// sameSet reports whether a set in the kernel can hold our elements.
func sameSet(have, want *nftables.Set) bool {
	return have.KeyType.GetNFTMagic() == want.KeyType.GetNFTMagic() &&
		have.DataType.GetNFTMagic() == want.DataType.GetNFTMagic() &&
		have.IsMap == want.IsMap && have.Interval == want.Interval &&
		have.Constant == want.Constant && have.HasTimeout == want.HasTimeout && have.Dynamic == want.Dynamic &&
		have.Size == want.Size
}

// sameChain reports whether a chain in the kernel has the type, hook, priority and policy
// of ours.
func sameChain(have, want *nftables.Chain) bool {
	if want.Hooknum == nil {
		return have.Hooknum == nil
	}
	return have.Hooknum != nil && *have.Hooknum == *want.Hooknum && *have.Priority == *want.Priority &&
		have.Type == want.Type && have.Policy != nil && *have.Policy == *want.Policy
}

// sameRules reports whether a chain in the kernel contains exactly our rules.
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

// Read implements [dataplane.Dataplane]. With a Translator, the result contains no
// endpoints and no session affinity; see [Dataplane.ReadVirtualBindings].
func (d *Dataplane) Read(ctx context.Context) (dataplane.State, error) {
	state := dataplane.State{}
	err := d.forEachFrontend(ctx, func(f dataplane.Frontend, r *frontendElements) { state[f] = d.renderer.binding(r) })
	if err != nil {
		return nil, err
	}
	return state, nil
}

// forEachFrontend reads the rendered elements of all frontends.
func (d *Dataplane) forEachFrontend(ctx context.Context, visit func(dataplane.Frontend, *frontendElements)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var have [2]*tableContent
	_, _, err := d.readConsistently(ctx, func() error {
		for i, t := range d.tables {
			var err error
			if have[i], err = d.readSets(ctx, t); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, c := range have {
		for f, r := range c.frontends {
			if r.inServices { // no rule looks up the elements of other frontends
				visit(f, r)
			}
		}
	}
	return nil
}

// binding returns how the kernel handles connections to the frontend.
func (r *frontendElements) binding() dataplane.Binding {
	b := r.bindingExceptEndpoints()
	b.Endpoints = r.reachableEndpoints(clusterEndpoints, r.class)
	if b.ExternalTrafficPolicyLocal {
		b.LocalEndpoints = r.reachableEndpoints(localEndpoints, r.externalClass)
	}
	if r.class.has(classSessionAffinity) {
		b.Affinity = r.timeoutClass.timeout()
	}
	b.Scheduler = r.class.selection().scheduler()
	return b
}

// bindingExceptEndpoints returns the binding without endpoints and session affinity.
func (r *frontendElements) bindingExceptEndpoints() dataplane.Binding {
	name, _, _ := parseServiceComment(r.comment)
	b := dataplane.Binding{Service: name}
	b.Masquerade, b.NoEndpointsVerdict = r.class.masquerade(), r.class.noEndpointsVerdict()
	b.ExternalTrafficPolicyLocal = r.class.has(classTrafficPolicyLocal)
	switch {
	case !r.class.has(classSourceRanges):
	case r.class.has(classSharedList):
		if r.sharedList != nil {
			b.SourceRanges = r.sharedList.ranges
		}
	default:
		b.SourceRanges = r.ranges
	}
	return b
}

// reachableEndpoints returns the endpoints of a list that connections of a class can reach.
func (r *frontendElements) reachableEndpoints(l endpointList, c serviceClass) []dataplane.Endpoint {
	slots, size, hairpins, selected := r.slots[l].endpoints, c.size(), r.hairpins, c.selection()
	switch {
	case c.has(classSharedList) && (r.sharedList == nil || size == 0):
		return nil
	case c.has(classSharedList):
		slots, size, hairpins = r.sharedList.slots[l], r.sharedList.sizeClasses[l].size(), r.sharedList.hairpins
		selected = r.sharedList.sizeClasses[l].listSelection()
	case c.has(classSessionAffinity):
		slots = r.slotAssignment()[l].slots
	}
	var all []dataplane.Endpoint
	for _, addr := range slots[:min(size, len(slots))] {
		if addr.IsValid() {
			_, isLocal := slices.BinarySearchFunc(hairpins, addr.Addr(), netip.Addr.Compare)
			all = append(all, dataplane.Endpoint{Addr: addr, Local: isLocal})
		}
	}
	slices.SortFunc(all, func(x, y dataplane.Endpoint) int { return x.Addr.Compare(y.Addr) })
	if selected == selectByHash { // an endpoint has several slots
		all = slices.Compact(all)
	}
	return all
}
