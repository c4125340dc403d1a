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
func (d *Dataplane) render(s *dataplane.Service, a slotAssignment, n listID) *frontendElements {
	r := d.renderer.render(s, a, d.node)
	if n != 0 && !r.class.has(classPassThrough) {
		r.moveToSharedList(s, n)
	}
	return r
}

// frontendElements is everything that the maps and sets hold for one frontend. All elements
// but those that shared.go counts belong to exactly one frontend, so the
// difference of two states is the difference of their rows. Rows read from the kernel can be
// of any shape; those that render makes are consistent.
type frontendElements struct {
	// service is the comment on the frontend's element in services.
	service string
	// class is the value in services, external the one in external, where
	// the frontend is there.
	class, externalClass   serviceClass
	inServices, inExternal bool
	// timeoutClass is the affinity class in timeouts; 0 if the frontend is not there.
	timeoutClass serviceClass
	// slots are what is in the slots of each list.
	slots [numEndpointLists]listElements
	// byID is in sticky-endpoints.
	byID map[endpointID]netip.AddrPort
	// hairpins are the addresses that are in hairpin with this frontend,
	// sorted.
	hairpins []netip.Addr
	// ranges are the source ranges, sorted. self says that a client may have
	// the frontend's own address.
	ranges    []netip.Prefix
	allowSelf bool

	// listID is the value in lists, and shared the elements of that list; 0 and nil
	// where the frontend shares none.
	listID     listID
	sharedList *sharedList

	// addrs are the sets that the frontend's address is to be in. They are not
	// known of a row that was read.
	addrs addrSetMembership
	// ports are those of the endpoints where there is a Translator, sorted, and
	// otherwise told by slots and byID. They are not known of a row that was read.
	ports []uint16
}

// listElements is what is in the slots of a list: endpoints, or with affinity their IDs.
type listElements struct {
	// endpoints are in endpoints-…; a slot that is not there is the zero
	// AddrPort.
	endpoints []netip.AddrPort
	// ids are in slots; a slot that is not there is noEndpointID.
	ids []int
}

const noEndpointID = -1

// render returns what the maps hold for each frontend of the Service when its
// endpoints are arranged like this, on this node.
func render(s *dataplane.Service, a slotAssignment, node dataplane.Node) *frontendElements {
	r := &frontendElements{
		service: serviceComment(s.Key), inServices: true, inExternal: s.ExternalTrafficPolicyLocal, timeoutClass: timeoutClassOf(s),
		ranges: s.SourceRanges,
	}
	r.class, r.externalClass = classOf(s)
	r.addrs = addrSetMembershipOf(s.Key.Kind, r.class, r.externalClass, node)
	for l := range numEndpointLists {
		if s.Affinity == 0 {
			r.slots[l].endpoints = a[l].slots
			continue
		}
		if r.byID == nil {
			r.byID = map[endpointID]netip.AddrPort{}
		}
		for i, n := range a[l].ids {
			r.slots[l].ids = append(r.slots[l].ids, int(n))
			r.byID[n] = a[l].slots[i]
		}
	}
	for _, list := range [numEndpointLists][]dataplane.Endpoint{s.Endpoints, s.LocalEndpoints} {
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
	r.allowSelf = slices.ContainsFunc(s.SourceRanges, func(p netip.Prefix) bool {
		return slices.ContainsFunc(node.PrimaryAddrs, p.Contains)
	})
	return r
}

// verdictElements returns the branches that the row needs.
func (r *frontendElements) verdictElements() []verdictElement {
	var all []verdictElement
	add := func(m verdictMap, c serviceClass) {
		all = append(all, verdictElement{m, c})
		if c.has(classSessionAffinity) && c.size() > 0 {
			all = append(all, verdictElement{vmapDraws, c})
		}
	}
	if r.inServices {
		add(vmapClasses, r.class)
		all = append(all, verdictElement{vmapMasquerades, r.class})
	}
	if r.inExternal {
		add(vmapLocalClasses, r.externalClass)
	}
	if r.timeoutClass != 0 {
		all = append(all, verdictElement{vmapAffinities, r.timeoutClass})
		if r.inExternal {
			all = append(all, verdictElement{vmapLocalAffinities, r.timeoutClass})
		}
	}
	return all
}

// sameVerdictElements reports whether the rows need the same branches, and their address
// in the same sets.
func (r *frontendElements) sameVerdictElements(o *frontendElements) bool {
	return r.class == o.class && r.externalClass == o.externalClass && r.inServices == o.inServices && r.inExternal == o.inExternal &&
		r.timeoutClass == o.timeoutClass && r.addrs == o.addrs
}

// allowedRanges returns the ranges that a frontend with this row has elements for.
func (r *frontendElements) allowedRanges(f dataplane.Frontend) []netip.Prefix {
	own := frontendPrefix(f)
	if !r.allowSelf || slices.Contains(r.ranges, own) {
		return r.ranges
	}
	all := append(slices.Clone(r.ranges), own)
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// rangeComment is the comment on a range's element: the frontend's own address
// has one if it is there on account of self.
func (r *frontendElements) rangeComment(f dataplane.Frontend, p netip.Prefix) string {
	if r.allowSelf && p == frontendPrefix(f) && !slices.Contains(r.ranges, p) {
		return selfComment
	}
	return ""
}

const selfComment = "this node"

func frontendPrefix(f dataplane.Frontend) netip.Prefix {
	return netip.PrefixFrom(f.Addr.Addr(), f.Addr.Addr().BitLen())
}

// maxComment is the longest comment that `nft` prints, less the final zero
// (libnftnl, NFTNL_UDATA_COMMENT_MAXLEN).
const maxComment = 127

// serviceComment names the Service for people. Longer names are shortened and end in
// part of their SHA-256, so that they stay different.
func serviceComment(k dataplane.Key) string {
	s := k.Service()
	if len(s) <= maxComment {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	suffix := "~" + hex.EncodeToString(sum[:4])
	return s[:maxComment-len(suffix)] + suffix
}
