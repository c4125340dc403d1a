package bench

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	stdsync "sync"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/sync"
)

// churn replaces endpoints at the given rates. It creates changes when they are due, however long
// earlier changes take. Changes that become due while the pipeline handles earlier changes go into
// one Delta, as a source does.
func churn(ctx context.Context, o Options, m *measurements) error {
	services := newServices(o.Services, o.Endpoints)
	err := withLoadedTestbed(ctx, o, services, func(s *pipelineUnderTest, _ *testbed.Probe) error {
		c := &churner{pipeline: s, slices: churnSlices(services)}
		for _, rate := range o.Rates {
			o.Progress(fmt.Sprintf("churn: %d Services, %g changes per second for %s", o.Services, rate, o.ChurnTime))
			if err := c.runAt(ctx, rate, o, m); err != nil {
				return fmt.Errorf("%g changes per second: %w", rate, err)
			}
		}
		return nil
	})
	if err == nil {
		m.addNote("Churn and memory are measured on the benchmark's own process, which also generates the changes.")
	}
	return err
}

// churnSlices returns the EndpointSlices of at most 4096 of the Services, spread evenly.
func churnSlices(services []*cluster.Service) []*discoveryv1.EndpointSlice {
	const limit = 4096
	slices := make([]*discoveryv1.EndpointSlice, min(len(services), limit))
	for i := range slices {
		slices[i] = services[i*len(services)/len(slices)].Slice()
	}
	return slices
}

// withReplacedEndpoint returns a copy of slice whose last endpoint has the address addr. It copies
// as little as possible, because its cost counts towards the measurement.
func withReplacedEndpoint(slice *discoveryv1.EndpointSlice, addr netip.Addr) *discoveryv1.EndpointSlice {
	changed := *slice
	changed.Endpoints = append([]discoveryv1.Endpoint(nil), slice.Endpoints...)
	changed.Endpoints[len(changed.Endpoints)-1].Addresses = []string{addr.String()}
	return &changed
}

// churner generates changes.
type churner struct {
	pipeline *pipelineUnderTest
	slices   []*discoveryv1.EndpointSlice
	count    int
}

// next returns the next change. Each change has a different endpoint address.
func (c *churner) next() *discoveryv1.EndpointSlice {
	c.count++
	return withReplacedEndpoint(c.slices[c.count%len(c.slices)], cluster.WatchedAddr(c.count))
}

// runAt generates rate changes per second for [Options.ChurnTime] and records their latencies.
func (c *churner) runAt(ctx context.Context, rate float64, o Options, m *measurements) error {
	s := c.pipeline
	runtime.GC()
	waiting := &pending{changes: map[dataplane.Key][]pendingChange{}}
	s.setCommitHook(waiting.onCommit)
	defer s.setCommitHook(nil)
	before, err := system.UsageOf(os.Getpid())
	if err != nil {
		return err
	}
	s.mu.Lock()
	commits := s.commits
	s.mu.Unlock()
	begin := time.Now()
	total := max(int(rate*o.ChurnTime.Seconds()), 1)
	due := func(i int) time.Time { return begin.Add(time.Duration(float64(i) / rate * float64(time.Second))) }
	events := map[string][]time.Time{} // due times by the name of the Service
	var woke time.Time
	for sent := 0; sent < total; {
		if err := ctx.Err(); err != nil {
			return err
		}
		if wait := time.Until(due(sent)); wait > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(wait):
			}
			woke = time.Now() // oversleeping does not count towards the latency
		}
		var d kube.Delta
		clear(events)
		for now := time.Now(); sent < total && !due(sent).After(now); sent++ {
			slice := c.next()
			event := due(sent)
			if event.Before(woke) {
				event = woke
			}
			name := slice.Labels[discoveryv1.LabelServiceName]
			events[name] = append(events[name], event)
			d.EndpointSlices = append(d.EndpointSlices, slice)
		}
		tracked := s.pipeline.Track(d)
		waiting.add(tracked.Changes, events)
		s.pipeline.Program(tracked)
	}
	if _, err := s.waitSynced(ctx); err != nil {
		return err
	}
	took := time.Since(begin)
	after, err := system.UsageOf(os.Getpid())
	if err != nil {
		return err
	}
	s.mu.Lock()
	commits = s.commits - commits
	s.mu.Unlock()
	scenario := result.Scenario{Change: result.ReplaceEndpoint, Services: o.Services, Endpoints: o.Endpoints, Rate: rate}
	m.addSamples(result.Churn, scenario, "s", waiting.latencies,
		result.Value{Name: "cpu", Unit: "s", Value: (after.CPU() - before.CPU()).Seconds()},
		result.Value{Name: "duration", Unit: "s", Value: took.Seconds()},
		result.Value{Name: "changes", Unit: "1", Value: float64(total)},
		result.Value{Name: "commits", Unit: "1", Value: float64(commits)},
		result.Value{Name: "resident", Unit: "B", Value: float64(after.Resident)})
	return nil
}

// pending holds the changes that the kernel has not acknowledged yet.
type pending struct {
	mu        stdsync.Mutex
	changes   map[dataplane.Key][]pendingChange
	latencies []float64
}

// pendingChange is a Service passed to the syncer, and the due times of the changes it contains.
type pendingChange struct {
	service *dataplane.Service
	events  []time.Time
}

func (p *pending) add(changes map[dataplane.Key]*dataplane.Service, events map[string][]time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, value := range changes {
		p.changes[key] = append(p.changes[key], pendingChange{value, events[key.Name]})
	}
}

// onCommit records the latencies of the committed Services, and of the earlier pending values of
// the same Services, which the committed values supersede.
func (p *pending) onCommit(c sync.Commit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, programmed := range c.Changes {
		key := programmed.Key()
		queue := p.changes[key]
		for i, queued := range queue {
			if queued.service != programmed.New {
				continue
			}
			for _, acknowledged := range queue[:i+1] {
				for _, event := range acknowledged.events {
					p.latencies = append(p.latencies, c.End.Sub(event).Seconds())
				}
			}
			p.changes[key] = queue[i+1:]
			break
		}
	}
}
