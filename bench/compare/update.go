package compare

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
)

// requiredMisses is how many packets in a row do not arrive at an endpoint that one packet in
// so many would arrive at, until it is sure that none does.
func requiredMisses(endpoints int) int {
	const sure = 25 // a chance of e^-25, about 1e-11
	return sure * endpoints
}

// updates measures the kinds of changes, sample by sample, system by system.
func (c *comparison) updates(ctx context.Context, nodes []*node, services int) error {
	changes := []result.Change{result.ReplaceEndpoint, result.ScaleUp, result.ScaleDown, result.CreateService, result.DeleteService}
	for i := range c.Samples {
		if i%10 == 0 {
			c.progress("update: sample %d of %d", i+1, c.Samples)
		}
		for j, change := range changes {
			scenario := result.Scenario{Change: change, Services: services, Endpoints: c.Endpoints}
			for _, n := range rotated(nodes, i+j) {
				if err := n.waitSettled(ctx, c.SettleTime); err != nil {
					return err
				}
				took, answered, err := c.update(ctx, n, change, i)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", n.sys.Name(), change, err)
				}
				n.settledAt = time.Now()
				c.addSample(n, result.UpdatePacket, scenario, "s", took.Seconds())
				updateMean(c.measurement(n.sys.Name(), result.UpdatePacket, scenario), "request", "s", answered.Seconds())
			}
		}
	}
	return nil
}

// update makes one change and waits until packets show it. What scales up and what
// is created goes again with the next change, so that the number of Services stays.
//
// It returns how long packets took to show it, and the API server to answer.
func (c *comparison) update(ctx context.Context, n *node, change result.Change, sample int) (took, answered time.Duration, err error) {
	ctx, cancel := n.contextWhileRunning(ctx)
	defer cancel()
	// A Service is replaced and scaled in turns; they are spread over all of them.
	const prime = 7919
	first, second := 2*sample*prime%len(n.services), (2*sample+1)*prime%len(n.services)
	var s *cluster.Service
	var event *request
	var look func(context.Context) (testbed.Observation, error)
	arrival := func(at func(netip.Addr) bool) {
		look = func(ctx context.Context) (testbed.Observation, error) {
			return n.probe.FirstArrival(ctx, event.sentAt, s.Addr(), at)
		}
	}
	absence := func(at func(netip.Addr) bool, quiet int) {
		look = func(ctx context.Context) (testbed.Observation, error) {
			return n.probe.LastArrival(ctx, event.sentAt, s.Addr(), at, quiet)
		}
	}
	switch change {
	case result.ReplaceEndpoint:
		var by netip.Addr
		s = n.services[first]
		event, by = n.replaceEndpoint(ctx, first, true)
		arrival(testbed.ToEndpoint(by))
	case result.ScaleUp:
		by := n.nextAddr(true)
		s = n.services[second]
		event = n.updateEndpoints(ctx, second, s.WithEndpoint(by))
		arrival(testbed.ToEndpoint(by))
	case result.ScaleDown:
		s = n.services[second]
		gone := s.Endpoints[len(s.Endpoints)-1] // from ScaleUp
		event = n.updateEndpoints(ctx, second, s.WithoutEndpoint(gone))
		absence(testbed.ToEndpoint(gone), requiredMisses(len(s.Endpoints)))
	case result.CreateService:
		s = c.createdService(n, sample)
		event = n.server.create(ctx, s.Object(), s.Slice())
		arrival(testbed.ToAnyEndpoint)
	case result.DeleteService:
		s = c.createdService(n, sample)
		event = n.server.delete(ctx, s.Object(), s.Slice())
		absence(testbed.ToAnyEndpoint, requiredMisses(1))
	}
	took, err = n.observe(ctx, event, look)
	return took, event.duration, err
}

// createdService returns the Service that is created for a sample, which has addresses of
// its own.
func (c *comparison) createdService(n *node, sample int) *cluster.Service {
	s := &cluster.Service{Index: len(n.services) + sample}
	const apart = 1 << 20 // from those that are given out one by one
	for e := range c.Endpoints {
		s.Endpoints = append(s.Endpoints, cluster.WatchedAddr(apart+sample*c.Endpoints+e))
	}
	return s
}
