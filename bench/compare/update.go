package compare

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
)

// requiredMisses returns how many consecutive packets must miss one of the given number of
// endpoints to show that this endpoint is gone.
func requiredMisses(endpoints int) int {
	const factor = 25 // the probability of an error is e^-25, about 1e-11
	return factor * endpoints
}

// updates measures each kind of change, in the order of samples, kinds and systems.
func (c *comparison) updates(ctx context.Context, nodes []*node, services int) (err error) {
	echo, err := testbed.NewEcho(ctx)
	if err != nil {
		return fmt.Errorf("start the echo: %w", err)
	}
	defer func() { err = errors.Join(err, echo.Close()) }()
	for _, n := range nodes {
		if err := c.createOnlyEndpoint(ctx, n); err != nil {
			return fmt.Errorf("%s: create the Service with one endpoint: %w", n.sys.Name(), err)
		}
	}
	changes := []result.Change{result.ReplaceOnlyEndpoint, result.ReplaceEndpoint, result.ScaleUp, result.ScaleDown, result.CreateService, result.DeleteService}
	for i := range c.Samples {
		if i%10 == 0 {
			c.progress("update: sample %d of %d", i+1, c.Samples)
		}
		if err := c.wakeUp(ctx, nodes, echo, services); err != nil {
			return err
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

// wakeUp measures how long the machine takes to wake up: a round trip to a sleeping thread, after the
// pause that precedes each change.
func (c *comparison) wakeUp(ctx context.Context, nodes []*node, echo *testbed.Echo, services int) error {
	for _, n := range nodes {
		if err := n.waitSettled(ctx, c.SettleTime); err != nil {
			return err
		}
	}
	took, err := echo.RoundTrip()
	if err != nil {
		return fmt.Errorf("measure a wake-up: %w", err)
	}
	for _, n := range nodes {
		n.settledAt = time.Now()
	}
	m := c.measurement(result.Direct, result.WakeUp, result.Scenario{Services: services, Endpoints: c.Endpoints})
	m.Unit = "s"
	m.Samples = append(m.Samples, took.Seconds())
	return nil
}

// update makes one change and waits until packets show it. The next change removes the endpoint or
// Service that ScaleUp or CreateService adds, so that the numbers stay the same. update returns
// the times until packets show the change and until the API server answers.
func (c *comparison) update(ctx context.Context, n *node, change result.Change, sample int) (took, answered time.Duration, err error) {
	ctx, cancel := n.contextWhileRunning(ctx)
	defer cancel()
	// ReplaceEndpoint and the scaling changes use different Services, spread over all Services.
	const prime = 7919
	first, second := 2*sample*prime%len(n.services), (2*sample+1)*prime%len(n.services)
	var s *cluster.Service
	var event *request
	var observe func(context.Context) (testbed.Observation, error)
	arrival := func(at func(netip.Addr) bool) {
		observe = func(ctx context.Context) (testbed.Observation, error) {
			return n.probe.FirstArrival(ctx, event.sentAt, s.Addr(), at)
		}
	}
	absence := func(at func(netip.Addr) bool, misses int) {
		observe = func(ctx context.Context) (testbed.Observation, error) {
			return n.probe.LastArrival(ctx, event.sentAt, s.Addr(), at, misses)
		}
	}
	n.probe.MinInterval = c.probeInterval(change)
	defer func() { n.probe.MinInterval = c.ProbeInterval }()
	switch change {
	case result.ReplaceOnlyEndpoint:
		addr := n.nextAddr(true)
		n.onlyEndpoint = n.onlyEndpoint.WithReplacedEndpoint(addr)
		s = n.onlyEndpoint
		event = n.server.update(ctx, s.Slice())
		arrival(testbed.ToEndpoint(addr))
	case result.ReplaceEndpoint:
		var addr netip.Addr
		s = n.services[first]
		event, addr = n.replaceEndpoint(ctx, first, true)
		arrival(testbed.ToEndpoint(addr))
	case result.ScaleUp:
		addr := n.nextAddr(true)
		s = n.services[second]
		event = n.updateEndpoints(ctx, second, s.WithEndpoint(addr))
		arrival(testbed.ToEndpoint(addr))
	case result.ScaleDown:
		s = n.services[second]
		removed := s.Endpoints[len(s.Endpoints)-1] // added by ScaleUp
		event = n.updateEndpoints(ctx, second, s.WithoutEndpoint(removed))
		absence(testbed.ToEndpoint(removed), requiredMisses(len(s.Endpoints)))
	case result.CreateService:
		s = c.createdService(n, sample)
		event = n.server.create(ctx, s.Object(), s.Slice())
		arrival(testbed.ToAnyEndpoint)
	case result.DeleteService:
		s = c.createdService(n, sample)
		event = n.server.delete(ctx, s.Object(), s.Slice())
		absence(testbed.ToAnyEndpoint, requiredMisses(1))
	}
	took, err = n.observe(ctx, event, observe)
	return took, event.duration, err
}

// probeInterval returns the minimum time between two packets for a change. If each packet shows the
// change, the probe sleeps between them, so that the system has both processors of a small machine.
func (c *comparison) probeInterval(change result.Change) time.Duration {
	const sleep = 100 * time.Microsecond
	switch change {
	case result.ReplaceOnlyEndpoint, result.CreateService, result.DeleteService:
		return max(c.ProbeInterval, sleep)
	default:
		return c.ProbeInterval
	}
}

// createOnlyEndpoint creates the Service for ReplaceOnlyEndpoint and waits until it answers.
func (c *comparison) createOnlyEndpoint(ctx context.Context, n *node) error {
	ctx, cancel := n.contextWhileRunning(ctx)
	defer cancel()
	s := &cluster.Service{Index: c.onlyEndpointIndex(n), Endpoints: []netip.Addr{n.nextAddr(true)}}
	event := n.server.create(ctx, s.Object(), s.Slice())
	_, err := n.observe(ctx, event, func(ctx context.Context) (testbed.Observation, error) {
		return n.probe.FirstArrival(ctx, event.sentAt, s.Addr(), testbed.ToAnyEndpoint)
	})
	n.onlyEndpoint, n.settledAt = s, time.Now()
	return err
}

// onlyEndpointIndex returns the index of the Service for ReplaceOnlyEndpoint, behind the Services of
// createdService. Larger indices are unused.
func (c *comparison) onlyEndpointIndex(n *node) int { return len(n.services) + c.Samples }

// createdService returns the Service to create for a sample. Its endpoint addresses differ from
// those of nextAddr.
func (c *comparison) createdService(n *node, sample int) *cluster.Service {
	s := &cluster.Service{Index: len(n.services) + sample}
	const offset = 1 << 20 // above all addresses of nextAddr
	for e := range c.Endpoints {
		s.Endpoints = append(s.Endpoints, cluster.WatchedAddr(offset+sample*c.Endpoints+e))
	}
	return s
}
