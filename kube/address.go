package kube

import (
	"fmt"
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"
	netutils "k8s.io/utils/net"

	"fairlead.io/fairlead/dataplane"
)

// linearSearchMax is the maximum number of elements to search linearly. Larger sets use a map.
const linearSearchMax = 8

// addrSet is an ordered set of addresses. It uses a map only if it is large.
type addrSet struct {
	list  []netip.Addr
	index map[netip.Addr]struct{}
}

func (s *addrSet) add(a netip.Addr) {
	if s.has(a) {
		return
	}
	s.list = append(s.list, a)
	switch {
	case s.index != nil:
		s.index[a] = struct{}{}
	case len(s.list) > linearSearchMax:
		s.index = make(map[netip.Addr]struct{}, 2*len(s.list))
		for _, a := range s.list {
			s.index[a] = struct{}{}
		}
	}
}

func (s *addrSet) has(a netip.Addr) bool {
	if s.index != nil {
		_, ok := s.index[a]
		return ok
	}
	return slices.Contains(s.list, a)
}

// addrError describes a problem with an address or network. It completes a sentence that begins
// with the text.
type addrError string

func (e addrError) Error() string { return string(e) }

const (
	errNotIP       addrError = "is not an IP address"
	errNotNetwork  addrError = "is not a network"
	errZone        addrError = "has a zone"
	errUnspecified addrError = "is the unspecified address"
	errLoopback    addrError = "is a loopback address"
	errLinkLocal   addrError = "is a link-local address"
	errMulticast   addrError = "is a multicast address"
	errBroadcast   addrError = "is the broadcast address"
	errNodeAddr    addrError = "is an address of this node"
)

// ParseAddr parses an IP address as older API servers and kube-proxy accept it: IPv4 octets with
// leading zeros are decimal, and an IPv4-mapped IPv6 address is returned as IPv4. The error completes
// a sentence that begins with the text.
func ParseAddr(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil {
		var ok bool
		if addr, ok = netip.AddrFromSlice(netutils.ParseIPSloppy(text)); !ok {
			return netip.Addr{}, errNotIP
		}
	}
	if addr.Zone() != "" {
		return netip.Addr{}, errZone
	}
	return addr.Unmap(), nil
}

// parseAddr is like [ParseAddr], but rejects the unspecified address. The error is an addrError.
func parseAddr(text string) (netip.Addr, error) {
	addr, err := ParseAddr(text)
	if err == nil && addr.IsUnspecified() {
		return netip.Addr{}, errUnspecified
	}
	return addr, err
}

// ParseNetwork parses a network as older API servers and kube-proxy accept it. It clears host
// bits and accepts leading zeros in IPv4 octets and in the prefix length. An IPv4-mapped IPv6
// network is returned as IPv4 unless it also contains other addresses. The error is an addrError.
func ParseNetwork(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		_, network, err := netutils.ParseCIDRSloppy(text)
		if err != nil {
			return netip.Prefix{}, errNotNetwork
		}
		addr, _ := netip.AddrFromSlice(network.IP)
		bits, _ := network.Mask.Size()
		prefix = netip.PrefixFrom(addr, bits)
	}
	if addr := prefix.Addr(); addr.Is4In6() {
		const mapped = 128 - 32
		if bits := prefix.Bits(); bits >= mapped {
			return netip.PrefixFrom(addr.Unmap(), bits-mapped).Masked(), nil
		}
	}
	return prefix.Masked(), nil
}

// validateAddr rejects the addresses that the API server rejects in EndpointSlices and in
// spec.externalIPs. A loopback or link-local address would let a Service reach into the node, or
// intercept an address that the node uses.
func validateAddr(addr netip.Addr) error {
	switch {
	case addr.IsLoopback():
		return errLoopback
	case addr.IsLinkLocalUnicast():
		return errLinkLocal
	case addr.IsMulticast():
		return errMulticast
	case addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return errBroadcast
	}
	return nil
}

// validateEndpointAddr rejects addresses that are invalid for an endpoint of this family.
func validateEndpointAddr(addr netip.Addr, family dataplane.Family) error {
	if dataplane.FamilyOf(addr) != family {
		return fmt.Errorf("is not of the slice's addressType %s", family)
	}
	return validateAddr(addr)
}

// addressTypeFamily returns the family of an address type. It returns false for FQDN and unknown
// types.
func addressTypeFamily(t discoveryv1.AddressType) (dataplane.Family, bool) {
	switch t {
	case discoveryv1.AddressTypeIPv4:
		return dataplane.IPv4, true
	case discoveryv1.AddressTypeIPv6:
		return dataplane.IPv6, true
	default:
		return 0, false
	}
}

// unspecifiedAddr returns the unspecified address of the family.
func unspecifiedAddr(family dataplane.Family) netip.Addr {
	if family == dataplane.IPv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// outermost returns the networks that no other network contains, sorted. It does not modify its
// argument.
func outermost(networks []netip.Prefix) []netip.Prefix {
	sorted := make([]netip.Prefix, 0, len(networks))
	for _, n := range networks {
		sorted = append(sorted, n.Masked())
	}
	// A network sorts after the networks that contain it.
	slices.SortFunc(sorted, netip.Prefix.Compare)
	kept := sorted[:0]
	for _, n := range sorted {
		if last := len(kept) - 1; last >= 0 && kept[last].Contains(n.Addr()) {
			continue
		}
		kept = append(kept, n)
	}
	if len(kept) == 0 {
		return nil
	}
	return kept
}
