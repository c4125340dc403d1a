package ipvs

import (
	"context"
	"errors"
	"fmt"
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
	// virtual servers, and all addresses. Fewer rounds suffice for few virtual servers, and more
	// are needed for more than 98,304. The kernel returns the destinations of one virtual server
	// per request.
	resyncRounds             = 12
	resyncServersPerRound    = 256
	resyncMaxServersPerRound = 8192
)

// A resync spreads its requests: after each burst it pauses, so that it neither delays changes nor
// occupies a processor.
const (
	burstPause = 100 * time.Millisecond
	// The maximum numbers of bursts for the destinations that drain, for the destinations that are
	// verified, and for a dump. All pauses of a resync take less than resyncPeriod.
	drainBursts, destinationBursts, dumpBursts = 10, 25, 5
	// The minimum sizes of a burst: requests for the destinations of one virtual server, and
	// objects of a dump.
	minBurst, minDumpBurst = 16, 2048
)

// burstSize returns the size of a burst so that n objects need at most a number of bursts.
func burstSize(n, minimum, bursts int) int { return max(minimum, (n+bursts-1)/bursts) }

// roundsFor returns the number of resyncs that together verify n virtual servers.
func roundsFor(n int) int {
	return max(min(resyncRounds, 1+n/resyncServersPerRound), 1+(n-1)/resyncMaxServersPerRound)
}

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
		if err := d.verify(round, d.pause); err != nil && !d.stopped() {
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

// pause waits for burstPause, or until Close.
func (d *Dataplane) pause() {
	select {
	case <-d.stop:
	case <-time.After(burstPause):
	}
}

// verification is one resync. It uses its own connections to the kernel and does not hold mu while
// it reads. It ignores virtual servers that change meanwhile.
type verification struct {
	*Dataplane

	conn verifiedIPVS
	// pause separates bursts of requests.
	pause func()
	// The resync verifies the destinations of the virtual servers for which isSelected is true.
	round, rounds int
	selected      []selectedServer
}

// verifiedIPVS is the part of ipvsAPI that a resync uses. Tests replace it.
type verifiedIPVS interface {
	readServers(f dataplane.Family, visit func(serverKey, serverState)) (complete bool, count int, err error)
	readDestinations(s serverKey, expected int) ([]addressedDestination, error)
	getServer(s serverKey) (set settings, exists bool, err error)
}

// selectedServer is a virtual server whose destinations a resync verifies.
type selectedServer struct {
	serverKey

	destinations int // likely number
}

// verify deletes destinations that have drained, and signals drift if the kernel's state
// differs from the programmed state.
func (d *Dataplane) verify(round int, pause func()) error {
	d.mu.Lock()
	ready, programmed := d.ready, len(d.servers)
	d.mu.Unlock()
	if !ready {
		return nil
	}
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
	v := verification{Dataplane: d, conn: c, pause: pause, round: round, rounds: roundsFor(programmed)}
	defer v.endReads()
	if err := v.finishDrains(); err != nil {
		return err
	}
	intact, err := v.verifyHost(h)
	if err == nil && intact {
		intact, err = v.verifyServers()
	}
	if err == nil && intact {
		intact, err = v.verifySelected()
	}
	if err != nil {
		return err
	}
	if !intact && !d.stopped() {
		d.signalDrift()
	}
	return h.setSysctls(requiredSysctls(d.opts.StrictARP))
}

// beginRead forgets the changes before the following read of the kernel.
func (v *verification) beginRead() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dirty == nil {
		v.dirty = map[serverKey]bool{}
	}
	clear(v.dirty)
}

func (v *verification) endReads() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dirty = nil
}

// isSelected reports whether the current resync verifies the destinations of a virtual server. Each
// virtual server is selected in one of rounds successive resyncs.
func (v *verification) isSelected(s serverKey) bool {
	return s.hash()%uint64(v.rounds) == uint64(v.round)%uint64(v.rounds) //nolint:gosec // not negative
}

// verifyHost reports whether the interface, the routing rules and the routes exist. It verifies the
// routes in one of rounds successive resyncs.
func (v *verification) verifyHost(h *host) (bool, error) {
	link, err := h.handle.LinkByName(LinkName)
	if err != nil {
		return false, nil //nolint:nilerr // Replace reports the cause
	}
	h.link = link.Attrs().Index
	for _, f := range families() {
		if exists, err := h.hasLookupRule(f); err == nil && !exists || err != nil && f == dataplane.IPv4 {
			return false, err
		}
	}
	v.mu.Lock()
	intact := h.link == v.host.linkIndex()
	v.mu.Unlock()
	if !intact || v.round%v.rounds != 0 {
		return intact, nil
	}
	return v.verifyBindings(h.readBindings)
}

