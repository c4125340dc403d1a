package conntrack

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// flow is what counts of an entry.
type flow struct {
	protocol dataplane.Protocol
	// destination is where the client sends to, and endpoint is where replies
	// come from. They are the same where nothing was translated.
	destination, endpoint netip.AddrPort
	// replied says that a packet came back (IPS_SEEN_REPLY).
	replied bool
}

// frontend returns the frontend that the client sends to.
func (f flow) frontend() dataplane.Frontend {
	return dataplane.Frontend{Protocol: f.protocol, Addr: f.destination}
}

func (f flow) translated() bool { return f.endpoint != f.destination }

// serviceIndex is what the kernel's maps have for UDP and SCTP.
type serviceIndex struct {
	services map[dataplane.Key]*dataplane.Service
	// owners are the Services of the frontends, of which those with the
	// unspecified address are node ports.
	owners map[dataplane.Frontend]*dataplane.Service
	// nodePortAddrs and nodePortNetworks are where node ports answer, and formerNodePortAddrs
	// and formerNodePortNetworks where they did.
	nodePortAddrs, formerNodePortAddrs       map[netip.Addr]struct{}
	nodePortNetworks, formerNodePortNetworks []netip.Prefix
}

func newServiceIndex() serviceIndex {
	return serviceIndex{
		services: map[dataplane.Key]*dataplane.Service{},
		owners:   map[dataplane.Frontend]*dataplane.Service{},

		formerNodePortAddrs: map[netip.Addr]struct{}{},
	}
}

// update replaces the Services of these keys, by none where they are nil.
func (p *serviceIndex) update(services map[dataplane.Key]*dataplane.Service) {
	// A frontend may go from one to another, so all leave before any joins.
	for key := range services {
		for f := range trackedFrontends(p.services[key]) {
			delete(p.owners, f)
		}
		delete(p.services, key)
	}
	for key, svc := range services {
		for f := range trackedFrontends(svc) {
			p.owners[f] = svc
			p.services[key] = svc
		}
	}
}

func (p *serviceIndex) setNode(n dataplane.Node) {
	maps.Copy(p.formerNodePortAddrs, p.nodePortAddrs)
	p.nodePortAddrs = make(map[netip.Addr]struct{}, len(n.NodePortAddrs))
	for _, addr := range n.NodePortAddrs {
		p.nodePortAddrs[addr] = struct{}{}
		delete(p.formerNodePortAddrs, addr)
	}
	for _, network := range p.nodePortNetworks {
		if !slices.Contains(p.formerNodePortNetworks, network) {
			p.formerNodePortNetworks = append(p.formerNodePortNetworks, network)
		}
	}
	p.nodePortNetworks = n.NodePortNetworks
	p.formerNodePortNetworks = slices.DeleteFunc(p.formerNodePortNetworks, func(former netip.Prefix) bool {
		return slices.Contains(p.nodePortNetworks, former)
	})
}

// nodePortFrontend returns the node port that a frontend with one of the node's addresses
// would be.
func (p *serviceIndex) nodePortFrontend(f dataplane.Frontend) (dataplane.Frontend, bool) {
	addr := f.Addr.Addr()
	_, ok := p.nodePortAddrs[addr]
	return withUnspecifiedAddr(f), ok || prefixesContain(p.nodePortNetworks, addr)
}

