package conntrack

import (
	"maps"
	"net/netip"
	"slices"

	"fairlead/dataplane"
)

// flow is what counts of an entry of UDP.
type flow struct {
	// destination is where the client sends to, and endpoint is where replies
	// come from. They are the same where nothing was translated.
	destination, endpoint netip.AddrPort
}

func (f flow) translated() bool { return f.endpoint != f.destination }

// programmed is what the kernel's maps have for UDP.
type programmed struct {
	services map[dataplane.Key]*dataplane.Service
	// owners are the Services of the frontends, of which those with the
	// unspecified address are node ports.
	owners map[netip.AddrPort]*dataplane.Service
	// nodePortAddrs are where node ports answer, and formerAddrs where they did.
	nodePortAddrs, formerAddrs map[netip.Addr]struct{}
}

func newProgrammed() programmed {
	return programmed{
		services: map[dataplane.Key]*dataplane.Service{},
		owners:   map[netip.AddrPort]*dataplane.Service{},

		formerAddrs: map[netip.Addr]struct{}{},
	}
}

// take replaces the Services of these keys, by none where they are nil.
func (p *programmed) take(services map[dataplane.Key]*dataplane.Service) {
	// A frontend may go from one to another, so all leave before any joins.
	for key := range services {
		for f := range frontends(p.services[key]) {
			delete(p.owners, f)
		}
		delete(p.services, key)
	}
	for key, svc := range services {
		for f := range frontends(svc) {
			p.owners[f] = svc
			p.services[key] = svc
		}
	}
}

func (p *programmed) setNode(n dataplane.Node) {
	maps.Copy(p.formerAddrs, p.nodePortAddrs)
	p.nodePortAddrs = make(map[netip.Addr]struct{}, len(n.NodePortAddrs))
	for _, addr := range n.NodePortAddrs {
		p.nodePortAddrs[addr] = struct{}{}
		delete(p.formerAddrs, addr)
	}
}

// nodePort returns the node port that a destination would be.
func (p *programmed) nodePort(destination netip.AddrPort) (netip.AddrPort, bool) {
	_, ok := p.nodePortAddrs[destination.Addr()]
	return atAnyAddr(destination), ok
}

// left reports whether a flow is to a node port, by an address that has none any
// more.
func (p *programmed) left(f flow) bool {
	if _, former := p.formerAddrs[f.destination.Addr()]; !former || !f.translated() {
		return false
	}
	owner := p.owners[atAnyAddr(f.destination)]
	return owner != nil && serves(owner, f.endpoint)
}

// atAnyAddr returns the frontend of a node port.
func atAnyAddr(destination netip.AddrPort) netip.AddrPort {
	unspecified := netip.IPv6Unspecified()
	if destination.Addr().Is4() {
		unspecified = netip.IPv4Unspecified()
	}
	return netip.AddrPortFrom(unspecified, destination.Port())
}

// stale reports whether a flow is to be forgotten, of those in s.
func (p *programmed) stale(f flow, s *suspects) bool {
	owner := p.owners[f.destination]
	node, isNode := p.nodePort(f.destination)
	if owner == nil && isNode {
		owner = p.owners[node]
	}
	if owner != nil {
		if serves(owner, f.endpoint) {
			return false
		}
		if s.all {
			return true
		}
	}
	if owner == nil && s.all && p.left(f) {
		return true
	}
	return s.frontends[f.destination].has(f, owner) || isNode && s.frontends[node].has(f, owner)
}

// suspects are the frontends that may have stale entries.
type suspects struct {
	// all says that every entry of every frontend is suspect.
	all       bool
	frontends map[netip.AddrPort]suspicion
}

// suspicion says which entries of a frontend are suspect.
type suspicion struct {
	// left are the endpoints that have left; each list is sorted.
	left [][]netip.AddrPort
	// untranslated says that those are that were not translated.
	untranslated bool
}

