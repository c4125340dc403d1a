package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"fairlead.io/fairlead/dataplane"
)

// NodePortAddresses says on which of this node's addresses node ports are
// served, as kube-proxy's --nodeport-addresses. Several of them add up. The
// zero value stands for the node's primary addresses.
type NodePortAddresses struct {
	// Primary are those of the Node object, one a family: the first InternalIP,
	// or else the first ExternalIP.
	Primary bool
	// Localhost are the loopback addresses, see [Result.LoopbackNodePortAddrs].
	Localhost bool
	// All are all but loopback and link-local ones, and those inside a
	// ServiceCIDR, unlike with kube-proxy.
	All bool
	// CIDRs are networks that the addresses lie in. Loopback and link-local
	// addresses are among them only where the network has no others. Unlike
	// with kube-proxy, a family of which there is no network has no node ports,
	// and addresses inside a ServiceCIDR are not among them.
	CIDRs []netip.Prefix
}

// The keywords of --nodeport-addresses.
const (
	nodePortPrimary   = "primary"
	nodePortLocalhost = "localhost"
	nodePortAll       = "all"
)

// ParseNodePortAddresses reads the values of --nodeport-addresses: networks
// such as 192.0.2.0/24, whose host bits are ignored, and each of the keywords
// primary, localhost and all at most once. No values, or a single empty one,
// stand for primary. The error names the value and the fix.
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
			network, err := parseNetwork(text)
			if err != nil {
				return NodePortAddresses{}, fmt.Errorf(
					"%q %w: give networks such as 192.0.2.0/24 or 2001:db8::/32, or primary, localhost or all", value, err)
			}
			a.CIDRs = append(a.CIDRs, network)
			continue
		}
		if *keyword {
			return NodePortAddresses{}, fmt.Errorf("%q is given twice: give it once", text)
		}
		*keyword = true
	}
	return a, nil
}

// IsZero reports whether a is the zero value, which stands for primary.
func (a NodePortAddresses) IsZero() bool {
	return !a.Primary && !a.Localhost && !a.All && len(a.CIDRs) == 0
}

// SelectsAll reports whether a selects all addresses of a family.
func (a NodePortAddresses) SelectsAll(family dataplane.Family) bool {
	return a.All || slices.ContainsFunc(a.CIDRs, func(p netip.Prefix) bool {
		return p.Bits() == 0 && dataplane.FamilyOf(p.Addr()) == family
	})
}

// nodePortAddrs returns the addresses and networks on which the kernel serves node
// ports, sorted: it can't at loopback addresses. primary are the node's.
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

// loopbackAddrs returns the loopback addresses that are asked for by themselves:
// everything does not include them.
func loopbackAddrs(want NodePortAddresses, in networks) []netip.Addr {
	var addrs []netip.Addr
	for _, a := range in.localAddrs {
		if a = canonicalAddr(a); a.IsLoopback() && (want.Localhost || anySelects(want.CIDRs, a)) {
			addrs = append(addrs, a)
		}
	}
	return sortAddrs(addrs)
}

// sortAddrs returns addresses in order, each once, and nil for none.
func sortAddrs(addrs []netip.Addr) []netip.Addr {
	if len(addrs) == 0 {
		return nil
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// allNetworks returns the networks of all addresses.
func allNetworks() []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
}

func anySelects(networks []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(networks, func(p netip.Prefix) bool { return selects(p, a) })
}

// selects reports whether a network given for node ports means the address. The
// caller sees to it that cluster IPs are not meant, which another proxy may have
// left on an interface.
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
