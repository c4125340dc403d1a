package apiserver

import (
	"context"
	"slices"
	"time"
)

const (
	// lateListAfter is the delay before missing lists are logged.
	lateListAfter = 5 * time.Second
	// serviceCIDRsTimeout and nodesTimeout are how long the first Delta waits for optional
	// lists after the lists of Services and EndpointSlices. Without ServiceCIDRs,
	// connections to unassigned cluster IPs are not dropped. Without the Node, node ports
	// are not served on its primary addresses, and its zone and pod CIDRs are unknown:
	// nodesTimeout is therefore longer.
	serviceCIDRsTimeout = 3 * time.Second
	nodesTimeout        = 15 * time.Second
	// retryGracePeriod is how much longer the first Delta waits for an optional list while
	// the API server is unreachable, or until each list has been requested again after the
	// other lists completed.
	retryGracePeriod = 20 * time.Second
)

// allResources returns the resources in the order used in logs.
func allResources() []resource { return []resource{services, endpointSlices, nodes, serviceCIDRs} }

// timeout returns how long the first Delta waits for the list, or zero if the list is
// required.
func (res resource) timeout() time.Duration {
	switch res {
	case serviceCIDRs:
		return serviceCIDRsTimeout
	case nodes:
		return nodesTimeout
	default:
		return 0
	}
}

// reminder is the timer of a message that is logged repeatedly, at growing intervals.
type reminder struct {
	*time.Timer

	armed bool
	step  int
}

// reminderIntervals returns the intervals between messages. The last one repeats.
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

// start arms the timer with the interval at index step, unless it is armed.
func (r *reminder) start(step int) {
	if !r.armed {
		r.armed, r.step = true, step
		r.schedule()
	}
}

// schedule sets the timer to the next interval.
func (r *reminder) schedule() {
	pauses := reminderIntervals()
	r.Reset(pauses[min(r.step, len(pauses)-1)])
	r.step++
}

// logProblems logs missing lists and failing requests, and schedules the next message while
// there are any.
func (s *Source) logProblems(ctx context.Context, r *reminder) {
	missing, failing := s.queue.missingLists(), s.connection.describeFailures()
	switch {
	case len(missing) > 0:
		s.log.WarnContext(ctx, "lists from the API server are late; nothing new is programmed until they are complete",
			"missing", missing, "failing", failing)
	case len(failing) > 0:
		s.log.WarnContext(ctx, "requests to the API server still fail; programmed Services stay in place", "failing", failing)
	default:
		r.armed = false
		return
	}
	r.schedule()
}

// optionalListTimer limits how long the first Delta waits for optional lists.
type optionalListTimer struct {
	*time.Timer

	started time.Time
}

// start starts the timer when only optional lists are missing.
func (o *optionalListTimer) start(missing []resource) {
	if o.started.IsZero() && !slices.ContainsFunc(missing, func(res resource) bool { return res.timeout() == 0 }) {
		o.started = time.Now()
		o.schedule(missing)
	}
}

func (o *optionalListTimer) schedule(missing []resource) {
	var earliest time.Duration
	for _, res := range missing {
		if limit := res.timeout(); earliest == 0 || limit < earliest {
			earliest = limit
		}
	}
	if earliest > 0 {
		o.Reset(max(time.Second, time.Until(o.started.Add(earliest))))
	}
}

// skipLateLists stops waiting for optional lists whose time is over.
func (s *Source) skipLateLists(ctx context.Context, o *optionalListTimer) {
	missing := s.queue.missingLists()
	for _, res := range missing {
		limit := res.timeout()
		if limit == 0 || time.Since(o.started) < limit {
			continue
		}
		if !s.connection.awaitingRetry(res, o.started) || time.Since(o.started) >= limit+retryGracePeriod {
			s.log.WarnContext(ctx, "list from the API server is late; Services are programmed without it until it is complete",
				"resource", string(res), "failing", s.connection.describeFailures())
			s.queue.skipList(res)
		}
	}
	o.schedule(s.queue.missingLists())
}
