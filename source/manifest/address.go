package manifest

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// addressAllocator allocates cluster IPs and records which Service has which address.
type addressAllocator struct {
	pools    map[corev1.IPFamily]*pool
	families []corev1.IPFamily // the families of the pools, in configured order
	owners   map[netip.Addr]types.NamespacedName
}

// pool is a Service CIDR.
type pool struct {
	prefix netip.Prefix
	// size is the number of addresses that can be allocated: all except the first (network)
	// and the last (broadcast).
	size uint64
	used uint64
}

func newAddressAllocator(cidrs []netip.Prefix) (*addressAllocator, error) {
	a := &addressAllocator{pools: map[corev1.IPFamily]*pool{}, owners: map[netip.Addr]types.NamespacedName{}}
	for _, cidr := range cidrs {
		switch {
		case !cidr.IsValid() || cidr.Addr().Is4In6():
			return nil, fmt.Errorf("service CIDR %s: not a network: use one such as 10.96.0.0/16 or fd00:10:96::/112", cidr)
		case cidr.Addr().BitLen()-cidr.Bits() < 2:
			return nil, fmt.Errorf("service CIDR %s: too small: use a larger network", cidr)
		}
		family := familyOf(cidr.Addr())
		if first, ok := a.pools[family]; ok {
			return nil, fmt.Errorf("service CIDR %s: second network of family %s, after %s: specify at most one per family", cidr, family, first.prefix)
		}
		// A pool uses at most 2^62 addresses: 64 bits of the hash select one of them.
		bits := min(cidr.Addr().BitLen()-cidr.Bits(), 62)
		a.pools[family] = &pool{prefix: cidr.Masked(), size: 1<<bits - 2}
		a.families = append(a.families, family)
	}
	return a, nil
}

// allocate assigns the address to the Service. It reports false and the owner if another
// Service has it.
func (a *addressAllocator) allocate(addr netip.Addr, name types.NamespacedName) (types.NamespacedName, bool) {
	if owner, ok := a.owners[addr]; ok {
		return owner, owner == name
	}
	a.owners[addr] = name
	if p := a.pools[familyOf(addr)]; p != nil && p.contains(addr) {
		p.used++
	}
	return name, true
}

// release frees the address if the Service has it.
func (a *addressAllocator) release(addr netip.Addr, name types.NamespacedName) {
	if owner, ok := a.owners[addr]; !ok || owner != name {
		return
	}
	delete(a.owners, addr)
	if p := a.pools[familyOf(addr)]; p != nil && p.contains(addr) {
		p.used--
	}
}

// allocateNext allocates a free address to the Service: the one derived from its name or,
// if that is in use, the next free one. It reports false if all addresses are in use.
func (a *addressAllocator) allocateNext(name types.NamespacedName, family corev1.IPFamily) (netip.Addr, bool) {
	p := a.pools[family]
	if p.used >= p.size {
		return netip.Addr{}, false
	}
	sum := sha256.Sum256([]byte(name.String()))
	for i := binary.BigEndian.Uint64(sum[:]) % p.size; ; i = (i + 1) % p.size {
		addr := p.nth(i)
		if _, taken := a.owners[addr]; !taken {
			a.allocate(addr, name)
			return addr, true
		}
	}
}

// nth returns the i-th address that can be allocated.
func (p *pool) nth(i uint64) netip.Addr {
	bytes := p.prefix.Addr().As16()
	low := bytes[8:]
	binary.BigEndian.PutUint64(low, binary.BigEndian.Uint64(low)+i+1)
	addr := netip.AddrFrom16(bytes)
	if p.prefix.Addr().Is4() {
		return addr.Unmap()
	}
	return addr
}

// contains reports whether the address can be allocated from the pool.
func (p *pool) contains(addr netip.Addr) bool {
	if !p.prefix.Contains(addr) {
		return false
	}
	bytes, first := addr.As16(), p.prefix.Addr().As16()
	if [8]byte(bytes[:8]) != [8]byte(first[:8]) {
		return false // beyond the 2^62 addresses that are used
	}
	i := binary.BigEndian.Uint64(bytes[8:]) - binary.BigEndian.Uint64(first[8:])
	return i >= 1 && i <= p.size
}

// addressRequest is a Service's need for an address of one family.
type addressRequest struct {
	family corev1.IPFamily
	// requested is the address specified in the file, if valid.
	requested netip.Addr
}

// requests returns the addresses and families that the Service needs, and the family
// policy, according to the API server's defaults.
func (a *addressAllocator) requests(o *object) ([]addressRequest, corev1.IPFamilyPolicy, *Error) {
	spec := &o.service.Spec
	headless := isHeadless(o.service)
	policy := corev1.IPFamilyPolicySingleStack
	if spec.IPFamilyPolicy != nil {
		policy = *spec.IPFamilyPolicy
	} else if headless && len(spec.Selector) == 0 {
		policy = corev1.IPFamilyPolicyRequireDualStack
	}
	var requests []addressRequest
	for _, family := range spec.IPFamilies {
		requests = append(requests, addressRequest{family: family})
	}
	for i, text := range spec.ClusterIPs {
		if headless {
			break
		}
		addr := netip.MustParseAddr(text) // validated
		if i < len(requests) {
			requests[i].requested = addr
		} else {
			requests = append(requests, addressRequest{familyOf(addr), addr})
		}
	}
	if len(requests) == 0 {
		switch {
		case len(a.families) > 0:
			requests = []addressRequest{{family: a.families[0]}}
		case headless:
			requests = []addressRequest{{family: corev1.IPv4Protocol}}
		default:
			return nil, "", o.errorf("spec.clusterIP", "the Service needs an address, but no Service CIDR is configured: "+
				"set --service-cidr, or write an address here")
		}
	}
	available := func(req addressRequest) bool {
		return req.requested.IsValid() || a.pools[req.family] != nil || (headless && len(a.families) == 0)
	}
	if len(requests) == 1 && policy != corev1.IPFamilyPolicySingleStack {
		second := addressRequest{family: otherFamily(requests[0].family)}
		if available(second) || policy == corev1.IPFamilyPolicyRequireDualStack {
			requests = append(requests, second)
		}
	}
	if headless {
		return requests, policy, nil
	}
	if policy == corev1.IPFamilyPolicyPreferDualStack && len(requests) == 2 {
		if available(requests[0]) && !available(requests[1]) {
			requests = requests[:1]
		} else if !available(requests[0]) && available(requests[1]) {
			requests = requests[1:]
		}
	}
	for _, req := range requests {
		switch {
		case available(req):
		case policy == corev1.IPFamilyPolicyRequireDualStack:
			return nil, "", o.errorf("spec.ipFamilyPolicy", "RequireDualStack needs an address of each family, "+
				"but no %s Service CIDR is configured: set --service-cidr to one of each family, or use PreferDualStack", req.family)
		default:
			return nil, "", o.errorf("spec.ipFamilies", "the Service needs an %s address, but no such Service CIDR is configured: "+
				"set --service-cidr, or write an address in spec.clusterIP", req.family)
		}
	}
	return requests, policy, nil
}

func otherFamily(family corev1.IPFamily) corev1.IPFamily {
	if family == corev1.IPv4Protocol {
		return corev1.IPv6Protocol
	}
	return corev1.IPv4Protocol
}
