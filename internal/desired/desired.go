// Package desired computes what the agent of this node should program, without programming it. It
// reads the same objects with the same settings, and passes them through the same pipeline and
// tracker.
package desired

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/nodeip"
	"fairlead.io/fairlead/internal/otherproxy"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/kube"
)

// DefaultTimeout is the time to wait for complete lists of all objects.
const DefaultTimeout = 30 * time.Second

// ErrTimeout is wrapped by the error of a reading whose source has not delivered all objects in time.
var ErrTimeout = errors.New("the source has not delivered all objects")

// Source delivers Kubernetes objects.
type Source interface {
	// Run delivers all objects, then changes, until ctx is done. It returns nil if ctx is done.
	Run(ctx context.Context, deliver func(kube.Delta)) error
}

// Options are the options of [Read] and [Follow].
type Options struct {
	// Config holds the settings of `fairlead run`, and Backend the backend of Config.Mode.
	Config  config.Config
	Backend backend.Backend
	// Source delivers the objects. SourceName names it in errors.
	Source     Source
	SourceName string
	// Timeout is how long to wait for the first complete delivery. 0 means [DefaultTimeout].
	Timeout time.Duration
	// Interval, if not 0, makes [Follow] pass on the state periodically, too.
	Interval time.Duration
	Logger   *slog.Logger
}

// State is the desired state of the node. Follow updates it after the function that received it
// has returned.
type State struct {
	// Node describes the node, including whether the rules of other Service proxies exist.
	Node dataplane.Node
	// Services has every Service that the agent would program.
	Services map[dataplane.Key]*dataplane.Service
	// Tracker holds the objects and explains Services. It must not be changed.
	Tracker *kube.Tracker
	// Problems has the problems that the last delivery has caused. In the first State, these are
	// all problems.
	Problems []kube.Problem
	// Objects has the objects of the last delivery. In the first State, these are all objects.
	Objects kube.Delta
	// NodeHealth is the state of the Node object, nil if it is unknown.
	NodeHealth *kube.NodeHealth
	// LoopbackNodePortAddrs, Overlaps and NodePortsWithoutAddress are the last reports of the
	// tracker, see [kube.Result].
	LoopbackNodePortAddrs   []netip.Addr
	Overlaps                []kube.Overlap
	NodePortsWithoutAddress []kube.NodePortsWithoutAddress
	// OtherProxies lists the rules of other Service proxies on this node.
	OtherProxies []otherproxy.Rules
}

// All yields the Services in the order of their keys.
func (s *State) All() iter.Seq[*dataplane.Service] {
	return func(yield func(*dataplane.Service) bool) {
		for _, key := range slices.SortedFunc(maps.Keys(s.Services), dataplane.Key.Compare) {
			if !yield(s.Services[key]) {
				return
			}
		}
	}
}

// Update implements [pipeline.Target].
func (s *State) Update(services map[dataplane.Key]*dataplane.Service) {
	for key, service := range services {
		if service == nil {
			delete(s.Services, key)
			continue
		}
		s.Services[key] = service
	}
}

// record keeps what a Result reports in addition to Services.
func (s *State) record(r kube.Result) {
	s.Problems = r.Problems
	if r.Node != nil {
		s.LoopbackNodePortAddrs, s.Overlaps = r.LoopbackNodePortAddrs, r.Overlaps
	}
	if r.NodeHealth != nil {
		s.NodeHealth = r.NodeHealth
	}
	if len(r.NodePortsWithoutAddress) > 0 {
		s.NodePortsWithoutAddress = r.NodePortsWithoutAddress
	}
}

// SetNode implements [pipeline.Target].
func (s *State) SetNode(node dataplane.Node) { s.Node = node }

