package apiserver

import (
	"context"
	"slices"
	"time"
)

const (
	// lateListAfter is when the operator is told which lists are waited for.
	lateListAfter = 5 * time.Second
	// serviceCIDRsTimeout and nodesTimeout are how long programming waits for lists that
	// it can do without, once it has those of Services and EndpointSlices. Without
	// ServiceCIDRs connections to addresses of no Service are not dropped. Without
	// the Node no node ports are served on its primary addresses, and there are no
	// topology hints and no networks of local pods, so it is waited for longer.
	serviceCIDRsTimeout = 3 * time.Second
	nodesTimeout        = 15 * time.Second
	// retryGracePeriod is how much longer it waits for a list while the API server can't be
	// reached, or if the list was last requested before the others were complete: until
	// each list has been requested again.
	retryGracePeriod = 20 * time.Second
)

// allResources returns the kinds in the order of the log.
func allResources() []resource { return []resource{services, endpointSlices, nodes, serviceCIDRs} }

// timeout returns how long programming waits for the list, or zero if it can't do
// without.
func (k resource) timeout() time.Duration {
	switch k {
	case serviceCIDRs:
		return serviceCIDRsTimeout
	case nodes:
		return nodesTimeout
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

// reminderIntervals are those between messages. The last one repeats.
func reminderIntervals() []time.Duration {
	return []time.Duration{lateListAfter, time.Minute - lateListAfter, 9 * time.Minute, time.Hour}
}

func newReminder() *reminder {
	r := &reminder{Timer: time.NewTimer(0)}
	if !r.Stop() {
		<-r.C
	}
	return r
}

// start starts the pauses at one of them, unless they have begun.
func (r *reminder) start(step int) {
	if !r.armed {
		r.armed, r.step = true, step
		r.schedule()
	}
}

// schedule starts the next pause.
func (r *reminder) schedule() {
	pauses := reminderIntervals()
	r.Reset(pauses[min(r.step, len(pauses)-1)])
	r.step++
}

// logProblems logs what is still waited for, and which requests still fail.
func (s *Source) logProblems(ctx context.Context, r *reminder) {
	missing, failing := s.queue.missingLists(), s.connection.describeFailures()
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
	r.schedule()
}

// optionalListTimer is the time until programming does without lists that it can do without.
type optionalListTimer struct {
	*time.Timer

	started time.Time
}

// start starts the time once only such lists are missing.
func (o *optionalListTimer) start(missing []resource) {
	if o.started.IsZero() && !slices.ContainsFunc(missing, func(k resource) bool { return k.timeout() == 0 }) {
		o.started = time.Now()
		o.schedule(missing)
	}
}

func (o *optionalListTimer) schedule(missing []resource) {
	var earliest time.Duration
	for _, k := range missing {
		if limit := k.timeout(); earliest == 0 || limit < earliest {
			earliest = limit
		}
	}
	if earliest > 0 {
		o.Reset(max(time.Second, time.Until(o.started.Add(earliest))))
	}
}

// skipLateLists has programming do without the lists whose time is over.
func (s *Source) skipLateLists(ctx context.Context, o *optionalListTimer) {
	missing := s.queue.missingLists()
	for _, k := range missing {
		limit := k.timeout()
		if limit == 0 || time.Since(o.started) < limit {
			continue
		}
		if !s.connection.awaitingRetry(k, o.started) || time.Since(o.started) >= limit+retryGracePeriod {
			s.log.WarnContext(ctx, "list of the API server is late; Services are programmed without it until it is complete",
				"resource", string(k), "failing", s.connection.describeFailures())
			s.queue.skipList(k)
		}
	}
	o.schedule(s.queue.missingLists())
}
