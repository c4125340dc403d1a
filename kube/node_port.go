package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
)

// NodePortAddresses selects the addresses of this node that serve node ports, like kube-proxy's
// --nodeport-addresses. An address is selected if any of the fields selects it. The zero value
// selects the node's primary addresses.
type NodePortAddresses struct {
	// Primary selects the primary addresses of the Node object, one per family: the first
	// InternalIP, or else the first ExternalIP.
	Primary bool
	// Localhost selects the loopback addresses, see [Result.LoopbackNodePortAddrs].
	Localhost bool
	// All selects every address except loopback and link-local addresses and, unlike in
	// kube-proxy, addresses inside a ServiceCIDR.
	All bool
	// CIDRs selects the addresses in these networks. Loopback and link-local addresses are
	// selected only by a network that contains no other addresses. Unlike in kube-proxy,
	// addresses inside a ServiceCIDR are not selected, and a family without a network has no node
	// ports.
	CIDRs []netip.Prefix
}

// Keywords of --nodeport-addresses.
const (
	nodePortPrimary   = "primary"
	nodePortLocalhost = "localhost"
	nodePortAll       = "all"
)

// ParseNodePortAddresses parses the values of --nodeport-addresses: networks such as
// 192.0.2.0/24, whose host bits are ignored, and the keywords primary, localhost and all, each at
// most once. No values or a single empty value mean primary. The error names the value and the
// fix.
func ParseNodePortAddresses(values []string) (NodePortAddresses, error) {
	var a NodePortAddresses
	if len(values) == 1 && strings.TrimSpace(values[0]) == "" {
		return a, nil
	}
	for _, value := range values {
		text := strings.TrimSpace(value)
		var keyword *bool
		switch text {
		case nodePortPrimary:
			keyword = &a.Primary
		case nodePortLocalhost:
			keyword = &a.Localhost
		case nodePortAll:
			keyword = &a.All
		default:
			network, err := ParseNetwork(text)
			if err != nil {
				return NodePortAddresses{}, fmt.Errorf(
					"%q %w: use networks such as 192.0.2.0/24 or 2001:db8::/32, or primary, localhost or all", value, err)
			}
			a.CIDRs = append(a.CIDRs, network)
			continue
		}
		if *keyword {
			return NodePortAddresses{}, fmt.Errorf("%q is given twice: remove one of them", text)
		}
		*keyword = true
	}
	return a, nil
}

// IsZero reports whether a is the zero value, which selects the primary addresses.
func (a NodePortAddresses) IsZero() bool {
	return !a.Primary && !a.Localhost && !a.All && len(a.CIDRs) == 0
}

// SelectsAll reports whether a selects all addresses of a family.
func (a NodePortAddresses) SelectsAll(family dataplane.Family) bool {
	return a.All || slices.ContainsFunc(a.CIDRs, func(p netip.Prefix) bool {
		return p.Bits() == 0 && dataplane.FamilyOf(p.Addr()) == family
	})
}

// nodePortAddrs returns the addresses and networks, sorted, on which the kernel serves node
// ports. Loopback addresses are excluded, because the kernel cannot serve node ports on them.
// primary are the node's primary addresses.
func nodePortAddrs(opts Options, in networks, primary []netip.Addr, serviceCIDRs []netip.Prefix) ([]netip.Addr, []netip.Prefix) {
	want := opts.NodePortAddresses
	var addrs []netip.Addr
	if want.Primary || want.IsZero() {
		addrs = append(addrs, primary...)
	}
	cidrs := want.CIDRs
	if want.All {
		cidrs = append(slices.Clip(cidrs), allNetworks()...)
	}
	for _, a := range in.localAddrs {
		a = canonicalAddr(a)
		if a.IsValid() && !a.IsLoopback() && anySelects(cidrs, a) && !anyContains(serviceCIDRs, a) {
			addrs = append(addrs, a)
		}
	}
	var selected []netip.Prefix
	for _, route := range in.localRoutes {
		for _, p := range cidrs {
			switch {
			case !p.Overlaps(route) || route.Addr().IsLoopback() || slices.ContainsFunc(serviceCIDRs, route.Overlaps):
			case p.Bits() > route.Bits():
				selected = append(selected, p)
			case selects(p, route.Addr()):
				selected = append(selected, route)
			}
		}
	}
	var networks []netip.Prefix
	for _, p := range outermost(selected) {
		if p.IsSingleIP() {
			addrs = append(addrs, p.Addr())
		} else {
			networks = append(networks, p)
		}
	}
	return sortAddrs(addrs), networks
}

// loopbackAddrs returns the loopback addresses that are selected explicitly. The keyword all does
// not select them.
func loopbackAddrs(want NodePortAddresses, in networks) []netip.Addr {
	var addrs []netip.Addr
	for _, a := range in.localAddrs {
		if a = canonicalAddr(a); a.IsLoopback() && (want.Localhost || anySelects(want.CIDRs, a)) {
			addrs = append(addrs, a)
		}
	}
	return sortAddrs(addrs)
}

// sortAddrs sorts and deduplicates addrs in place. It returns nil for an empty list.
func sortAddrs(addrs []netip.Addr) []netip.Addr {
	if len(addrs) == 0 {
		return nil
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// allNetworks returns one network of all addresses for each family.
func allNetworks() []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
}

func anySelects(networks []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(networks, func(p netip.Prefix) bool { return selects(p, a) })
}

// selects reports whether network p, given for node ports, selects the address. The caller
// excludes cluster IPs, which another proxy may have left on an interface.
func selects(p netip.Prefix, a netip.Addr) bool {
	if !p.Contains(a) {
		return false
	}
	switch {
	case a.IsLoopback():
		return p.Addr().IsLoopback() && p.Bits() >= 8
	case a.IsLinkLocalUnicast():
		return p.Addr().IsLinkLocalUnicast() && p.Bits() >= 10
	default:
		return true
	}
}

func anyContains(networks []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(a) })
}