func prefixesContain(networks []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// isFormerNodePort reports whether a flow is to a node port, by an address that has none any
// more.
func (p *serviceIndex) isFormerNodePort(f flow) bool {
	addr := f.destination.Addr()
	if _, former := p.formerNodePortAddrs[addr]; !f.translated() || !former && !prefixesContain(p.formerNodePortNetworks, addr) {
		return false
	}
	owner := p.owners[withUnspecifiedAddr(f.frontend())]
	return owner != nil && serves(owner, f)
}

// withUnspecifiedAddr returns the frontend of a node port.
func withUnspecifiedAddr(f dataplane.Frontend) dataplane.Frontend {
	unspecified := netip.IPv6Unspecified()
	if f.Addr.Addr().Is4() {
		unspecified = netip.IPv4Unspecified()
	}
	f.Addr = netip.AddrPortFrom(unspecified, f.Addr.Port())
	return f
}

// isStale reports whether a flow is to be forgotten, of those in s.
func (p *serviceIndex) isStale(f flow, s *candidates) bool {
	frontend := f.frontend()
	owner := p.owners[frontend]
	node, isNode := p.nodePortFrontend(frontend)
	if owner == nil && isNode {
		owner = p.owners[node]
	}
	if owner != nil {
		if serves(owner, f) {
			return false
		}
		if s.all {
			return true
		}
	}
	if owner == nil && s.all && p.isFormerNodePort(f) {
		return true
	}
	return s.frontends[frontend].isStale(f, owner) || isNode && s.frontends[node].isStale(f, owner)
}

// candidates are the frontends that may have stale entries.
type candidates struct {
	// all says that every entry of every frontend is suspect.
	all       bool
	frontends map[dataplane.Frontend]criteria
}

// criteria says which entries of a frontend are suspect.
type criteria struct {
	// removed are the endpoints that have left; each list is sorted.
	removed [][]netip.AddrPort
	// untranslated says that those are that were not translated.
	untranslated bool
}

// isStale reports whether a flow to an endpoint that does not serve the frontend now
// is suspect. The owner is nil if the frontend is none any more: then a flow
// without translation is somebody else's.
func (s criteria) isStale(f flow, owner *dataplane.Service) bool {
	if !f.translated() && owner == nil {
		return false
	}
	return s.matches(f)
}

// matches reports whether a flow was not translated, or goes to an endpoint that
// has left, as s says.
func (s criteria) matches(f flow) bool {
	if !f.translated() && s.untranslated {
		return true
	}
	return slices.ContainsFunc(s.removed, func(list []netip.AddrPort) bool { return containsAddr(list, f.endpoint) })
}

func (s *candidates) empty() bool { return !s.all && len(s.frontends) == 0 }

func (s *candidates) add(frontend dataplane.Frontend, more criteria) {
	if s.frontends == nil {
		s.frontends = map[dataplane.Frontend]criteria{}
	}
	have := s.frontends[frontend]
	have.removed = append(have.removed, more.removed...)
	have.untranslated = have.untranslated || more.untranslated
	s.frontends[frontend] = have
}

func (s *candidates) merge(o candidates) {
	s.all = s.all || o.all
	for f, more := range o.frontends {
		s.add(f, more)
	}
}

// addChange adds the frontends of which a change leaves stale entries behind.
func (s *candidates) addChange(c dataplane.Change) {
	if !isTracked(c.Old) && !isTracked(c.New) {
		return
	}
	old, now := servingEndpoints(c.Old), servingEndpoints(c.New)
	gone := difference(old, now)
	if isSCTP(c.Old) {
		// The handshakes that an endpoint of Service.Serving has not answered are
		// stale, too.
		gone = difference(old, acceptingEndpoints(c.New))
	}
	var left [][]netip.AddrPort
	if len(gone) > 0 {
		left = [][]netip.AddrPort{gone}
	}
	first := len(old) == 0 && len(now) > 0
	for f := range trackedFrontends(c.New) {
		if !hasFrontend(c.Old, f) {
			s.add(f, criteria{untranslated: true})
		} else if left != nil || first {
			s.add(f, criteria{removed: left, untranslated: first})
		}
	}
	for f := range trackedFrontends(c.Old) {
		if !hasFrontend(c.New, f) && len(old) > 0 {
			s.add(f, criteria{removed: [][]netip.AddrPort{old}})
		}
	}
}

// trackedFrontends yields the frontends of UDP and SCTP. The Service may be nil.
func trackedFrontends(svc *dataplane.Service) iter.Seq[dataplane.Frontend] {
	return func(yield func(dataplane.Frontend) bool) {
		if svc == nil {
			return
		}
		for _, f := range svc.Frontends {
			if f.Protocol != dataplane.TCP && !yield(f) {
				return
			}
		}
	}
}

// isTracked reports whether the Service has a frontend of UDP or SCTP.
func isTracked(svc *dataplane.Service) bool {
	for range trackedFrontends(svc) {
		return true
	}
	return false
}

// isSCTP reports whether the frontends of the Service are of SCTP.
func isSCTP(svc *dataplane.Service) bool {
	return svc != nil && svc.Frontends[0].Protocol == dataplane.SCTP
}

func hasFrontend(svc *dataplane.Service, frontend dataplane.Frontend) bool {
	return svc != nil && slices.Contains(svc.Frontends, frontend)
}

// servingEndpoints returns all endpoints that serve, sorted and unique. The Service may
// be nil.
func servingEndpoints(svc *dataplane.Service) []netip.AddrPort {
	list := acceptingEndpoints(svc)
	if svc == nil || len(svc.Serving) == 0 {
		return list
	}
	list = append(list, svc.Serving...)
	slices.SortFunc(list, netip.AddrPort.Compare)
	return slices.Compact(list)
}

// acceptingEndpoints returns the endpoints to which new connections go, sorted and unique.
// The Service may be nil.
func acceptingEndpoints(svc *dataplane.Service) []netip.AddrPort {
	if svc == nil {
		return nil
	}
	list := make([]netip.AddrPort, 0, len(svc.Endpoints)+len(svc.LocalEndpoints)+len(svc.Serving))
	for _, e := range svc.Endpoints {
		list = append(list, e.Addr)
	}
	if len(svc.LocalEndpoints) == 0 {
		return list
	}
	for _, e := range svc.LocalEndpoints {
		list = append(list, e.Addr)
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return slices.Compact(list)
}

// serves reports whether the endpoint of a flow still serves it.
func serves(svc *dataplane.Service, f flow) bool {
	if containsEndpoint(svc.Endpoints, f.endpoint) || containsEndpoint(svc.LocalEndpoints, f.endpoint) {
		return true
	}
	// An endpoint of SCTP that has not answered the handshake and takes no new
	// ones may never answer.
	return (f.protocol != dataplane.SCTP || f.replied) && containsAddr(svc.Serving, f.endpoint)
}

// containsEndpoint reports whether an address is one of the endpoints, which are sorted.
func containsEndpoint(list []dataplane.Endpoint, addr netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(list, addr, func(e dataplane.Endpoint, addr netip.AddrPort) int { return e.Addr.Compare(addr) })
	return ok
}

func containsAddr(sorted []netip.AddrPort, addr netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(sorted, addr, netip.AddrPort.Compare)
	return ok
}

// difference returns what is in a and not in b, which are sorted.
func difference(a, b []netip.AddrPort) []netip.AddrPort {
	var rest []netip.AddrPort
	for _, addr := range a {
		if !containsAddr(b, addr) {
			rest = append(rest, addr)
		}
	}
	return rest
}
