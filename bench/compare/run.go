package compare

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"fairlead.io/fairlead/bench/cluster"
	"fairlead.io/fairlead/bench/result"
	"fairlead.io/fairlead/bench/statistics"
	"fairlead.io/fairlead/bench/system"
	"fairlead.io/fairlead/bench/testbed"
	"fairlead.io/fairlead/test/controlplane"
)

// comparison is one run.
type comparison struct {
	Options
	report *result.Report
}

// serverPool is what is measured with one number of Services.
type serverPool struct {
	*content
	factory  serverFactory
	bySystem map[string]server // by system
	spare    []server          // those of systems that cannot run here
}

// serverFor returns the API server of a system.
func (s *serverPool) serverFor(ctx context.Context, sys system.System) (server, error) {
	if s.bySystem[sys.Name()] != nil {
		return s.bySystem[sys.Name()], nil
	}
	if n := len(s.spare); n > 0 {
		s.bySystem[sys.Name()], s.spare = s.spare[n-1], s.spare[:n-1]
		return s.bySystem[sys.Name()], nil
	}
	opened, err := s.factory.open(ctx)
	if err != nil {
		return nil, err
	}
	s.bySystem[sys.Name()] = opened
	return opened, nil
}

// release spares the API server of a system that cannot run here.
func (s *serverPool) release(sys system.System) {
	if unused := s.bySystem[sys.Name()]; unused != nil {
		delete(s.bySystem, sys.Name())
		s.spare = append(s.spare, unused)
	}
}

func (s *serverPool) close() error {
	var errs []error
	for _, one := range slices.Concat(s.spare, slices.Collect(maps.Values(s.bySystem))) {
		errs = append(errs, one.close())
	}
	return errors.Join(errs...)
}

// Run measures, and returns what it has found out. A system that cannot run here is
// left out, and the report says why. When ctx is done the report has what was
// measured until then, beside the error.
func Run(ctx context.Context, opts Options) (*result.Report, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	// The API servers are in this process, which must not pause for its own memory.
	const seldom = 400
	defer debug.SetGCPercent(debug.SetGCPercent(seldom))
	if opts.ControlPlane != "" {
		version, err := controlplane.Version(ctx, opts.ControlPlane)
		if err != nil {
			return nil, err
		}
		opts.Environment.APIServer = version
	}
	c := &comparison{Options: opts, report: &result.Report{
		Schema: result.Schema, Time: time.Now(), Environments: []result.Environment{opts.Environment},
	}}
	var err error
	for _, services := range opts.Services {
		if err = c.runWithServices(ctx, services); err != nil {
			break
		}
	}
	c.finish(ctx)
	return c.report, err
}

// runWithServices measures with one number of Services.
func (c *comparison) runWithServices(ctx context.Context, services int) (err error) {
	c.progress("%d Services of %d endpoints", services, c.Endpoints)
	s := &serverPool{content: newContent(services, c.Endpoints), bySystem: map[string]server{}}
	if s.factory, err = c.serverFactory(s.content); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	nodes, err := c.coldStarts(ctx, s)
	defer func() {
		for _, n := range nodes {
			err = errors.Join(err, n.close())
		}
	}()
	if err != nil {
		return err
	}
	if c.includes(Update) {
		if err := c.updates(ctx, nodes, services); err != nil {
			return err
		}
	}
	if c.includes(Churn) {
		for _, rate := range c.Rates {
			if err := c.churn(ctx, nodes, services, rate); err != nil {
				return err
			}
		}
	}
	return nil
}

// rotated returns the list with another one first each time.
func rotated[T any](list []T, by int) []T {
	if len(list) == 0 {
		return nil
	}
	by %= len(list)
	return slices.Concat(list[by:], list[:by])
}

// coldStarts starts each system several times on new nodes, and returns those of the last time.
func (c *comparison) coldStarts(ctx context.Context, s *serverPool) (nodes []*node, err error) {
	starts := 1
	if c.includes(ColdStart) || c.includes(Memory) {
		starts = c.Starts
	}
	for i := range starts {
		for _, sys := range rotated(c.Systems, i) {
			if c.isLeftOut(sys) {
				continue
			}
			server, err := s.serverFor(ctx, sys)
			if ctx.Err() != nil {
				return nodes, context.Cause(ctx)
			}
			if err != nil {
				return nodes, err
			}
			n, err := c.coldStart(ctx, sys, server, s.content)
			if ctx.Err() != nil {
				return nodes, errors.Join(context.Cause(ctx), closeNode(n))
			}
			if err != nil {
				if err := c.leaveOut(sys, err); err != nil {
					return nodes, errors.Join(err, closeNode(n))
				}
				_ = closeNode(n) // it is known already that it does not run
				s.release(sys)
				continue
			}
			if i < starts-1 {
				if err := n.close(); err != nil {
					return nodes, err
				}
				continue
			}
			nodes = append(nodes, n)
		}
	}
	// In the order that was asked for.
	slices.SortFunc(nodes, func(a, b *node) int {
		index := func(n *node) int {
			return slices.IndexFunc(c.Systems, func(s system.System) bool { return s.Name() == n.sys.Name() })
		}
		return cmp.Compare(index(a), index(b))
	})
	return nodes, nil
}

