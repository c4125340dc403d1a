package kube

import (
	"net/netip"
	"slices"
)

// Overlap reports that a ServiceCIDR contains addresses of pods or of this node. A ServiceCIDR
// inside a larger pod network is not an Overlap, because pods get no addresses from it.
type Overlap struct {
	ServiceCIDR netip.Prefix
	// Other is a pod network or an address of this node.
	Other netip.Prefix
}

// subtractOverlaps returns the ServiceCIDRs without the pod networks in them and without this
// node's own addresses, and the overlaps. The dataplane drops connections to an address in a
// ServiceCIDR that belongs to no Service. The addresses of other nodes, and of pods outside
// podNetworks, are not known here.
func subtractOverlaps(serviceCIDRs, podNetworks []netip.Prefix, own map[netip.Addr]struct{}) ([]netip.Prefix, []Overlap) {
	var overlaps []Overlap
	var rest []netip.Prefix
	for _, s := range serviceCIDRs {
		var others []netip.Prefix
		for _, p := range podNetworks {
			if p.Overlaps(s) && p.Bits() >= s.Bits() {
				others = append(others, p.Masked())
			}
		}
		for addr := range own {
			if s.Contains(addr) {
				others = append(others, netip.PrefixFrom(addr, addr.BitLen()))
			}
		}
		slices.SortFunc(others, netip.Prefix.Compare)
		parts := []netip.Prefix{s.Masked()}
		for _, o := range slices.Compact(others) {
			overlaps = append(overlaps, Overlap{ServiceCIDR: s, Other: o})
			var left []netip.Prefix
			for _, part := range parts {
				left = subtract(left, part, o)
			}
			parts = left
		}
		rest = append(rest, parts...)
	}
	return rest, overlaps
}

// subtract appends the networks that together cover p without o.
func subtract(list []netip.Prefix, p, o netip.Prefix) []netip.Prefix {
	switch {
	case !p.Overlaps(o):
		return append(list, p)
	case o.Bits() <= p.Bits():
		return list
	}
	lower := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	b := p.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	upper, _ := netip.AddrFromSlice(b)
	return subtract(subtract(list, lower, o), netip.PrefixFrom(upper, lower.Bits()), o)
}
