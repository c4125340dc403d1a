package conntrack

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"fairlead.io/fairlead/dataplane"
)

// flow is the part of an entry that determines whether the entry is stale.
type flow struct {
	protocol dataplane.Protocol
	// destination is the client's destination, endpoint the source of the replies. They are
	// equal if the flow is not translated.
	destination, endpoint netip.AddrPort
	// replied reports that the entry has seen a reply (IPS_SEEN_REPLY).
	replied bool
}

// frontend returns the client's destination as a frontend.
func (f flow) frontend() dataplane.Frontend {
	return dataplane.Frontend{Protocol: f.protocol, Addr: f.destination}
}

func (f flow) translated() bool { return f.endpoint != f.destination }

// serviceIndex holds the programmed UDP and SCTP Services.
type serviceIndex struct {
	services map[dataplane.Key]*dataplane.Service
	// owners maps frontends to their Services. Node ports have the unspecified address.
	owners map[dataplane.Frontend]*dataplane.Service
	// nodePortAddrs and nodePortNetworks are the current addresses of node ports.
	// formerNodePortAddrs and formerNodePortNetworks are the previous ones.
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

// update replaces the Services with these keys, and removes them if they are nil.
func (x *serviceIndex) update(services map[dataplane.Key]*dataplane.Service) {
	// Frontends may move between Services, so remove all old ones before adding new ones.
	for key := range services {
		for f := range trackedFrontends(x.services[key]) {
			delete(x.owners, f)
		}
		delete(x.services, key)
	}
	for key, svc := range services {
		for f := range trackedFrontends(svc) {
			x.owners[f] = svc
			x.services[key] = svc
		}
	}
}

func (x *serviceIndex) setNode(n dataplane.Node) {
	maps.Copy(x.formerNodePortAddrs, x.nodePortAddrs)
	x.nodePortAddrs = make(map[netip.Addr]struct{}, len(n.NodePortAddrs))
	for _, addr := range n.NodePortAddrs {
		x.nodePortAddrs[addr] = struct{}{}
		delete(x.formerNodePortAddrs, addr)
	}
	for _, network := range x.nodePortNetworks {
		if !slices.Contains(x.formerNodePortNetworks, network) {
			x.formerNodePortNetworks = append(x.formerNodePortNetworks, network)
		}
	}
	x.nodePortNetworks = n.NodePortNetworks
	x.formerNodePortNetworks = slices.DeleteFunc(x.formerNodePortNetworks, func(former netip.Prefix) bool {
		return slices.Contains(x.nodePortNetworks, former)
	})
}

// nodePortFrontend returns the node port for a frontend, and reports whether the frontend's
// address serves node ports.
func (x *serviceIndex) nodePortFrontend(f dataplane.Frontend) (dataplane.Frontend, bool) {
	addr := f.Addr.Addr()
	_, ok := x.nodePortAddrs[addr]
	return withUnspecifiedAddr(f), ok || prefixesContain(x.nodePortNetworks, addr)
}

func prefixesContain(networks []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// isFormerNodePort reports whether a flow was translated by a node port at a former address.
func (x *serviceIndex) isFormerNodePort(f flow) bool {
	addr := f.destination.Addr()
	if _, former := x.formerNodePortAddrs[addr]; !f.translated() || !former && !prefixesContain(x.formerNodePortNetworks, addr) {
		return false
	}
	owner := x.owners[withUnspecifiedAddr(f.frontend())]
	return owner != nil && serves(owner, f)
}

// withUnspecifiedAddr returns f with the unspecified address, which all node ports have.
func withUnspecifiedAddr(f dataplane.Frontend) dataplane.Frontend {
	unspecified := netip.IPv6Unspecified()
	if f.Addr.Addr().Is4() {
		unspecified = netip.IPv4Unspecified()
	}
	f.Addr = netip.AddrPortFrom(unspecified, f.Addr.Port())
	return f
}

// isStale reports whether a flow is stale. It considers only the candidates s.
func (x *serviceIndex) isStale(f flow, s *candidates) bool {
	frontend := f.frontend()
	owner := x.owners[frontend]
	nodePort, isNodePort := x.nodePortFrontend(frontend)
	if owner == nil && isNodePort {
		owner = x.owners[nodePort]
	}
	if owner != nil {
		if serves(owner, f) {
			return false
		}
		if s.all {
			return true
		}
	}
	if owner == nil && s.all && x.isFormerNodePort(f) {
		return true
	}
	return s.frontends[frontend].isStale(f, owner) || isNodePort && s.frontends[nodePort].isStale(f, owner)
}

// candidates are the frontends that may have stale entries.
type candidates struct {
	// all means all entries of all frontends.
	all       bool
	frontends map[dataplane.Frontend]criteria
}

// criteria select the candidate entries of one frontend.
type criteria struct {
	// removed holds lists of removed endpoints, each sorted.
	removed [][]netip.AddrPort
	// untranslated selects entries that are not translated.
	untranslated bool
}

// isStale reports whether a flow is stale, given that its endpoint does not serve the
// frontend. owner is nil if the frontend was deleted; an untranslated flow then belongs to
// another program.
func (c criteria) isStale(f flow, owner *dataplane.Service) bool {
	if !f.translated() && owner == nil {
		return false
	}
	return c.matches(f)
}

// matches reports whether the criteria select the flow: it is not translated, or its endpoint
// was removed.
func (c criteria) matches(f flow) bool {
	if !f.translated() && c.untranslated {
		return true
	}
	return slices.ContainsFunc(c.removed, func(list []netip.AddrPort) bool { return containsAddr(list, f.endpoint) })
}

// maxRemovedLists is the maximum number of lists in criteria. An endpoint that comes and goes is in many.
const maxRemovedLists = 16

func (s *candidates) empty() bool { return !s.all && len(s.frontends) == 0 }

func (s *candidates) add(frontend dataplane.Frontend, more criteria) {
	if s.frontends == nil {
		s.frontends = map[dataplane.Frontend]criteria{}
	}
	have := s.frontends[frontend]
	have.removed = append(have.removed, more.removed...)
	if len(have.removed) > maxRemovedLists {
		all := slices.Concat(have.removed...)
		slices.SortFunc(all, netip.AddrPort.Compare)
		have.removed = [][]netip.AddrPort{slices.Compact(all)}
	}
	have.untranslated = have.untranslated || more.untranslated
	s.frontends[frontend] = have
}

func (s *candidates) merge(o candidates) {
	s.all = s.all || o.all
	for f, more := range o.frontends {
		s.add(f, more)
	}
}

// limit replaces more than maxLaterFrontends frontends by all.
func (s *candidates) limit() {
	if len(s.frontends) > maxLaterFrontends {
		*s = candidates{all: true}
	}
}

// addChange adds the frontends for which a change may leave stale entries.
func (s *candidates) addChange(c dataplane.Change) {
	if !isTracked(c.Old) && !isTracked(c.New) {
		return
	}
	old, now := servingEndpoints(c.Old), servingEndpoints(c.New)
	removedAddrs := difference(old, now)
	if isSCTP(c.Old) {
		// Handshakes that an endpoint in Service.Serving has not answered are stale too.
		removedAddrs = append(removedAddrs, difference(acceptingEndpoints(c.Old), acceptingEndpoints(c.New))...)
		slices.SortFunc(removedAddrs, netip.AddrPort.Compare)
		removedAddrs = slices.Compact(removedAddrs)
	}
	var removed [][]netip.AddrPort
	if len(removedAddrs) > 0 {
		removed = [][]netip.AddrPort{removedAddrs}
	}
	gainsEndpoint := len(old) == 0 && len(now) > 0
	for f := range trackedFrontends(c.New) {
		if !hasFrontend(c.Old, f) {
			s.add(f, criteria{untranslated: true})
		} else if removed != nil || gainsEndpoint {
			s.add(f, criteria{removed: removed, untranslated: gainsEndpoint})
		}
	}
	for f := range trackedFrontends(c.Old) {
		if !hasFrontend(c.New, f) && len(old) > 0 {
			s.add(f, criteria{removed: [][]netip.AddrPort{old}})
		}
	}
}

// trackedFrontends yields the UDP and SCTP frontends. svc may be nil.
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

// isTracked reports whether the Service has a UDP or SCTP frontend.
func isTracked(svc *dataplane.Service) bool {
	for range trackedFrontends(svc) {
		return true
	}
	return false
}

// isSCTP reports whether the Service has SCTP frontends.
func isSCTP(svc *dataplane.Service) bool {
	return svc != nil && svc.Frontends[0].Protocol == dataplane.SCTP
}

func hasFrontend(svc *dataplane.Service, frontend dataplane.Frontend) bool {
	return svc != nil && slices.Contains(svc.Frontends, frontend)
}

// servingEndpoints returns all endpoints that serve, sorted and deduplicated. svc may be nil.
func servingEndpoints(svc *dataplane.Service) []netip.AddrPort {
	list := acceptingEndpoints(svc)
	if svc == nil || len(svc.Serving) == 0 {
		return list
	}
	list = append(list, svc.Serving...)
	slices.SortFunc(list, netip.AddrPort.Compare)
	return slices.Compact(list)
}

// acceptingEndpoints returns the endpoints that accept new connections, sorted and
// deduplicated. svc may be nil.
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

// serves reports whether the endpoint of a flow serves it.
func serves(svc *dataplane.Service, f flow) bool {
	if containsEndpoint(svc.Endpoints, f.endpoint) || containsEndpoint(svc.LocalEndpoints, f.endpoint) {
		return true
	}
	// An SCTP endpoint that accepts no new associations may never answer a pending handshake.
	return (f.protocol != dataplane.SCTP || f.replied) && containsAddr(svc.Serving, f.endpoint)
}

// containsEndpoint reports whether a sorted list of endpoints contains an address.
func containsEndpoint(list []dataplane.Endpoint, addr netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(list, addr, func(e dataplane.Endpoint, addr netip.AddrPort) int { return e.Addr.Compare(addr) })
	return ok
}

func containsAddr(sorted []netip.AddrPort, addr netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(sorted, addr, netip.AddrPort.Compare)
	return ok
}

// difference returns the elements of a that are not in b. Both must be sorted.
func difference(a, b []netip.AddrPort) []netip.AddrPort {
	var diff []netip.AddrPort
	for _, addr := range a {
		if !containsAddr(b, addr) {
			diff = append(diff, addr)
		}
	}
	return diff
}
