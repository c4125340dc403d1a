// Package pipeline connects a tracker, a syncer and a dataplane. It takes Kubernetes objects,
// programs the kernel and reports commits. The agent programs nodes with it, and the
// benchmarks measure it. Commands that only read use it without a syncer, see
// [NewWithTarget].
package pipeline

import (
	"iter"
	"log/slog"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nodeip"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/sync"
)

// Options are the options of [New].
type Options struct {
	Tracker kube.Options
	// Logger, OnCommit and ResyncPeriod are options of the syncer; see [sync.Options].
	Logger       *slog.Logger
	OnCommit     func(sync.Commit)
	ResyncPeriod time.Duration
}

// Target receives the desired state of the node: the Node, and each Service that changes,
// nil if it is gone.
type Target interface {
	SetNode(node dataplane.Node)
	Update(services map[dataplane.Key]*dataplane.Service)
}

var _ Target = (*sync.Syncer)(nil)

// Pipeline programs a dataplane from Kubernetes objects. Its methods must not be called
// concurrently.
type Pipeline struct {
	// Syncer programs the dataplane while Syncer.Run runs. Callers must not call its Update
	// and SetNode; Pipeline does. It is nil after NewWithTarget.
	Syncer *sync.Syncer

	tracker *kube.Tracker
	target  Target
	// update passes changed Services to the target.
	update func(map[dataplane.Key]*dataplane.Service)
	// node is the last Node from the tracker, nil before the first. Pipeline adds isAhead to it.
	node    *dataplane.Node
	isAhead bool
}

// New returns a Pipeline that programs dp while its Syncer runs.
func New(dp dataplane.Dataplane, o Options) *Pipeline {
	syncer := sync.New(dp, sync.Options{
		Logger: o.Logger, OnCommit: o.OnCommit, ResyncPeriod: o.ResyncPeriod, Prioritize: kube.IsPriority,
	})
	p := NewWithTarget(syncer, o.Tracker)
	p.Syncer, p.update = syncer, syncer.UpdateInline
	return p
}

// NewWithTarget returns a Pipeline that passes the desired state to target and programs
// nothing.
func NewWithTarget(target Target, o kube.Options) *Pipeline {
	return &Pipeline{tracker: kube.NewTracker(o), target: target, update: target.Update}
}

// Tracker returns the tracker. Callers must not change it.
func (p *Pipeline) Tracker() *kube.Tracker { return p.tracker }

// Track returns the changes that result from the objects of a Delta. The caller must pass the
// Result to Program before it calls Track or Configure again.
func (p *Pipeline) Track(d kube.Delta) kube.Result { return p.tracker.Apply(d) }

// TrackAddresses returns the changes that result from the addresses of this node. The caller
// must pass the Result to Program like a Result of Track.
func (p *Pipeline) TrackAddresses(a nodeip.Addresses) kube.Result {
	return p.tracker.Apply(kube.Delta{LocalAddrs: a.All, VirtualAddrs: a.Virtual, LocalRoutes: a.Routes})
}

// Configure sets the options of the tracker and returns the resulting changes. The caller must
// pass the Result to Program like a Result of Track.
func (p *Pipeline) Configure(o kube.Options) kube.Result { return p.tracker.Configure(o) }

// Services yields the state of all Services and visits each of them.
func (p *Pipeline) Services() iter.Seq[kube.ServiceState] { return p.tracker.All() }

// Program passes a Result to the syncer or target. It programs a small change before it returns,
// see [sync.Syncer.UpdateInline], and does not wait for the kernel otherwise.
func (p *Pipeline) Program(result kube.Result) {
	if result.Node != nil {
		node := *result.Node
		p.node = &node
		p.setNode()
	}
	p.update(result.Changes)
}

// SetAheadOfOthers sets [dataplane.Node.AheadOfOthers] in the current Node and in all later ones.
func (p *Pipeline) SetAheadOfOthers(ahead bool) {
	p.isAhead = ahead
	if p.node != nil {
		p.setNode()
	}
}

// IsAheadOfOthers returns the value of the last SetAheadOfOthers.
func (p *Pipeline) IsAheadOfOthers() bool { return p.isAhead }

func (p *Pipeline) setNode() {
	node := *p.node
	node.AheadOfOthers = p.isAhead
	p.target.SetNode(node)
}
