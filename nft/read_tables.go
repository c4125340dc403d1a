package nft

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"

	"github.com/google/nftables"
)

// Tables is the content of both tables in the kernel.
type Tables struct {
	// Families contains the families whose table exists.
	Families []dataplane.Family
	// Frontends contains the frontends that the rules look up.
	Frontends map[dataplane.Frontend]FrontendState
	// NodePortRanges contains the sorted addresses that accept connections to node ports.
	NodePortRanges []AddrRange
	// Unread says which sets could not be read, because another version of the program has
	// created them. The frontends are incomplete then.
	Unread []string
	// Consistent is false if the tables changed during each attempt to read them. The
	// frontends may then mix several states.
	Consistent bool
}

// FrontendState is the state of one frontend in the kernel.
type FrontendState struct {
	// VirtualBinding contains the binding. In the tables of a [Translator], the binding has
	// no endpoints and no session affinity. In other tables, Served and Virtual are zero.
	VirtualBinding
	// Kind is the kind of the frontend if KindKnown is true. It is unknown for the external
	// addresses in tables of earlier versions.
	Kind      dataplane.Kind
	KindKnown bool
	// SharedList reports whether the frontend shares its endpoints with other frontends of
	// the Service.
	SharedList bool
	// Class is the service class of the frontend, as in the name of its chain.
	Class string
}

// AddrRange is a range of addresses, including both ends.
type AddrRange struct{ First, Last netip.Addr }

// Contains reports whether the range contains an address.
func (r AddrRange) Contains(a netip.Addr) bool {
	return dataplane.FamilyOf(a) == dataplane.FamilyOf(r.First) && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0
}

// TablesExist reports whether the kernel has at least one of the tables. The error is as for
// [Open].
func TablesExist(ctx context.Context, opts Options) (bool, error) {
	conn, err := dialDump(opts.NetNS)
	if err != nil {
		return false, err
	}
	exist := false
	for _, t := range opts.newTables(opts.tableName()) {
		tables, err := conn.listTables(ctx, t.nf.Family)
		if err != nil {
			return false, errors.Join(explainError(err), conn.Close())
		}
		_, found := tables[t.nf.Name]
		exist = exist || found
	}
	if err := conn.Close(); err != nil {
		return false, fmt.Errorf("close the netlink socket: %w", err)
	}
	return exist, nil
}

// Generation returns the number of the kernel's current ruleset in the network namespace. It
// changes with each commit of any program.
func Generation(opts Options) (uint32, error) {
	conn, err := nftables.New(nftables.WithNetNSFd(opts.NetNS))
	if err != nil {
		return 0, fmt.Errorf("open netlink socket: %w", explainError(err))
	}
	g, err := conn.GetGen()
	if err != nil {
		return 0, fmt.Errorf("read the nftables generation: %w", explainError(err))
	}
	return g.ID, nil
}

