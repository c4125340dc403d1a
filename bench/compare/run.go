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

// comparison is one run of Run.
type comparison struct {
	Options
	report *result.Report
	// flowOffload is a system with flow offload, nil until [comparison.established] has started it.
	flowOffload system.System
}

// serverPool holds the API servers for one number of Services.
type serverPool struct {
	*content
	factory  serverFactory
	bySystem map[string]server // by name of the system
	spare    []server          // released servers of systems that cannot run here
}

// serverFor returns the API server of a system. It reuses a released server or opens a new one.
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

// release makes the API server of a system that cannot run here available to other systems.
func (s *serverPool) release(sys system.System) {
	if unused := s.bySystem[sys.Name()]; unused != nil {
		delete(s.bySystem, sys.Name())
		s.spare = append(s.spare, unused)
	}
}

func (s *serverPool) close() error {
	var errs []error
	for _, api := range slices.Concat(s.spare, slices.Collect(maps.Values(s.bySystem))) {
		errs = append(errs, api.close())
	}
	return errors.Join(errs...)
}

// Run compares systems and returns the report. Systems that cannot run here are left out, with the
// reason in the report. If ctx is done, Run returns the measurements taken so far together with
// the error.
func Run(ctx context.Context, opts Options) (*result.Report, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	// The API servers run in this process, so garbage collection must be rare.
	const gcPercent = 400
	defer debug.SetGCPercent(debug.SetGCPercent(gcPercent))
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

// runWithServices runs all parts with one number of Services.
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
	if c.includes(DataPath) {
		if err := c.dataPath(ctx, nodes, s.content); err != nil {
			return err
		}
	}
	if c.includes(Established) {
		return c.established(ctx, nodes, s)
	}
	return nil
}

// rotated returns list rotated to the left by the given number of elements.
func rotated[T any](list []T, by int) []T {
	if len(list) == 0 {
		return nil
	}
	by %= len(list)
	return slices.Concat(list[by:], list[:by])
}

// coldStarts starts each system several times, each time on a new node, and returns the nodes of
// the last starts.
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
				_ = closeNode(n) // the report has the reason already
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
	// Return the nodes in the order of the options.
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

// coldStart starts a system on a new node and measures the start.
func (c *comparison) coldStart(ctx context.Context, sys system.System, s server, content *content) (*node, error) {
	n, took, use, err := c.startNode(ctx, sys, s, content)
	if err != nil {
		return n, err
	}
	scenario := result.Scenario{Services: len(content.services), Endpoints: c.Endpoints}
	if c.includes(ColdStart) {
		c.addSample(n, result.ColdStartAnswer, scenario, "s", took.Seconds())
		c.addSample(n, result.ColdStartCPU, scenario, "s", use.CPU().Seconds())
	}
	if c.includes(Memory) {
		c.addSample(n, result.Memory, scenario, "B", float64(use.Resident))
		c.addSample(n, result.PeakMemory, scenario, "B", float64(use.PeakResident))
	}
	return n, nil
}

// startNode starts a system on a new node. It returns the time until all Services answered, and what the
// system used until it was idle. After an error, the caller must close the node unless it is nil.
func (c *comparison) startNode(ctx context.Context, sys system.System, s server, content *content) (_ *node, took time.Duration, use system.Usage, err error) {
	dir := filepath.Join(c.Dir, sys.Name())
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, 0, use, fmt.Errorf("create the directory for logs: %w", err)
	}
	n, err := newNode(ctx, sys, dir, s, content, c.ProbeInterval)
	if err != nil {
		return nil, 0, use, err
	}
	if err := n.testbed.SetBackgroundReachable(true); err != nil {
		return n, 0, use, err
	}
	if err := n.start(ctx); err != nil {
		return n, 0, use, err
	}
	running, cancel := n.contextWhileRunning(ctx)
	defer cancel()
	answering, stop := context.WithTimeout(running, c.StartLimit)
	defer stop()
	took, err = n.probe.WaitAllAnswer(answering, n.startedAt, content.addrs)
	if errors.Is(err, testbed.ErrNotObserved) || errors.Is(err, context.DeadlineExceeded) {
		return n, 0, use, fmt.Errorf("not all of %d Services answered within %s", len(content.services), c.StartLimit)
	}
	if err != nil {
		return n, 0, use, errors.Join(err, context.Cause(running))
	}
	if err := n.waitIdle(running); err != nil {
		return n, 0, use, err
	}
	n.settledAt = time.Now()
	use, err = n.usage()
	if err != nil {
		return n, 0, use, err
	}
	c.progress("%s: the last Service answers after %s; %s of processor time, %d MB resident",
		sys.Name(), took.Round(time.Millisecond), use.CPU(), use.Resident/1e6)
	return n, took, use, n.testbed.SetBackgroundReachable(false)
}

// addSample adds a sample to a measurement.
func (c *comparison) addSample(n *node, measure result.Measure, scenario result.Scenario, unit string, v float64) {
	m := c.measurement(n.sys.Name(), measure, scenario)
	m.Unit = unit
	m.Samples = append(m.Samples, v)
}

// measurement returns the measurement with the given key, and creates it if necessary.
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

// leaveOut records that a system cannot run here. It returns an error if no system is left.
func (c *comparison) leaveOut(sys system.System, err error) error {
	reason := err.Error()
	if e, ok := errors.AsType[*system.UnavailableError](err); ok {
		reason = e.Reason
	}
	c.progress("%s is left out: %s", sys.Name(), reason)
	c.report.LeftOut = append(c.report.LeftOut, result.LeftOut{System: sys.Name(), Environment: c.Environment.Name, Reason: reason})
	if !slices.ContainsFunc(c.Systems, func(sys system.System) bool { return !c.isLeftOut(sys) }) {
		return errors.New("no system can run here")
	}
	return nil
}

// finish computes distributions and ratios and describes the systems.
func (c *comparison) finish(ctx context.Context) {
	r := c.report
	for i := range r.Measurements {
		m := &r.Measurements[i]
		m.Distribution = statistics.Summarize(m.Samples)
	}
	env := system.Environment{Kubeconfig: "KUBECONFIG", NodeName: cluster.NodeName, ClusterCIDR: testbed.ClusterCIDR}
	systems := slices.Clone(c.Systems)
	if c.flowOffload != nil {
		systems = append(systems, c.flowOffload)
	}
	for _, s := range systems {
		described := result.System{Name: s.Name()}
		if describer, ok := s.(interface {
			Command(env system.Environment) []string
		}); ok {
			described.Command = describer.Command(env)
		}
		if describer, ok := s.(interface {
			Version(ctx context.Context) (string, error)
		}); ok {
			described.Version, _ = describer.Version(context.WithoutCancel(ctx)) // empty for a missing program
		}
		r.Systems = append(r.Systems, described)
	}
	r.Ratios = ratios(r.Measurements)
	r.TookSeconds = time.Since(r.Time).Seconds()
	for i := range r.Measurements {
		if m := &r.Measurements[i]; len(m.Samples) > result.MaxSamples {
			m.Samples = nil
		}
	}
}
