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

// updater makes single changes and measures each of them.
type updater struct {
	pipeline *pipelineUnderTest
	probe    *testbed.Probe
	services []*cluster.Service
	// endpoints is the number of endpoints of each Service between changes.
	endpoints int
	usedAddrs int // number of addresses used so far
	// untilPacket makes the updater measure until packets show a change, instead of until the
	// kernel acknowledges it without any traffic.
	untilPacket bool
	samples     map[result.Measure]map[result.Change][]float64
}

// update measures single changes on an otherwise idle node. The kinds of change alternate, so that
// other activity on the machine affects all kinds equally.
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

// round makes each change twice: once until the kernel's acknowledgement and once until packets
// show it.
func (u *updater) round(ctx context.Context, i int) error {
	for _, u.untilPacket = range []bool{false, true} {
		const stride = 7919 // prime: spreads the changes over all Services
		index := i * stride % len(u.services)
		if err := u.changeEndpoints(ctx, index); err != nil {
			return fmt.Errorf("change %s: %w", u.services[index].Name(), err)
		}
		if err := u.createAndDeleteService(ctx); err != nil {
			return fmt.Errorf("create and delete a Service: %w", err)
		}
	}
	return nil
}

// changeEndpoints replaces an endpoint of a Service, and adds and removes another.
func (u *updater) changeEndpoints(ctx context.Context, index int) error {
	old := u.services[index]
	addr := u.nextAddr()
	replaced := old.WithReplacedEndpoint(addr)
	if err := u.measure(ctx, result.ReplaceEndpoint, replaced, testbed.ToEndpoint(addr), sliceDelta(replaced)); err != nil {
		return err
	}
	u.services[index] = replaced
	added := u.nextAddr()
	scaled := replaced.WithEndpoint(added)
	if err := u.measure(ctx, result.ScaleUp, scaled, testbed.ToEndpoint(added), sliceDelta(scaled)); err != nil {
		return err
	}
	return u.measure(ctx, result.ScaleDown, replaced, testbed.ToEndpoint(added), sliceDelta(replaced))
}

// createAndDeleteService creates a Service and deletes it again.
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

// nextAddr returns an unused endpoint address.
func (u *updater) nextAddr() netip.Addr {
	u.usedAddrs++
	return cluster.WatchedAddr(u.usedAddrs)
}

// sliceDelta returns a Delta with the EndpointSlice of the Service.
func sliceDelta(s *cluster.Service) kube.Delta {
	return kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{s.Slice()}}
}

// measure makes a change and waits for its effect. at selects the endpoints where packets arrive
// after the change, or, if the change removes something, until the change.
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

// timeToAck makes a change and returns the time from event until the kernel acknowledges it.
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
	observed := make(chan outcome, 1)
	ready := make(chan struct{})
	// The probe runs on a separate thread that busy-waits for the event: waking a sleeping thread
	// takes longer than the change.
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
		observed <- o
	}()
	<-ready
	now := time.Now()
	event.Store(&now)
	if _, err := u.timeToAck(ctx, now, deltas); err != nil {
		cancel() // the probe would wait in vain
		<-observed
		return 0, err
	}
	o := <-observed
	return o.After, o.err
}

// requiredMisses returns how many consecutive packets must miss one of the given number of
// endpoints to show that this endpoint is gone. The probability of that many misses by chance is
// about 1 in 100,000.
func requiredMisses(endpoints int) int { return max(12*(endpoints+1), 20) }
