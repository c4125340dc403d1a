package ipvs

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"
	"fairlead.io/fairlead/nft"
)

// Replace implements [dataplane.Dataplane]. It first programs the nftables rules, which drop
// connections to Services without usable virtual servers: these Services are closed. Then it
// programs the virtual servers, and after every [nlconn.BatchSize] requests the rules that
// open their Services. Finally it removes all undesired objects.
func (d *Dataplane) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	previous, drained := d.servers, d.draining
	d.reset()
	d.clearDrift()
	if err := d.setUp(); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	r, err := d.newReplacement(ctx, services, previous, drained)
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	if err := recordFailures(d.rules.Replace(ctx, node, r.initialServices(), nil), r.owners, r.failed); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	if err := r.programServers(ctx, progress); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	if err := r.removeUndesired(ctx); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	d.ready = true
	if len(r.failed) > 0 {
		return &dataplane.Error{Op: "replace", Failed: r.failed}
	}
	return nil
}

// clearDrift discards pending signals of drift and loss: the following read of the kernel
// covers that drift.
func (d *Dataplane) clearDrift() {
	for _, signal := range []chan struct{}{d.drift, d.lost} {
		select {
		case <-signal:
		default:
		}
	}
}

// replacement is the state of a running Replace.
type replacement struct {
	*Dataplane

	services []*dataplane.Service
	// previousDrains is the value of Dataplane.draining before the Replace.
	previousDrains map[serverKey]map[netip.AddrPort]time.Time
	// closed holds the Services that are closed at first.
	closed  map[dataplane.Key]bool
	desired map[serverKey]virtualServer
	owners  map[serverKey][]dataplane.Key
	// translated holds the frontends whose connections nftables translates.
	translated map[serverKey]bool
	// repairs resets destinations that have another weight than 0 and 1, or are not reached by
	// NAT.
	repairs []request
	failed  map[dataplane.Key]error
}

// newReplacement reads the kernel's state and computes the desired state. The managed virtual
// servers that it finds become the programmed state. previous and drained are the old values
// of Dataplane.servers and Dataplane.draining, empty after a start.
func (d *Dataplane) newReplacement(
	ctx context.Context, services iter.Seq[*dataplane.Service],
	previous map[serverKey]virtualServer, drained map[serverKey]map[netip.AddrPort]time.Time,
) (*replacement, error) {
	r := &replacement{
		Dataplane: d, previousDrains: drained, closed: map[dataplane.Key]bool{}, failed: map[dataplane.Key]error{},
		desired: map[serverKey]virtualServer{}, owners: map[serverKey][]dataplane.Key{}, translated: map[serverKey]bool{},
	}
	for s := range services {
		if err := d.checkSupported(s); err != nil {
			r.failed[s.Key] = err
			continue
		}
		r.services = append(r.services, s)
		addTranslated(r.translated, s)
		d.render(s, func(sv serverKey, vs virtualServer) {
			r.desired[sv] = vs
			r.owners[sv] = []dataplane.Key{s.Key}
		})
	}
	bound, err := d.host.boundAddrs()
	if err != nil {
		return nil, err
	}
	servers, err := r.readServers(bound, previous)
	if err != nil {
		return nil, err
	}
	for sv, state := range servers {
		addr := sv.addr.Addr()
		_, isDesired := r.desired[sv]
		_, programmed := previous[sv]
		managed := isInternal(addr) || bound[addr] || isDesired || programmed
		if !managed || prefixesContain(d.excludeCIDRs, addr) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		endpoints, err := r.readEndpoints(sv, state.destinations)
		if err != nil {
			return nil, err
		}
		d.servers[sv] = virtualServer{settings: state.settings, endpoints: endpoints}
		d.serverCount[sv.family()]++
		if !isInternal(addr) {
			d.boundRefs[addr]++
		}
	}
	return r, r.reconcileBindings(bound)
}

// reconcileBindings binds the addresses of existing virtual servers that are unbound but
// desired, and unbinds addresses without virtual servers. It also executes repairs.
func (r *replacement) reconcileBindings(have map[netip.Addr]bool) error {
	b := r.newBatch()
	b.requests = r.repairs
	missing := map[netip.Addr]bool{}
	for s := range r.desired {
		if addr := s.addr.Addr(); r.boundRefs[addr] > 0 && !have[addr] && !missing[addr] {
			missing[addr] = true
			b.bind = append(b.bind, addr)
		}
	}
	for addr := range have {
		if r.boundRefs[addr] == 0 {
			b.unbind = append(b.unbind, addr)
		}
	}
	return b.execute(r.owners, r.failed)
}

// readServers returns the virtual servers in the kernel, also those of other programs. It reads IPv6
// virtual servers only if some are desired or programmed, their addresses are bound, or a resync has
// found one: the kernel can only dump them together with all IPv4 virtual servers.
func (r *replacement) readServers(bound map[netip.Addr]bool, previous map[serverKey]virtualServer) (map[serverKey]serverState, error) {
	hasIPv6 := r.strayIPv6
	for addr := range bound {
		hasIPv6 = hasIPv6 || addr.Is6()
	}
	for _, servers := range []map[serverKey]virtualServer{r.desired, previous} {
		for s := range servers {
			hasIPv6 = hasIPv6 || s.family() == dataplane.IPv6
		}
	}
	servers := make(map[serverKey]serverState, len(r.desired))
	for _, f := range families() {
		if f == dataplane.IPv6 && !hasIPv6 {
			continue
		}
		before := len(servers)
		complete, _, err := r.ipvs.readServers(f, func(s serverKey, state serverState) { servers[s] = state })
		if err != nil {
			return nil, err
		}
		r.strayIPv6 = r.strayIPv6 && f != dataplane.IPv6
		// If no virtual servers exist at all, a dump is complete.
		if complete || len(servers) == before {
			continue
		}
		for s := range r.desired {
			if _, ok := servers[s]; ok || s.family() != f {
				continue
			}
			set, exists, err := r.ipvs.getServer(s)
			if err != nil {
				return nil, err
			}
			if exists {
				servers[s] = serverState{set, unknownNumber}
			}
		}
	}
	return servers, nil
}

