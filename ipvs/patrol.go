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
	// patrolPeriod is how often the kernel is compared with what is programmed,
	// since it does not announce what others change, and draining destinations and
	// leaving virtual servers are looked after.
	patrolPeriod = 5 * time.Second
	// patrolRounds is in how many patrols all destinations are looked at, if there
	// are more than a few: the kernel lists those of one virtual server at a time.
	patrolRounds = 12
	patrolLeast  = 256
)

// patrol looks at the kernel every few seconds until Close.
func (d *Dataplane) patrol() {
	ticker := time.NewTicker(patrolPeriod)
	defer ticker.Stop()
	for round := 0; ; round++ {
		select {
		case <-d.stop:
			return
		case <-ticker.C:
		}
		if err := d.look(round); err != nil && !d.stopped() {
			d.log.Warn("the kernel's virtual servers were not compared with what is programmed", "error", err)
		}
	}
}

// attend does what does not wait for a patrol that takes long, until Close.
func (d *Dataplane) attend() {
	for {
		select {
		case <-d.stop:
			return
		case <-d.rules.Drift():
			d.signal()
		case <-d.datagrams.C:
			if err := d.endDatagrams(); err != nil {
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

// look removes destinations that have drained, and signals drift if something is
// not as it was programmed. It asks the kernel by a connection of its own and holds
// nobody up meanwhile; what changes while it looks is not judged.
func (d *Dataplane) look(round int) error {
	d.mu.Lock()
	if !d.ready {
		d.mu.Unlock()
		return nil
	}
	d.touched = map[server]bool{}
	programmed := slices.Collect(maps.Keys(d.servers))
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.touched = nil
		d.mu.Unlock()
	}()
	k, err := dialKernel(d.opts.NetNS)
	if err != nil {
		return err
	}
	defer k.close() //nolint:errcheck // it was only read from
	h, err := openHost(d.opts.NetNS)
	if err != nil {
		return err
	}
	defer h.close() //nolint:errcheck // it was only read from
	if err := d.lookAfterDrains(k); err != nil {
		return err
	}
	intact, err := d.hostIntact(h)
	if err != nil {
		return err
	}
	found, err := k.servers()
	if err != nil {
		return err
	}
	slices.SortFunc(programmed, server.compare)
	rounds := min(patrolRounds, 1+len(programmed)/patrolLeast)
	for i, s := range programmed {
		if err := k.complete(found, slices.Values([]server{s})); err != nil {
			return err
		}
		set, there := found[s]
		delete(found, s)
		if !d.isAsProgrammed(s, set, there) {
			intact = false
			break
		}
		if i%rounds != round%rounds || d.stopped() {
			continue
		}
		destinations, err := k.destinations(s)
		if err != nil {
			return err
		}
		if !d.hasDestinations(s, destinations) {
			intact = false
			break
		}
	}
	if intact {
		intact = !d.hasStrangers(found)
	}
	if !intact && !d.stopped() {
		d.signal()
	}
	return h.sysctl(sysctls(d.opts.StrictARP))
}

// hostIntact reports whether the interface, the rules and the routes are there.
func (d *Dataplane) hostIntact(h *host) (bool, error) {
	link, err := h.handle.LinkByName(LinkName)
	if err != nil {
		return false, nil // a Replace tells what is wrong
	}
	h.link = link.Attrs().Index
	for _, f := range families() {
		if there, err := h.hasRule(f); err == nil && !there || err != nil && f == dataplane.IPv4 {
			return false, err
		}
	}
	bound, err := h.bound()
	if err != nil {
		return false, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.touched) > 0 {
		return true, nil // next time
	}
	for addr := range d.bound {
		if !bound[addr] && !d.unbound[addr] {
			return false, nil
		}
		delete(bound, addr)
	}
	return h.link == d.host.linkIndex() && len(bound) == 0, nil
}

// isAsProgrammed compares a virtual server by itself.
func (d *Dataplane) isAsProgrammed(s server, set settings, there bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	want, programmed := d.servers[s]
	return d.unsure(s) || !programmed || there && set == want.settings
}

// unsure reports whether a virtual server is not to be judged.
func (d *Dataplane) unsure(s server) bool { return d.touched[s] || d.doubtful[s] }

// hasDestinations compares the destinations of a virtual server.
func (d *Dataplane) hasDestinations(s server, found map[netip.AddrPort]destination) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	want, programmed := d.servers[s]
	if d.unsure(s) || !programmed {
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

// hasStrangers reports whether there are virtual servers where only ours should be.
func (d *Dataplane) hasStrangers(found map[server]settings) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range found {
		addr := s.addr.Addr()
		if _, programmed := d.servers[s]; programmed || d.unsure(s) || contains(d.exclude, addr) {
			continue
		}
		if isInternal(addr) || d.bound[addr] > 0 {
			return true
		}
	}
	return false
}

// lookAfterDrains deletes destinations whose connections have ended, or whose time
// is over.
func (d *Dataplane) lookAfterDrains(k *kernel) error {
	d.mu.Lock()
	draining := slices.Collect(maps.Keys(d.draining))
	d.mu.Unlock()
	for _, s := range draining {
		found, err := k.destinations(s)
		if err != nil {
			return err
		}
		if err := d.endDrains(s, found); err != nil {
			return err
		}
	}
	for {
		d.mu.Lock()
		more, err := d.removeDrained(nlconn.BatchSize)
		d.mu.Unlock()
		if !more || err != nil {
			return err
		}
	}
}

// removeDrained deletes at most limit virtual servers that are leaving and have no
// destinations, then their addresses, then the rules for these addresses. It reports
// whether there may be more. If a step fails, it signals drift, so that a Replace finds
// the rest.
func (d *Dataplane) removeDrained(limit int) (more bool, err error) {
	w := d.work()
	for s := range d.leaving {
		if len(d.draining[s]) > 0 {
			continue
		}
		if w.delete(s); len(w.requests) == limit {
			more = true
			break
		}
	}
	if len(w.requests) == 0 {
		return false, nil
	}
	failed := map[dataplane.Key]error{}
	err = w.carryOut(nil, failed)
	if err == nil {
		err = d.applyRules(context.Background(), w.released(), nil, failed)
	}
	if err != nil {
		d.signal()
		return false, fmt.Errorf("remove virtual servers that have drained: %w", err)
	}
	return more, nil
}

// endDatagrams deletes destinations of UDP whose time is over, and sets the time for
// those whose is not.
func (d *Dataplane) endDatagrams() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.soon = false
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
				requests = append(requests, request{command: delDest, server: s, dest: addr})
			}
		}
	}
	if !next.IsZero() {
		d.soon = true
		d.datagrams.Reset(time.Until(next))
	}
	if err := d.endAll(requests); err != nil {
		return err
	}
	_, err := d.removeDrained(math.MaxInt)
	return err
}

// endAll deletes destinations that have drained.
func (d *Dataplane) endAll(requests []request) error {
	if len(requests) == 0 {
		return nil
	}
	answers, err := d.kernel.run(requests)
	if err != nil {
		return err
	}
	var errs []error
	for i, answer := range answers {
		r := requests[i]
		if answer != nil && !isGone(answer) {
			errs = append(errs, fmt.Errorf("%s: %w", r, answer))
			continue
		}
		d.settled(r.server, r.dest)
		d.touch(r.server)
	}
	return errors.Join(errs...)
}

func (d *Dataplane) endDrains(s server, found map[netip.AddrPort]destination) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.touched[s] {
		return nil // what was found may be of before
	}
	now := time.Now()
	var requests []request
	for addr, until := range d.draining[s] {
		dest, there := found[addr]
		if !there {
			d.settled(s, addr)
			continue
		}
		if dest.connections == 0 || !until.IsZero() && now.After(until) {
			requests = append(requests, request{command: delDest, server: s, dest: addr})
		}
	}
	return d.endAll(requests)
}
