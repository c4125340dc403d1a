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

// programmed is what the kernel's maps have for UDP and SCTP.
type programmed struct {
	services map[dataplane.Key]*dataplane.Service
	// owners are the Services of the frontends, of which those with the
	// unspecified address are node ports.
	owners map[dataplane.Frontend]*dataplane.Service
	// nodePortAddrs and nodePortNetworks are where node ports answer, and formerAddrs
	// and formerNetworks where they did.
	nodePortAddrs, formerAddrs       map[netip.Addr]struct{}
	nodePortNetworks, formerNetworks []netip.Prefix
}

func newProgrammed() programmed {
	return programmed{
		services: map[dataplane.Key]*dataplane.Service{},
		owners:   map[dataplane.Frontend]*dataplane.Service{},

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
	for _, network := range p.nodePortNetworks {
		if !slices.Contains(p.formerNetworks, network) {
			p.formerNetworks = append(p.formerNetworks, network)
		}
	}
	p.nodePortNetworks = n.NodePortNetworks
	p.formerNetworks = slices.DeleteFunc(p.formerNetworks, func(former netip.Prefix) bool {
		return slices.Contains(p.nodePortNetworks, former)
	})
}

// nodePort returns the node port that a frontend with one of the node's addresses
// would be.
func (p *programmed) nodePort(f dataplane.Frontend) (dataplane.Frontend, bool) {
	addr := f.Addr.Addr()
	_, ok := p.nodePortAddrs[addr]
	return atAnyAddr(f), ok || within(p.nodePortNetworks, addr)
}

func within(networks []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// left reports whether a flow is to a node port, by an address that has none any
// more.
func (p *programmed) left(f flow) bool {
	addr := f.destination.Addr()
	if _, former := p.formerAddrs[addr]; !f.translated() || !former && !within(p.formerNetworks, addr) {
		return false
	}
	owner := p.owners[atAnyAddr(f.frontend())]
	return owner != nil && serves(owner, f)
}

// atAnyAddr returns the frontend of a node port.
func atAnyAddr(f dataplane.Frontend) dataplane.Frontend {
	unspecified := netip.IPv6Unspecified()
	if f.Addr.Addr().Is4() {
		unspecified = netip.IPv4Unspecified()
	}
	f.Addr = netip.AddrPortFrom(unspecified, f.Addr.Port())
	return f
}

// stale reports whether a flow is to be forgotten, of those in s.
func (p *programmed) stale(f flow, s *suspects) bool {
	frontend := f.frontend()
	owner := p.owners[frontend]
	node, isNode := p.nodePort(frontend)
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
	if owner == nil && s.all && p.left(f) {
		return true
	}
	return s.frontends[frontend].has(f, owner) || isNode && s.frontends[node].has(f, owner)
}

// suspects are the frontends that may have stale entries.
type suspects struct {
	// all says that every entry of every frontend is suspect.
	all       bool
	frontends map[dataplane.Frontend]suspicion
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
	return s.matches(f)
}

// matches reports whether a flow was not translated, or goes to an endpoint that
// has left, as s says.
func (s suspicion) matches(f flow) bool {
	if !f.translated() && s.untranslated {
		return true
	}
	return slices.ContainsFunc(s.left, func(list []netip.AddrPort) bool { return contains(list, f.endpoint) })
}

func (s *suspects) none() bool { return !s.all && len(s.frontends) == 0 }

func (s *suspects) add(frontend dataplane.Frontend, more suspicion) {
	if s.frontends == nil {
		s.frontends = map[dataplane.Frontend]suspicion{}
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
	if !isTracked(c.Old) && !isTracked(c.New) {
		return
	}
	old, now := endpoints(c.Old), endpoints(c.New)
	gone := without(old, now)
	if isSCTP(c.Old) {
		// The handshakes that an endpoint of Service.Serving has not answered are
		// stale, too.
		gone = without(old, accepting(c.New))
	}
	var left [][]netip.AddrPort
	if len(gone) > 0 {
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

// frontends yields the frontends of UDP and SCTP. The Service may be nil.
func frontends(svc *dataplane.Service) iter.Seq[dataplane.Frontend] {
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
	for range frontends(svc) {
		return true
	}
	return false
}

// isSCTP reports whether the frontends of the Service are of SCTP.
func isSCTP(svc *dataplane.Service) bool {
	return svc != nil && svc.Frontends[0].Protocol == dataplane.SCTP
}

func has(svc *dataplane.Service, frontend dataplane.Frontend) bool {
	return svc != nil && slices.Contains(svc.Frontends, frontend)
}

// endpoints returns all endpoints that serve, sorted and unique. The Service may
// be nil.
func endpoints(svc *dataplane.Service) []netip.AddrPort {
	list := accepting(svc)
	if svc == nil || len(svc.Serving) == 0 {
		return list
	}
	list = append(list, svc.Serving...)
	slices.SortFunc(list, netip.AddrPort.Compare)
	return slices.Compact(list)
}

// accepting returns the endpoints to which new connections go, sorted and unique.
// The Service may be nil.
func accepting(svc *dataplane.Service) []netip.AddrPort {
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
	if among(svc.Endpoints, f.endpoint) || among(svc.LocalEndpoints, f.endpoint) {
		return true
	}
	// An endpoint of SCTP that has not answered the handshake and takes no new
	// ones may never answer.
	return (f.protocol != dataplane.SCTP || f.replied) && contains(svc.Serving, f.endpoint)
}

// among reports whether an address is one of the endpoints, which are sorted.
func among(list []dataplane.Endpoint, addr netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(list, addr, func(e dataplane.Endpoint, addr netip.AddrPort) int { return e.Addr.Compare(addr) })
	return ok
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
