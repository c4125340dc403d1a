package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/kube"
)

// start measures starts, each on a new node. A restart follows on those that the
// probe did not look at.
func start(ctx context.Context, o Options, m *measurements) error {
	services := newServices(o.Services, o.Endpoints)
	vips := make([]netip.AddrPort, len(services))
	for i, s := range services {
		vips[i] = s.Addr()
	}
	var complete, answer, restart []float64
	for i := range o.startCount() {
		o.Progress(fmt.Sprintf("start: %d Services, start %d of %d", o.Services, i+1, o.startCount()))
		err := withTestbed(func(r *testbed.Testbed, _ *testbed.Probe) error {
			took, err := startOnce(ctx, o, r, initialDelta(services, r.Node.IPv4))
			if err != nil || !o.includes(Restart) {
				complete = append(complete, took.Seconds())
				return err
			}
			complete = append(complete, took.Seconds())
			o.Progress(fmt.Sprintf("restart: %d Services, restart %d of %d", o.Services, i+1, o.startCount()))
			took, err = restartOnce(ctx, o, r, initialDelta(services, r.Node.IPv4))
			restart = append(restart, took.Seconds())
			return err
		})
		if err != nil {
			return err
		}
		if !o.includes(Start) {
			continue
		}
		o.Progress(fmt.Sprintf("start until all answer: %d Services, start %d of %d", o.Services, i+1, o.startCount()))
		err = withTestbed(func(r *testbed.Testbed, p *testbed.Probe) error {
			took, err := startUntilAllAnswer(ctx, o, r, p, initialDelta(services, r.Node.IPv4), vips)
			answer = append(answer, took.Seconds())
			return err
		})
		if err != nil {
			return err
		}
	}
	scenario := result.Scenario{Services: o.Services, Endpoints: o.Endpoints}
	if o.includes(Start) {
		m.addSamples(result.ColdStartComplete, scenario, "s", complete)
		m.addSamples(result.ColdStartAnswer, scenario, "s", answer)
	}
	m.addSamples(result.Restart, scenario, "s", restart)
	return nil
}

// startOnce returns the time from nothing, with all objects at hand, to the kernel's
// acknowledgement of the last of them.
func startOnce(ctx context.Context, o Options, r *testbed.Testbed, all kube.Delta) (took time.Duration, err error) {
	runtime.GC() // what was before must not count
	begin := time.Now()
	s, err := newPipelineUnderTest(ctx, o, r)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	end, err := s.load(ctx, all)
	return end.Sub(begin), err
}

// startUntilAllAnswer is startOnce until the last of the Services answers.
func startUntilAllAnswer(
	ctx context.Context, o Options, r *testbed.Testbed, p *testbed.Probe, all kube.Delta, vips []netip.AddrPort,
) (took time.Duration, err error) {
	if err := r.SetBackgroundReachable(true); err != nil {
		return 0, err
	}
	runtime.GC()
	begin := time.Now()
	s, err := newPipelineUnderTest(ctx, o, r)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.apply(all); err != nil {
		return 0, err
	}
	s.pipeline.Syncer.FinishInitialList()
	took, err = p.WaitAllAnswer(ctx, begin, vips)
	if err != nil {
		return 0, err
	}
	_, err = s.waitSynced(ctx)
	return took, err
}

// restartOnce is startOnce where all is programmed. That something is written then
// is an error.
func restartOnce(ctx context.Context, o Options, r *testbed.Testbed, all kube.Delta) (took time.Duration, err error) {
	told, err := newMonitor(r.Node.Fd())
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, told.close()) }()
	if took, err = startOnce(ctx, o, r, all); err != nil {
		return 0, err
	}
	written, err := told.read()
	if err == nil && written != (notificationCount{}) {
		err = fmt.Errorf("a restart with nothing to do has written: %+v", written)
	}
	return took, err
}