// ReadTables returns the content of both tables. It needs no Dataplane, writes nothing, and
// does not wait for other programs. If these change the tables during the read, ReadTables
// reads them again, a few times at most. The time is about the same as for [Dataplane.Read].
// The error is as for [Open].
func ReadTables(ctx context.Context, opts Options) (*Tables, error) {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(opts.NetNS), nftables.WithSockOptions(socketOptions))
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", explainError(err))
	}
	defer func() { _ = conn.CloseLasting() }()
	if err := probe(conn); err != nil {
		return nil, err
	}
	dump, err := dialParallelDump(opts.NetNS)
	if err != nil {
		return nil, err
	}
	defer dump.Close() //nolint:errcheck // nothing was written
	reader, tables := setsReader{conn, dump}, opts.newTables(opts.tableName())
	var have [2]*tableContent
	consistent, err := reader.readConsistently(ctx, func() error {
		for i, t := range tables {
			if have[i], err = reader.read(ctx, t); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	result := &Tables{Frontends: map[dataplane.Frontend]FrontendState{}, Consistent: consistent}
	for i, c := range have {
		result.add(tables[i], c)
	}
	return result, nil
}

// readConsistently calls read until the ruleset does not change meanwhile. It makes up to
// readAttempts attempts, and reports whether the last one has succeeded.
func (r setsReader) readConsistently(ctx context.Context, read func() error) (consistent bool, err error) {
	var readErr error
	for range readAttempts {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		before, err := r.conn.GetGen()
		if err != nil {
			return false, fmt.Errorf("read the nftables generation: %w", explainError(err))
		}
		r.dump.inconsistent = false
		readErr = read()
		after, err := r.conn.GetGen()
		if err != nil {
			return false, fmt.Errorf("read the nftables generation: %w", explainError(err))
		}
		same := before.ID == after.ID
		if readErr != nil && (same || !isConcurrentChange(readErr)) {
			return false, readErr
		}
		if readErr == nil && same && !r.dump.inconsistent {
			return true, nil
		}
	}
	return false, readErr
}

// add adds the content of one table.
func (s *Tables) add(t *table, c *tableContent) {
	if c.table == nil {
		return
	}
	s.Families = append(s.Families, t.family)
	if c.unreadReason != "" {
		s.Unread = append(s.Unread, fmt.Sprintf("table %s: %s", t, c.unreadReason))
	}
	_, translated := c.sets[boundIPAddrs.String()]
	for f, r := range c.frontends {
		if r.inServices { // no rule looks up the elements of other frontends
			s.Frontends[f] = r.state(f, c, translated)
		}
	}
	s.NodePortRanges = append(s.NodePortRanges, t.nodePortRanges(c)...)
}

// state returns the state of a frontend. translated is set for the tables of a Translator.
func (r *frontendElements) state(f dataplane.Frontend, c *tableContent, translated bool) FrontendState {
	s := FrontendState{SharedList: r.class.has(classSharedList), Class: r.class.String()}
	if translated {
		s.VirtualBinding = r.virtualBinding()
	} else {
		s.Binding, s.Local = r.binding(), r.hairpins
	}
	_, s.Kind, s.KindKnown = parseServiceComment(r.comment)
	switch {
	case f.Addr.Addr().IsUnspecified():
		s.Kind, s.KindKnown = dataplane.NodePort, true
	case !s.KindKnown && c.addrs[clusterIPAddrs][f.Addr.Addr()]:
		s.Kind, s.KindKnown = dataplane.ClusterIP, true
	}
	return s
}

// nodePortRanges returns the sorted addresses in the sets for node ports.
func (t *table) nodePortRanges(c *tableContent) []AddrRange {
	var ranges []AddrRange
	for _, e := range c.nodeElements[t.nodePortAddrs.Name] {
		if addr, ok := netip.AddrFromSlice(e.Key); ok {
			ranges = append(ranges, AddrRange{addr, addr})
		}
	}
	// The elements of an interval set are the first address of each interval and the first
	// address after it, which is missing at the end of the address space.
	ends := slices.SortedFunc(slices.Values(c.nodeElements[t.nodePortNetworks.Name]), func(a, b element) int {
		return cmp.Or(bytes.Compare(a.Key, b.Key), compareBool(b.IntervalEnd, a.IntervalEnd))
	})
	for i, e := range ends {
		first, ok := netip.AddrFromSlice(e.Key)
		if !ok || e.IntervalEnd {
			continue
		}
		last := lastAddr(netip.PrefixFrom(first, 0))
		if i+1 < len(ends) && ends[i+1].IntervalEnd {
			if next, ok := netip.AddrFromSlice(ends[i+1].Key); ok {
				last = next.Prev()
			}
		}
		ranges = append(ranges, AddrRange{first, last})
	}
	slices.SortFunc(ranges, func(a, b AddrRange) int { return a.First.Compare(b.First) })
	return ranges
}
