package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"
)

const (
	// resyncPeriod is how often the kernel is compared with what is programmed,
	// since it does not announce what others change, and draining destinations and
	// leaving virtual servers are looked after.
	resyncPeriod = 5 * time.Second
	// resyncRounds is in how many patrols all destinations are looked at, if there
	// are more than a few: the kernel lists those of one virtual server at a time.
	resyncRounds          = 12
	resyncServersPerRound = 256
)

// resync looks at the kernel every few seconds until Close.
func (d *Dataplane) resync() {
	ticker := time.NewTicker(resyncPeriod)
	defer ticker.Stop()
	for round := 0; ; round++ {
		select {
		case <-d.stop:
			return
		case <-ticker.C:
		}
		if err := d.verify(round); err != nil && !d.stopped() {
			d.log.Warn("the kernel's virtual servers were not compared with what is programmed", "error", err)
		}
	}
}

// handleEvents does what does not wait for a patrol that takes long, until Close.
func (d *Dataplane) handleEvents() {
	for {
		select {
		case <-d.stop:
			return
		case <-d.rules.Drift():
			d.signalDrift()
		case <-d.udpDrainTimer.C:
			if err := d.finishUDPDrains(); err != nil {
				d.log.Warn("endpoints of UDP that have left were not removed yet", "error", err)
			}
		}
	}
}

func (d *Dataplane) stopped() bool {
	select {
	case <-d.stop:
		return true
	default:
		return false
	}
}

// verify removes destinations that have drained, and signals drift if something is
// not as it was programmed. It asks the kernel by a connection of its own and holds
// nobody up meanwhile; what changes while it looks is not judged.
func (d *Dataplane) verify(round int) error {
	d.mu.Lock()
	if !d.ready {
		d.mu.Unlock()
		return nil
	}
	d.dirty = map[serverKey]bool{}
	programmed := slices.Collect(maps.Keys(d.servers))
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.dirty = nil
		d.mu.Unlock()
	}()
	k, err := dialIPVS(d.opts.NetNS)
	if err != nil {
		return err
	}
	defer k.close() //nolint:errcheck // it was only read from
	h, err := openHost(d.opts.NetNS)
	if err != nil {
		return err
	}
	defer h.close() //nolint:errcheck // it was only read from
	if err := d.finishDrains(k); err != nil {
		return err
	}
	intact, err := d.verifyHost(h)
	if err != nil {
		return err
	}
	found, err := k.dumpServers()
	if err != nil {
		return err
	}
	slices.SortFunc(programmed, serverKey.compare)
	rounds := min(resyncRounds, 1+len(programmed)/resyncServersPerRound)
	for i, s := range programmed {
		if err := k.addMissing(found, slices.Values([]serverKey{s})); err != nil {
			return err
		}
		set, there := found[s]
		delete(found, s)
		if !d.verifySettings(s, set, there) {
			intact = false
			break
		}
		if i%rounds != round%rounds || d.stopped() {
			continue
		}
		destinations, err := k.dumpDestinations(s)
		if err != nil {
			return err
		}
		if !d.verifyDestinations(s, destinations) {
			intact = false
			break
		}
	}
	if intact {
		intact = !d.hasUnexpectedServers(found)
	}
	if !intact && !d.stopped() {
		d.signalDrift()
	}
	return h.setSysctls(requiredSysctls(d.opts.StrictARP))
}

// verifyHost reports whether the interface, the rules and the routes are there.
func (d *Dataplane) verifyHost(h *host) (bool, error) {
	link, err := h.handle.LinkByName(LinkName)
	if err != nil {
		return false, nil // a Replace tells what is wrong
	}
	h.link = link.Attrs().Index
	for _, f := range families() {
		if there, err := h.hasLookupRule(f); err == nil && !there || err != nil && f == dataplane.IPv4 {
			return false, err
		}
	}
	bound, err := h.boundAddrs()
	if err != nil {
		return false, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.dirty) > 0 {
		return true, nil // next time
	}
	for addr := range d.boundRefs {
		if !bound[addr] && !d.bindFailed[addr] {
			return false, nil
		}
		delete(bound, addr)
	}
	return h.link == d.host.linkIndex() && len(bound) == 0, nil
}

// verifySettings compares a virtual server by itself.
func (d *Dataplane) verifySettings(s serverKey, set settings, there bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	want, programmed := d.servers[s]
	return d.skipVerify(s) || !programmed || there && set == want.settings
}

// skipVerify reports whether a virtual server is not to be judged.
func (d *Dataplane) skipVerify(s serverKey) bool { return d.dirty[s] || d.unverified[s] }

