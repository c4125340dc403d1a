// Package pipeline joins a tracker, a syncer and a dataplane: objects go in, the kernel's
// acknowledgement comes out. The agent programs the node with it, and the benchmarks
// measure it.
package pipeline

import (
	"log/slog"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/sync"
)

// Options describe a [Pipeline].
type Options struct {
	Tracker kube.Options
	// Logger, OnCommit and ResyncPeriod are those of [sync.Options].
	Logger       *slog.Logger
	OnCommit     func(sync.Commit)
	ResyncPeriod time.Duration
}

// Pipeline turns objects into the state of a dataplane. Its methods must not be called at
// the same time.
type Pipeline struct {
	// Syncer programs the dataplane while its Run runs. Only [Pipeline.Program] calls its
	// Update and SetNode.
	Syncer *sync.Syncer

	tracker *kube.Tracker
	// node is what the tracker last returned, nil before it did. isAhead goes with it.
	node    *dataplane.Node
	isAhead bool
}

// New returns a Pipeline that programs dp once its Syncer runs.
func New(dp dataplane.Dataplane, o Options) *Pipeline {
	return &Pipeline{
		Syncer: sync.New(dp, sync.Options{
			Logger: o.Logger, OnCommit: o.OnCommit, ResyncPeriod: o.ResyncPeriod, Prioritize: kube.IsPriority,
		}),
		tracker: kube.NewTracker(o.Tracker),
	}
}

// Track returns the changes that follow from the objects of a Delta. The caller hands the Result to
// Program, before the next call of Track or Configure.
func (p *Pipeline) Track(d kube.Delta) kube.Result { return p.tracker.Apply(d) }

// Configure returns the changes that follow from other options of the tracker.
func (p *Pipeline) Configure(o kube.Options) kube.Result { return p.tracker.Configure(o) }

// Program hands a Result to the syncer. It does not wait for the kernel.
func (p *Pipeline) Program(result kube.Result) {
	if result.Node != nil {
		node := *result.Node
		p.node = &node
		p.setNode()
	}
	p.Syncer.Update(result.Changes)
}

// SetAheadOfOthers sets [dataplane.Node.AheadOfOthers], now and for each Node that follows.
func (p *Pipeline) SetAheadOfOthers(ahead bool) {
	p.isAhead = ahead
	if p.node != nil {
		p.setNode()
	}
}

// IsAheadOfOthers returns what SetAheadOfOthers has set.
func (p *Pipeline) IsAheadOfOthers() bool { return p.isAhead }

func (p *Pipeline) setNode() {
	node := *p.node
	node.AheadOfOthers = p.isAhead
	p.Syncer.SetNode(node)
}