func closeNode(n *node) error {
	if n == nil {
		return nil
	}
	return n.close()
}

// coldStart is one cold start.
func (c *comparison) coldStart(ctx context.Context, sys system.System, s server, content *content) (*node, error) {
	dir := filepath.Join(c.Dir, sys.Name())
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("make a folder for logs: %w", err)
	}
	n, err := newNode(ctx, sys, dir, s, content)
	if err != nil {
		return nil, err
	}
	if err := n.testbed.SetBackgroundReachable(true); err != nil {
		return n, err
	}
	if err := n.start(ctx); err != nil {
		return n, err
	}
	running, cancel := n.contextWhileRunning(ctx)
	defer cancel()
	answering, stop := context.WithTimeout(running, c.StartLimit)
	defer stop()
	took, err := n.probe.WaitAllAnswer(answering, n.startedAt, content.addrs)
	if errors.Is(err, testbed.ErrNotObserved) || errors.Is(err, context.DeadlineExceeded) {
		return n, fmt.Errorf("with %d Services not all of them answered within %s", len(content.services), c.StartLimit)
	}
	if err != nil {
		return n, errors.Join(err, context.Cause(running))
	}
	if err := n.waitIdle(running); err != nil {
		return n, err
	}
	n.settledAt = time.Now()
	use, err := n.usage()
	if err != nil {
		return n, err
	}
	c.progress("%s: the last Service answers after %s; %s of processor time, %d MB resident",
		sys.Name(), took.Round(time.Millisecond), use.CPU(), use.Resident/1e6)
	scenario := result.Scenario{Services: len(content.services), Endpoints: c.Endpoints}
	if c.includes(ColdStart) {
		c.addSample(n, result.ColdStartAnswer, scenario, "s", took.Seconds())
		c.addSample(n, result.ColdStartCPU, scenario, "s", use.CPU().Seconds())
	}
	if c.includes(Memory) {
		c.addSample(n, result.Memory, scenario, "B", float64(use.Resident))
		c.addSample(n, result.PeakMemory, scenario, "B", float64(use.PeakResident))
	}
	return n, n.testbed.SetBackgroundReachable(false)
}

// addSample adds a sample to a measurement.
func (c *comparison) addSample(n *node, measure result.Measure, scenario result.Scenario, unit string, v float64) {
	m := c.measurement(n.sys.Name(), measure, scenario)
	m.Unit = unit
	m.Samples = append(m.Samples, v)
}

// measurement returns the measurement, a new one if there is none.
func (c *comparison) measurement(sys string, measure result.Measure, scenario result.Scenario) *result.Measurement {
	if m := c.report.Find(measure, sys, c.Environment.Name, scenario); m != nil {
		return m
	}
	c.report.Measurements = append(c.report.Measurements, result.Measurement{
		Measure: measure, System: sys, Environment: c.Environment.Name, Scenario: scenario,
	})
	return &c.report.Measurements[len(c.report.Measurements)-1]
}

func (c *comparison) isLeftOut(sys system.System) bool {
	return slices.ContainsFunc(c.report.LeftOut, func(l result.LeftOut) bool { return l.System == sys.Name() && l.Measure == "" })
}

// release records that a system does not run here. The error is that something
// else is wrong.
func (c *comparison) leaveOut(sys system.System, err error) error {
	reason := err.Error()
	if e, ok := errors.AsType[*system.UnavailableError](err); ok {
		reason = e.Reason
	}
	c.progress("%s is left out: %s", sys.Name(), reason)
	c.report.LeftOut = append(c.report.LeftOut, result.LeftOut{System: sys.Name(), Environment: c.Environment.Name, Reason: reason})
	if len(c.report.LeftOut) >= len(c.Systems) {
		return errors.New("no system can run here")
	}
	return nil
}

// finish sums up.
func (c *comparison) finish(ctx context.Context) {
	r := c.report
	for i := range r.Measurements {
		m := &r.Measurements[i]
		m.Distribution = statistics.Summarize(m.Samples)
	}
	env := system.Environment{Kubeconfig: "KUBECONFIG", NodeName: cluster.NodeName, ClusterCIDR: testbed.ClusterCIDR}
	for _, s := range c.Systems {
		about := result.System{Name: s.Name()}
		if with, ok := s.(interface {
			Command(env system.Environment) []string
		}); ok {
			about.Command = with.Command(env)
		}
		if with, ok := s.(interface {
			Version(ctx context.Context) (string, error)
		}); ok {
			about.Version, _ = with.Version(context.WithoutCancel(ctx)) // a system that is not there has none
		}
		r.Systems = append(r.Systems, about)
	}
	r.Ratios = ratios(r.Measurements)
	r.TookSeconds = time.Since(r.Time).Seconds()
	for i := range r.Measurements {
		if m := &r.Measurements[i]; len(m.Samples) > result.MaxSamples {
			m.Samples = nil
		}
	}
}
