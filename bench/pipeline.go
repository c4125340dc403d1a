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
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/sync"
)

// pipelineUnderTest is the agent's pipeline in this process: objects go in, the kernel's
// acknowledgement comes out.
type pipelineUnderTest struct {
	testbed  *testbed.Testbed
	dp       dataplane.Dataplane
	pipeline *pipeline.Pipeline
	stop     func() error

	mu         stdsync.Mutex
	commits    int
	last       sync.Commit
	err        error
	commitHook func(sync.Commit)
}

// newPipelineUnderTest opens the backend on the node of the testbed. Nothing is programmed before
// load.
func newPipelineUnderTest(ctx context.Context, o Options, r *testbed.Testbed) (*pipelineUnderTest, error) {
	dp, err := o.openDataplane(r.Node.Fd())
	if err != nil {
		return nil, err
	}
	s := &pipelineUnderTest{testbed: r, dp: dp}
	s.pipeline = pipeline.New(dp, pipeline.Options{OnCommit: s.recordCommit, Tracker: kube.Options{
		NodeName: cluster.NodeName, DetectLocal: kube.DetectLocal{ClusterCIDRs: []netip.Prefix{testbed.ClusterCIDR}},
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
func (s *pipelineUnderTest) close() error { return s.stop() }

func (s *pipelineUnderTest) recordCommit(c sync.Commit) {
	s.mu.Lock()
	s.commits++
	s.last = c
	if c.Err != nil {
		s.err = fmt.Errorf("program the kernel: %w", c.Err)
	}
	for key, err := range c.Failed {
		s.err = fmt.Errorf("program %s: %w", key, err)
	}
	listener := s.commitHook
	s.mu.Unlock()
	if listener != nil {
		listener(c)
	}
}

// setCommitHook has f called with each commit from now on, nil for nobody.
func (s *pipelineUnderTest) setCommitHook(f func(sync.Commit)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitHook = f
}

// apply hands over what a source would.
func (s *pipelineUnderTest) apply(deltas ...kube.Delta) error {
	for _, d := range deltas {
		result := s.pipeline.Track(d)
		if len(result.Problems) > 0 {
			return fmt.Errorf("a Service of the benchmark: %s", result.Problems[0])
		}
		s.pipeline.Program(result)
	}
	return nil
}

// waitSynced waits until all that was delivered is acknowledged by the kernel, and
// returns when that was.
func (s *pipelineUnderTest) waitSynced(ctx context.Context) (time.Time, error) {
	if err := s.pipeline.Syncer.WaitSynced(ctx); err != nil {
		return time.Time{}, fmt.Errorf("wait for the kernel: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.End, s.err
}

// load delivers everything there is and waits until it is programmed. It returns
// when that was.
func (s *pipelineUnderTest) load(ctx context.Context, everything kube.Delta) (time.Time, error) {
	if err := s.apply(everything); err != nil {
		return time.Time{}, err
	}
	s.pipeline.Syncer.FinishInitialList()
	return s.waitSynced(ctx)
}

// newServices returns n Services.
func newServices(n, endpoints int) []*cluster.Service {
	services := make([]*cluster.Service, n)
	for i := range services {
		services[i] = cluster.NewService(i, endpoints)
	}
	return services
}

// initialDelta is the first Delta of a source.
func initialDelta(services []*cluster.Service, node netip.Addr) kube.Delta {
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

// withLoadedTestbed makes a testbed with a probe and a subject that has programmed the Services,
// runs f, and removes it all.
func withLoadedTestbed(ctx context.Context, o Options, services []*cluster.Service, f func(*pipelineUnderTest, *testbed.Probe) error) error {
	return withTestbed(func(r *testbed.Testbed, p *testbed.Probe) (err error) {
		s, err := newPipelineUnderTest(ctx, o, r)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		if _, err := s.load(ctx, initialDelta(services, r.Node.IPv4)); err != nil {
			return err
		}
		return f(s, p)
	})
}

// withTestbed runs f with a testbed and a probe, and removes them.
func withTestbed(f func(*testbed.Testbed, *testbed.Probe) error) (err error) {
	r, err := testbed.New(testbed.Options{})
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
