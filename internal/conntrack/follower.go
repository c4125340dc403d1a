package conntrack

import (
	"context"
	"errors"
	"hash/maphash"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"fairlead.io/fairlead/dataplane"
)

// The Cleaner follows new entries while changes are frequent: from followAfter changes within
// followWithin on, until no change has come for followIdle.
const (
	followAfter  = 10
	followWithin = 10 * time.Second
	followIdle   = 30 * time.Second
)

const (
	// receiveInterval is the longest time between two calls of flowEvents.receive.
	receiveInterval = time.Second
	// maxEventRate is the number of events per second from which on dumps are cheaper. An event takes
	// the kernel and the Cleaner about 4 µs, and ten scans a second take 20 ms or more.
	maxEventRate = 5_000
	// maxFlowKeys limits the memory of a flowSet to a few megabytes.
	maxFlowKeys = 100_000
	// followRetry is the pause after an error and after too many events.
	followRetry = time.Minute
)

var (
	errEventRate = errors.New("there are too many new entries per second")
	errFlowKeys  = errors.New("the entries have too many destinations")
)

// follower knows which frontends and endpoints may have UDP and SCTP entries. While changes are
// frequent, it listens to the kernel's events for new entries. It knows the older entries from a dump
// of all entries of a protocol.
//
// A packet that precedes the listener creates an entry without an event. It may wait before the entry
// becomes visible, for at most rescanDelay. So only a dump that begins rescanDelay after the listener
// has started is complete.
type follower struct {
	log *slog.Logger
	// events is nil while the follower does not listen. The following fields are then unused.
	events       flowEvents
	since        time.Time // start of the listener
	receiveAt    time.Time // time of the next call of receive
	received     int       // events since countedSince
	countedSince time.Time
	flows        flowSet
	// complete holds the queries for a family and a protocol whose flows are all in flows.
	complete map[query]bool

	// changes holds the times of the last changes, as a ring: next is the oldest.
	changes [followAfter]time.Time
	next    int
	// notBefore is the earliest time at which the follower listens again.
	notBefore time.Time
}

// recordChange records that a change needs a scan, and starts to listen if changes are frequent. open
// returns the table.
func (f *follower) recordChange(ctx context.Context, now time.Time, open func() (table, error)) {
	oldest := f.changes[f.next]
	f.changes[f.next] = now
	f.next = (f.next + 1) % followAfter
	if f.events != nil || now.Sub(oldest) > followWithin || now.Before(f.notBefore) {
		return
	}
	t, err := open()
	if err == nil {
		f.events, err = t.listen()
		err = errors.Join(err, t.close())
	}
	if err != nil {
		f.stop(ctx, now, err)
		return
	}
	f.since, f.receiveAt = time.Now(), now
	f.received, f.countedSince = 0, now
	f.flows, f.complete = newFlowSet(), map[query]bool{}
	f.log.DebugContext(ctx, "following new connection-tracking entries, because UDP or SCTP endpoints change often")
}

// lastChange returns the time of the last change.
func (f *follower) lastChange() time.Time { return f.changes[(f.next+followAfter-1)%followAfter] }

// stop ends listening. err is the reason, or nil if changes have become rare. After an error, the
// follower listens again at the earliest after followRetry.
func (f *follower) stop(ctx context.Context, now time.Time, err error) {
	if f.events == nil && err == nil {
		return
	}
	if f.events != nil {
		_ = f.events.close()
		f.events, f.flows, f.complete = nil, flowSet{}, nil
	}
	if err != nil {
		f.notBefore = now.Add(followRetry)
	}
	f.log.DebugContext(ctx, "not following new connection-tracking entries", "error", err)
}

