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
	d.forget()
	d.kernelDrift()
	if err := d.setUp(); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	r, err := d.compare(ctx, services, known, drained)
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	if err := note(d.rules.Replace(ctx, node, r.first(), nil), r.owners, r.failed); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	if err := r.fill(ctx, progress); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	if err := r.clear(ctx); err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	d.ready = true
	if len(r.failed) > 0 {
		return &dataplane.Error{Op: "replace", Failed: r.failed}
	}
	return nil
}

// kernelDrift takes a value from the channel of drift: what is read now shows it.
func (d *Dataplane) kernelDrift() {
	select {
	case <-d.drift:
	default:
	}
}

// replacement is a Replace under way.
type replacement struct {
	*Dataplane

	services []*dataplane.Service
	// drained is what was draining before.
	drained map[server]map[netip.AddrPort]time.Time
	// closed are the Services that are closed at first.
	closed map[dataplane.Key]bool
	want   map[server]virtualServer
	owners map[server][]dataplane.Key
	// translated are the frontends whose connections are translated.
	translated map[server]bool
	// odd are destinations with a weight that is none of ours.
	odd    []request
	failed map[dataplane.Key]error
}

// compare reads the kernel, and finds which Services are there. What it finds of
// ours is what is programmed, until that changes. Of before it needs which virtual
// servers were known and what was draining, as far as that is known.
func (d *Dataplane) compare(
	ctx context.Context, services iter.Seq[*dataplane.Service],
	known map[server]virtualServer, drained map[server]map[netip.AddrPort]time.Time,
) (*replacement, error) {
	r := &replacement{
		Dataplane: d, drained: drained, closed: map[dataplane.Key]bool{}, failed: map[dataplane.Key]error{},
		want: map[server]virtualServer{}, owners: map[server][]dataplane.Key{}, translated: map[server]bool{},
	}
	for s := range services {
		if err := d.supported(s); err != nil {
			r.failed[s.Key] = err
			continue
		}
		r.services = append(r.services, s)
		addTranslated(r.translated, s)
		d.render(s, func(sv server, vs virtualServer) {
			r.want[sv] = vs
			r.owners[sv] = []dataplane.Key{s.Key}
		})
	}
	bound, err := d.host.bound()
	if err != nil {
		return nil, err
	}
	found, err := d.kernel.servers()
	if err != nil {
		return nil, err
	}
	// Where there are none, there is nothing to be missed.
	if len(found) > 0 {
		if err := d.kernel.complete(found, maps.Keys(r.want)); err != nil {
			return nil, err
		}
	}
	for sv, set := range found {
		addr := sv.addr.Addr()
		_, wanted := r.want[sv]
		_, programmed := known[sv]
		ours := isInternal(addr) || bound[addr] || wanted || programmed
		if !ours || contains(d.exclude, addr) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		endpoints, err := r.destinations(sv)
		if err != nil {
			return nil, err
		}
		d.servers[sv] = virtualServer{settings: set, endpoints: endpoints}
		if !isInternal(addr) {
			d.bound[addr]++
		}
	}
	return r, r.bindAnew(bound)
}

// bindAnew binds the addresses of virtual servers that are there without and are to
// stay, and ends that of others. It puts odd weights right.
func (r *replacement) bindAnew(have map[netip.Addr]bool) error {
	w := r.work()
	w.requests = r.odd
	missing := map[netip.Addr]bool{}
	for s := range r.want {
		if addr := s.addr.Addr(); r.bound[addr] > 0 && !have[addr] && !missing[addr] {
			missing[addr] = true
			w.bind = append(w.bind, addr)
		}
	}
	for addr := range have {
		if r.bound[addr] == 0 {
			w.unbind = append(w.unbind, addr)
		}
	}
	return w.carryOut(r.owners, r.failed)
}

