package kube

import (
	"net/netip"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
)

// sourceRanges are the networks whose clients may connect to the addresses of
// the load balancer, by family: nil lets in everyone.
type sourceRanges struct{ v4, v6 []netip.Prefix }

func (r sourceRanges) forFamily(family dataplane.Family) []netip.Prefix {
	if family == dataplane.IPv4 {
		return r.v4
	}
	return r.v6
}

// sourceRanges reads spec.loadBalancerSourceRanges. The annotation of former
// times, service.beta.kubernetes.io/load-balancer-source-ranges, is for cloud
// load balancers; kube-proxy does not read it either.
//
// An entry that can't be read never opens the Service: the others go on to
// filter, and if there are none in a family that the entry may have been meant
// for, nobody of that family is let in.
func (c *conversion) sourceRanges() sourceRanges {
	var r sourceRanges
	var bad4, bad6 bool
	for i, entry := range c.service.Spec.LoadBalancerSourceRanges {
		text := strings.TrimSpace(entry) // validation lets spaces pass
		network, err := parseNetwork(text)
		switch {
		case err != nil:
			six, four := strings.Contains(text, ":"), strings.Contains(text, ".")
			bad4 = bad4 || four || !six
			bad6 = bad6 || six || !four
			c.addProblem(elementPath("spec.loadBalancerSourceRanges", i, ""),
				"%q %v: write one as 192.0.2.0/24 or 2001:db8::/32; until then only clients of the other ranges are let in, "+
					"and nobody of a family that has no other", entry, err)
		case network.Addr().Is4():
			r.v4 = append(r.v4, network)
		default:
			r.v6 = append(r.v6, network)
		}
	}
	return sourceRanges{v4: effectiveRanges(r.v4, bad4, dataplane.IPv4), v6: effectiveRanges(r.v6, bad6, dataplane.IPv6)}
}

// effectiveRanges returns the ranges of a family sorted, unique, and nil if they let
// in everyone.
func effectiveRanges(ranges []netip.Prefix, bad bool, family dataplane.Family) []netip.Prefix {
	switch {
	case slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Bits() == 0 }):
		return nil
	case len(ranges) == 0 && bad:
		return []netip.Prefix{noClients(family)}
	case len(ranges) == 0:
		return nil
	}
	slices.SortFunc(ranges, netip.Prefix.Compare)
	return slices.Compact(ranges)
}

// noClients returns a network that no client is in.
func noClients(family dataplane.Family) netip.Prefix {
	addr := unspecifiedAddr(family)
	return netip.PrefixFrom(addr, addr.BitLen())
}
