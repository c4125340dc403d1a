package ipvs

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/kmod"
)

// serverKey identifies a virtual server in the kernel.
type serverKey struct {
	protocol dataplane.Protocol
	addr     netip.AddrPort
}

func (s serverKey) family() dataplane.Family { return dataplane.FamilyOf(s.addr.Addr()) }

// String formats the key like a [dataplane.Frontend].
func (s serverKey) String() string {
	return dataplane.Frontend{Protocol: s.protocol, Addr: s.addr}.String()
}

func (s serverKey) compare(o serverKey) int {
	return cmp.Or(s.addr.Compare(o.addr), cmp.Compare(s.protocol, o.protocol))
}

// hash returns a number that spreads virtual servers evenly and does not change.
func (s serverKey) hash() uint64 {
	const fibonacci = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio
	addr := s.addr.Addr().As16()
	h := binary.BigEndian.Uint64(addr[:8])*fibonacci + binary.BigEndian.Uint64(addr[8:])
	h = h*fibonacci + uint64(s.addr.Port())<<8 + uint64(s.protocol)
	return h * fibonacci >> 32 //nolint:mnd // the upper half depends on all bits
}

// virtualServer is the desired state of a virtual server.
type virtualServer struct {
	settings
	// endpoints are the destinations that accept connections, sorted by address. The slice is
	// shared with the Service.
	endpoints []dataplane.Endpoint
	// serving are the UDP endpoints that keep their existing flows.
	serving []netip.AddrPort
}

// settings are the properties of a virtual server without its destinations.
type settings struct {
	scheduler string
	flags     uint32
	// timeout is the persistence timeout in seconds, 0 without persistence.
	timeout uint32
}

// Flags of a virtual server (linux/ip_vs.h). flagMask selects the flags that are compared.
const (
	flagPersistent = 0x0001
	flagHashed     = 0x0002 // set by the kernel
	flagOnePacket  = 0x0004
	flagSched1     = 0x0008
	flagSched2     = 0x0010
	flagSched3     = 0x0020

	flagMask = flagPersistent | flagOnePacket | flagSched1 | flagSched2 | flagSched3
)

// settingsFor returns the settings of a Service's virtual servers.
func settingsFor(s *dataplane.Service, scheduler string) settings {
	if s.Scheduler != "" {
		scheduler = s.Scheduler
	}
	set := settings{scheduler: scheduler, timeout: uint32(s.Affinity / time.Second)} //nolint:gosec // MaxAffinity fits
	if set.timeout != 0 {
		set.flags |= flagPersistent
	}
	switch scheduler {
	case maglev:
		set.flags |= flagSched1 | flagSched2 // mh-port: hash the client's port too, as kube-proxy does
	case dataplane.SourceHash:
		set.scheduler = maglev
		set.flags |= flagSched1
	case sourceHashing:
		set.flags |= flagSched1
	}
	return set
}

// The kernel's schedulers that hash addresses. A destination with weight 0 stays in their tables, and
// the kernel refuses its clients unless flagSched1 (sh-fallback, mh-fallback) is set; then it selects
// another destination (net/netfilter/ipvs/ip_vs_sh.c and ip_vs_mh.c).
const (
	maglev        = "mh" // Maglev's consistent hashing
	sourceHashing = "sh"
)

// schedulerOf returns the [dataplane.ServiceSpec].Scheduler of a virtual server with these
// settings.
func schedulerOf(set settings) string {
	if set.scheduler == maglev && set.flags&flagSched2 == 0 {
		return dataplane.SourceHash
	}
	return set.scheduler
}

// SourceHashScheduler returns the [dataplane.ServiceSpec].Scheduler that selects endpoints by the
// client's address: [dataplane.SourceHash], or sh on a kernel without the module ip_vs_mh. With sh,
// most clients move to another endpoint when endpoints change.
func SourceHashScheduler() string {
	if kmod.Exists("ip_vs_" + maglev) {
		return dataplane.SourceHash
	}
	return sourceHashing
}

// endpointList selects one of the endpoint lists of a Service.
type endpointList int

const (
	clusterEndpoints endpointList = iota // dataplane.ServiceSpec.Endpoints
	localEndpoints                       // dataplane.ServiceSpec.LocalEndpoints
	endpointLists
)

// internalNets returns the networks of internal addresses, where all virtual servers are that
// do not listen on a cluster IP. They are parts of the reserved 240.0.0.0/4 (RFC 1112) and of
// fd00::/8 (RFC 4193). Only nftables rules lead to these addresses.
func internalNets() []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{0xfa, 0x1d}), 16),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0xfa, 0x1d}), 64),
	}
}

func internalNet(f dataplane.Family) netip.Prefix {
	nets := internalNets()
	if f == dataplane.IPv6 {
		return nets[1]
	}
	return nets[0]
}

func isInternal(a netip.Addr) bool {
	return slices.ContainsFunc(internalNets(), func(p netip.Prefix) bool { return p.Contains(a) })
}

// addrOwner identifies an endpoint list of a Service as the owner of an internal address.
// preferred is the address that it has unless another owner uses it.
type addrOwner struct {
	key       dataplane.Key
	list      endpointList
	preferred netip.AddrPort
}

func addrOwnerOf(s *dataplane.Service, l endpointList) addrOwner {
	return addrOwner{s.Key, l, preferredAddr(s, l)}
}

