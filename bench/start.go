package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/rig"
	"fairlead.io/fairlead/kube"
)

// start measures starts, each on a new node. A restart follows on those that the
// probe did not look at.
func start(ctx context.Context, o Options, m *measurements) error {
	services := some(o.Services, o.Endpoints)
	vips := make([]netip.AddrPort, len(services))
	for i, s := range services {
		vips[i] = s.Addr()
	}
	var complete, answer, restart []float64
	for i := range o.starts() {
		o.Progress(fmt.Sprintf("start: %d Services, start %d of %d", o.Services, i+1, o.starts()))
		err := inRig(func(r *rig.Rig, _ *rig.Probe) error {
			took, err := startOnce(ctx, o, r, everything(services, r.Node.IPv4))
			if err != nil || !o.measures(Restart) {
				complete = append(complete, took.Seconds())
				return err
			}
			complete = append(complete, took.Seconds())
			o.Progress(fmt.Sprintf("restart: %d Services, restart %d of %d", o.Services, i+1, o.starts()))
			took, err = restartOnce(ctx, o, r, everything(services, r.Node.IPv4))
			restart = append(restart, took.Seconds())
			return err
		})
		if err != nil {
			return err
		}
		if !o.measures(Start) {
			continue
		}
		o.Progress(fmt.Sprintf("start until all answer: %d Services, start %d of %d", o.Services, i+1, o.starts()))
		err = inRig(func(r *rig.Rig, p *rig.Probe) error {
			took, err := startUntilAnswer(ctx, o, r, p, everything(services, r.Node.IPv4), vips)
			answer = append(answer, took.Seconds())
			return err
		})
		if err != nil {
			return err
		}
	}
	scenario := result.Scenario{Services: o.Services, Endpoints: o.Endpoints}
	if o.measures(Start) {
		m.samples(result.ColdStartComplete, scenario, "s", complete)
		m.samples(result.ColdStartAnswer, scenario, "s", answer)
	}
	m.samples(result.Restart, scenario, "s", restart)
	return nil
}

// startOnce returns the time from nothing, with all objects at hand, to the kernel's
// acknowledgement of the last of them.
func startOnce(ctx context.Context, o Options, r *rig.Rig, all kube.Delta) (took time.Duration, err error) {
	runtime.GC() // what was before must not count
	begin := time.Now()
	s, err := newSubject(ctx, o, r)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	end, err := s.load(ctx, all)
	return end.Sub(begin), err
}

// startUntilAnswer is startOnce until the last of the Services answers.
func startUntilAnswer(
	ctx context.Context, o Options, r *rig.Rig, p *rig.Probe, all kube.Delta, vips []netip.AddrPort,
) (took time.Duration, err error) {
	if err := r.Answer(true); err != nil {
		return 0, err
	}
	runtime.GC()
	begin := time.Now()
	s, err := newSubject(ctx, o, r)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.deliver(all); err != nil {
		return 0, err
	}
	s.pipeline.Syncer.ListComplete()
	took, err = p.Answers(ctx, begin, vips)
	if err != nil {
		return 0, err
	}
	_, err = s.settled(ctx)
	return took, err
}

// restartOnce is startOnce where all is programmed. That something is written then
// is an error.
func restartOnce(ctx context.Context, o Options, r *rig.Rig, all kube.Delta) (took time.Duration, err error) {
	told, err := listen(r.Node.Fd())
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, told.close()) }()
	if took, err = startOnce(ctx, o, r, all); err != nil {
		return 0, err
	}
	written, err := told.take()
	if err == nil && written != (announced{}) {
		err = fmt.Errorf("a restart with nothing to do has written: %+v", written)
	}
	return took, err
}
