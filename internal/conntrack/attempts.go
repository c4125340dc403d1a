package conntrack

import (
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// The delays of TCP scans, see [Cleaner.Run]. A handshake in flight when its endpoint is
// removed completes within attemptScanDelay. attemptScanInterval limits the cost of frequent
// changes, as in every rollout.
const (
	attemptScanDelay    = time.Second
	attemptScanInterval = 5 * time.Second
)

// maxAttempts is the maximum number of TCP frontends with recorded removed endpoints.
// Connection attempts to other frontends time out in the client, as they would without a
// Cleaner.
const maxAttempts = 10_000

// connAttempts holds the TCP frontends that may have stale connection attempts. A client
// without an answer repeats its SYN to the same endpoint for two minutes
// (net.ipv4.tcp_syn_retries).
type connAttempts map[dataplane.Frontend]criteria

// record adds the frontends of a change that may have stale connection attempts, and removes
// endpoints that accept connections again.
func (a *connAttempts) record(c dataplane.Change) {
	old, now := tcpFrontends(c.Old), tcpFrontends(c.New)
	if len(old) == 0 && len(now) == 0 {
		return
	}
	removed := removedEndpoints(c.Old, c.New)
	var before, after []netip.AddrPort // the last argument and result of removeAccepting
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
		if len(removed) > 0 && !next.untranslated {
			next.removed = append(next.removed, removed)
		}
		a.set(f, next)
	}
	var accepting []netip.AddrPort
	for _, f := range old {
		if slices.Contains(now, f) {
			continue
		}
		if accepting == nil {
			accepting = acceptingEndpoints(c.Old)
		}
		if len(accepting) > 0 {
			a.set(f, criteria{removed: append(slices.Clip((*a)[f].removed), accepting)})
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

// isStale reports whether a flow is a stale connection attempt. nodePort is the frontend of
// the flow if it is to a node port.
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

// queries returns the dumps that find stale connection attempts, by family.
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

// tcpFrontends returns the frontends of a TCP Service. svc may be nil.
func tcpFrontends(svc *dataplane.Service) []dataplane.Frontend {
	if svc == nil || svc.Frontends[0].Protocol != dataplane.TCP {
		return nil
	}
	return svc.Frontends
}

// removedEndpoints returns the endpoints that accepted new connections in old and do not in
// now, sorted. Both Services may be nil.
func removedEndpoints(old, now *dataplane.Service) (removed []netip.AddrPort) {
	if old == nil || now == nil {
		return nil
	}
	collect := func(before, after, others []dataplane.Endpoint) {
		if len(before) == 0 || len(before) == len(after) && &before[0] == &after[0] {
			return
		}
		for _, e := range before {
			for len(after) > 0 && after[0].Addr.Compare(e.Addr) < 0 {
				after = after[1:]
			}
			if (len(after) == 0 || after[0].Addr != e.Addr) && !containsEndpoint(others, e.Addr) {
				removed = append(removed, e.Addr)
			}
		}
	}
	collect(old.Endpoints, now.Endpoints, now.LocalEndpoints)
	collect(old.LocalEndpoints, now.LocalEndpoints, now.Endpoints)
	slices.SortFunc(removed, netip.AddrPort.Compare)
	return slices.Compact(removed)
}

// removeAccepting returns the addresses that do not accept new connections of the Service. It
// returns addrs itself if none of them does.
func removeAccepting(addrs []netip.AddrPort, svc *dataplane.Service) []netip.AddrPort {
	accepts := func(addr netip.AddrPort) bool {
		return containsEndpoint(svc.Endpoints, addr) || containsEndpoint(svc.LocalEndpoints, addr)
	}
	if !slices.ContainsFunc(addrs, accepts) {
		return addrs
	}
	return slices.DeleteFunc(slices.Clone(addrs), accepts)
}

func sameSlice(a, b []netip.AddrPort) bool {
	return len(a) == len(b) && len(a) > 0 && &a[0] == &b[0]
}
