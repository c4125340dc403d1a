package manifest

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// addressAllocator knows who has which cluster IP, and hands out free ones.
type addressAllocator struct {
	pools    map[corev1.IPFamily]*pool
	families []corev1.IPFamily // the families of the pools, as given
	owners   map[netip.Addr]types.NamespacedName
}

// pool is a Service CIDR.
type pool struct {
	prefix netip.Prefix
	// size is the number of addresses that can be handed out: all but the first
	// (the network's) and the last (the broadcast address).
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
			return nil, fmt.Errorf("service CIDR %s: has no address to hand out: use a larger network", cidr)
		}
		family := familyOf(cidr.Addr())
		if first, ok := a.pools[family]; ok {
			return nil, fmt.Errorf("service CIDR %s: a second network of family %s, after %s: give at most one a family", cidr, family, first.prefix)
		}
		// More than 2^62 addresses need no more bits of the hash.
		bits := min(cidr.Addr().BitLen()-cidr.Bits(), 62)
		a.pools[family] = &pool{prefix: cidr.Masked(), size: 1<<bits - 2}
		a.families = append(a.families, family)
	}
	return a, nil
}

// allocate gives the address to the Service. It reports false, and who has it, if
// it is another's.
func (a *addressAllocator) allocate(addr netip.Addr, name types.NamespacedName) (types.NamespacedName, bool) {
	if holder, ok := a.owners[addr]; ok {
		return holder, holder == name
	}
	a.owners[addr] = name
	if p := a.pools[familyOf(addr)]; p != nil && p.contains(addr) {
		p.used++
	}
	return name, true
}

// release takes the address back, if it is the Service's.
func (a *addressAllocator) release(addr netip.Addr, name types.NamespacedName) {
	if holder, ok := a.owners[addr]; !ok || holder != name {
		return
	}
	delete(a.owners, addr)
	if p := a.pools[familyOf(addr)]; p != nil && p.contains(addr) {
		p.used--
	}
}

// allocateNext claims a free address for the Service: the one that its name says, or if
// that is taken the next free one after it. It reports false if there is none.
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

// nth returns the i-th address that can be handed out.
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

// contains reports whether the address is one that can be handed out.
func (p *pool) contains(addr netip.Addr) bool {
	if !p.prefix.Contains(addr) {
		return false
	}
	bytes, first := addr.As16(), p.prefix.Addr().As16()
	if [8]byte(bytes[:8]) != [8]byte(first[:8]) {
		return false // beyond the 2^62 addresses used of a larger network
	}
	i := binary.BigEndian.Uint64(bytes[8:]) - binary.BigEndian.Uint64(first[8:])
	return i >= 1 && i <= p.size
}

// addressRequest is the address a Service has to have in one family.
type addressRequest struct {
	family corev1.IPFamily
	// requested is the address that the file says, if it does.
	requested netip.Addr
}

// requests returns what addresses and families the Service needs, following the
// API server's defaults, and the policy.
func (a *addressAllocator) requests(o *object) ([]addressRequest, corev1.IPFamilyPolicy, *Error) {
	spec := &o.service.Spec
	headless := isHeadless(o.service)
	policy := corev1.IPFamilyPolicySingleStack
	if spec.IPFamilyPolicy != nil {
		policy = *spec.IPFamilyPolicy
	} else if headless && len(spec.Selector) == 0 {
		policy = corev1.IPFamilyPolicyRequireDualStack
	}
	var wishes []addressRequest
	for _, family := range spec.IPFamilies {
		wishes = append(wishes, addressRequest{family: family})
	}
	for i, text := range spec.ClusterIPs {
		if headless {
			break
		}
		addr := netip.MustParseAddr(text) // validated
		if i < len(wishes) {
			wishes[i].requested = addr
		} else {
			wishes = append(wishes, addressRequest{familyOf(addr), addr})
		}
	}
	if len(wishes) == 0 {
		switch {
		case len(a.families) > 0:
			wishes = []addressRequest{{family: a.families[0]}}
		case headless:
			wishes = []addressRequest{{family: corev1.IPv4Protocol}}
		default:
			return nil, "", o.errorf("spec.clusterIP", "the Service needs an address and there is no network to take it from: "+
				"give one with --service-cidr, or write an address here")
		}
	}
	available := func(w addressRequest) bool {
		return w.requested.IsValid() || a.pools[w.family] != nil || (headless && len(a.families) == 0)
	}
	if len(wishes) == 1 && policy != corev1.IPFamilyPolicySingleStack {
		second := addressRequest{family: otherFamily(wishes[0].family)}
		if available(second) || policy == corev1.IPFamilyPolicyRequireDualStack {
			wishes = append(wishes, second)
		}
	}
	if headless {
		return wishes, policy, nil
	}
	if policy == corev1.IPFamilyPolicyPreferDualStack && len(wishes) == 2 {
		if available(wishes[0]) && !available(wishes[1]) {
			wishes = wishes[:1]
		} else if !available(wishes[0]) && available(wishes[1]) {
			wishes = wishes[1:]
		}
	}
	for _, w := range wishes {
		switch {
		case available(w):
		case policy == corev1.IPFamilyPolicyRequireDualStack:
			return nil, "", o.errorf("spec.ipFamilyPolicy", "RequireDualStack needs an address of both families "+
				"and there is no %s network to take one from: give one of each family with --service-cidr, or use PreferDualStack", w.family)
		default:
			return nil, "", o.errorf("spec.ipFamilies", "the Service needs an %s address and there is no network to take it from: "+
				"give one with --service-cidr, or write an address in spec.clusterIP", w.family)
		}
	}
	return wishes, policy, nil
}

func otherFamily(family corev1.IPFamily) corev1.IPFamily {
	if family == corev1.IPv4Protocol {
		return corev1.IPv6Protocol
	}
	return corev1.IPv4Protocol
}