// has reports whether a flow to an endpoint that does not serve the frontend now
// is suspect. The owner is nil if the frontend is none any more: then a flow
// without translation is somebody else's.
func (s suspicion) has(f flow, owner *dataplane.Service) bool {
	if !f.translated() && owner == nil {
		return false
	}
	if !f.translated() && s.untranslated {
		return true
	}
	return slices.ContainsFunc(s.left, func(list []netip.AddrPort) bool { return contains(list, f.endpoint) })
}

func (s *suspects) none() bool { return !s.all && len(s.frontends) == 0 }

func (s *suspects) add(frontend netip.AddrPort, more suspicion) {
	if s.frontends == nil {
		s.frontends = map[netip.AddrPort]suspicion{}
	}
	have := s.frontends[frontend]
	have.left = append(have.left, more.left...)
	have.untranslated = have.untranslated || more.untranslated
	s.frontends[frontend] = have
}

func (s *suspects) merge(o suspects) {
	s.all = s.all || o.all
	for f, more := range o.frontends {
		s.add(f, more)
	}
}

// change adds the frontends of which a change leaves stale entries behind.
func (s *suspects) change(c dataplane.Change) {
	if !isUDP(c.Old) && !isUDP(c.New) {
		return
	}
	old, now := endpoints(c.Old), endpoints(c.New)
	var left [][]netip.AddrPort
	if gone := without(old, now); len(gone) > 0 {
		left = [][]netip.AddrPort{gone}
	}
	first := len(old) == 0 && len(now) > 0
	for f := range frontends(c.New) {
		if !has(c.Old, f) {
			s.add(f, suspicion{untranslated: true})
		} else if left != nil || first {
			s.add(f, suspicion{left: left, untranslated: first})
		}
	}
	for f := range frontends(c.Old) {
		if !has(c.New, f) && len(old) > 0 {
			s.add(f, suspicion{left: [][]netip.AddrPort{old}})
		}
	}
}

// frontends yields the frontends of UDP. The Service may be nil.
func frontends(svc *dataplane.Service) func(yield func(netip.AddrPort) bool) {
	return func(yield func(netip.AddrPort) bool) {
		if svc == nil {
			return
		}
		for _, f := range svc.Frontends {
			if f.Protocol == dataplane.UDP && !yield(f.Addr) {
				return
			}
		}
	}
}

func isUDP(svc *dataplane.Service) bool {
	for range frontends(svc) {
		return true
	}
	return false
}

func has(svc *dataplane.Service, frontend netip.AddrPort) bool {
	for f := range frontends(svc) {
		if f == frontend {
			return true
		}
	}
	return false
}

// endpoints returns all endpoints that serve, sorted and unique. The Service may
// be nil.
func endpoints(svc *dataplane.Service) []netip.AddrPort {
	if svc == nil {
		return nil
	}
	list := make([]netip.AddrPort, 0, len(svc.Endpoints)+len(svc.Serving))
	for _, e := range svc.Endpoints {
		list = append(list, e.Addr)
	}
	for _, e := range svc.LocalEndpoints {
		list = append(list, e.Addr)
	}
	list = append(list, svc.Serving...)
	slices.SortFunc(list, netip.AddrPort.Compare)
	return slices.Compact(list)
}

// serves reports whether an address is one of the endpoints.
func serves(svc *dataplane.Service, addr netip.AddrPort) bool {
	in := func(list []dataplane.Endpoint) bool {
		_, ok := slices.BinarySearchFunc(list, addr, func(e dataplane.Endpoint, addr netip.AddrPort) int { return e.Addr.Compare(addr) })
		return ok
	}
	return in(svc.Endpoints) || in(svc.LocalEndpoints) || contains(svc.Serving, addr)
}

func contains(sorted []netip.AddrPort, addr netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(sorted, addr, netip.AddrPort.Compare)
	return ok
}

// without returns what is in a and not in b, which are sorted.
func without(a, b []netip.AddrPort) []netip.AddrPort {
	var rest []netip.AddrPort
	for _, addr := range a {
		if !contains(b, addr) {
			rest = append(rest, addr)
		}
	}
	return rest
}
