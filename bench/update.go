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
	"fairlead.io/fairlead/bench/rig"
	"fairlead.io/fairlead/kube"
)

// updater makes one change after another, and measures each.
type updater struct {
	subject  *subject
	probe    *rig.Probe
	services []*cluster.Service
	// endpoints is the number that a Service has at rest.
	endpoints int
	watched   int // addresses used so far
	// byPacket says that the probe looks; otherwise the kernel's acknowledgement
	// counts, without the probe's packets beside.
	byPacket bool
	took     map[result.Measure]map[result.Change][]float64
}

// update measures single changes. Between them there is rest. The kinds take turns,
// so that what else happens on the machine hits all alike.
func update(ctx context.Context, o Options, m *measurements) error {
	services := some(o.Services, o.Endpoints)
	return loaded(ctx, o, services, func(s *subject, p *rig.Probe) error {
		u := &updater{
			subject: s, probe: p, services: services, endpoints: o.Endpoints,
			took: map[result.Measure]map[result.Change][]float64{result.UpdateAck: {}, result.UpdatePacket: {}},
		}
		for i := range o.Samples {
			o.Progress(fmt.Sprintf("update: %d Services, round %d of %d", o.Services, i+1, o.Samples))
			if err := u.round(ctx, i); err != nil {
				return err
			}
		}
		for _, measure := range []result.Measure{result.UpdateAck, result.UpdatePacket} {
			for _, change := range changes() {
				m.samples(measure, result.Scenario{Change: change, Services: o.Services, Endpoints: o.Endpoints}, "s", u.took[measure][change])
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
	for _, u.byPacket = range []bool{false, true} {
		const stride = 7919 // all over the table
		at := i * stride % len(u.services)
		if err := u.endpointsOf(ctx, at); err != nil {
			return fmt.Errorf("change %s: %w", u.services[at].Name(), err)
		}
		if err := u.service(ctx); err != nil {
			return fmt.Errorf("one more Service: %w", err)
		}
	}
	return nil
}

// endpointsOf changes the endpoints of a Service.
func (u *updater) endpointsOf(ctx context.Context, at int) error {
	old := u.services[at]
	addr := u.next()
	replaced := old.Replaced(addr)
	if err := u.measure(ctx, result.ReplaceEndpoint, replaced, rig.At(addr), sliceOf(replaced)); err != nil {
		return err
	}
	u.services[at] = replaced
	more := u.next()
	scaled := replaced.With(more)
	if err := u.measure(ctx, result.ScaleUp, scaled, rig.At(more), sliceOf(scaled)); err != nil {
		return err
	}
	return u.measure(ctx, result.ScaleDown, replaced, rig.At(more), sliceOf(replaced))
}

// service creates a Service and deletes it.
func (u *updater) service(ctx context.Context) error {
	s := &cluster.Service{Index: len(u.services)}
	for range u.endpoints {
		s.Endpoints = append(s.Endpoints, u.next())
	}
	err := u.measure(ctx, result.CreateService, s, rig.Anywhere, kube.Delta{Services: []*corev1.Service{s.Object()}}, sliceOf(s))
	if err != nil {
		return err
	}
	return u.measure(ctx, result.DeleteService, s, rig.Anywhere,
		kube.Delta{DeletedServices: []types.NamespacedName{s.Name()}},
		kube.Delta{DeletedEndpointSlices: []types.NamespacedName{s.SliceName()}})
}

// next returns an endpoint's address that was not used before.
func (u *updater) next() netip.Addr {
	u.watched++
	return cluster.Watched(u.watched)
}

func sliceOf(s *cluster.Service) kube.Delta {
	return kube.Delta{EndpointSlices: []*discoveryv1.EndpointSlice{s.Slice()}}
}

// measure makes a change, and waits until it has its effect: at is where packets
// arrive from then on, or until then if the change removes something.
func (u *updater) measure(
	ctx context.Context, change result.Change, s *cluster.Service, at func(netip.Addr) bool, deltas ...kube.Delta,
) error {
	var err error
	var took time.Duration
	if u.byPacket {
		took, err = u.seen(ctx, change, s, at, deltas)
	} else {
		took, err = u.acknowledged(ctx, time.Now(), deltas)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", change, err)
	}
	samples := u.took[result.UpdateAck]
	if u.byPacket {
		samples = u.took[result.UpdatePacket]
	}
	samples[change] = append(samples[change], took.Seconds())
	return nil
}

// acknowledged makes a change and returns the time from the event to the kernel's
// acknowledgement.
func (u *updater) acknowledged(ctx context.Context, event time.Time, deltas []kube.Delta) (time.Duration, error) {
	if err := u.subject.deliver(deltas...); err != nil {
		return 0, err
	}
	end, err := u.subject.settled(ctx)
	return end.Sub(event), err
}

// seen makes a change and returns the time from the event until packets show it.
func (u *updater) seen(
	ctx context.Context, change result.Change, s *cluster.Service, at func(netip.Addr) bool, deltas []kube.Delta,
) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		rig.Sighting
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
			o.Sighting, o.err = u.probe.LastArrival(ctx, *event.Load(), s.Addr(), at, quiet(u.endpoints))
		default:
			o.Sighting, o.err = u.probe.FirstArrival(ctx, *event.Load(), s.Addr(), at)
		}
		seen <- o
	}()
	<-ready
	now := time.Now()
	event.Store(&now)
	if _, err := u.acknowledged(ctx, now, deltas); err != nil {
		cancel() // there is nothing to be seen
		<-seen
		return 0, err
	}
	o := <-seen
	return o.After, o.err
}

// quiet is how many packets in a row must miss one of so many endpoints to show that
// it is gone: that it happens by chance has a probability of some 1 in 100,000.
func quiet(endpoints int) int { return max(12*(endpoints+1), 20) }
