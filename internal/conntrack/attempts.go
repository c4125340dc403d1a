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
	firstAttemptLook = time.Second
	attemptRest      = 5 * time.Second
)

// maxAttempts is for how many frontends of TCP it is remembered at most which
// endpoints have left. The connection attempts to others end with the client's
// patience, as they would without a Cleaner.
const maxAttempts = 10_000

// attempts are the frontends of TCP to which clients may be trying to connect by
// an entry that leads nowhere: a client that gets no answer sends its SYN again,
// to the endpoint of the first, for two minutes (net.ipv4.tcp_syn_retries).
type attempts map[dataplane.Frontend]suspicion

// note adds the frontends of a change that clients may be stuck at, and removes
// endpoints that are back.
func (a *attempts) note(c dataplane.Change) {
	old, now := frontendsOfTCP(c.Old), frontendsOfTCP(c.New)
	if len(old) == 0 && len(now) == 0 {
		return
	}
	gone := departed(c.Old, c.New)
	var before, after []netip.AddrPort // the last list that endpoints were removed from, and the result
	for _, f := range now {
		was := (*a)[f]
		next := suspicion{untranslated: was.untranslated || !slices.Contains(old, f)}
		for _, list := range was.left {
			if !sameList(list, before) {
				before, after = list, withoutAccepted(list, c.New)
			}
			if len(after) > 0 {
				next.left = append(next.left, after)
			}
		}
		if len(gone) > 0 && !next.untranslated {
			next.left = append(next.left, gone)
		}
		a.set(f, next)
	}
	var all []netip.AddrPort
	for _, f := range old {
		if slices.Contains(now, f) {
			continue
		}
		if all == nil {
			all = accepting(c.Old)
		}
		if len(all) > 0 {
			a.set(f, suspicion{left: append(slices.Clip((*a)[f].left), all)})
		}
	}
}

func (a *attempts) set(f dataplane.Frontend, next suspicion) {
	if len(next.left) == 0 && !next.untranslated {
		delete(*a, f)
		return
	}
	if _, ok := (*a)[f]; !ok && len(*a) >= maxAttempts {
		return
	}
	if *a == nil {
		*a = attempts{}
	}
	(*a)[f] = next
}

// stale reports whether a flow leads nowhere. nodePort is the frontend that it is
// to if it is to a node port.
func (a attempts) stale(f flow, nodePort dataplane.Frontend, isNodePort bool) bool {
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
func (a attempts) queries() map[dataplane.Family][]query {
	queries := map[dataplane.Family][]query{}
	for f := range a {
		family := dataplane.FamilyOf(f.Addr.Addr())
		if queries[family] == nil {
			queries[family] = []query{{family: family, protocol: dataplane.TCP, unreplied: true}}
		}
	}
	return queries
}

// frontendsOfTCP returns the frontends if they are of TCP. The Service may be
// nil.
func frontendsOfTCP(svc *dataplane.Service) []dataplane.Frontend {
	if svc == nil || svc.Frontends[0].Protocol != dataplane.TCP {
		return nil
	}
	return svc.Frontends
}

// departed returns the endpoints to which new connections went before and do not
// go now, sorted by list. Both Services may be nil.
func departed(old, now *dataplane.Service) (gone []netip.AddrPort) {
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
			if (len(after) == 0 || after[0].Addr != e.Addr) && !among(others, e.Addr) {
				gone = append(gone, e.Addr)
			}
		}
	}
	leave(old.Endpoints, now.Endpoints, now.LocalEndpoints)
	leave(old.LocalEndpoints, now.LocalEndpoints, now.Endpoints)
	slices.SortFunc(gone, netip.AddrPort.Compare)
	return slices.Compact(gone)
}

// withoutAccepted returns the addresses to which the Service has no new
// connections go: list itself if that is all of it.
func withoutAccepted(list []netip.AddrPort, svc *dataplane.Service) []netip.AddrPort {
	accepted := func(addr netip.AddrPort) bool { return among(svc.Endpoints, addr) || among(svc.LocalEndpoints, addr) }
	if !slices.ContainsFunc(list, accepted) {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), accepted)
}

func sameList(a, b []netip.AddrPort) bool {
	return len(a) == len(b) && len(a) > 0 && &a[0] == &b[0]
}
