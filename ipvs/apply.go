package ipvs

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/nft"

	"golang.org/x/sys/unix"
)

// Apply implements [dataplane.Dataplane]. The order of its steps is that of the
// package documentation.
func (d *Dataplane) Apply(ctx context.Context, changes []dataplane.Change) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	failed := map[dataplane.Key]error{}
	p := d.plan(changes, failed)
	if err := d.applyRules(ctx, p.guards, p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	w := d.work()
	for s, vs := range p.want {
		if failed[p.wanting[s]] == nil { // or else its address may be without a drop rule
			w.add(s, vs)
		}
	}
	if err := w.carryOut(p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	p.spread(failed)
	if err := d.applyRules(ctx, p.switching(failed), p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	w = d.work()
	for s, vs := range p.want {
		if inDoubt(p.wanting[s], failed) {
			d.doubtful[s] = true
			continue
		}
		w.drop(s, vs)
	}
	for s, k := range p.have {
		if _, stays := p.want[s]; !stays && !inDoubt(k, failed) {
			w.retire(s, p.translated[s])
		}
	}
	for s := range p.translated {
		if d.leaving[s] {
			w.delete(s)
		}
	}
	if err := w.carryOut(p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	if err := d.applyRules(ctx, w.released(), p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	for _, c := range p.changes {
		if c.Old != nil {
			d.places.release(c.Old, c.New)
		}
	}
	if len(failed) > 0 {
		return &dataplane.Error{Op: "apply", Failed: failed}
	}
	return nil
}

// plan is what the changes of an Apply come to, over all of them at once.
type plan struct {
	changes []dataplane.Change
	// have are the virtual servers of what was, want are those of what is to be, and
	// wanting says whose these are.
	have    map[server]dataplane.Key
	want    map[server]virtualServer
	wanting map[server]dataplane.Key
	// owners are the keys of both that each virtual server matters to.
	owners map[server][]dataplane.Key
	// guards add the rules for addresses that are not bound yet; see directAddrs.
	guards []dataplane.Change
	// translated are the frontends whose connections are translated, so that no
	// virtual server can be there.
	translated map[server]bool
}

func (d *Dataplane) plan(changes []dataplane.Change, failed map[dataplane.Key]error) *plan {
	p := &plan{
		have: make(map[server]dataplane.Key, len(changes)), want: make(map[server]virtualServer, len(changes)),
		wanting: make(map[server]dataplane.Key, len(changes)), owners: make(map[server][]dataplane.Key, len(changes)),
		translated: map[server]bool{},
	}
	for _, c := range changes {
		if c.Old == nil || d.supported(c.Old) != nil {
			continue
		}
		d.render(c.Old, func(s server, _ virtualServer) {
			p.have[s] = c.Key()
			p.own(s, c.Key())
		})
	}
	guarded := map[netip.Addr]bool{}
	for _, c := range changes {
		old, now := c.Old, c.New
		if old != nil && d.supported(old) != nil {
			old = nil
		}
		if now != nil {
			if err := d.supported(now); err != nil {
				failed[c.Key()] = err
				now = nil
			}
		}
		if now != nil {
			d.render(now, func(s server, vs virtualServer) {
				p.want[s], p.wanting[s] = vs, c.Key()
				p.own(s, c.Key())
			})
			addTranslated(p.translated, now)
			for addr := range directAddrs(now) {
				if d.bound[addr] == 0 && !guarded[addr] {
					guarded[addr] = true
					p.guards = append(p.guards, dataplane.Change{New: nft.BoundAddress(addr)})
				}
			}
		}
		if old != nil || now != nil {
			p.changes = append(p.changes, dataplane.Change{Old: old, New: now})
		}
	}
	return p
}

// addTranslated adds the frontends of a Service whose connections are translated.
func addTranslated(to map[server]bool, s *dataplane.Service) {
	if direct(s) {
		return
	}
	for _, f := range s.Frontends {
		to[server{f.Protocol, f.Addr}] = true
	}
}

func (p *plan) own(s server, k dataplane.Key) {
	if !slices.Contains(p.owners[s], k) {
		p.owners[s] = append(p.owners[s], k)
	}
}

// inDoubt reports whether something failed for a key, so that nothing is to be taken
// away from its virtual servers.
func inDoubt(k dataplane.Key, failed map[dataplane.Key]error) bool {
	err := failed[k]
	return err != nil && !errors.Is(err, dataplane.ErrUnsupported)
}

// spread makes fail what takes a frontend from a Service that has failed, and keeps it
// therefore.
func (p *plan) spread(failed map[dataplane.Key]error) {
	for more := len(failed) > 0; more; {
		more = false
		kept := map[dataplane.Frontend]dataplane.Key{}
		for _, c := range p.changes {
			if c.Old != nil && c.New != nil && inDoubt(c.Key(), failed) {
				for _, f := range c.Old.Frontends {
					kept[f] = c.Key()
				}
			}
		}
		for _, c := range p.changes {
			if c.New == nil || failed[c.Key()] != nil {
				continue
			}
			for _, f := range c.New.Frontends {
				if k, ok := kept[f]; ok {
					failed[c.Key()] = fmt.Errorf("the frontend %s is still that of %s: %w", f, k, failed[k])
					more = true
					break
				}
			}
		}
	}
}

// directAddrs returns the addresses of a Service with virtual servers, each of which has
// a [nft.BoundAddress] in the rules. Only rules lead to a virtual server at an internal
// address. But connections of the node meet a virtual server at a cluster IP before it
// has destinations, and where it is gone, and the address still bound, connections of
// others would reach the node's own programs.
func directAddrs(s *dataplane.Service) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		if !direct(s) {
			return
		}
		for _, f := range s.Frontends {
			if !yield(f.Addr.Addr()) {
				return
			}
		}
	}
}

// switching returns the changes of the rules that go with those of the virtual
// servers: new Services are opened, and those that go are closed. A Service that could
// not be programmed keeps the rules that it had.
func (p *plan) switching(failed map[dataplane.Key]error) []dataplane.Change {
	var all []dataplane.Change
	for _, c := range p.changes {
		if failed[c.Key()] == nil || c.New == nil {
			all = append(all, c)
		}
	}
	return all
}

// applyRules changes the rules, and notes the keys of those that did not take.
func (d *Dataplane) applyRules(
	ctx context.Context, changes []dataplane.Change, owners map[server][]dataplane.Key, failed map[dataplane.Key]error,
) error {
	if len(changes) == 0 {
		return nil
	}
	return note(d.rules.Apply(ctx, changes), owners, failed)
}

// note adds the keys of an error of the rules to failed. For an address these are the
// owners of the virtual servers there. It returns an error that concerns all changes, or
// an address without owners.
func note(err error, owners map[server][]dataplane.Key, failed map[dataplane.Key]error) error {
	var keyed *dataplane.Error
	if !errors.As(err, &keyed) {
		return err
	}
	refused := map[netip.Addr]error{}
	for k, e := range keyed.Failed {
		if addr, ok := nft.BoundAddressOf(k); ok {
			refused[addr] = fmt.Errorf("the drop rule of %s: %w", addr, e)
		} else {
			failed[k] = e
		}
	}
	if len(refused) == 0 {
		return nil
	}
	rest := maps.Clone(refused)
	for s, keys := range owners {
		if e := refused[s.addr.Addr()]; e != nil {
			delete(rest, s.addr.Addr())
			for _, k := range keys {
				if failed[k] == nil {
					failed[k] = e
				}
			}
		}
	}
	for _, e := range rest {
		return e
	}
	return nil
}

// work collects requests to the kernel, and carries them out together.
type work struct {
	*Dataplane

	requests []request
	bind     []netip.Addr
	unbind   []netip.Addr
	now      time.Time
}

func (d *Dataplane) work() *work { return &work{Dataplane: d, now: time.Now()} }

// add makes a virtual server have at least these endpoints. One that is leaving stays.
func (w *work) add(s server, want virtualServer) {
	have, there := w.servers[s]
	delete(w.leaving, s)
	switch {
	case !there:
		w.request(request{command: newService, server: s, settings: want.settings})
		if !isInternal(s.addr.Addr()) {
			if addr := s.addr.Addr(); w.bound[addr] == 0 || w.unbound[addr] {
				w.bind = append(w.bind, addr)
			}
			w.bound[s.addr.Addr()]++
		}
	case have.settings != want.settings:
		w.request(request{command: setService, server: s, settings: want.settings})
	}
	merge(have.endpoints, want.endpoints, func(e netip.AddrPort, inHave, inWant bool) {
		if inHave || !inWant {
			return
		}
		c := newDest
		if _, draining := w.draining[s][e]; draining {
			c = setDest
			w.settled(s, e)
		}
		w.request(request{command: c, server: s, dest: e, weight: 1})
	})
	if len(have.endpoints) == 0 || !there || have.settings != want.settings {
		w.touch(s)
	}
	// Both until those that leave are dropped.
	w.servers[s] = virtualServer{want.settings, have.endpoints, have.serving}
}

// drop ends new connections to endpoints that a virtual server is no longer to
// have, and notes that it has what is wanted.
func (w *work) drop(s server, want virtualServer) {
	have := w.servers[s]
	merge(have.endpoints, want.endpoints, func(e netip.AddrPort, inHave, inWant bool) {
		if inHave && !inWant {
			w.request(request{command: setDest, server: s, dest: e})
			w.drain(s, e, w.now.Add(w.drainLimit(s)))
		}
	})
	if s.protocol == dataplane.UDP {
		w.serve(s, want.serving)
	}
	w.touch(s)
	w.servers[s] = want
}

// serve lets draining destinations of UDP stay for as long as they serve the flows
// that they have, and no longer.
func (w *work) serve(s server, serving []netip.AddrPort) {
	for e, until := range w.draining[s] {
		_, serves := slices.BinarySearchFunc(serving, e, netip.AddrPort.Compare)
		switch {
		case serves:
			w.draining[s][e] = time.Time{}
		case until.IsZero():
			w.drain(s, e, w.now.Add(datagramGrace))
		}
	}
}

// datagramGrace is how long a destination of UDP drains that does not serve any
// more. Its flows do not end, but move to another when it is deleted, which loses the
// answers that are on their way then (net/netfilter/ipvs/ip_vs_conn.c, ip_vs_expire_nodest_conn_flush).
const datagramGrace = 200 * time.Millisecond

func (d *Dataplane) drainLimit(s server) time.Duration {
	if s.protocol == dataplane.UDP {
		return datagramGrace
	}
	return d.opts.DrainLimit
}

// retire begins to drain a virtual server that no Service has any more; the rules keep
// new connections from it. It deletes the virtual server immediately if that has no
// destinations, or if now is set.
func (w *work) retire(s server, now bool) {
	have, there := w.servers[s]
	if !there {
		return
	}
	if now || len(have.endpoints) == 0 && len(w.draining[s]) == 0 {
		w.delete(s)
		return
	}
	w.drop(s, virtualServer{settings: have.settings})
	w.leaving[s] = true
}

// delete removes a virtual server with its destinations.
func (w *work) delete(s server) {
	if _, there := w.servers[s]; !there {
		return
	}
	w.request(request{command: delService, server: s})
	w.touch(s)
	delete(w.servers, s)
	delete(w.draining, s)
	delete(w.leaving, s)
	if addr := s.addr.Addr(); !isInternal(addr) {
		if w.bound[addr]--; w.bound[addr] == 0 {
			delete(w.bound, addr)
			w.unbind = append(w.unbind, addr)
		}
	}
}

func (w *work) request(r request) { w.requests = append(w.requests, r) }

// touch tells the patrol that what it has seen of a virtual server is old.
func (d *Dataplane) touch(s server) {
	if d.touched != nil {
		d.touched[s] = true
	}
}

// drain notes that a destination is to go when its connections have ended.
func (d *Dataplane) drain(s server, e netip.AddrPort, until time.Time) {
	if d.draining[s] == nil {
		d.draining[s] = map[netip.AddrPort]time.Time{}
	}
	d.draining[s][e] = until
	if s.protocol == dataplane.UDP && !d.soon {
		d.soon = true
		d.datagrams.Reset(time.Until(until))
	}
}

// settled notes that a destination is not draining any more.
func (d *Dataplane) settled(s server, e netip.AddrPort) {
	if delete(d.draining[s], e); len(d.draining[s]) == 0 {
		delete(d.draining, s)
	}
}

// carryOut hands the work to the kernel: addresses are bound before their virtual
// servers come and unbound after these have gone, so that whose address is bound is
// ours, whenever the program ends, and whatever fails. It notes the keys for which
// something failed; an error is about everything.
func (w *work) carryOut(owners map[server][]dataplane.Key, failed map[dataplane.Key]error) error {
	refused, err := w.bindAll(unix.RTM_NEWROUTE, w.bind)
	if err != nil {
		return err
	}
	for _, addr := range w.bind {
		if refused[addr] == nil {
			delete(w.unbound, addr)
		} else {
			w.unbound[addr] = true
		}
	}
	w.requests = slices.DeleteFunc(w.requests, func(r request) bool { return refused[r.addr.Addr()] != nil })
	answers, err := w.run(w.requests)
	if err != nil {
		return err
	}
	for i, answer := range answers {
		if answer == nil {
			continue
		}
		r := w.requests[i]
		if answer = w.again(r, answer); answer == nil {
			continue
		}
		if err := w.fail(r.server, owners[r.server], failed, fmt.Errorf("%s: %w", r, answer)); err != nil {
			return err
		}
		if r.command == delService {
			w.unbind = slices.DeleteFunc(w.unbind, func(a netip.Addr) bool { return a == r.addr.Addr() })
		}
	}
	stuck, err := w.bindAll(unix.RTM_DELROUTE, w.unbind)
	if err != nil {
		return err
	}
	w.unbind = slices.DeleteFunc(w.unbind, func(a netip.Addr) bool { return stuck[a] != nil })
	maps.Copy(refused, stuck)
	return w.failAddresses(refused, owners, failed)
}

// released returns the changes of the rules for addresses that are no longer bound,
// once the work has been carried out.
func (w *work) released() []dataplane.Change {
	all := make([]dataplane.Change, 0, len(w.unbind))
	for _, addr := range w.unbind {
		all = append(all, dataplane.Change{Old: nft.BoundAddress(addr)})
	}
	return all
}

func (w *work) run(requests []request) ([]error, error) {
	if len(requests) == 0 {
		return nil, nil
	}
	return w.kernel.run(requests)
}

// bindAll binds addresses, or ends that, and returns the errors of those for which it
// failed.
func (w *work) bindAll(typ uint16, addrs []netip.Addr) (map[netip.Addr]error, error) {
	refused := map[netip.Addr]error{}
	if len(addrs) == 0 {
		return refused, nil
	}
	answers, err := w.host.bind(typ, addrs)
	if err != nil {
		return nil, err
	}
	for i, answer := range answers {
		switch {
		case answer == nil:
		case typ == unix.RTM_NEWROUTE:
			refused[addrs[i]] = fmt.Errorf("bind %s to %s: %w", addrs[i], LinkName, answer)
		default:
			refused[addrs[i]] = fmt.Errorf("unbind %s from %s: %w", addrs[i], LinkName, answer)
		}
	}
	return refused, nil
}

// fail notes an error about a virtual server. It is returned if it matters to no key.
func (w *work) fail(s server, owners []dataplane.Key, failed map[dataplane.Key]error, err error) error {
	w.doubtful[s] = true
	if len(owners) == 0 {
		return err
	}
	for _, k := range owners {
		if failed[k] == nil {
			failed[k] = err
		}
	}
	return nil
}

// failAddresses notes errors about addresses.
func (w *work) failAddresses(refused map[netip.Addr]error, owners map[server][]dataplane.Key, failed map[dataplane.Key]error) error {
	if len(refused) == 0 {
		return nil
	}
	rest := maps.Clone(refused)
	for s, keys := range owners {
		if err := refused[s.addr.Addr()]; err != nil {
			delete(rest, s.addr.Addr())
			if err := w.fail(s, keys, failed, err); err != nil {
				return err
			}
		}
	}
	for _, err := range rest {
		return err
	}
	return nil
}

// again tries another request where the kernel's answer is about what was there
// already, or was not, and returns the answer that counts.
func (w *work) again(r request, answer error) error {
	switch {
	case isGone(answer) && (r.command == delService || r.command == delDest):
		return nil
	case r.command == setDest && r.weight == 0 && isGone(answer):
		w.settled(r.server, r.dest)
		return nil
	case errors.Is(answer, unix.EEXIST) && r.command == newService:
		r.command = setService
	case errors.Is(answer, unix.EEXIST) && r.command == newDest:
		r.command = setDest
	case isGone(answer) && r.command == setDest:
		r.command = newDest
	case isGone(answer) && r.command == newDest:
		// Its virtual server may have come with the scheduler's module.
	case errors.Is(answer, unix.ENOENT) && (r.command == newService || r.command == setService):
		// It says that of a scheduler that it does not have.
		if err := w.load("ip_vs_" + r.scheduler); err != nil {
			return fmt.Errorf("the kernel has no scheduler %s: %w", r.scheduler, err)
		}
	default:
		return answer
	}
	answers, err := w.run([]request{r})
	if err == nil {
		err = answers[0]
	}
	return err
}

// merge walks two lists of endpoints in order of address in step.
func merge(have, want []dataplane.Endpoint, visit func(e netip.AddrPort, inHave, inWant bool)) {
	for len(have) > 0 || len(want) > 0 {
		switch {
		case len(want) == 0 || len(have) > 0 && have[0].Addr.Compare(want[0].Addr) < 0:
			visit(have[0].Addr, true, false)
			have = have[1:]
		case len(have) == 0 || want[0].Addr.Compare(have[0].Addr) < 0:
			visit(want[0].Addr, false, true)
			want = want[1:]
		default:
			visit(want[0].Addr, true, true)
			have, want = have[1:], want[1:]
		}
	}
}
