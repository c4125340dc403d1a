package nft

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
)

// render returns the rendered elements of each frontend of the Service, including their
// shared list if n is not 0.
func (d *Dataplane) render(s *dataplane.Service, a slotAssignment, n listID) *frontendElements {
	r := d.renderer.render(s, a, d.node)
	if n != 0 && !r.class.has(classPassThrough) {
		r.moveToSharedList(s, n)
	}
	return r
}

// frontendElements contains the elements of all maps and sets for one frontend. Each
// element belongs to exactly one frontend, except for the elements that shared_sets.go
// counts. So the difference between two states of the tables is the difference between
// their frontendElements. Elements that were read from the kernel can be inconsistent;
// rendered elements are consistent.
type frontendElements struct {
	// comment is the comment on the frontend's element in services; see serviceComment.
	comment string
	// class is the value in services, and externalClass the value in external. inServices
	// and inExternal report whether these maps contain the frontend.
	class, externalClass   serviceClass
	inServices, inExternal bool
	// timeoutClass is the value in timeouts, or 0 if the map does not contain the frontend.
	timeoutClass serviceClass
	// slots contains the elements of each endpoint list.
	slots [numEndpointLists]listElements
	// byID contains the elements of sticky-endpoints.
	byID map[endpointID]netip.AddrPort
	// hairpins contains the sorted endpoint addresses in hairpin.
	hairpins []netip.Addr
	// ranges contains the sorted source ranges. allowSelf is set if a client may have the
	// frontend's own address.
	ranges    []netip.Prefix
	allowSelf bool

	// listID is the value in lists, and sharedList contains the elements of this list. They
	// are 0 and nil if the frontend shares no list.
	listID     listID
	sharedList *sharedList

	// addrs are the address sets that must contain the frontend's address. Not set for
	// elements read from the kernel.
	addrs addrSetMembership
	// ports contains the sorted endpoint ports if there is a Translator; otherwise, slots
	// and byID contain the ports. Not set for elements read from the kernel.
	ports []uint16
}

// listElements contains the elements of an endpoint list: endpoints, or endpoint IDs with
// session affinity.
type listElements struct {
	// endpoints contains the elements of endpoints-…, by slot. A missing slot is the zero
	// AddrPort.
	endpoints []netip.AddrPort
	// ids contains the elements of slots, by slot. A missing slot is noEndpointID.
	ids []int
}

const noEndpointID = -1

// render returns the elements of each frontend of the Service, for a slot assignment and a
// node.
func render(s *dataplane.Service, a slotAssignment, node dataplane.Node) *frontendElements {
	r := &frontendElements{
		comment: serviceComment(s.Key), inServices: true, inExternal: s.ExternalTrafficPolicyLocal, timeoutClass: timeoutClassOf(s),
		ranges: s.SourceRanges,
	}
	r.class, r.externalClass = classOf(s)
	r.class = r.class.withSelection(a[clusterEndpoints].selection)
	if r.inExternal {
		r.externalClass = r.externalClass.withSelection(a[localEndpoints].selection)
	}
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
		for _, e := range list { // sorted, so hairpins is sorted as well
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

// verdictElements returns the verdict elements that the frontend needs.
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

// sameVerdictElements reports whether r and o need the same verdict elements and elements
// of address sets.
func (r *frontendElements) sameVerdictElements(o *frontendElements) bool {
	return r.class == o.class && r.externalClass == o.externalClass && r.inServices == o.inServices && r.inExternal == o.inExternal &&
		r.timeoutClass == o.timeoutClass && r.addrs == o.addrs
}

// allowedRanges returns the ranges that the source range sets contain for the frontend.
func (r *frontendElements) allowedRanges(f dataplane.Frontend) []netip.Prefix {
	own := frontendPrefix(f)
	if !r.allowSelf || slices.Contains(r.ranges, own) {
		return r.ranges
	}
	all := append(slices.Clone(r.ranges), own)
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// rangeComment returns the comment on a range's element. The frontend's own address has a
// comment if it is an element because of allowSelf.
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

// belongsTo reports whether the frontend's element in services names a Service with this
// key. Earlier versions wrote no kind.
func (r *frontendElements) belongsTo(k dataplane.Key) bool {
	return r.comment == serviceComment(k) || r.comment == shortenName(k.Service(), maxComment)
}

// maxComment is the length of the longest comment that `nft` prints, without the final zero
// (libnftnl, NFTNL_UDATA_COMMENT_MAXLEN).
const maxComment = 127

// serviceComment returns the comment that names the Service: its name, and the kind if the
// tables do not show it otherwise. For example, "default/web:http LoadBalancer".
func serviceComment(k dataplane.Key) string {
	suffix := kindSuffix(k.Kind)
	return shortenName(k.Service(), maxComment-len(suffix)) + suffix
}

// kindSuffix returns the end of a comment that contains the kind. Node ports have the
// unspecified address, and the set cluster-ips contains all cluster IPs.
func kindSuffix(k dataplane.Kind) string {
	switch k {
	case dataplane.ExternalIP:
		return " ExternalIP"
	case dataplane.LoadBalancer:
		return " LoadBalancer"
	default:
		return ""
	}
}

// parseServiceComment returns the name and the kind that a comment contains. hasKind is
// false for cluster IPs, for node ports, and for all comments of earlier versions.
func parseServiceComment(comment string) (name string, kind dataplane.Kind, hasKind bool) {
	for _, kind := range []dataplane.Kind{dataplane.ExternalIP, dataplane.LoadBalancer} {
		if name, ok := strings.CutSuffix(comment, kindSuffix(kind)); ok {
			return name, kind, true
		}
	}
	return comment, 0, false
}

// shortenName shortens names of more than limit bytes and appends part of their SHA-256
// hash, so that they stay unique.
func shortenName(name string, limit int) string {
	if len(name) <= limit {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	suffix := "~" + hex.EncodeToString(sum[:4])
	return name[:limit-len(suffix)] + suffix
}
