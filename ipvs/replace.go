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

// Replace implements [dataplane.Dataplane]. The rules come first, in which Services
// whose virtual servers cannot take connections yet are closed; then the virtual
// servers, and with every [nlconn.BatchSize] requests the rules that open them; and at
// the end goes what is not wanted.
func (d *Dataplane) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	known, drained := d.servers, d.draining
	d.reset()
	d.clearDrift()
	if err := d.setUp(); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	r, err := d.newReplacement(ctx, services, known, drained)
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

// clearDrift takes a value from the channel of drift: what is read now shows it.
func (d *Dataplane) clearDrift() {
	select {
	case <-d.drift:
	default:
	}
}

// replacement is a Replace under way.
type replacement struct {
	*Dataplane

	services []*dataplane.Service
	// previousDrains is what was draining before.
	previousDrains map[serverKey]map[netip.AddrPort]time.Time
	// closed are the Services that are closed at first.
	closed  map[dataplane.Key]bool
	desired map[serverKey]virtualServer
	owners  map[serverKey][]dataplane.Key
	// translated are the frontends whose connections are translated.
	translated map[serverKey]bool
	// repairs are destinations with a weight that is none of ours.
	repairs []request
	failed  map[dataplane.Key]error
}

// newReplacement reads the kernel, and finds which Services are there. What it finds of
// ours is what is programmed, until that changes. Of before it needs which virtual
// servers were known and what was draining, as far as that is known.
func (d *Dataplane) newReplacement(
	ctx context.Context, services iter.Seq[*dataplane.Service],
	known map[serverKey]virtualServer, drained map[serverKey]map[netip.AddrPort]time.Time,
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
	found, err := d.ipvs.dumpServers()
	if err != nil {
		return nil, err
	}
	// Where there are none, there is nothing to be missed.
	if len(found) > 0 {
		if err := d.ipvs.addMissing(found, maps.Keys(r.desired)); err != nil {
			return nil, err
		}
	}
	for sv, set := range found {
		addr := sv.addr.Addr()
		_, wanted := r.desired[sv]
		_, programmed := known[sv]
		ours := isInternal(addr) || bound[addr] || wanted || programmed
		if !ours || prefixesContain(d.excludeCIDRs, addr) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		endpoints, err := r.readDestinations(sv)
		if err != nil {
			return nil, err
		}
		d.servers[sv] = virtualServer{settings: set, endpoints: endpoints}
		if !isInternal(addr) {
			d.boundRefs[addr]++
		}
	}
	return r, r.reconcileBindings(bound)
}

// reconcileBindings binds the addresses of virtual servers that are there without and are to
// stay, and ends that of others. It puts odd weights right.
func (r *replacement) reconcileBindings(have map[netip.Addr]bool) error {
	w := r.newBatch()
	w.requests = r.repairs
	missing := map[netip.Addr]bool{}
	for s := range r.desired {
		if addr := s.addr.Addr(); r.boundRefs[addr] > 0 && !have[addr] && !missing[addr] {
			missing[addr] = true
			w.bind = append(w.bind, addr)
		}
	}
	for addr := range have {
		if r.boundRefs[addr] == 0 {
			w.unbind = append(w.unbind, addr)
		}
	}
	return w.execute(r.owners, r.failed)
}

// readDestinations returns the destinations of a virtual server that take connections,
// in order, and notes those that do not as draining.
func (r *replacement) readDestinations(s serverKey) ([]dataplane.Endpoint, error) {
	found, err := r.ipvs.dumpDestinations(s)
	if err != nil {
		return nil, err
	}
	limit := time.Now().Add(r.drainLimit(s))
	var endpoints []dataplane.Endpoint
	for addr, dest := range found {
		if dest.weight == 0 {
			until, known := r.previousDrains[s][addr]
			if !known {
				until = limit
			}
			r.startDrain(s, addr, until)
			continue
		}
		if dest.weight != 1 || !dest.nat {
			r.repairs = append(r.repairs, request{command: setDest, serverKey: s, dest: addr, weight: 1})
		}
		endpoints = append(endpoints, dataplane.Endpoint{Addr: addr})
	}
	slices.SortFunc(endpoints, func(a, b dataplane.Endpoint) int { return a.Addr.Compare(b.Addr) })
	return endpoints, nil
}

// initialServices returns the Services as the rules have them at first, and the addresses that
// are bound or will be, each before its Services.
func (r *replacement) initialServices() iter.Seq[*dataplane.Service] {
	return func(yield func(*dataplane.Service) bool) {
		guarded := make(map[netip.Addr]bool, len(r.boundRefs))
		guard := func(addrs iter.Seq[netip.Addr]) bool {
			for addr := range addrs {
				if !guarded[addr] {
					guarded[addr] = true
					if !yield(nft.BoundAddressService(addr)) {
						return false
					}
				}
			}
			return true
		}
		if !guard(maps.Keys(r.boundRefs)) {
			return
		}
		for _, s := range r.services {
			if !guard(directAddrs(s)) {
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

// closedService returns the Service as one that no endpoint can take connections of.
func closedService(s *dataplane.Service) *dataplane.Service {
	c := *s
	c.Endpoints, c.LocalEndpoints, c.NoEndpointsVerdict = nil, nil, dataplane.Drop
	return &c
}

// canServe reports whether connections to a Service reach an endpoint of it: each
// of its virtual servers has one that it is to have, or is to have none.
func (r *replacement) canServe(s *dataplane.Service) bool {
	yes := true
	r.render(s, func(sv serverKey, want virtualServer) {
		have, there := r.servers[sv]
		if len(want.endpoints) == 0 {
			return
		}
		some := false
		diffEndpoints(have.endpoints, want.endpoints, func(_ netip.AddrPort, inHave, inWant bool) { some = some || inHave && inWant })
		yes = yes && there && some
	})
	return yes
}

// programServers makes the virtual servers of all Services and opens those that are closed.
func (r *replacement) programServers(ctx context.Context, progress func(int)) error {
	w, opening, complete := r.newBatch(), []dataplane.Change(nil), 0
	pending := 0
	commit := func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.execute(r.owners, r.failed); err != nil {
			return err
		}
		opening = slices.DeleteFunc(opening, func(c dataplane.Change) bool { return r.failed[c.Key()] != nil })
		if len(opening) > 0 {
			if err := r.applyRules(ctx, opening, r.owners, r.failed); err != nil {
				return err
			}
		}
		complete += pending
		w, opening, pending = r.newBatch(), nil, 0
		if progress != nil {
			progress(complete)
		}
		return nil
	}
	for _, s := range r.services {
		if r.failed[s.Key] != nil {
			continue
		}
		r.render(s, func(sv serverKey, want virtualServer) { w.ensureServer(sv, want) })
		if r.closed[s.Key] {
			opening = append(opening, dataplane.Change{Old: closedService(s), New: s})
		}
		pending++
		if len(w.requests) >= nlconn.BatchSize {
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

// removeUndesired removes destinations and virtual servers that are not wanted, once they have
// drained. Some may be of Services that were deleted while no Dataplane was running.
func (r *replacement) removeUndesired(ctx context.Context) error {
	w := r.newBatch()
	for _, s := range slices.SortedFunc(maps.Keys(r.servers), serverKey.compare) {
		want, wanted := r.desired[s]
		switch {
		case !wanted:
			w.retire(s, r.translated[s])
		case r.failed[r.owners[s][0]] == nil:
			w.drainUndesired(s, want)
		}
	}
	if err := w.execute(r.owners, r.failed); err != nil {
		return err
	}
	return r.applyRules(ctx, w.dropRuleRemovals(), r.owners, r.failed)
}