// Read returns the desired state once all objects are known.
func Read(ctx context.Context, o Options) (*State, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var state *State
	err := Follow(ctx, o, func(s *State) error {
		state = s
		cancel()
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case state == nil:
		return nil, ctx.Err()
	}
	return state, nil
}

// Follow calls handle with the desired state once all objects are known, and again after each
// change of the objects or of the node's addresses and at each Interval, until ctx is done or handle returns an error. It
// makes one call at a time.
func Follow(ctx context.Context, o Options, handle func(*State) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer stop(nil)
	f := newFollower(o, handle, stop)
	timeout := o.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	timer := time.AfterFunc(timeout, func() {
		stop(fmt.Errorf("%w: %s, within %s", ErrTimeout, o.SourceName, timeout))
	})
	defer timer.Stop()
	f.onSynced = func() bool { return timer.Stop() }
	// The addresses come first, as in the agent, so that the first state includes node ports.
	addressesKnown := make(chan struct{})
	ready := sync.OnceFunc(func() { close(addressesKnown) })
	running.Go(func() {
		err := nodeip.Watch(ctx, nodeip.Options{Logger: o.Logger.With("component", "nodeip")}, func(a nodeip.Addresses) {
			f.setAddresses(ctx, a)
			ready()
		})
		if err != nil {
			stop(err)
		}
	})
	if o.Interval > 0 {
		running.Go(func() { f.repeat(ctx, o.Interval) })
	}
	select {
	case <-ctx.Done():
		return followError(ctx)
	case <-addressesKnown:
	}
	if err := o.Source.Run(ctx, func(d kube.Delta) { f.deliver(ctx, d) }); err != nil {
		return err
	}
	return followError(ctx)
}

// followError returns the cause of the end of ctx, nil if its parent is done.
func followError(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// follower passes objects and addresses through a pipeline.
type follower struct {
	log      *slog.Logger
	handle   func(*State) error
	stop     context.CancelCauseFunc
	onSynced func() bool

	mu       sync.Mutex
	pipeline *pipeline.Pipeline
	state    *State
	synced   bool
}

func newFollower(o Options, handle func(*State) error, stop context.CancelCauseFunc) *follower {
	f := &follower{log: o.Logger, handle: handle, stop: stop, state: &State{Services: map[dataplane.Key]*dataplane.Service{}}}
	f.pipeline = pipeline.NewWithTarget(f.state, o.Backend.TrackerOptions(o.Config.Tracker, o.Config.Values))
	f.state.Tracker = f.pipeline.Tracker()
	return f
}

func (f *follower) setAddresses(ctx context.Context, a nodeip.Addresses) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	f.program(ctx, kube.Delta{}, f.pipeline.TrackAddresses(a))
}

func (f *follower) deliver(ctx context.Context, d kube.Delta) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ctx.Err() != nil || !f.synced && !f.onSynced() { // onSynced reports that the time is not over
		return
	}
	f.synced = true
	f.program(ctx, d, f.pipeline.Track(d))
}

// program updates the state and, once all objects are known, passes it on.
func (f *follower) program(ctx context.Context, objects kube.Delta, result kube.Result) {
	f.state.Objects = objects
	f.state.record(result)
	f.pipeline.Program(result)
	f.pass(ctx)
}

// repeat passes on the state periodically until ctx is done.
func (f *follower) repeat(ctx context.Context, interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		f.mu.Lock()
		f.state.Objects, f.state.Problems = kube.Delta{}, nil
		f.pass(ctx)
		f.mu.Unlock()
	}
}

// pass passes on the state once all objects are known.
func (f *follower) pass(ctx context.Context) {
	if !f.synced || ctx.Err() != nil {
		return
	}
	f.scanOtherProxies(ctx)
	if err := f.handle(f.state); err != nil {
		f.stop(err)
	}
}

// scanOtherProxies reads the rules of other Service proxies, like the agent.
func (f *follower) scanOtherProxies(ctx context.Context) {
	rules, err := otherproxy.Read()
	if err != nil {
		f.log.WarnContext(ctx, "cannot check this node for rules of other Service proxies", "error", err)
	}
	f.state.OtherProxies = rules
	f.pipeline.SetAheadOfOthers(len(rules) > 0)
}
