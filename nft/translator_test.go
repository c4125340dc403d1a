package nft

import (
	"hash/fnv"
	"net/netip"

	"fairlead/dataplane"
)

// virtualServers lets cluster IPs through, and has an address for each other list.
type virtualServers struct{}

func (virtualServers) VirtualServers(s *dataplane.Service) (cluster, local netip.AddrPort) {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s.Key.String()))
	sum := h.Sum32()
	addr := func(l list) netip.AddrPort {
		if s.Key.Family == dataplane.IPv6 {
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, 0xfa, 13: byte(l), 14: byte(sum >> 8), 15: byte(sum)}), 7)
		}
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{250, 29 + byte(l), byte(sum >> 8), byte(sum)}), 7)
	}
	if s.Key.Kind != dataplane.ClusterIP {
		cluster = addr(clusterList)
	}
	if s.ExternalLocal {
		local = addr(localList)
	}
	return cluster, local
}
