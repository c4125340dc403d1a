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

// SettleTime is the pause between a cold start and a warm restart. The kernel moves elements to
// larger hash tables for a while after a cold start, and an agent that reads them meanwhile has to
// read again. Agents rarely restart so soon.
const SettleTime = 2 * time.Second

// start measures cold starts, each on a new node. A warm restart follows each cold start that the
// probe does not observe.
func start(ctx context.Context, o Options, m *measurements) error {
	services := newServices(o.Services, o.Endpoints)
	vips := make([]netip.AddrPort, len(services))
	for i, s := range services {
		vips[i] = s.Addr()
	}
	var complete, answer, restart []float64
	for i := range o.startCount() {
		o.Progress(fmt.Sprintf("start: %d Services, cold start %d of %d", o.Services, i+1, o.startCount()))
		err := withTestbed(func(r *testbed.Testbed, _ *testbed.Probe) error {
			took, err := startOnce(ctx, o, r, initialDelta(services, r.Node.IPv4))
			if err != nil || !o.includes(Restart) {
				complete = append(complete, took.Seconds())
				return err
			}
			complete = append(complete, took.Seconds())
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(SettleTime):
			}
			o.Progress(fmt.Sprintf("restart: %d Services, warm restart %d of %d", o.Services, i+1, o.startCount()))
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
		o.Progress(fmt.Sprintf("start until all Services answer: %d Services, cold start %d of %d", o.Services, i+1, o.startCount()))
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

// startOnce starts the pipeline with all objects available. It returns the time until the kernel
// acknowledges the last of them.
func startOnce(ctx context.Context, o Options, r *testbed.Testbed, all kube.Delta) (took time.Duration, err error) {
	runtime.GC() // garbage of earlier measurements must not count
	begin := time.Now()
	s, err := newPipelineUnderTest(ctx, o, r)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	end, err := s.load(ctx, all)
	return end.Sub(begin), err
}

// startUntilAllAnswer starts the pipeline like startOnce, and returns the time until the last
// Service answers.
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

// restartOnce measures startOnce with everything programmed already. It returns an error if the
// restart writes anything.
func restartOnce(ctx context.Context, o Options, r *testbed.Testbed, all kube.Delta) (took time.Duration, err error) {
	notifications, err := newMonitor(r.Node.Fd())
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, notifications.close()) }()
	if took, err = startOnce(ctx, o, r, all); err != nil {
		return 0, err
	}
	written, err := notifications.read()
	if err == nil && written != (notificationCount{}) {
		err = fmt.Errorf("the warm restart wrote to the kernel although nothing had changed: %+v", written)
	}
	return took, err
}
