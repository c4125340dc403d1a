package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	stdsync "sync"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/rig"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/sync"
)

// subject is the agent's pipeline in this process: objects go in, the kernel's
// acknowledgement comes out.
type subject struct {
	rig      *rig.Rig
	dp       dataplane.Dataplane
	pipeline *pipeline.Pipeline
	stop     func() error

	mu       stdsync.Mutex
	commits  int
	last     sync.Commit
	failed   error
	onCommit func(sync.Commit)
}

// newSubject opens the backend on the node of the rig. Nothing is programmed before
// load.
func newSubject(ctx context.Context, o Options, r *rig.Rig) (*subject, error) {
	dp, err := o.open(r.Node.Fd())
	if err != nil {
		return nil, err
	}
	s := &subject{rig: r, dp: dp}
	s.pipeline = pipeline.New(dp, pipeline.Options{OnCommit: s.committed, Tracker: kube.Options{
		NodeName: cluster.NodeName, DetectLocal: kube.DetectLocal{ClusterCIDRs: []netip.Prefix{rig.ClusterCIDR}},
	}})
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- s.pipeline.Syncer.Run(ctx) }()
	s.stop = stdsync.OnceValue(func() error {
		cancel()
		return errors.Join(<-ended, dp.Close())
	})
	return s, nil
}

// close ends the subject. What is programmed stays.
func (s *subject) close() error { return s.stop() }

func (s *subject) committed(c sync.Commit) {
	s.mu.Lock()
	s.commits++
	s.last = c
	if c.Err != nil {
		s.failed = fmt.Errorf("program the kernel: %w", c.Err)
	}
	for key, err := range c.Failed {
		s.failed = fmt.Errorf("program %s: %w", key, err)
	}
	listener := s.onCommit
	s.mu.Unlock()
	if listener != nil {
		listener(c)
	}
}

// listen has f called with each commit from now on, nil for nobody.
func (s *subject) listen(f func(sync.Commit)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onCommit = f
}

// deliver hands over what a source would.
func (s *subject) deliver(deltas ...kube.Delta) error {
	for _, d := range deltas {
		result := s.pipeline.Track(d)
		if len(result.Problems) > 0 {
			return fmt.Errorf("a Service of the benchmark: %s", result.Problems[0])
		}
		s.pipeline.Program(result)
	}
	return nil
}

// settled waits until all that was delivered is acknowledged by the kernel, and
// returns when that was.
func (s *subject) settled(ctx context.Context) (time.Time, error) {
	if err := s.pipeline.Syncer.WaitSynced(ctx); err != nil {
		return time.Time{}, fmt.Errorf("wait for the kernel: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.End, s.failed
}

// load delivers everything there is and waits until it is programmed. It returns
// when that was.
func (s *subject) load(ctx context.Context, everything kube.Delta) (time.Time, error) {
	if err := s.deliver(everything); err != nil {
		return time.Time{}, err
	}
	s.pipeline.Syncer.ListComplete()
	return s.settled(ctx)
}

// some returns n Services.
func some(n, endpoints int) []*cluster.Service {
	services := make([]*cluster.Service, n)
	for i := range services {
		services[i] = cluster.New(i, endpoints)
	}
	return services
}

// everything is the first Delta of a source.
func everything(services []*cluster.Service, node netip.Addr) kube.Delta {
	d := kube.Delta{
		Node: cluster.Node(node), LocalAddrs: []netip.Addr{node},
		ServiceCIDRs: []*networkingv1.ServiceCIDR{cluster.ServiceCIDR()},
	}
	for _, s := range services {
		d.Services = append(d.Services, s.Object())
		d.EndpointSlices = append(d.EndpointSlices, s.Slice())
	}
	return d
}

// loaded makes a rig with a probe and a subject that has programmed the Services,
// runs f, and removes it all.
func loaded(ctx context.Context, o Options, services []*cluster.Service, f func(*subject, *rig.Probe) error) error {
	return inRig(func(r *rig.Rig, p *rig.Probe) (err error) {
		s, err := newSubject(ctx, o, r)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		if _, err := s.load(ctx, everything(services, r.Node.IPv4)); err != nil {
			return err
		}
		return f(s, p)
	})
}

// inRig runs f with a rig and a probe, and removes them.
func inRig(f func(*rig.Rig, *rig.Probe) error) (err error) {
	r, err := rig.New(rig.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	p, err := r.NewProbe()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	return f(r, p)
}
