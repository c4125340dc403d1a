package conntrack

import (
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// The delays of looks at TCP, see [Cleaner.Run]. A handshake that was under way
// when its endpoint left is over after the first. The second keeps the cost low
// while endpoints of TCP come and go all the time, as they do in every rollout.
const (
	attemptScanDelay    = time.Second
	attemptScanInterval = 5 * time.Second
)

// maxAttempts is for how many frontends of TCP it is remembered at most which
// endpoints have left. The connection attempts to others end with the client's
// patience, as they would without a Cleaner.
const maxAttempts = 10_000

// connAttempts are the frontends of TCP to which clients may be trying to connect by
// an entry that leads nowhere: a client that gets no answer sends its SYN again,
// to the endpoint of the first, for two minutes (net.ipv4.tcp_syn_retries).
type connAttempts map[dataplane.Frontend]criteria

// record adds the frontends of a change that clients may be stuck at, and removes
// endpoints that are back.
func (a *connAttempts) record(c dataplane.Change) {
	old, now := tcpFrontends(c.Old), tcpFrontends(c.New)
	if len(old) == 0 && len(now) == 0 {
		return
	}
	gone := removedEndpoints(c.Old, c.New)
	var before, after []netip.AddrPort // the last list that endpoints were removed from, and the result
	for _, f := range now {
		was := (*a)[f]
		next := criteria{untranslated: was.untranslated || !slices.Contains(old, f)}
		for _, list := range was.removed {
			if !sameSlice(list, before) {
				before, after = list, removeAccepting(list, c.New)
			}
			if len(after) > 0 {
				next.removed = append(next.removed, after)
			}
		}
		if len(gone) > 0 && !next.untranslated {
			next.removed = append(next.removed, gone)
		}
		a.set(f, next)
	}
	var all []netip.AddrPort
	for _, f := range old {
		if slices.Contains(now, f) {
			continue
		}
		if all == nil {
			all = acceptingEndpoints(c.Old)
		}
		if len(all) > 0 {
			a.set(f, criteria{removed: append(slices.Clip((*a)[f].removed), all)})
		}
	}
}

func (a *connAttempts) set(f dataplane.Frontend, next criteria) {
	if len(next.removed) == 0 && !next.untranslated {
		delete(*a, f)
		return
	}
	if _, ok := (*a)[f]; !ok && len(*a) >= maxAttempts {
		return
	}
	if *a == nil {
		*a = connAttempts{}
	}
	(*a)[f] = next
}

// isStale reports whether a flow leads nowhere. nodePortFrontend is the frontend that it is
// to if it is to a node port.
func (a connAttempts) isStale(f flow, nodePort dataplane.Frontend, isNodePort bool) bool {
	if f.protocol != dataplane.TCP || f.replied {
		return false
	}
	at, ok := a[f.frontend()]
	if !ok && isNodePort {
		at, ok = a[nodePort]
	}
	return ok && at.matches(f)
}

// queries returns the dumps that show them, by family.
func (a connAttempts) queries() map[dataplane.Family][]query {
	queries := map[dataplane.Family][]query{}
	for f := range a {
		family := dataplane.FamilyOf(f.Addr.Addr())
		if queries[family] == nil {
			queries[family] = []query{{family: family, protocol: dataplane.TCP, unreplied: true}}
		}
	}
	return queries
}

// tcpFrontends returns the frontends if they are of TCP. The Service may be
// nil.
func tcpFrontends(svc *dataplane.Service) []dataplane.Frontend {
	if svc == nil || svc.Frontends[0].Protocol != dataplane.TCP {
		return nil
	}
	return svc.Frontends
}

// removedEndpoints returns the endpoints to which new connections went before and do not
// go now, sorted by list. Both Services may be nil.
func removedEndpoints(old, now *dataplane.Service) (gone []netip.AddrPort) {
	if old == nil || now == nil {
		return nil
	}
	leave := func(before, after, others []dataplane.Endpoint) {
		if len(before) == 0 || len(before) == len(after) && &before[0] == &after[0] {
			return
		}
		for _, e := range before {
			for len(after) > 0 && after[0].Addr.Compare(e.Addr) < 0 {
				after = after[1:]
			}
			if (len(after) == 0 || after[0].Addr != e.Addr) && !containsEndpoint(others, e.Addr) {
				gone = append(gone, e.Addr)
			}
		}
	}
	leave(old.Endpoints, now.Endpoints, now.LocalEndpoints)
	leave(old.LocalEndpoints, now.LocalEndpoints, now.Endpoints)
	slices.SortFunc(gone, netip.AddrPort.Compare)
	return slices.Compact(gone)
}

// removeAccepting returns the addresses to which the Service has no new
// connections go: list itself if that is all of it.
func removeAccepting(list []netip.AddrPort, svc *dataplane.Service) []netip.AddrPort {
	accepted := func(addr netip.AddrPort) bool {
		return containsEndpoint(svc.Endpoints, addr) || containsEndpoint(svc.LocalEndpoints, addr)
	}
	if !slices.ContainsFunc(list, accepted) {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), accepted)
}

func sameSlice(a, b []netip.AddrPort) bool {
	return len(a) == len(b) && len(a) > 0 && &a[0] == &b[0]
}
