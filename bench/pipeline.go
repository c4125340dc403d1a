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

// pipelineUnderTest runs the agent's pipeline in this process: it takes Kubernetes objects and
// reports the kernel's acknowledgements.
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

// newPipelineUnderTest opens the backend on the node of the testbed and starts the pipeline. The
// pipeline programs nothing before FinishInitialList, which load calls.
func newPipelineUnderTest(ctx context.Context, o Options, r *testbed.Testbed) (*pipelineUnderTest, error) {
	dp, err := o.openDataplane(r.Node.Fd()) //nolint:contextcheck // Close ends its goroutines
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

// close stops the pipeline. The kernel keeps its state.
func (s *pipelineUnderTest) close() error { return s.stop() }

// recordCommit keeps the result of a commit and calls the commit hook.
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
	hook := s.commitHook
	s.mu.Unlock()
	if hook != nil {
		hook(c)
	}
}

// setCommitHook makes the pipeline call f with each later commit. A nil f removes the hook.
func (s *pipelineUnderTest) setCommitHook(f func(sync.Commit)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitHook = f
}

// apply passes deltas to the pipeline, as a source does.
func (s *pipelineUnderTest) apply(deltas ...kube.Delta) error {
	for _, d := range deltas {
		result := s.pipeline.Track(d)
		if len(result.Problems) > 0 {
			return fmt.Errorf("track a Service of the benchmark: %s", result.Problems[0])
		}
		s.pipeline.Program(result)
	}
	return nil
}

// waitSynced waits until the kernel has acknowledged all applied deltas, and returns the time of
// the last acknowledgement.
func (s *pipelineUnderTest) waitSynced(ctx context.Context) (time.Time, error) {
	if err := s.pipeline.Syncer.WaitSynced(ctx); err != nil {
		return time.Time{}, fmt.Errorf("wait until the kernel acknowledges: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.End, s.err
}

// load applies the initial Delta and waits until it is programmed. It returns the time of the last
// acknowledgement.
func (s *pipelineUnderTest) load(ctx context.Context, initial kube.Delta) (time.Time, error) {
	if err := s.apply(initial); err != nil {
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

// initialDelta returns the Delta that a source delivers first.
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

// withLoadedTestbed calls f with a probe, and a pipeline that has programmed the Services on a new
// testbed. It removes everything afterwards.
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

// withTestbed calls f with a new testbed and a probe, and removes them afterwards.
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
