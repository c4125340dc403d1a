package conntrack

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// maxQueries is how many narrow dumps are made at most instead of one of a whole
// protocol of a family. Each walks the whole table: with 262,144 buckets that takes 9 ms,
// and 0.25 µs an entry, while handing an entry over takes 2.5 µs. So three are
// cheaper from some 10,000 entries on.
const maxQueries = 3

// query says what a dump is narrowed to: a protocol of a family, the destination's
// address and port where they are not the zero ones, and with unreplied the
// entries without a reply (Linux 5.15). There is no address of IPv6:
// the kernel compares it the wrong way round, and leaves out the entries that are
// asked for (ctnetlink_filter_match_tuple, seen with Linux 6.18).
type query struct {
	family    dataplane.Family
	protocol  dataplane.Protocol
	addr      netip.Addr
	port      uint16
	unreplied bool
}

func (q query) compare(o query) int {
	return cmp.Or(cmp.Compare(q.family, o.family), cmp.Compare(q.protocol, o.protocol), q.addr.Compare(o.addr), cmp.Compare(q.port, o.port))
}

// matches reports whether the answer to q has the flow.
func (q query) matches(f flow) bool {
	return f.protocol == q.protocol && (!q.addr.IsValid() || q.addr == f.destination.Addr()) &&
		(q.port == 0 || q.port == f.destination.Port()) && (!q.unreplied || !f.replied)
}

// queries returns the dumps that show all suspect entries, by family. Families
// without suspects are not in it.
func (p *serviceIndex) queries(s *candidates) map[dataplane.Family][]query {
	narrow := map[query]netip.Addr{} // by family and port; the zero Addr for several
	add := func(f dataplane.Frontend) {
		addr := f.Addr.Addr()
		q := query{family: dataplane.FamilyOf(addr), protocol: f.Protocol, port: f.Addr.Port()}
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
			queries[family] = slices.CompactFunc(slices.SortedFunc(func(yield func(query) bool) {
				for _, q := range list {
					if !yield(query{family: family, protocol: q.protocol}) {
						return
					}
				}
			}, query.compare), func(a, b query) bool { return a == b })
			continue
		}
		slices.SortFunc(list, query.compare)
	}
	return queries
}

// sortedFamilies returns the families of queries, in order.
func sortedFamilies(queries map[dataplane.Family][]query) []dataplane.Family {
	return slices.Sorted(maps.Keys(queries))
}
