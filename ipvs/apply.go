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

// Apply implements [dataplane.Dataplane]. The package documentation lists its steps.
func (d *Dataplane) Apply(ctx context.Context, changes []dataplane.Change) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	failed := map[dataplane.Key]error{}
	p := d.newPlan(changes, failed)
	if err := d.applyRules(ctx, p.dropRules, p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	b := d.newBatch()
	for s, vs := range p.desired {
		if failed[p.desiredKeys[s]] == nil { // otherwise its address may lack a drop rule
			b.ensureServer(s, vs)
		}
	}
	if err := b.execute(p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	p.propagateFailures(failed)
	if err := d.applyRules(ctx, p.ruleChanges(failed), p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	b = d.newBatch()
	for s, vs := range p.desired {
		if writeFailed(p.desiredKeys[s], failed) {
			d.unverified[s] = true
			continue
		}
		b.drainUndesired(s, vs)
	}
	for s, k := range p.current {
		if _, isDesired := p.desired[s]; !isDesired && !writeFailed(k, failed) {
			b.retire(s, p.translated[s])
		}
	}
	for s := range p.translated {
		if d.retiring[s] {
			b.deleteServer(s)
		}
	}
	if err := b.execute(p.owners, failed); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	if err := d.applyRules(ctx, b.dropRuleRemovals(), p.owners, failed); err != nil {
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

// plan combines the changes of one Apply.
type plan struct {
	changes []dataplane.Change
	// current maps the virtual servers of the old Services to their keys. desired and
	// desiredKeys hold the virtual servers of the new Services and their keys.
	current     map[serverKey]dataplane.Key
	desired     map[serverKey]virtualServer
	desiredKeys map[serverKey]dataplane.Key
	// owners maps each virtual server, current or desired, to the affected keys.
	owners map[serverKey][]dataplane.Key
	// dropRules adds the rules for addresses that are not bound yet; see directAddrs.
	dropRules []dataplane.Change
	// translated holds the frontends whose connections nftables translates. No virtual server
	// may remain at these.
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
	hasDropRule := map[netip.Addr]bool{}
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
				if d.boundRefs[addr] == 0 && !hasDropRule[addr] {
					hasDropRule[addr] = true
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

// addTranslated adds the frontends of a Service whose connections nftables translates.
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

// writeFailed reports whether a write for the key failed, so that its virtual servers must
// keep their current state. A Service that is not supported was not written.
func writeFailed(k dataplane.Key, failed map[dataplane.Key]error) bool {
	err := failed[k]
	return err != nil && !errors.Is(err, dataplane.ErrUnsupported)
}

// propagateFailures marks a key as failed if its new Service takes a frontend from a failed
// Service, which keeps that frontend.
func (p *plan) propagateFailures(failed map[dataplane.Key]error) {
	for changed := len(failed) > 0; changed; {
		changed = false
		keptBy := map[dataplane.Frontend]dataplane.Key{}
		for _, c := range p.changes {
			if c.Old != nil && c.New != nil && writeFailed(c.Key(), failed) {
				for _, f := range c.Old.Frontends {
					keptBy[f] = c.Key()
				}
			}
		}
		for _, c := range p.changes {
			if c.New == nil || failed[c.Key()] != nil {
				continue
			}
			for _, f := range c.New.Frontends {
				if k, ok := keptBy[f]; ok {
					failed[c.Key()] = fmt.Errorf("frontend %s is still used by %s: %w", f, k, failed[k])
					changed = true
					break
				}
			}
		}
	}
}

// directAddrs returns the addresses of a Service that need a [nft.BoundAddressService]: the
// frontend addresses that virtual servers listen on. Internal addresses need none, because they are
// reachable only through rules. At a cluster IP, connections of the node would otherwise reach
// a virtual server before it has destinations. Connections of other clients would reach
// programs of the node while the address is bound without a virtual server.
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

// ruleChanges returns the changes of the nftables rules that accompany the changes of virtual
// servers: they open new Services and close deleted ones. A Service that could not be
// programmed keeps its old rules.
func (p *plan) ruleChanges(failed map[dataplane.Key]error) []dataplane.Change {
	var all []dataplane.Change
	for _, c := range p.changes {
		if failed[c.Key()] == nil || c.New == nil {
			all = append(all, c)
		}
	}
	return all
}

// applyRules changes the nftables rules and adds the keys whose rules failed to failed.
func (d *Dataplane) applyRules(
	ctx context.Context, changes []dataplane.Change, owners map[serverKey][]dataplane.Key, failed map[dataplane.Key]error,
) error {
	if len(changes) == 0 {
		return nil
	}
	return recordFailures(d.rules.Apply(ctx, changes), owners, failed)
}

// recordFailures adds the keys of an nftables error to failed. An error about an address
// counts for the owners of the virtual servers at that address. recordFailures returns an
// error that concerns all changes or an address without owners.
func recordFailures(err error, owners map[serverKey][]dataplane.Key, failed map[dataplane.Key]error) error {
	var keyed *dataplane.Error
	if !errors.As(err, &keyed) {
		return err
	}
	addrErrs := map[netip.Addr]error{}
	for k, e := range keyed.Failed {
		if addr, ok := nft.BoundAddressOf(k); ok {
			addrErrs[addr] = fmt.Errorf("drop rule of %s: %w", addr, e)
		} else {
			failed[k] = e
		}
	}
	if len(addrErrs) == 0 {
		return nil
	}
	unowned := maps.Clone(addrErrs)
	for s, keys := range owners {
		if e := addrErrs[s.addr.Addr()]; e != nil {
			delete(unowned, s.addr.Addr())
			for _, k := range keys {
				if failed[k] == nil {
					failed[k] = e
				}
			}
		}
	}
	for _, e := range unowned {
		return e
	}
	return nil
}

// batch collects requests to the kernel and executes them together.
type batch struct {
	*Dataplane

	requests []request
	bind     []netip.Addr
	unbind   []netip.Addr
	now      time.Time
}

func (d *Dataplane) newBatch() *batch { return &batch{Dataplane: d, now: time.Now()} }

// ensureServer gives a virtual server at least the desired endpoints. It reuses a retiring
// virtual server.
func (b *batch) ensureServer(s serverKey, want virtualServer) {
	have, exists := b.servers[s]
	delete(b.retiring, s)
	switch {
	case !exists:
		b.enqueue(request{command: newService, serverKey: s, settings: want.settings})
		if !isInternal(s.addr.Addr()) {
			if addr := s.addr.Addr(); b.boundRefs[addr] == 0 || b.bindFailed[addr] {
				b.bind = append(b.bind, addr)
			}
			b.boundRefs[s.addr.Addr()]++
		}
	case have.settings != want.settings:
		b.enqueue(request{command: setService, serverKey: s, settings: want.settings})
	}
	diffEndpoints(have.endpoints, want.endpoints, func(e netip.AddrPort, inHave, inWant bool) {
		if inHave || !inWant {
			return
		}
		c := newDest
		if _, draining := b.draining[s][e]; draining {
			c = setDest
			b.endDrain(s, e)
		}
		b.enqueue(request{command: c, serverKey: s, dest: e, weight: 1})
	})
	if len(have.endpoints) == 0 || !exists || have.settings != want.settings {
		b.markDirty(s)
	}
	if !exists {
		b.serverCount[s.family()]++
	}
	// The endpoints in have remain until drainUndesired.
	b.servers[s] = virtualServer{want.settings, have.endpoints, have.serving}
}

// drainUndesired starts to drain the endpoints that a virtual server should no longer have,
// and records the desired state as programmed.
func (b *batch) drainUndesired(s serverKey, want virtualServer) {
	have := b.servers[s]
	diffEndpoints(have.endpoints, want.endpoints, func(e netip.AddrPort, inHave, inWant bool) {
		if inHave && !inWant {
			b.enqueue(request{command: setDest, serverKey: s, dest: e})
			b.startDrain(s, e, b.now.Add(b.drainLimit(s)))
		}
	})
	if s.protocol == dataplane.UDP {
		b.keepServing(s, want.serving)
	}
	b.markDirty(s)
	b.servers[s] = want
}

// keepServing keeps draining UDP destinations for exactly as long as their endpoints serve.
func (b *batch) keepServing(s serverKey, serving []netip.AddrPort) {
	for e, until := range b.draining[s] {
		_, serves := slices.BinarySearchFunc(serving, e, netip.AddrPort.Compare)
		switch {
		case serves:
			b.draining[s][e] = time.Time{}
		case until.IsZero():
			b.startDrain(s, e, b.now.Add(udpDrainGrace))
		}
	}
}

// udpDrainGrace is how long a UDP destination drains after its endpoint stops serving. When
// the destination is deleted, its flows move to another one, and answers on their way are lost
// (net/netfilter/ipvs/ip_vs_conn.c, ip_vs_expire_nodest_conn_flush).
const udpDrainGrace = 200 * time.Millisecond

func (d *Dataplane) drainLimit(s serverKey) time.Duration {
	if s.protocol == dataplane.UDP {
		return udpDrainGrace
	}
	return d.opts.DrainLimit
}

// retire drains a virtual server that no Service uses any more; the nftables rules drop new
// connections to it. If immediately is set or the virtual server has no destinations, retire deletes
// it immediately.
func (b *batch) retire(s serverKey, immediately bool) {
	have, exists := b.servers[s]
	if !exists {
		return
	}
	if immediately || len(have.endpoints) == 0 && len(b.draining[s]) == 0 {
		b.deleteServer(s)
		return
	}
	b.drainUndesired(s, virtualServer{settings: have.settings})
	b.retiring[s] = true
}

// deleteServer deletes a virtual server with its destinations.
func (b *batch) deleteServer(s serverKey) {
	if _, exists := b.servers[s]; !exists {
		return
	}
	b.enqueue(request{command: delService, serverKey: s})
	b.markDirty(s)
	delete(b.servers, s)
	b.serverCount[s.family()]--
	delete(b.draining, s)
	delete(b.retiring, s)
	if addr := s.addr.Addr(); !isInternal(addr) {
		if b.boundRefs[addr]--; b.boundRefs[addr] == 0 {
			delete(b.boundRefs, addr)
			b.unbind = append(b.unbind, addr)
		}
	}
}

func (b *batch) enqueue(r request) { b.requests = append(b.requests, r) }

// markDirty tells a running resync to ignore the data that it has read about a virtual server.
func (d *Dataplane) markDirty(s serverKey) {
	if d.dirty != nil {
		d.dirty[s] = true
	}
}

// startDrain records that a destination drains until its connections end, or until the given
// time.
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

// endDrain records that a destination no longer drains.
func (d *Dataplane) endDrain(s serverKey, e netip.AddrPort) {
	if delete(d.draining[s], e); len(d.draining[s]) == 0 {
		delete(d.draining, s)
	}
}

// execute sends the collected requests to the kernel. It binds addresses before it adds their
// virtual servers, and unbinds them after it has deleted these. A bound address therefore
// identifies a managed virtual server at any time, even if the process ends or a request
// fails. execute adds keys with a failed request to failed. It returns an error that concerns
// all requests.
func (b *batch) execute(owners map[serverKey][]dataplane.Key, failed map[dataplane.Key]error) error {
	bindErrs, err := b.changeBindings(unix.RTM_NEWROUTE, b.bind)
	if err != nil {
		return err
	}
	for _, addr := range b.bind {
		if bindErrs[addr] == nil {
			delete(b.bindFailed, addr)
		} else {
			b.bindFailed[addr] = true
		}
	}
	b.requests = slices.DeleteFunc(b.requests, func(r request) bool { return bindErrs[r.addr.Addr()] != nil })
	answers, err := b.run(b.requests)
	if err != nil {
		return err
	}
	for i, answer := range answers {
		if answer == nil {
			continue
		}
		r := b.requests[i]
		if answer = b.retry(r, answer); answer == nil {
			continue
		}
		if err := b.recordFailure(r.serverKey, owners[r.serverKey], failed, fmt.Errorf("%s: %w", r, answer)); err != nil {
			return err
		}
		if r.command == delService {
			b.unbind = slices.DeleteFunc(b.unbind, func(a netip.Addr) bool { return a == r.addr.Addr() })
		}
	}
	unbindErrs, err := b.changeBindings(unix.RTM_DELROUTE, b.unbind)
	if err != nil {
		return err
	}
	b.unbind = slices.DeleteFunc(b.unbind, func(a netip.Addr) bool { return unbindErrs[a] != nil })
	maps.Copy(bindErrs, unbindErrs)
	return b.recordAddrFailures(bindErrs, owners, failed)
}

// dropRuleRemovals returns the rule changes for addresses that execute has unbound.
func (b *batch) dropRuleRemovals() []dataplane.Change {
	all := make([]dataplane.Change, 0, len(b.unbind))
	for _, addr := range b.unbind {
		all = append(all, dataplane.Change{Old: nft.BoundAddressService(addr)})
	}
	return all
}

func (b *batch) run(requests []request) ([]error, error) {
	if len(requests) == 0 {
		return nil, nil
	}
	return b.ipvs.run(requests)
}

// changeBindings binds or unbinds addresses, and returns the errors by address.
func (b *batch) changeBindings(typ uint16, addrs []netip.Addr) (map[netip.Addr]error, error) {
	errs := map[netip.Addr]error{}
	if len(addrs) == 0 {
		return errs, nil
	}
	answers, err := b.host.changeBindings(typ, addrs)
	if err != nil {
		return nil, err
	}
	for i, answer := range answers {
		switch {
		case answer == nil:
		case typ == unix.RTM_NEWROUTE:
			errs[addrs[i]] = fmt.Errorf("bind %s to %s: %w", addrs[i], LinkName, answer)
		default:
			errs[addrs[i]] = fmt.Errorf("unbind %s from %s: %w", addrs[i], LinkName, answer)
		}
	}
	return errs, nil
}

// recordFailure records an error about a virtual server. It returns the error if the virtual
// server has no owners.
func (b *batch) recordFailure(s serverKey, owners []dataplane.Key, failed map[dataplane.Key]error, err error) error {
	b.unverified[s] = true
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

// recordAddrFailures records errors about addresses for the owners of the virtual servers
// there. It returns the error of an address without owners.
func (b *batch) recordAddrFailures(addrErrs map[netip.Addr]error, owners map[serverKey][]dataplane.Key, failed map[dataplane.Key]error) error {
	if len(addrErrs) == 0 {
		return nil
	}
	unowned := maps.Clone(addrErrs)
	for s, keys := range owners {
		if err := addrErrs[s.addr.Addr()]; err != nil {
			delete(unowned, s.addr.Addr())
			if err := b.recordFailure(s, keys, failed, err); err != nil {
				return err
			}
		}
	}
	for _, err := range unowned {
		return err
	}
	return nil
}

// retry sends an adjusted request if the kernel's answer shows that an object exists already
// or is missing. It returns the final answer.
func (b *batch) retry(r request, answer error) error {
	switch {
	case isNotFound(answer) && (r.command == delService || r.command == delDest):
		return nil
	case r.command == setDest && r.weight == 0 && isNotFound(answer):
		b.endDrain(r.serverKey, r.dest)
		return nil
	case errors.Is(answer, unix.EEXIST) && r.command == newService:
		r.command = setService
	case errors.Is(answer, unix.EEXIST) && r.command == newDest:
		r.command = setDest
	case isNotFound(answer) && r.command == setDest:
		r.command = newDest
	case isNotFound(answer) && r.command == newDest:
		// The virtual server may have been added after its scheduler's module was loaded.
	case errors.Is(answer, unix.ENOENT) && (r.command == newService || r.command == setService):
		// The kernel answers ENOENT for an unknown scheduler.
		if err := b.loadModules("ip_vs_" + r.scheduler); err != nil {
			return fmt.Errorf("the kernel has no scheduler %s: %w", r.scheduler, err)
		}
	default:
		return answer
	}
	answers, err := b.run([]request{r})
	if err == nil {
		err = answers[0]
	}
	return err
}

// diffEndpoints walks two sorted lists of endpoints in parallel.
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