// verifyDestinations compares the destinations of a virtual server.
func (d *Dataplane) verifyDestinations(s serverKey, found map[netip.AddrPort]destination) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	want, programmed := d.servers[s]
	if d.skipVerify(s) || !programmed {
		return true
	}
	for _, e := range want.endpoints {
		if dest, ok := found[e.Addr]; !ok || dest.weight != 1 || !dest.nat {
			return false
		}
		delete(found, e.Addr)
	}
	for addr := range found {
		if _, draining := d.draining[s][addr]; !draining {
			return false
		}
	}
	return true
}

// hasUnexpectedServers reports whether there are virtual servers where only ours should be.
func (d *Dataplane) hasUnexpectedServers(found map[serverKey]settings) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range found {
		addr := s.addr.Addr()
		if _, programmed := d.servers[s]; programmed || d.skipVerify(s) || prefixesContain(d.excludeCIDRs, addr) {
			continue
		}
		if isInternal(addr) || d.boundRefs[addr] > 0 {
			return true
		}
	}
	return false
}

// finishDrains deletes destinations whose connections have ended, or whose time
// is over.
func (d *Dataplane) finishDrains(k *ipvsConn) error {
	d.mu.Lock()
	draining := slices.Collect(maps.Keys(d.draining))
	d.mu.Unlock()
	for _, s := range draining {
		found, err := k.dumpDestinations(s)
		if err != nil {
			return err
		}
		if err := d.finishServerDrains(s, found); err != nil {
			return err
		}
	}
	for {
		d.mu.Lock()
		more, err := d.deleteRetired(nlconn.BatchSize)
		d.mu.Unlock()
		if !more || err != nil {
			return err
		}
	}
}

// deleteRetired deletes at most limit virtual servers that are leaving and have no
// destinations, then their addresses, then the rules for these addresses. It reports
// whether there may be more. If a step fails, it signals drift, so that a Replace finds
// the rest.
func (d *Dataplane) deleteRetired(limit int) (more bool, err error) {
	w := d.newBatch()
	for s := range d.retiring {
		if len(d.draining[s]) > 0 {
			continue
		}
		if w.deleteServer(s); len(w.requests) == limit {
			more = true
			break
		}
	}
	if len(w.requests) == 0 {
		return false, nil
	}
	failed := map[dataplane.Key]error{}
	err = w.execute(nil, failed)
	if err == nil {
		err = d.applyRules(context.Background(), w.dropRuleRemovals(), nil, failed)
	}
	if err != nil {
		d.signalDrift()
		return false, fmt.Errorf("remove virtual servers that have drained: %w", err)
	}
	return more, nil
}

// finishUDPDrains deletes destinations of UDP whose time is over, and sets the time for
// those whose is not.
func (d *Dataplane) finishUDPDrains() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.udpDrainTimerSet = false
	now := time.Now()
	var requests []request
	var next time.Time
	for s, addrs := range d.draining {
		if s.protocol != dataplane.UDP {
			continue
		}
		for addr, until := range addrs {
			switch {
			case until.IsZero():
			case now.Before(until) && (next.IsZero() || until.Before(next)):
				next = until
			case !now.Before(until):
				requests = append(requests, request{command: delDest, serverKey: s, dest: addr})
			}
		}
	}
	if !next.IsZero() {
		d.udpDrainTimerSet = true
		d.udpDrainTimer.Reset(time.Until(next))
	}
	if err := d.deleteDestinations(requests); err != nil {
		return err
	}
	_, err := d.deleteRetired(math.MaxInt)
	return err
}

// deleteDestinations deletes destinations that have drained.
func (d *Dataplane) deleteDestinations(requests []request) error {
	if len(requests) == 0 {
		return nil
	}
	answers, err := d.ipvs.run(requests)
	if err != nil {
		return err
	}
	var errs []error
	for i, answer := range answers {
		r := requests[i]
		if answer != nil && !isNotFound(answer) {
			errs = append(errs, fmt.Errorf("%s: %w", r, answer))
			continue
		}
		d.endDrain(r.serverKey, r.dest)
		d.markDirty(r.serverKey)
	}
	return errors.Join(errs...)
}

func (d *Dataplane) finishServerDrains(s serverKey, found map[netip.AddrPort]destination) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dirty[s] {
		return nil // what was found may be of before
	}
	now := time.Now()
	var requests []request
	for addr, until := range d.draining[s] {
		dest, there := found[addr]
		if !there {
			d.endDrain(s, addr)
			continue
		}
		if dest.connections == 0 || !until.IsZero() && now.After(until) {
			requests = append(requests, request{command: delDest, serverKey: s, dest: addr})
		}
	}
	return d.deleteDestinations(requests)
}