// addrAllocator assigns internal addresses to endpoint lists. The preferred address is derived
// from the Service, so it stays the same after a restart. If two owners prefer the same
// address, the second one gets the next port. The address of a node port depends only on the
// node port, and no other owner uses it.
type addrAllocator struct {
	owners    map[netip.AddrPort]addrOwner
	displaced map[addrOwner]netip.AddrPort // owners without their preferred address
}

func newAddrAllocator() addrAllocator {
	return addrAllocator{owners: map[netip.AddrPort]addrOwner{}, displaced: map[addrOwner]netip.AddrPort{}}
}

// allocate returns the internal address of an endpoint list, and assigns one if necessary.
func (a *addrAllocator) allocate(s *dataplane.Service, l endpointList) netip.AddrPort {
	owner := addrOwnerOf(s, l)
	if s.Key.Kind == dataplane.NodePort {
		return owner.preferred
	}
	if addr, ok := a.displaced[owner]; ok {
		return addr
	}
	addr := owner.preferred
	for {
		if current, ok := a.owners[addr]; !ok || current == owner {
			break
		}
		port := addr.Port() + 1
		if port == 0 {
			port = 1
		}
		addr = netip.AddrPortFrom(addr.Addr(), port)
	}
	a.owners[addr] = owner
	if addr != owner.preferred {
		a.displaced[owner] = addr
	}
	return addr
}

// release frees the addresses of s that next does not use. next is nil if the Service is
// deleted.
func (a *addrAllocator) release(s, next *dataplane.Service) {
	for l := range endpointLists {
		owner := addrOwnerOf(s, l)
		if next != nil && addrOwnerOf(next, l) == owner {
			continue
		}
		addr, moved := a.displaced[owner]
		if !moved {
			addr = owner.preferred
		}
		if a.owners[addr] == owner {
			delete(a.owners, addr)
		}
		delete(a.displaced, owner)
	}
}

// preferredAddr returns the preferred internal address of an endpoint list. For a node port,
// it has the node port's number and one address for each protocol and list. For other
// Services, address and port are a hash of the key, outside the 256 addresses that are
// reserved for node ports.
func preferredAddr(s *dataplane.Service, l endpointList) netip.AddrPort {
	base := internalNet(s.Key.Family).Addr()
	b := base.AsSlice()
	if f := s.Frontends[0]; s.Key.Kind == dataplane.NodePort {
		n := map[dataplane.Protocol]endpointList{dataplane.TCP: 1, dataplane.UDP: 3, dataplane.SCTP: 5}[f.Protocol] + l
		b[len(b)-1] = byte(n) //nolint:gosec // fits
		return netip.AddrPortFrom(addrFromSlice(b), f.Addr.Port())
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", s.Key, l))
	host := b[2:]
	if s.Key.Family == dataplane.IPv6 {
		host = b[8:]
	}
	copy(host, sum[:])
	if n := len(host); host[n-2] == 0 {
		host[n-2] = 1
	}
	port := binary.BigEndian.Uint16(sum[16:])
	if port == 0 {
		port = 1
	}
	return netip.AddrPortFrom(addrFromSlice(b), port)
}

func addrFromSlice(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a
}

// hasDirectServers reports whether the virtual servers for Endpoints listen on the frontends'
// own addresses. This is true for cluster IPs only.
func hasDirectServers(s *dataplane.Service) bool { return s.Key.Kind == dataplane.ClusterIP }

// VirtualServers implements [fairlead.io/fairlead/nft.Translator].
func (d *Dataplane) VirtualServers(s *dataplane.Service) (cluster, local netip.AddrPort) {
	if !hasDirectServers(s) {
		cluster = d.allocator.allocate(s, clusterEndpoints)
	}
	if s.ExternalTrafficPolicyLocal {
		local = d.allocator.allocate(s, localEndpoints)
	}
	return cluster, local
}

// render calls yield for each virtual server of a Service.
func (d *Dataplane) render(s *dataplane.Service, yield func(serverKey, virtualServer)) {
	set := settingsFor(s, d.scheduler)
	cluster, local := d.VirtualServers(s)
	all := virtualServer{set, s.Endpoints, s.Serving}
	if hasDirectServers(s) {
		for _, f := range s.Frontends {
			yield(serverKey{f.Protocol, f.Addr}, all)
		}
	}
	for i, f := range s.Frontends {
		if slices.ContainsFunc(s.Frontends[:i], func(o dataplane.Frontend) bool { return o.Protocol == f.Protocol }) {
			continue
		}
		if !hasDirectServers(s) {
			yield(serverKey{f.Protocol, cluster}, all)
		}
		if s.ExternalTrafficPolicyLocal {
			yield(serverKey{f.Protocol, local}, virtualServer{set, s.LocalEndpoints, s.Serving})
		}
	}
}

// checkSupported returns an error that wraps [dataplane.ErrUnsupported] if this backend cannot
// program the Service.
func (d *Dataplane) checkSupported(s *dataplane.Service) error {
	if !hasDirectServers(s) {
		return nil
	}
	for _, f := range s.Frontends {
		for _, p := range d.excludeCIDRs {
			if p.Contains(f.Addr.Addr()) {
				return fmt.Errorf("%w: the cluster IP %s is in %s, which is excluded from IPVS (--ipvs-exclude-cidrs)",
					dataplane.ErrUnsupported, f.Addr.Addr(), p)
			}
		}
	}
	return nil
}
