package loadbalancer

import (
	"errors"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// pool assigns addresses to Services.
type pool struct {
	networks []netip.Prefix // one for each family
	used     map[netip.Addr]bool
	owners   map[types.UID][]netip.Addr
}

func newPool(networks []netip.Prefix) *pool {
	return &pool{networks: networks, used: map[netip.Addr]bool{}, owners: map[types.UID][]netip.Addr{}}
}

var errNoAddress = errors.New("all addresses for load balancers are in use")

// get returns the addresses of a Service, one for each family. An address stays the same until it
// is released.
func (p *pool) get(owner types.UID, families []corev1.IPFamily) ([]netip.Addr, error) {
	result := make([]netip.Addr, 0, len(families))
	for _, family := range families {
		address, err := p.address(owner, family == corev1.IPv4Protocol)
		if err != nil {
			return nil, err
		}
		result = append(result, address)
	}
	return result, nil
}

func (p *pool) address(owner types.UID, ipv4 bool) (netip.Addr, error) {
	for _, address := range p.owners[owner] {
		if address.Is4() == ipv4 {
			return address, nil
		}
	}
	// Networks have more IPv6 addresses than any cluster needs.
	const limit = 250
	for _, network := range p.networks {
		if network.Addr().Is4() != ipv4 {
			continue
		}
		address := network.Addr()
		for range limit {
			if address = address.Next(); !p.used[address] {
				p.used[address] = true
				p.owners[owner] = append(p.owners[owner], address)
				return address, nil
			}
		}
	}
	return netip.Addr{}, errNoAddress
}

// release releases and returns the addresses of a Service.
func (p *pool) release(owner types.UID) []netip.Addr {
	addresses := p.owners[owner]
	for _, address := range addresses {
		delete(p.used, address)
	}
	delete(p.owners, owner)
	return addresses
}

// retain releases and returns the addresses of all Services that are not present.
func (p *pool) retain(present map[types.UID]bool) []netip.Addr {
	var released []netip.Addr
	for owner := range p.owners {
		if !present[owner] {
			released = append(released, p.release(owner)...)
		}
	}
	return released
}
