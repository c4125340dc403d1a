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
	p := d.newPlan(changes, failed)
	if err := d.applyRules(ctx, p.dropRules, p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	w := d.newBatch()
	for s, vs := range p.desired {
		if failed[p.desiredKeys[s]] == nil { // or else its address may be without a drop rule
			w.ensureServer(s, vs)
		}
	}
	if err := w.execute(p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	p.propagateFailures(failed)
	if err := d.applyRules(ctx, p.ruleChanges(failed), p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	w = d.newBatch()
	for s, vs := range p.desired {
		if writeFailed(p.desiredKeys[s], failed) {
			d.unverified[s] = true
			continue
		}
		w.drainUndesired(s, vs)
	}
	for s, k := range p.current {
		if _, stays := p.desired[s]; !stays && !writeFailed(k, failed) {
			w.retire(s, p.translated[s])
		}
	}
	for s := range p.translated {
		if d.retiring[s] {
			w.deleteServer(s)
		}
	}
	if err := w.execute(p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	if err := d.applyRules(ctx, w.dropRuleRemovals(), p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	for _, c := range p.changes {
		if c.Old != nil {
			d.allocator.release(c.Old, c.New)
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
	// current are the virtual servers of what was, want are those of what is to be, and
	// wanting says whose these are.
	current     map[serverKey]dataplane.Key
	desired     map[serverKey]virtualServer
	desiredKeys map[serverKey]dataplane.Key
	// owners are the keys of both that each virtual server matters to.
	owners map[serverKey][]dataplane.Key
	// dropRules add the rules for addresses that are not bound yet; see directAddrs.
	dropRules []dataplane.Change
	// translated are the frontends whose connections are translated, so that no
	// virtual server can be there.
	translated map[serverKey]bool
}

func (d *Dataplane) newPlan(changes []dataplane.Change, failed map[dataplane.Key]error) *plan {
	p := &plan{
		current: make(map[serverKey]dataplane.Key, len(changes)), desired: make(map[serverKey]virtualServer, len(changes)),
		desiredKeys: make(map[serverKey]dataplane.Key, len(changes)), owners: make(map[serverKey][]dataplane.Key, len(changes)),
		translated: map[serverKey]bool{},
	}
	for _, c := range changes {
		if c.Old == nil || d.checkSupported(c.Old) != nil {
			continue
		}
		d.render(c.Old, func(s serverKey, _ virtualServer) {
			p.current[s] = c.Key()
			p.addOwner(s, c.Key())
		})
	}
	guarded := map[netip.Addr]bool{}
	for _, c := range changes {
		old, now := c.Old, c.New
		if old != nil && d.checkSupported(old) != nil {
			old = nil
		}
		if now != nil {
			if err := d.checkSupported(now); err != nil {
				failed[c.Key()] = err
				now = nil
			}
		}
		if now != nil {
			d.render(now, func(s serverKey, vs virtualServer) {
				p.desired[s], p.desiredKeys[s] = vs, c.Key()
				p.addOwner(s, c.Key())
			})
			addTranslated(p.translated, now)
			for addr := range directAddrs(now) {
				if d.boundRefs[addr] == 0 && !guarded[addr] {
					guarded[addr] = true
					p.dropRules = append(p.dropRules, dataplane.Change{New: nft.BoundAddressService(addr)})
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
func addTranslated(to map[serverKey]bool, s *dataplane.Service) {
	if hasDirectServers(s) {
		return
	}
	for _, f := range s.Frontends {
		to[serverKey{f.Protocol, f.Addr}] = true
	}
}

func (p *plan) addOwner(s serverKey, k dataplane.Key) {
	if !slices.Contains(p.owners[s], k) {
		p.owners[s] = append(p.owners[s], k)
	}
}

// writeFailed reports whether something failed for a key, so that nothing is to be taken
// away from its virtual servers.
func writeFailed(k dataplane.Key, failed map[dataplane.Key]error) bool {
	err := failed[k]
	return err != nil && !errors.Is(err, dataplane.ErrUnsupported)
}

// propagateFailures makes fail what takes a frontend from a Service that has failed, and keeps it
// therefore.
func (p *plan) propagateFailures(failed map[dataplane.Key]error) {
	for more := len(failed) > 0; more; {
		more = false
		kept := map[dataplane.Frontend]dataplane.Key{}
		for _, c := range p.changes {
			if c.Old != nil && c.New != nil && writeFailed(c.Key(), failed) {
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
// a [nft.BoundAddressService] in the rules. Only rules lead to a virtual server at an internal
// address. But connections of the node meet a virtual server at a cluster IP before it
// has destinations, and where it is gone, and the address still bound, connections of
// others would reach the node's own programs.
func directAddrs(s *dataplane.Service) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		if !hasDirectServers(s) {
			return
		}
		for _, f := range s.Frontends {
			if !yield(f.Addr.Addr()) {
				return
			}
		}
	}
}

// ruleChanges returns the changes of the rules that go with those of the virtual
// servers: new Services are opened, and those that go are closed. A Service that could
// not be programmed keeps the rules that it had.
func (p *plan) ruleChanges(failed map[dataplane.Key]error) []dataplane.Change {
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
	ctx context.Context, changes []dataplane.Change, owners map[serverKey][]dataplane.Key, failed map[dataplane.Key]error,
) error {
	if len(changes) == 0 {
		return nil
	}
	return recordFailures(d.rules.Apply(ctx, changes), owners, failed)
}

// recordFailures adds the keys of an error of the rules to failed. For an address these are the
// owners of the virtual servers there. It returns an error that concerns all changes, or
// an address without owners.
func recordFailures(err error, owners map[serverKey][]dataplane.Key, failed map[dataplane.Key]error) error {
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

// batch collects requests to the kernel, and carries them out together.
type batch struct {
	*Dataplane

	requests []request
	bind     []netip.Addr
	unbind   []netip.Addr
	now      time.Time
}

func (d *Dataplane) newBatch() *batch { return &batch{Dataplane: d, now: time.Now()} }

// ensureServer makes a virtual server have at least these endpoints. One that is leaving stays.
func (w *batch) ensureServer(s serverKey, want virtualServer) {
	have, there := w.servers[s]
	delete(w.retiring, s)
	switch {
	case !there:
		w.enqueue(request{command: newService, serverKey: s, settings: want.settings})
		if !isInternal(s.addr.Addr()) {
			if addr := s.addr.Addr(); w.boundRefs[addr] == 0 || w.bindFailed[addr] {
				w.bind = append(w.bind, addr)
			}
			w.boundRefs[s.addr.Addr()]++
		}
	case have.settings != want.settings:
		w.enqueue(request{command: setService, serverKey: s, settings: want.settings})
	}
	diffEndpoints(have.endpoints, want.endpoints, func(e netip.AddrPort, inHave, inWant bool) {
		if inHave || !inWant {
			return
		}
		c := newDest
		if _, draining := w.draining[s][e]; draining {
			c = setDest
			w.endDrain(s, e)
		}
		w.enqueue(request{command: c, serverKey: s, dest: e, weight: 1})
	})
	if len(have.endpoints) == 0 || !there || have.settings != want.settings {
		w.markDirty(s)
	}
	// Both until those that leave are dropped.
	w.servers[s] = virtualServer{want.settings, have.endpoints, have.serving}
}

// drainUndesired ends new connections to endpoints that a virtual server is no longer to
// have, and notes that it has what is wanted.
func (w *batch) drainUndesired(s serverKey, want virtualServer) {
	have := w.servers[s]
	diffEndpoints(have.endpoints, want.endpoints, func(e netip.AddrPort, inHave, inWant bool) {
		if inHave && !inWant {
			w.enqueue(request{command: setDest, serverKey: s, dest: e})
			w.startDrain(s, e, w.now.Add(w.drainLimit(s)))
		}
	})
	if s.protocol == dataplane.UDP {
		w.keepServing(s, want.serving)
	}
	w.markDirty(s)
	w.servers[s] = want
}

// keepServing lets draining destinations of UDP stay for as long as they serve the flows
// that they have, and no longer.
func (w *batch) keepServing(s serverKey, serving []netip.AddrPort) {
	for e, until := range w.draining[s] {
		_, serves := slices.BinarySearchFunc(serving, e, netip.AddrPort.Compare)
		switch {
		case serves:
			w.draining[s][e] = time.Time{}
		case until.IsZero():
			w.startDrain(s, e, w.now.Add(udpDrainGrace))
		}
	}
}

// udpDrainGrace is how long a destination of UDP drains that does not serve any
// more. Its flows do not end, but move to another when it is deleted, which loses the
// answers that are on their way then (net/netfilter/ipvs/ip_vs_conn.c, ip_vs_expire_nodest_conn_flush).
const udpDrainGrace = 200 * time.Millisecond

func (d *Dataplane) drainLimit(s serverKey) time.Duration {
	if s.protocol == dataplane.UDP {
		return udpDrainGrace
	}
	return d.opts.DrainLimit
}

// retire begins to drain a virtual server that no Service has any more; the rules keep
// new connections from it. It deletes the virtual server immediately if that has no
// destinations, or if now is set.
func (w *batch) retire(s serverKey, now bool) {
	have, there := w.servers[s]
	if !there {
		return
	}
	if now || len(have.endpoints) == 0 && len(w.draining[s]) == 0 {
		w.deleteServer(s)
		return
	}
	w.drainUndesired(s, virtualServer{settings: have.settings})
	w.retiring[s] = true
}

// deleteServer removes a virtual server with its destinations.
func (w *batch) deleteServer(s serverKey) {
	if _, there := w.servers[s]; !there {
		return
	}
	w.enqueue(request{command: delService, serverKey: s})
	w.markDirty(s)
	delete(w.servers, s)
	delete(w.draining, s)
	delete(w.retiring, s)
	if addr := s.addr.Addr(); !isInternal(addr) {
		if w.boundRefs[addr]--; w.boundRefs[addr] == 0 {
			delete(w.boundRefs, addr)
			w.unbind = append(w.unbind, addr)
		}
	}
}

func (w *batch) enqueue(r request) { w.requests = append(w.requests, r) }

// markDirty tells the patrol that what it has seen of a virtual server is old.
func (d *Dataplane) markDirty(s serverKey) {
	if d.dirty != nil {
		d.dirty[s] = true
	}
}

// startDrain notes that a destination is to go when its connections have ended.
func (d *Dataplane) startDrain(s serverKey, e netip.AddrPort, until time.Time) {
	if d.draining[s] == nil {
		d.draining[s] = map[netip.AddrPort]time.Time{}
	}
	d.draining[s][e] = until
	if s.protocol == dataplane.UDP && !d.udpDrainTimerSet {
		d.udpDrainTimerSet = true
		d.udpDrainTimer.Reset(time.Until(until))
	}
}

// endDrain notes that a destination is not draining any more.
func (d *Dataplane) endDrain(s serverKey, e netip.AddrPort) {
	if delete(d.draining[s], e); len(d.draining[s]) == 0 {
		delete(d.draining, s)
	}
}

// execute hands the work to the kernel: addresses are bound before their virtual
// servers come and unbound after these have gone, so that whose address is bound is
// ours, whenever the program ends, and whatever fails. It notes the keys for which
// something failed; an error is about everything.
func (w *batch) execute(owners map[serverKey][]dataplane.Key, failed map[dataplane.Key]error) error {
	refused, err := w.changeBindings(unix.RTM_NEWROUTE, w.bind)
	if err != nil {
		return err
	}
	for _, addr := range w.bind {
		if refused[addr] == nil {
			delete(w.bindFailed, addr)
		} else {
			w.bindFailed[addr] = true
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
		if answer = w.retry(r, answer); answer == nil {
			continue
		}
		if err := w.recordFailure(r.serverKey, owners[r.serverKey], failed, fmt.Errorf("%s: %w", r, answer)); err != nil {
			return err
		}
		if r.command == delService {
			w.unbind = slices.DeleteFunc(w.unbind, func(a netip.Addr) bool { return a == r.addr.Addr() })
		}
	}
	stuck, err := w.changeBindings(unix.RTM_DELROUTE, w.unbind)
	if err != nil {
		return err
	}
	w.unbind = slices.DeleteFunc(w.unbind, func(a netip.Addr) bool { return stuck[a] != nil })
	maps.Copy(refused, stuck)
	return w.recordAddrFailures(refused, owners, failed)
}

// dropRuleRemovals returns the changes of the rules for addresses that are no longer bound,
// once the work has been carried out.
func (w *batch) dropRuleRemovals() []dataplane.Change {
	all := make([]dataplane.Change, 0, len(w.unbind))
	for _, addr := range w.unbind {
		all = append(all, dataplane.Change{Old: nft.BoundAddressService(addr)})
	}
	return all
}

func (w *batch) run(requests []request) ([]error, error) {
	if len(requests) == 0 {
		return nil, nil
	}
	return w.ipvs.run(requests)
}

// changeBindings binds addresses, or ends that, and returns the errors of those for which it
// failed.
func (w *batch) changeBindings(typ uint16, addrs []netip.Addr) (map[netip.Addr]error, error) {
	refused := map[netip.Addr]error{}
	if len(addrs) == 0 {
		return refused, nil
	}
	answers, err := w.host.changeBindings(typ, addrs)
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

// recordFailure notes an error about a virtual server. It is returned if it matters to no key.
func (w *batch) recordFailure(s serverKey, owners []dataplane.Key, failed map[dataplane.Key]error, err error) error {
	w.unverified[s] = true
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

// recordAddrFailures notes errors about addresses.
func (w *batch) recordAddrFailures(refused map[netip.Addr]error, owners map[serverKey][]dataplane.Key, failed map[dataplane.Key]error) error {
	if len(refused) == 0 {
		return nil
	}
	rest := maps.Clone(refused)
	for s, keys := range owners {
		if err := refused[s.addr.Addr()]; err != nil {
			delete(rest, s.addr.Addr())
			if err := w.recordFailure(s, keys, failed, err); err != nil {
				return err
			}
		}
	}
	for _, err := range rest {
		return err
	}
	return nil
}

// retry tries another request where the kernel's answer is about what was there
// already, or was not, and returns the answer that counts.
func (w *batch) retry(r request, answer error) error {
	switch {
	case isNotFound(answer) && (r.command == delService || r.command == delDest):
		return nil
	case r.command == setDest && r.weight == 0 && isNotFound(answer):
		w.endDrain(r.serverKey, r.dest)
		return nil
	case errors.Is(answer, unix.EEXIST) && r.command == newService:
		r.command = setService
	case errors.Is(answer, unix.EEXIST) && r.command == newDest:
		r.command = setDest
	case isNotFound(answer) && r.command == setDest:
		r.command = newDest
	case isNotFound(answer) && r.command == newDest:
		// Its virtual server may have come with the scheduler's module.
	case errors.Is(answer, unix.ENOENT) && (r.command == newService || r.command == setService):
		// It says that of a scheduler that it does not have.
		if err := w.loadModules("ip_vs_" + r.scheduler); err != nil {
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

// diffEndpoints walks two lists of endpoints in order of address in step.
func diffEndpoints(have, want []dataplane.Endpoint, visit func(e netip.AddrPort, inHave, inWant bool)) {
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
