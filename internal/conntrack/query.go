package conntrack

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"fairlead/dataplane"
)

// maxQueries is how many narrow dumps are made at most instead of one of all UDP
// of a family. Each walks the whole table: with 262,144 buckets that takes 9 ms,
// and 0.25 µs an entry, while handing an entry over takes 2.5 µs. So three are
// cheaper from some 10,000 entries on.
const maxQueries = 3

// query says what a dump is narrowed to: UDP of a family, and the destination's
// address and port where they are not the zero ones. There is no address of IPv6:
// the kernel compares it the wrong way round, and leaves out the entries that are
// asked for (ctnetlink_filter_match_tuple, seen with Linux 6.18).
type query struct {
	family dataplane.Family
	addr   netip.Addr
	port   uint16
}

func (q query) compare(o query) int {
	return cmp.Or(cmp.Compare(q.family, o.family), q.addr.Compare(o.addr), cmp.Compare(q.port, o.port))
}

// covers reports whether the answer to q has flows to destination.
func (q query) covers(destination netip.AddrPort) bool {
	return (!q.addr.IsValid() || q.addr == destination.Addr()) && (q.port == 0 || q.port == destination.Port())
}

// queries returns the dumps that show all suspect entries, by family. Families
// without suspects are not in it.
func (p *programmed) queries(s *suspects) map[dataplane.Family][]query {
	narrow := map[query]netip.Addr{} // by family and port; the zero Addr for several
	add := func(f netip.AddrPort) {
		q := query{family: dataplane.FamilyOf(f.Addr()), port: f.Port()}
		addr := f.Addr()
		if have, ok := narrow[q]; ok && have != addr || addr.IsUnspecified() || addr.Is6() {
			addr = netip.Addr{}
		}
		narrow[q] = addr
	}
	for f := range s.frontends {
		add(f)
	}
	if s.all {
		for f := range p.owners {
			add(f)
		}
	}
	queries := map[dataplane.Family][]query{}
	for q, addr := range narrow {
		q.addr = addr
		queries[q.family] = append(queries[q.family], q)
	}
	for family, list := range queries {
		if len(list) > maxQueries {
			queries[family] = []query{{family: family}}
			continue
		}
		slices.SortFunc(list, query.compare)
	}
	return queries
}

// families returns the families of queries, in order.
func families(queries map[dataplane.Family][]query) []dataplane.Family {
	return slices.Sorted(maps.Keys(queries))
}