// receive adds the new entries, if the follower listens.
func (f *follower) receive(ctx context.Context, now time.Time) {
	if f.events == nil {
		return
	}
	if now.Sub(f.lastChange()) >= followIdle {
		f.stop(ctx, now, nil)
		return
	}
	err := f.events.receive(func(fl flow) {
		f.received++
		f.flows.add(fl)
	})
	if elapsed := now.Sub(f.countedSince); elapsed >= receiveInterval {
		if float64(f.received) > maxEventRate*elapsed.Seconds() {
			err = errors.Join(err, errEventRate)
		}
		f.received, f.countedSince = 0, now
	}
	if len(f.flows.hashes) > maxFlowKeys {
		err = errors.Join(err, errFlowKeys)
	}
	if err != nil {
		f.stop(ctx, now, err)
		return
	}
	f.receiveAt = now.Add(receiveInterval)
}

// nextReceive returns the time of the next call of receive; a zero time means never.
func (f *follower) nextReceive() time.Time {
	if f.events == nil {
		return time.Time{}
	}
	return f.receiveAt
}

// split divides candidates into possible, which may have entries, and without, which have none.
func (f *follower) split(s candidates) (possible, without candidates) {
	if s.all || len(f.complete) == 0 {
		return s, candidates{}
	}
	for frontend, c := range s.frontends {
		q := query{family: dataplane.FamilyOf(frontend.Addr.Addr()), protocol: frontend.Protocol}
		if !f.complete[q] || f.flows.mayContain(frontend, c) {
			possible.add(frontend, c)
		} else {
			without.add(frontend, c)
		}
	}
	return possible, without
}

// widen replaces queries for single frontends by queries for a whole protocol, if their answers make
// the follower complete.
func (f *follower) widen(queries map[dataplane.Family][]query, now time.Time) {
	if !f.mayComplete(now) {
		return
	}
	for family, qs := range queries {
		for i, q := range qs {
			wide := query{family: family, protocol: q.protocol}
			if q.protocol != dataplane.TCP && !f.complete[wide] {
				qs[i] = wide
			}
		}
		slices.SortFunc(qs, query.compare)
		queries[family] = slices.Compact(qs)
	}
}

// mayComplete reports whether a dump that begins now may be complete.
func (f *follower) mayComplete(now time.Time) bool {
	return f.events != nil && now.Sub(f.since) >= rescanDelay
}

// visit adds a dumped entry.
func (f *follower) visit(fl flow) {
	if f.events != nil && fl.protocol != dataplane.TCP {
		f.flows.add(fl)
	}
}

// dumped records a successful dump that began at start.
func (f *follower) dumped(q query, start time.Time) {
	if wide := (query{family: q.family, protocol: q.protocol}); q == wide && f.mayComplete(start) {
		f.complete[wide] = true
	}
}

// flowSet is a set of frontends and endpoints with flows. It contains hashes only: a flow that was not
// added seems to be in the set if its hash is equal to another one.
type flowSet struct {
	seed   maphash.Seed
	hashes map[uint64]struct{}
}

// flowKey is a destination with an endpoint. The zero endpoint means that the flow is not translated.
type flowKey struct {
	destination dataplane.Frontend
	endpoint    netip.AddrPort
}

func newFlowSet() flowSet { return flowSet{seed: maphash.MakeSeed(), hashes: map[uint64]struct{}{}} }

// add adds a flow, for its destination as an address and as a node port.
func (s flowSet) add(f flow) {
	frontend := f.frontend()
	for _, destination := range []dataplane.Frontend{frontend, withUnspecifiedAddr(frontend)} {
		s.hashes[maphash.Comparable(s.seed, flowKey{destination, f.endpoint})] = struct{}{}
		if !f.translated() {
			s.hashes[maphash.Comparable(s.seed, flowKey{destination, netip.AddrPort{}})] = struct{}{}
		}
	}
}

// mayContain reports whether the set may contain a flow to the frontend that the criteria select.
func (s flowSet) mayContain(frontend dataplane.Frontend, c criteria) bool {
	contains := func(endpoint netip.AddrPort) bool {
		_, ok := s.hashes[maphash.Comparable(s.seed, flowKey{frontend, endpoint})]
		return ok
	}
	return c.untranslated && contains(netip.AddrPort{}) ||
		slices.ContainsFunc(c.removed, func(list []netip.AddrPort) bool { return slices.ContainsFunc(list, contains) })
}
