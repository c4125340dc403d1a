package kube

import (
	"net/netip"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
)

// sourceRanges contains the client networks that may connect to the load balancer IPs, by family.
// Nil allows all clients.
type sourceRanges struct{ v4, v6 []netip.Prefix }

func (r sourceRanges) forFamily(family dataplane.Family) []netip.Prefix {
	if family == dataplane.IPv4 {
		return r.v4
	}
	return r.v6
}

// sourceRanges reads spec.loadBalancerSourceRanges. It ignores the deprecated annotation
// service.beta.kubernetes.io/load-balancer-source-ranges, which is for cloud load balancers; so
// does kube-proxy.
//
// An invalid entry never opens the Service. The remaining entries still apply. If a family that
// the entry may belong to has no other entry, no client of that family is allowed.
func (c *conversion) sourceRanges() sourceRanges {
	var r sourceRanges
	var bad4, bad6 bool
	for i, entry := range c.service.Spec.LoadBalancerSourceRanges {
		text := strings.TrimSpace(entry) // validation accepts surrounding spaces
		network, err := ParseNetwork(text)
		switch {
		case err != nil:
			six, four := strings.Contains(text, ":"), strings.Contains(text, ".")
			bad4 = bad4 || four || !six
			bad6 = bad6 || six || !four
			c.addProblem(elementPath("spec.loadBalancerSourceRanges", i, ""),
				"%q %v: use a network such as 192.0.2.0/24 or 2001:db8::/32; until then only clients in the other ranges are allowed, "+
					"and no client of a family without another range", entry, err)
		case network.Addr().Is4():
			r.v4 = append(r.v4, network)
		default:
			r.v6 = append(r.v6, network)
		}
	}
	return sourceRanges{v4: effectiveRanges(r.v4, bad4, dataplane.IPv4), v6: effectiveRanges(r.v6, bad6, dataplane.IPv6)}
}

// effectiveRanges returns the ranges of a family, sorted and deduplicated, or nil if they allow
// all clients.
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

// noClients returns a network that contains no client.
func noClients(family dataplane.Family) netip.Prefix {
	addr := unspecifiedAddr(family)
	return netip.PrefixFrom(addr, addr.BitLen())
}
