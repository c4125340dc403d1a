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
	service *dataplane.Service // nil if there is none any more
	// pinned is where session affinity sends clients, and pinnedAt when it last
	// did; not valid for nowhere.
	pinned   netip.AddrPort
	pinnedAt time.Time

	// The rest belongs to Relay.Run.
	owner    dataplane.Key
	listener net.Listener // nil if it is not listened on
	// attempts is how often that failed, and retryAt when it is tried again.
	attempts  int
	retryAt   time.Time
	lastError string // the error that was logged last
}

func (p *port) family() dataplane.Family { return dataplane.FamilyOf(p.frontend.Addr.Addr()) }

// listenAddr returns where a port is listened on.
func (p *port) listenAddr() (network string, addr netip.AddrPort) {
	if p.family() == dataplane.IPv4 {
		return tcpNetwork(p.family()), netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), p.frontend.Addr.Port())
	}
	return tcpNetwork(p.family()), netip.AddrPortFrom(netip.IPv6Loopback(), p.frontend.Addr.Port())
}

// tcpNetwork returns the network of package net.
func tcpNetwork(f dataplane.Family) string {
	if f == dataplane.IPv4 {
		return "tcp4"
	}
	return "tcp6"
}

// setService gives the port to a Service, or to none.
func (p *port) setService(svc *dataplane.Service) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.service = svc
}

// endpointCount returns how many endpoints there are, and whether there is a Service.
func (p *port) endpointCount() (n int, there bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.service == nil {
		return 0, false
	}
	return len(p.service.Endpoints), true
}

// serviceName returns the Service port's namespace, name and port for the log, or
// "" if the Service is gone.
func (p *port) serviceName() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.service == nil {
		return ""
	}
	return p.service.Key.Service()
}

// pickEndpoint returns an endpoint for a client that has tried these before; ok is false
// if there is no other.
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
	// The next that was not tried: there are few of those that were.
	first := rand.IntN(len(all)) //nolint:gosec // as the kernel's choice, this is no secret
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

// containsEndpoint reports whether addr is one of endpoints, which are sorted.
func containsEndpoint(endpoints []dataplane.Endpoint, addr netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(endpoints, addr, func(e dataplane.Endpoint, a netip.AddrPort) int { return e.Addr.Compare(a) })
	return ok
}
