package bench

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/kube"
)

// updater makes one change after another, and measures each.
type updater struct {
	pipeline *pipelineUnderTest
	probe    *testbed.Probe
	services []*cluster.Service
	// endpoints is the number that a Service has at rest.
	endpoints int
	usedAddrs int // addresses used so far
	// untilPacket says that the probe looks; otherwise the kernel's acknowledgement
	// counts, without the probe's packets beside.
	untilPacket bool
	samples     map[result.Measure]map[result.Change][]float64
}

// update measures single changes. Between them there is rest. The kinds take turns,
// so that what else happens on the machine hits all alike.
func update(ctx context.Context, o Options, m *measurements) error {
	services := newServices(o.Services, o.Endpoints)
	return withLoadedTestbed(ctx, o, services, func(s *pipelineUnderTest, p *testbed.Probe) error {
		u := &updater{
			pipeline: s, probe: p, services: services, endpoints: o.Endpoints,
			samples: map[result.Measure]map[result.Change][]float64{result.UpdateAck: {}, result.UpdatePacket: {}},
		}
		for i := range o.Samples {
			o.Progress(fmt.Sprintf("update: %d Services, round %d of %d", o.Services, i+1, o.Samples))
			if err := u.round(ctx, i); err != nil {
				return err
			}
		}
		for _, measure := range []result.Measure{result.UpdateAck, result.UpdatePacket} {
			for _, change := range changes() {
				m.addSamples(measure, result.Scenario{Change: change, Services: o.Services, Endpoints: o.Endpoints}, "s", u.samples[measure][change])
			}
		}
		return nil
	})
}

func changes() []result.Change {
	return []result.Change{result.ReplaceEndpoint, result.ScaleUp, result.ScaleDown, result.CreateService, result.DeleteService}
}

// round makes each change twice: for the kernel's acknowledgement, and for the
// probe.
func (u *updater) round(ctx context.Context, i int) error {
	for _, u.untilPacket = range []bool{false, true} {
		const stride = 7919 // all over the table
		at := i * stride % len(u.services)
		if err := u.changeEndpoints(ctx, at); err != nil {
			return fmt.Errorf("change %s: %w", u.services[at].Name(), err)
		}
		if err := u.createAndDeleteService(ctx); err != nil {
			return fmt.Errorf("one more Service: %w", err)
		}
	}
	return nil
}

// changeEndpoints changes the endpoints of a Service.
func (u *updater) changeEndpoints(ctx context.Context, at int) error {
	old := u.services[at]
	addr := u.nextAddr()
	replaced := old.WithReplacedEndpoint(addr)
	if err := u.measure(ctx, result.ReplaceEndpoint, replaced, testbed.ToEndpoint(addr), sliceDelta(replaced)); err != nil {
		return err
	}
	u.services[at] = replaced
	more := u.nextAddr()
	scaled := replaced.WithEndpoint(more)
	if err := u.measure(ctx, result.ScaleUp, scaled, testbed.ToEndpoint(more), sliceDelta(scaled)); err != nil {
		return err
	}
	return u.measure(ctx, result.ScaleDown, replaced, testbed.ToEndpoint(more), sliceDelta(replaced))
}

// createAndDeleteService creates a Service and deletes it.
func (u *updater) createAndDeleteService(ctx context.Context) error {
	s := &cluster.Service{Index: len(u.services)}
	for range u.endpoints {
		s.Endpoints = append(s.Endpoints, u.nextAddr())
	}
	err := u.measure(ctx, result.CreateService, s, testbed.ToAnyEndpoint, kube.Delta{Services: []*corev1.Service{s.Object()}}, sliceDelta(s))
	if err != nil {
		return err
	}
	return u.measure(ctx, result.DeleteService, s, testbed.ToAnyEndpoint,
		kube.Delta{DeletedServices: []types.NamespacedName{s.Name()}},
		kube.Delta{DeletedEndpointSlices: []types.NamespacedName{s.SliceName()}})
}

// nextAddr returns an endpoint's address that was not used before.
func (u *updater) nextAddr() netip.Addr {
	u.usedAddrs++
	return cluster.WatchedAddr(u.usedAddrs)
}

func sliceDelta(s *cluster.Service) kube.Delta {
	return kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{s.Slice()}}
}

// measure makes a change, and waits until it has its effect: at is where packets
// arrive from then on, or until then if the change removes something.
func (u *updater) measure(
	ctx context.Context, change result.Change, s *cluster.Service, at func(netip.Addr) bool, deltas ...kube.Delta,
) error {
	var err error
	var took time.Duration
	if u.untilPacket {
		took, err = u.timeToPacket(ctx, change, s, at, deltas)
	} else {
		took, err = u.timeToAck(ctx, time.Now(), deltas)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", change, err)
	}
	samples := u.samples[result.UpdateAck]
	if u.untilPacket {
		samples = u.samples[result.UpdatePacket]
	}
	samples[change] = append(samples[change], took.Seconds())
	return nil
}

// timeToAck makes a change and returns the time from the event to the kernel's
// acknowledgement.
func (u *updater) timeToAck(ctx context.Context, event time.Time, deltas []kube.Delta) (time.Duration, error) {
	if err := u.pipeline.apply(deltas...); err != nil {
		return 0, err
	}
	end, err := u.pipeline.waitSynced(ctx)
	return end.Sub(event), err
}

// timeToPacket makes a change and returns the time from the event until packets show it.
func (u *updater) timeToPacket(
	ctx context.Context, change result.Change, s *cluster.Service, at func(netip.Addr) bool, deltas []kube.Delta,
) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		testbed.Observation
		err error
	}
	seen := make(chan outcome, 1)
	ready := make(chan struct{})
	// The probe has a thread of its own, which is awake when the event comes:
	// waking it takes longer than the change.
	var event atomic.Pointer[time.Time]
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		close(ready)
		for event.Load() == nil {
		}
		var o outcome
		switch change {
		case result.ScaleDown, result.DeleteService:
			o.Observation, o.err = u.probe.LastArrival(ctx, *event.Load(), s.Addr(), at, requiredMisses(u.endpoints))
		default:
			o.Observation, o.err = u.probe.FirstArrival(ctx, *event.Load(), s.Addr(), at)
		}
		seen <- o
	}()
	<-ready
	now := time.Now()
	event.Store(&now)
	if _, err := u.timeToAck(ctx, now, deltas); err != nil {
		cancel() // there is nothing to be seen
		<-seen
		return 0, err
	}
	o := <-seen
	return o.After, o.err
}

// requiredMisses is how many packets in a row must miss one of so many endpoints to show that
// it is gone: that it happens by chance has a probability of some 1 in 100,000.
func requiredMisses(endpoints int) int { return max(12*(endpoints+1), 20) }
