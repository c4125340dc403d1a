package nft

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// render returns what the maps hold for each frontend of the Service, and for the
// list that they share if they have a list ID.
func (d *Dataplane) render(s *dataplane.Service, a arrangement, n listID) *row {
	r := d.renderer.render(s, a, d.node)
	if n != 0 && !r.class.has(through) {
		r.share(s, n)
	}
	return r
}

// row is everything that the maps and sets hold for one frontend. All elements
// but those that shared.go counts belong to exactly one frontend, so the
// difference of two states is the difference of their rows. Rows read from the kernel can be
// of any shape; those that render makes are consistent.
type row struct {
	// service is the comment on the frontend's element in services.
	service string
	// class is the value in services, external the one in external, where
	// the frontend is there.
	class, external        class
	inServices, inExternal bool
	// timeout is the affinity class in timeouts; 0 if the frontend is not there.
	timeout class
	// slots are what is in the slots of each list.
	slots [lists]slotList
	// byID is in sticky-endpoints.
	byID map[id]netip.AddrPort
	// hairpins are the addresses that are in hairpin with this frontend,
	// sorted.
	hairpins []netip.Addr
	// ranges are the source ranges, sorted. self says that a client may have
	// the frontend's own address.
	ranges []netip.Prefix
	self   bool

	// list is the value in lists, and shared the elements of that list; 0 and nil
	// where the frontend shares none.
	list   listID
	shared *sharedList

	// addrs are the sets that the frontend's address is to be in. They are not
	// known of a row that was read.
	addrs inAddrSets
	// ports are those of the endpoints where there is a Translator, sorted, and
	// otherwise told by slots and byID. They are not known of a row that was read.
	ports []uint16
}

// slotList is what is in the slots of a list: endpoints, or with affinity their IDs.
type slotList struct {
	// endpoints are in endpoints-…; a slot that is not there is the zero
	// AddrPort.
	endpoints []netip.AddrPort
	// ids are in slots; a slot that is not there is noID.
	ids []int
}

const noID = -1

// render returns what the maps hold for each frontend of the Service when its
// endpoints are arranged like this, on this node.
func render(s *dataplane.Service, a arrangement, node dataplane.Node) *row {
	r := &row{
		service: comment(s.Key), inServices: true, inExternal: s.ExternalLocal, timeout: affinityOf(s),
		ranges: s.SourceRanges,
	}
	r.class, r.external = classOf(s)
	r.addrs = addrSetsOf(s.Key.Kind, r.class, r.external, node)
	for l := range lists {
		if s.Affinity == 0 {
			r.slots[l].endpoints = a[l].slots
			continue
		}
		if r.byID == nil {
			r.byID = map[id]netip.AddrPort{}
		}
		for i, n := range a[l].ids {
			r.slots[l].ids = append(r.slots[l].ids, int(n))
			r.byID[n] = a[l].slots[i]
		}
	}
	for _, list := range [lists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
		for _, e := range list { // sorted, so the hairpins are
			if n := len(r.hairpins); e.Local && (n == 0 || r.hairpins[n-1] != e.Addr.Addr()) {
				r.hairpins = append(r.hairpins, e.Addr.Addr())
			}
		}
	}
	if len(s.LocalEndpoints) > 0 {
		slices.SortFunc(r.hairpins, netip.Addr.Compare)
		r.hairpins = slices.Compact(r.hairpins)
	}
	r.self = slices.ContainsFunc(s.SourceRanges, func(p netip.Prefix) bool {
		return slices.ContainsFunc(node.Addrs, p.Contains)
	})
	return r
}

// branches returns the branches that the row needs.
func (r *row) branches() []branch {
	var all []branch
	add := func(m verdictMap, c class) {
		all = append(all, branch{m, c})
		if c.has(sticky) && c.size() > 0 {
			all = append(all, branch{draws, c})
		}
	}
	if r.inServices {
		add(classes, r.class)
		all = append(all, branch{masquerades, r.class})
	}
	if r.inExternal {
		add(localClasses, r.external)
	}
	if r.timeout != 0 {
		all = append(all, branch{affinities, r.timeout})
		if r.inExternal {
			all = append(all, branch{localAffinities, r.timeout})
		}
	}
	return all
}

// sameBranches reports whether the rows need the same branches, and their address
// in the same sets.
func (r *row) sameBranches(o *row) bool {
	return r.class == o.class && r.external == o.external && r.inServices == o.inServices && r.inExternal == o.inExternal &&
		r.timeout == o.timeout && r.addrs == o.addrs
}

// allowed returns the ranges that a frontend with this row has elements for.
func (r *row) allowed(f dataplane.Frontend) []netip.Prefix {
	own := ownRange(f)
	if !r.self || slices.Contains(r.ranges, own) {
		return r.ranges
	}
	all := append(slices.Clone(r.ranges), own)
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// rangeComment is the comment on a range's element: the frontend's own address
// has one if it is there on account of self.
func (r *row) rangeComment(f dataplane.Frontend, p netip.Prefix) string {
	if r.self && p == ownRange(f) && !slices.Contains(r.ranges, p) {
		return selfComment
	}
	return ""
}

const selfComment = "this node"

func ownRange(f dataplane.Frontend) netip.Prefix {
	return netip.PrefixFrom(f.Addr.Addr(), f.Addr.Addr().BitLen())
}

// maxComment is the longest comment that `nft` prints, less the final zero
// (libnftnl, NFTNL_UDATA_COMMENT_MAXLEN).
const maxComment = 127

// comment names the Service for people. Longer names are shortened and end in
// part of their SHA-256, so that they stay different.
func comment(k dataplane.Key) string {
	s := k.Service()
	if len(s) <= maxComment {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	suffix := "~" + hex.EncodeToString(sum[:4])
	return s[:maxComment-len(suffix)] + suffix
}
