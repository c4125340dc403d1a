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
	// resyncPeriod is the interval of resync: the kernel sends no notifications for IPVS. See
	// also lossCheckPeriod.
	resyncPeriod = 5 * time.Second
	// resyncRounds is the number of resyncs that together verify the destinations of all
	// virtual servers. Fewer rounds suffice for few virtual servers. The kernel dumps the
	// destinations of one virtual server per request.
	resyncRounds          = 12
	resyncServersPerRound = 256
)

// resync finishes drains and verifies the kernel's state every resyncPeriod until Close.
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
			d.log.Warn("cannot compare the kernel's virtual servers with the programmed state", "error", err)
		}
	}
}

// handleEvents handles events that must not wait for a long resync, until Close.
func (d *Dataplane) handleEvents() {
	for {
		select {
		case <-d.stop:
			return
		case <-d.rules.Drift():
			d.signalDrift()
		case <-d.rules.Lost():
			d.signalLoss()
		case <-d.udpDrainTimer.C:
			if err := d.finishUDPDrains(); err != nil {
				d.log.Warn("cannot remove drained UDP endpoints", "error", err)
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

// verify deletes destinations that have drained, and signals drift if the kernel's state
// differs from the programmed state. It uses its own connections to the kernel and does not
// hold mu while it reads. It ignores virtual servers that change meanwhile.
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
	c, err := dialIPVS(d.opts.NetNS)
	if err != nil {
		return err
	}
	defer c.close() //nolint:errcheck // only read from
	h, err := openHost(d.opts.NetNS)
	if err != nil {
		return err
	}
	defer h.close() //nolint:errcheck // only read from
	if err := d.finishDrains(c); err != nil {
		return err
	}
	intact, err := d.verifyHost(h)
	if err != nil {
		return err
	}
	servers, err := c.dumpServers()
	if err != nil {
		return err
	}
	slices.SortFunc(programmed, serverKey.compare)
	rounds := min(resyncRounds, 1+len(programmed)/resyncServersPerRound)
	for i, s := range programmed {
		if err := c.addMissing(servers, slices.Values([]serverKey{s})); err != nil {
			return err
		}
		set, exists := servers[s]
		delete(servers, s)
		if !d.verifySettings(s, set, exists) {
			intact = false
			break
		}
		if i%rounds != round%rounds || d.stopped() {
			continue
		}
		destinations, err := c.dumpDestinations(s)
		if err != nil {
			return err
		}
		if !d.verifyDestinations(s, destinations) {
			intact = false
			break
		}
	}
	if intact {
		intact = !d.hasUnexpectedServers(servers)
	}
	if !intact && !d.stopped() {
		d.signalDrift()
	}
	return h.setSysctls(requiredSysctls(d.opts.StrictARP))
}

// verifyHost reports whether the interface, the routing rules and the routes exist.
func (d *Dataplane) verifyHost(h *host) (bool, error) {
	link, err := h.handle.LinkByName(LinkName)
	if err != nil {
		return false, nil // Replace reports the cause
	}
	h.link = link.Attrs().Index
	for _, f := range families() {
		if exists, err := h.hasLookupRule(f); err == nil && !exists || err != nil && f == dataplane.IPv4 {
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
		return true, nil // verify them in the next resync
	}
	for addr := range d.boundRefs {
		if !bound[addr] && !d.bindFailed[addr] {
			return false, nil
		}
		delete(bound, addr)
	}
	return h.link == d.host.linkIndex() && len(bound) == 0, nil
}

// verifySettings reports whether a virtual server has the programmed settings.
func (d *Dataplane) verifySettings(s serverKey, set settings, exists bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	want, programmed := d.servers[s]
	return d.skipVerify(s) || !programmed || exists && set == want.settings
}

// skipVerify reports whether verify must ignore a virtual server.
func (d *Dataplane) skipVerify(s serverKey) bool { return d.dirty[s] || d.unverified[s] }

// verifyDestinations reports whether a virtual server has the programmed destinations.
func (d *Dataplane) verifyDestinations(s serverKey, destinations map[netip.AddrPort]destination) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	want, programmed := d.servers[s]
	if d.skipVerify(s) || !programmed {
		return true
	}
	for _, e := range want.endpoints {
		if dest, ok := destinations[e.Addr]; !ok || dest.weight != 1 || !dest.nat {
			return false
		}
		delete(destinations, e.Addr)
	}
	for addr := range destinations {
		if _, draining := d.draining[s][addr]; !draining {
			return false
		}
	}
	return true
}

// hasUnexpectedServers reports whether unknown virtual servers exist at bound or internal
// addresses.
func (d *Dataplane) hasUnexpectedServers(servers map[serverKey]settings) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range servers {
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

// finishDrains deletes destinations whose connections have ended or whose drain time has
// expired.
func (d *Dataplane) finishDrains(c *ipvsConn) error {
	d.mu.Lock()
	draining := slices.Collect(maps.Keys(d.draining))
	d.mu.Unlock()
	for _, s := range draining {
		destinations, err := c.dumpDestinations(s)
		if err != nil {
			return err
		}
		if err := d.finishServerDrains(s, destinations); err != nil {
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

// deleteRetired deletes at most limit retiring virtual servers without destinations, then
// their addresses, then the rules for these addresses. It reports whether more may remain. If
// a step fails, it signals drift, so that a Replace deletes the rest.
func (d *Dataplane) deleteRetired(limit int) (more bool, err error) {
	b := d.newBatch()
	for s := range d.retiring {
		if len(d.draining[s]) > 0 {
			continue
		}
		if b.deleteServer(s); len(b.requests) == limit {
			more = true
			break
		}
	}
	if len(b.requests) == 0 {
		return false, nil
	}
	failed := map[dataplane.Key]error{}
	err = b.execute(nil, failed)
	if err == nil {
		err = d.applyRules(context.Background(), b.dropRuleRemovals(), nil, failed)
	}
	if err != nil {
		d.signalDrift()
		return false, fmt.Errorf("delete drained virtual servers: %w", err)
	}
	return more, nil
}

// finishUDPDrains deletes UDP destinations whose drain time has expired, and sets the timer
// for the next ones.
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

func (d *Dataplane) finishServerDrains(s serverKey, destinations map[netip.AddrPort]destination) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dirty[s] {
		return nil // destinations may be outdated
	}
	now := time.Now()
	var requests []request
	for addr, until := range d.draining[s] {
		dest, exists := destinations[addr]
		if !exists {
			d.endDrain(s, addr)
			continue
		}
		if dest.connections == 0 || !until.IsZero() && now.After(until) {
			requests = append(requests, request{command: delDest, serverKey: s, dest: addr})
		}
	}
	return d.deleteDestinations(requests)
}