// verifyBindings reports whether exactly the addresses of the programmed virtual servers are bound.
func (v *verification) verifyBindings(read func(visit func(netip.Addr)) (interrupted bool, err error)) (bool, error) {
	const attempts = 2 // the second without pauses, which rarely is interrupted
	v.mu.Lock()
	burst := burstSize(len(v.boundRefs), minDumpBurst, dumpBursts)
	v.mu.Unlock()
	for attempt := range attempts {
		v.beginRead()
		bound := map[netip.Addr]bool{}
		interrupted, err := read(func(addr netip.Addr) {
			bound[addr] = true
			if attempt == 0 && len(bound)%burst == 0 {
				v.pause()
			}
		})
		if err != nil {
			return false, err
		}
		if v.hasBindings(bound) {
			return true, nil
		}
		if !interrupted {
			return false, nil
		}
	}
	return true, nil // verify them in a later resync
}

// hasBindings reports whether exactly the addresses of the programmed virtual servers are bound. It
// changes bound.
func (v *verification) hasBindings(bound map[netip.Addr]bool) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	changed := map[netip.Addr]bool{}
	for s := range v.dirty {
		changed[s.addr.Addr()] = true
		delete(bound, s.addr.Addr())
	}
	for addr := range v.boundRefs {
		if !bound[addr] && !v.bindFailed[addr] && !changed[addr] {
			return false
		}
		delete(bound, addr)
	}
	return len(bound) == 0
}

// verifyServers reports whether exactly the programmed virtual servers exist at their addresses, with
// the programmed settings and number of destinations. It selects virtual servers for
// verifySelected.
func (v *verification) verifyServers() (intact bool, err error) {
	for _, f := range families() {
		v.mu.Lock()
		skip := f == dataplane.IPv6 && v.serverCount[f] == 0 && v.searchedIPv6
		v.mu.Unlock()
		if skip {
			continue // the kernel would dump all IPv4 virtual servers as well
		}
		if intact, err = v.verifyFamily(f); err != nil || !intact {
			return intact, err
		}
	}
	return true, nil
}

func (v *verification) verifyFamily(f dataplane.Family) (intact bool, err error) {
	v.beginRead()
	v.mu.Lock()
	burst := burstSize(v.serverCount[f], minDumpBurst, dumpBursts)
	v.mu.Unlock()
	intact = true
	found, visited := 0, 0
	complete, count, err := v.conn.readServers(f, func(s serverKey, state serverState) {
		if visited++; f == dataplane.IPv6 && visited%burst == 0 {
			v.pause()
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		want, programmed := v.servers[s]
		switch {
		case v.skipVerify(s):
		case !programmed:
			unexpected := v.isUnexpected(s)
			intact = intact && !unexpected
			v.strayIPv6 = v.strayIPv6 || unexpected && f == dataplane.IPv6
		default:
			found++
			intact = intact && state.settings == want.settings && v.isPlausible(s, state.destinations)
			if v.isSelected(s) {
				v.selected = append(v.selected, selectedServer{s, max(state.destinations, len(want.endpoints))})
			}
		}
	})
	if err != nil || !intact {
		return false, err
	}
	if f == dataplane.IPv6 {
		v.mu.Lock()
		v.searchedIPv6 = true
		v.mu.Unlock()
	}
	switch missing := v.missingServers(f, found); {
	case missing > 0 && complete:
		return false, nil
	case missing > 0:
		return v.verifyEach(f)
	case complete:
		v.recordOtherServers(count - found)
	}
	return true, nil
}

// missingServers returns how many programmed virtual servers of a family a read did not find, except
// ones that have changed meanwhile.
func (v *verification) missingServers(f dataplane.Family, found int) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	missing := v.serverCount[f] - found
	for _, set := range []map[serverKey]bool{v.dirty, v.unverified} {
		for s := range set {
			if _, programmed := v.servers[s]; programmed && s.family() == f {
				missing--
			}
		}
	}
	return missing
}

// recordOtherServers records the number of IPv4 virtual servers that are not programmed, unless
// virtual servers have changed since they were counted.
func (v *verification) recordOtherServers(n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.dirty) == 0 && len(v.unverified) == 0 {
		v.otherServers = n
	}
}

