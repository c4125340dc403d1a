package conntrack

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// maxQueries is the maximum number of filtered dumps per family; with more, the Cleaner dumps
// a whole protocol. Each dump walks the whole table, which takes 9 ms for 262,144 buckets and
// 0.25 µs per entry. Returning an entry takes 2.5 µs. Three filtered dumps are therefore
// cheaper from about 10,000 entries on.
const maxQueries = 3

// query selects the entries of a dump: by family and protocol, by destination address and port
// if these are not zero, and with unreplied by the absence of a reply (Linux 5.15). It never
// selects by an IPv6 address: the kernel inverts this comparison and omits the matching
// entries (ctnetlink_filter_match_tuple, observed with Linux 6.18). It never selects by an SCTP
// port: the same function compares the ports of TCP and UDP only.
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

// matches reports whether the query selects the flow. The caller checks the family.
func (q query) matches(f flow) bool {
	return f.protocol == q.protocol && (!q.addr.IsValid() || q.addr == f.destination.Addr()) &&
		(q.port == 0 || q.port == f.destination.Port()) && (!q.unreplied || !f.replied)
}

// queries returns the dumps that contain all candidate entries, by family. It omits families
// without candidates.
func (x *serviceIndex) queries(s *candidates) map[dataplane.Family][]query {
	addrs := map[query]netip.Addr{} // keyed by family, protocol and port; the zero Addr means several addresses
	add := func(f dataplane.Frontend) {
		addr := f.Addr.Addr()
		q := query{family: dataplane.FamilyOf(addr), protocol: f.Protocol}
		if f.Protocol != dataplane.SCTP {
			q.port = f.Addr.Port()
		}
		if have, ok := addrs[q]; ok && have != addr || addr.IsUnspecified() || addr.Is6() {
			addr = netip.Addr{}
		}
		addrs[q] = addr
	}
	for f := range s.frontends {
		add(f)
	}
	if s.all {
		for f := range x.owners {
			add(f)
		}
	}
	queries := map[dataplane.Family][]query{}
	for q, addr := range addrs {
		q.addr = addr
		queries[q.family] = append(queries[q.family], q)
	}
	for family, qs := range queries {
		if len(qs) > maxQueries {
			queries[family] = slices.CompactFunc(slices.SortedFunc(func(yield func(query) bool) {
				for _, q := range qs {
					if !yield(query{family: family, protocol: q.protocol}) {
						return
					}
				}
			}, query.compare), func(a, b query) bool { return a == b })
			continue
		}
		slices.SortFunc(qs, query.compare)
	}
	return queries
}

// sortedFamilies returns the families of queries, sorted.
func sortedFamilies(queries map[dataplane.Family][]query) []dataplane.Family {
	return slices.Sorted(maps.Keys(queries))
}
