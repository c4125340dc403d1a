package relay

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	stdsync "sync"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/logrepeat"
)

// port is a node port in one family.
type port struct {
	frontend     dataplane.Frontend
	rejectionLog logrepeat.Limiter

	mu      stdsync.Mutex
	service *dataplane.Service // nil after the Service was removed
	// pinned is the endpoint that session affinity selects, and pinnedAt the time of its last
	// use. Without one, pinned is invalid.
	pinned   netip.AddrPort
	pinnedAt time.Time

	// Relay.Run owns the fields below.
	owner    dataplane.Key
	listener net.Listener // nil while the port is not open
	// attempts counts the failed attempts to listen since the last success, and retryAt is
	// the time of the next one.
	attempts  int
	retryAt   time.Time
	lastError string // logged last
}

func (p *port) family() dataplane.Family { return dataplane.FamilyOf(p.frontend.Addr.Addr()) }

// listenAddr returns the loopback address to listen on, and the network for package net.
func (p *port) listenAddr() (network string, addr netip.AddrPort) {
	if p.family() == dataplane.IPv4 {
		return tcpNetwork(p.family()), netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), p.frontend.Addr.Port())
	}
	return tcpNetwork(p.family()), netip.AddrPortFrom(netip.IPv6Loopback(), p.frontend.Addr.Port())
}

// tcpNetwork returns the name of the TCP network of a family in package net.
func tcpNetwork(f dataplane.Family) string {
	if f == dataplane.IPv4 {
		return "tcp4"
	}
	return "tcp6"
}

// setService makes svc, which may be nil, the Service of the port.
func (p *port) setService(svc *dataplane.Service) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.service = svc
}

// endpointCount returns the number of endpoints; ok is false if the port has no Service.
func (p *port) endpointCount() (n int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.service == nil {
		return 0, false
	}
	return len(p.service.Endpoints), true
}

// serviceName returns the namespace, name and port of the Service for log messages, or "" if
// the Service was removed.
func (p *port) serviceName() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.service == nil {
		return ""
	}
	return p.service.Key.Service()
}

// pickEndpoint returns an endpoint that a client has not tried yet; ok is false if none is
// left.
func (p *port) pickEndpoint(now time.Time, tried []netip.AddrPort) (addr netip.AddrPort, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.service == nil || len(p.service.Endpoints) == 0 {
		return netip.AddrPort{}, false
	}
	all := p.service.Endpoints
	sticky := p.service.Affinity > 0
	if sticky && p.pinned.IsValid() && now.Sub(p.pinnedAt) <= p.service.Affinity && !slices.Contains(tried, p.pinned) && containsEndpoint(all, p.pinned) {
		p.pinnedAt = now
		return p.pinned, true
	}
	// Tried endpoints are few, so a linear search is cheap.
	first := rand.IntN(len(all)) //nolint:gosec // not security-sensitive, like the kernel's choice
	for i := range all {
		addr = all[(first+i)%len(all)].Addr
		if !slices.Contains(tried, addr) {
			ok = true
			break
		}
	}
	if !ok {
		return netip.AddrPort{}, false
	}
	p.pinned, p.pinnedAt = netip.AddrPort{}, time.Time{}
	if sticky {
		p.pinned, p.pinnedAt = addr, now
	}
	return addr, true
}

// containsEndpoint reports whether the sorted endpoints contain addr.
func containsEndpoint(endpoints []dataplane.Endpoint, addr netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(endpoints, addr, func(e dataplane.Endpoint, a netip.AddrPort) int { return e.Addr.Compare(a) })
	return ok
}