// readEndpoints returns the destinations of a virtual server that accept connections, sorted by
// address. It records the others as draining.
func (r *replacement) readEndpoints(s serverKey, expected int) ([]dataplane.Endpoint, error) {
	destinations, err := r.ipvs.readDestinations(s, expected)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(destinations, func(a, b addressedDestination) int { return a.addr.Compare(b.addr) })
	want := r.desired[s].endpoints
	equal := len(destinations) == len(want)
	for i, dest := range destinations {
		equal = equal && dest.addr == want[i].Addr && dest.weight == 1 && dest.nat
	}
	if equal {
		return want, nil // share the slice
	}
	limit := time.Now().Add(r.drainLimit(s))
	endpoints := make([]dataplane.Endpoint, 0, len(destinations))
	for _, dest := range destinations {
		if dest.weight == 0 {
			until, ok := r.previousDrains[s][dest.addr]
			if !ok {
				until = limit
			}
			r.startDrain(s, dest.addr, until)
			continue
		}
		if dest.weight != 1 || !dest.nat {
			r.repairs = append(r.repairs, request{command: setDest, serverKey: s, dest: dest.addr, weight: 1})
		}
		endpoints = append(endpoints, dataplane.Endpoint{Addr: dest.addr})
	}
	return endpoints, nil
}

// initialServices returns the Services for the initial nftables rules, including a
// [nft.BoundAddressService] for each address that is or will be bound. An address precedes its
// Services.
func (r *replacement) initialServices() iter.Seq[*dataplane.Service] {
	return func(yield func(*dataplane.Service) bool) {
		yielded := make(map[netip.Addr]bool, len(r.boundRefs))
		yieldAddrs := func(addrs iter.Seq[netip.Addr]) bool {
			for addr := range addrs {
				if !yielded[addr] {
					yielded[addr] = true
					if !yield(nft.BoundAddressService(addr)) {
						return false
					}
				}
			}
			return true
		}
		if !yieldAddrs(maps.Keys(r.boundRefs)) {
			return
		}
		for _, s := range r.services {
			if !yieldAddrs(directAddrs(s)) {
				return
			}
			if !r.canServe(s) {
				r.closed[s.Key] = true
				s = closedService(s)
			}
			if !yield(s) {
				return
			}
		}
	}
}

// closedService returns a copy of the Service that has no endpoints and drops connections.
func closedService(s *dataplane.Service) *dataplane.Service {
	c := *s
	c.Endpoints, c.LocalEndpoints, c.NoEndpointsVerdict = nil, nil, dataplane.Drop
	return &c
}

// canServe reports whether connections to a Service reach an endpoint of it: each of its
// virtual servers has a desired destination already, or desires none.
func (r *replacement) canServe(s *dataplane.Service) bool {
	usable := true
	r.render(s, func(sv serverKey, want virtualServer) {
		have, exists := r.servers[sv]
		if len(want.endpoints) == 0 {
			return
		}
		matches := false
		diffEndpoints(have.endpoints, want.endpoints, func(_ netip.AddrPort, inHave, inWant bool) { matches = matches || inHave && inWant })
		usable = usable && exists && matches
	})
	return usable
}

// programServers programs the virtual servers of all Services, and opens closed Services.
func (r *replacement) programServers(ctx context.Context, progress func(int)) error {
	b, opening, complete := r.newBatch(), []dataplane.Change(nil), 0
	pending := 0
	commit := func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := b.execute(r.owners, r.failed); err != nil {
			return err
		}
		opening = slices.DeleteFunc(opening, func(c dataplane.Change) bool { return r.failed[c.Key()] != nil })
		if len(opening) > 0 {
			if err := r.applyRules(ctx, opening, r.owners, r.failed); err != nil {
				return err
			}
		}
		complete += pending
		b, opening, pending = r.newBatch(), nil, 0
		if progress != nil {
			progress(complete)
		}
		return nil
	}
	for _, s := range r.services {
		if r.failed[s.Key] != nil {
			continue
		}
		r.render(s, func(sv serverKey, want virtualServer) { b.ensureServer(sv, want) })
		if r.closed[s.Key] {
			opening = append(opening, dataplane.Change{Old: closedService(s), New: s})
		}
		pending++
		if len(b.requests) >= nlconn.BatchSize {
			if err := commit(); err != nil {
				return err
			}
		}
	}
	if pending == 0 && complete > 0 {
		return nil
	}
	return commit()
}

// removeUndesired drains and deletes undesired destinations and virtual servers. Some may
// belong to Services that were deleted while Fairlead was not running.
func (r *replacement) removeUndesired(ctx context.Context) error {
	b := r.newBatch()
	for _, s := range slices.SortedFunc(maps.Keys(r.servers), serverKey.compare) {
		want, isDesired := r.desired[s]
		switch {
		case !isDesired:
			b.retire(s, r.translated[s])
		case r.failed[r.owners[s][0]] == nil:
			b.drainUndesired(s, want)
		}
	}
	if err := b.execute(r.owners, r.failed); err != nil {
		return err
	}
	return r.applyRules(ctx, b.dropRuleRemovals(), r.owners, r.failed)
}