// destinations returns the destinations of a virtual server that take connections,
// in order, and notes those that do not as draining.
func (r *replacement) destinations(s server) ([]dataplane.Endpoint, error) {
	found, err := r.kernel.destinations(s)
	if err != nil {
		return nil, err
	}
	limit := time.Now().Add(r.drainLimit(s))
	var endpoints []dataplane.Endpoint
	for addr, dest := range found {
		if dest.weight == 0 {
			until, known := r.drained[s][addr]
			if !known {
				until = limit
			}
			r.drain(s, addr, until)
			continue
		}
		if dest.weight != 1 || !dest.nat {
			r.odd = append(r.odd, request{command: setDest, server: s, dest: addr, weight: 1})
		}
		endpoints = append(endpoints, dataplane.Endpoint{Addr: addr})
	}
	slices.SortFunc(endpoints, func(a, b dataplane.Endpoint) int { return a.Addr.Compare(b.Addr) })
	return endpoints, nil
}

// first returns the Services as the rules have them at first, and the addresses that
// are bound or will be, each before its Services.
func (r *replacement) first() iter.Seq[*dataplane.Service] {
	return func(yield func(*dataplane.Service) bool) {
		guarded := make(map[netip.Addr]bool, len(r.bound))
		guard := func(addrs iter.Seq[netip.Addr]) bool {
			for addr := range addrs {
				if !guarded[addr] {
					guarded[addr] = true
					if !yield(nft.BoundAddress(addr)) {
						return false
					}
				}
			}
			return true
		}
		if !guard(maps.Keys(r.bound)) {
			return
		}
		for _, s := range r.services {
			if !guard(directAddrs(s)) {
				return
			}
			if !r.servable(s) {
				r.closed[s.Key] = true
				s = closed(s)
			}
			if !yield(s) {
				return
			}
		}
	}
}

// closed returns the Service as one that no endpoint can take connections of.
func closed(s *dataplane.Service) *dataplane.Service {
	c := *s
	c.Endpoints, c.LocalEndpoints, c.NoEndpoints = nil, nil, dataplane.Drop
	return &c
}

// servable reports whether connections to a Service reach an endpoint of it: each
// of its virtual servers has one that it is to have, or is to have none.
func (r *replacement) servable(s *dataplane.Service) bool {
	yes := true
	r.render(s, func(sv server, want virtualServer) {
		have, there := r.servers[sv]
		if len(want.endpoints) == 0 {
			return
		}
		some := false
		merge(have.endpoints, want.endpoints, func(_ netip.AddrPort, inHave, inWant bool) { some = some || inHave && inWant })
		yes = yes && there && some
	})
	return yes
}

// fill makes the virtual servers of all Services and opens those that are closed.
func (r *replacement) fill(ctx context.Context, progress func(int)) error {
	w, opening, complete := r.work(), []dataplane.Change(nil), 0
	pending := 0
	commit := func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.carryOut(r.owners, r.failed); err != nil {
			return err
		}
		opening = slices.DeleteFunc(opening, func(c dataplane.Change) bool { return r.failed[c.Key()] != nil })
		if len(opening) > 0 {
			if err := r.applyRules(ctx, opening, r.owners, r.failed); err != nil {
				return err
			}
		}
		complete += pending
		w, opening, pending = r.work(), nil, 0
		if progress != nil {
			progress(complete)
		}
		return nil
	}
	for _, s := range r.services {
		if r.failed[s.Key] != nil {
			continue
		}
		r.render(s, func(sv server, want virtualServer) { w.add(sv, want) })
		if r.closed[s.Key] {
			opening = append(opening, dataplane.Change{Old: closed(s), New: s})
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

// clear removes destinations and virtual servers that are not wanted, once they have
// drained. Some may be of Services that were deleted while no Dataplane was running.
func (r *replacement) clear(ctx context.Context) error {
	w := r.work()
	for _, s := range slices.SortedFunc(maps.Keys(r.servers), server.compare) {
		want, wanted := r.want[s]
		switch {
		case !wanted:
			w.retire(s, r.translated[s])
		case r.failed[r.owners[s][0]] == nil:
			w.drop(s, want)
		}
	}
	if err := w.carryOut(r.owners, r.failed); err != nil {
		return err
	}
	return r.applyRules(ctx, w.released(), r.owners, r.failed)
}