// isPlausible reports whether a virtual server can have a number of destinations: its endpoints and
// destinations that drain, some of which may have ended.
func (d *Dataplane) isPlausible(s serverKey, destinations int) bool {
	endpoints := len(d.servers[s].endpoints)
	return destinations == unknownNumber || endpoints <= destinations && destinations <= endpoints+len(d.draining[s])
}

// verifyEach reports whether the programmed virtual servers of a family exist, after a dump has
// missed some. It reads the ones that another dump misses one by one.
func (v *verification) verifyEach(f dataplane.Family) (bool, error) {
	v.beginRead()
	found := map[serverKey]bool{}
	if _, _, err := v.conn.readServers(f, func(s serverKey, _ serverState) { found[s] = true }); err != nil {
		return false, err
	}
	v.mu.Lock()
	var missing []serverKey
	for s := range v.servers {
		if s.family() == f && !found[s] {
			missing = append(missing, s)
		}
	}
	v.mu.Unlock()
	for i, s := range missing {
		if i%minBurst == minBurst-1 {
			v.pause()
		}
		v.beginRead()
		set, exists, err := v.conn.getServer(s)
		if err != nil {
			return false, err
		}
		if !v.verifySettings(s, set, exists) {
			return false, nil
		}
	}
	return true, nil
}

// verifySelected reports whether the selected virtual servers have the programmed destinations.
func (v *verification) verifySelected() (bool, error) {
	burst := burstSize(len(v.selected), minBurst, destinationBursts)
	for i, s := range v.selected {
		if i > 0 && i%burst == 0 {
			v.pause()
		}
		if v.stopped() {
			return true, nil
		}
		v.beginRead()
		destinations, err := v.conn.readDestinations(s.serverKey, s.destinations)
		if err != nil {
			return false, err
		}
		if !v.verifyDestinations(s.serverKey, destinations) {
			return false, nil
		}
	}
	return true, nil
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

// verifyDestinations reports whether a virtual server has the programmed destinations. It sorts
// destinations.
func (d *Dataplane) verifyDestinations(s serverKey, destinations []addressedDestination) bool {
	slices.SortFunc(destinations, func(a, b addressedDestination) int { return a.addr.Compare(b.addr) })
	d.mu.Lock()
	defer d.mu.Unlock()
	want, programmed := d.servers[s]
	if d.skipVerify(s) || !programmed {
		return true
	}
	endpoints := want.endpoints
	for _, dest := range destinations {
		if len(endpoints) > 0 && endpoints[0].Addr == dest.addr && dest.weight == 1 && dest.nat {
			endpoints = endpoints[1:]
		} else if _, draining := d.draining[s][dest.addr]; !draining {
			return false
		}
	}
	return len(endpoints) == 0
}

// isUnexpected reports whether a virtual server that is not programmed is at a bound or internal
// address.
func (d *Dataplane) isUnexpected(s serverKey) bool {
	addr := s.addr.Addr()
	return (isInternal(addr) || d.boundRefs[addr] > 0) && !prefixesContain(d.excludeCIDRs, addr)
}

// finishDrains deletes destinations whose connections have ended or whose drain time has
// expired.
func (v *verification) finishDrains() error {
	v.mu.Lock()
	draining := make([]selectedServer, 0, len(v.draining))
	for s, addrs := range v.draining {
		draining = append(draining, selectedServer{s, len(v.servers[s].endpoints) + len(addrs)})
	}
	v.mu.Unlock()
	burst := burstSize(len(draining), minBurst, drainBursts)
	for i, s := range draining {
		if i > 0 && i%burst == 0 {
			v.pause()
		}
		v.beginRead()
		destinations, err := v.conn.readDestinations(s.serverKey, s.destinations)
		if err != nil {
			return err
		}
		if err := v.finishServerDrains(s.serverKey, destinations); err != nil {
			return err
		}
	}
	for {
		v.mu.Lock()
		more, err := v.deleteRetired(nlconn.BatchSize)
		v.mu.Unlock()
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

func (d *Dataplane) finishServerDrains(s serverKey, destinations []addressedDestination) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dirty[s] {
		return nil // destinations may be outdated
	}
	now := time.Now()
	var requests []request
	for addr, until := range d.draining[s] {
		i := slices.IndexFunc(destinations, func(dest addressedDestination) bool { return dest.addr == addr })
		if i < 0 {
			d.endDrain(s, addr)
			continue
		}
		if destinations[i].connections == 0 || !until.IsZero() && now.After(until) {
			requests = append(requests, request{command: delDest, serverKey: s, dest: addr})
		}
	}
	return d.deleteDestinations(requests)
}
