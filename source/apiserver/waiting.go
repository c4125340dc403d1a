package apiserver

import (
	"context"
	"slices"
	"time"
)

const (
	// lateAfter is when the operator is told which lists are waited for.
	lateAfter = 5 * time.Second
	// serviceCIDRsLimit and nodesLimit are how long programming waits for lists that
	// it can do without, once it has those of Services and EndpointSlices. Without
	// ServiceCIDRs connections to addresses of no Service are not dropped. Without
	// the Node no node ports are served on its primary addresses, and there are no
	// topology hints and no networks of local pods, so it is waited for longer.
	serviceCIDRsLimit = 3 * time.Second
	nodesLimit        = 15 * time.Second
	// attemptLimit is how much longer it waits for a list while the API server can't be
	// reached, or if the list was last requested before the others were complete: until
	// each list has been requested again.
	attemptLimit = 20 * time.Second
)

// allKinds returns the kinds in the order of the log.
func allKinds() []kind { return []kind{services, endpointSlices, nodes, serviceCIDRs} }

// limit returns how long programming waits for the list, or zero if it can't do
// without.
func (k kind) limit() time.Duration {
	switch k {
	case serviceCIDRs:
		return serviceCIDRsLimit
	case nodes:
		return nodesLimit
	default:
		return 0
	}
}

// reminder is the timer of a message that is logged again and again, with growing
// pauses.
type reminder struct {
	*time.Timer

	armed bool
	step  int
}

// reminderPauses are those between messages. The last one repeats.
func reminderPauses() []time.Duration {
	return []time.Duration{lateAfter, time.Minute - lateAfter, 9 * time.Minute, time.Hour}
}

func newReminder() *reminder {
	r := &reminder{Timer: time.NewTimer(0)}
	if !r.Stop() {
		<-r.C
	}
	return r
}

// begin starts the pauses at one of them, unless they have begun.
func (r *reminder) begin(step int) {
	if !r.armed {
		r.armed, r.step = true, step
		r.next()
	}
}

// next starts the next pause.
func (r *reminder) next() {
	pauses := reminderPauses()
	r.Reset(pauses[min(r.step, len(pauses)-1)])
	r.step++
}

// remind logs what is still waited for, and which requests still fail.
func (s *Source) remind(ctx context.Context, r *reminder) {
	missing, failing := s.box.late(), s.contact.failures()
	switch {
	case len(missing) > 0:
		s.log.WarnContext(ctx, "lists of the API server are late; nothing new is programmed until they are complete",
			"missing", missing, "failing", failing)
	case len(failing) > 0:
		s.log.WarnContext(ctx, "API server still fails to answer; what is programmed stays", "failing", failing)
	default:
		r.armed = false
		return
	}
	r.next()
}

// optional is the time until programming does without lists that it can do without.
type optional struct {
	*time.Timer

	begun time.Time
}

// begin starts the time once only such lists are missing.
func (o *optional) begin(missing []kind) {
	if o.begun.IsZero() && !slices.ContainsFunc(missing, func(k kind) bool { return k.limit() == 0 }) {
		o.begun = time.Now()
		o.next(missing)
	}
}

func (o *optional) next(missing []kind) {
	var earliest time.Duration
	for _, k := range missing {
		if limit := k.limit(); earliest == 0 || limit < earliest {
			earliest = limit
		}
	}
	if earliest > 0 {
		o.Reset(max(time.Second, time.Until(o.begun.Add(earliest))))
	}
}

// proceed has programming do without the lists whose time is over.
func (s *Source) proceed(ctx context.Context, o *optional) {
	missing := s.box.late()
	for _, k := range missing {
		limit := k.limit()
		if limit == 0 || time.Since(o.begun) < limit {
			continue
		}
		if !s.contact.awaitsRetry(k, o.begun) || time.Since(o.begun) >= limit+attemptLimit {
			s.log.WarnContext(ctx, "list of the API server is late; Services are programmed without it until it is complete",
				"resource", string(k), "failing", s.contact.failures())
			s.box.without(k)
		}
	}
	o.next(s.box.late())
}
