package pipeline_test

import (
	"context"
	"iter"
	"maps"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/kube/kubetest"
)

// recorder is a Dataplane that records the Nodes of all calls to Replace and the Services of
// the last one.
type recorder struct {
	*fake.Dataplane

	nodes    []dataplane.Node
	services []dataplane.Key
	inline   atomic.Bool // a call of Apply came from UpdateInline
}

// Apply implements dataplane.Dataplane.
func (r *recorder) Apply(ctx context.Context, changes []dataplane.Change) error {
	if strings.Contains(string(debug.Stack()), ".UpdateInline(") {
		r.inline.Store(true)
	}
	return r.Dataplane.Apply(ctx, changes)
}

// Replace implements dataplane.Dataplane.
func (r *recorder) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	r.nodes = append(r.nodes, node)
	r.services = nil
	for s := range services {
		r.services = append(r.services, s.Key)
	}
	return r.Dataplane.Replace(ctx, node, services, progress)
}

// TestPipeline checks that objects reach the dataplane, priority Services first, and that
// SetAheadOfOthers applies to earlier and later Nodes.
func TestPipeline(t *testing.T) {
	t.Parallel()
	dp := &recorder{Dataplane: fake.New(fake.Options{})}
	p := pipeline.New(dp, pipeline.Options{Tracker: kube.Options{NodeName: "node"}})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	wait := func() {
		t.Helper()
		if err := p.Syncer.WaitSynced(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	p.SetAheadOfOthers(true) // before the first Node
	everything := kube.Delta{LocalAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Node: kubetest.Node("node", "192.0.2.1")}
	everything.Services = append(everything.Services,
		kubetest.Service("default", "web", netip.MustParseAddr("10.96.0.11")),
		kubetest.Service("kube-system", "dns", netip.MustParseAddr("10.96.0.10")))
	p.Program(p.Track(everything))
	p.Syncer.FinishInitialList()
	go func() { ended <- p.Syncer.Run(ctx) }()
	wait()
	states := map[string]int{}
	for s := range p.Services() {
		states[s.Name.String()] = len(s.Ports)
	}
	if want := map[string]int{"default/web": 1, "kube-system/dns": 1}; !maps.Equal(states, want) {
		t.Errorf("Services with the number of their ports: %v, want %v", states, want)
	}
	wait()
	var added, removed kube.Delta
	added.Services = append(added.Services, kubetest.Service("default", "other", netip.MustParseAddr("10.96.0.12")))
	inline := false
	for attempts := 0; !inline && attempts < 100; attempts++ { // the Syncer may not be idle yet
		p.Program(p.Track(added))
		wait()
		inline = dp.inline.Load()
		removed.DeletedServices = nil
		for s := range p.Services() {
			if s.Name.Name == "other" {
				removed.DeletedServices = append(removed.DeletedServices, s.Name)
			}
		}
		p.Program(p.Track(removed))
		wait()
	}
	if !inline {
		t.Error("Program has never made the call for a single change itself")
	}
	p.SetAheadOfOthers(false)
	wait()
	p.Program(p.Configure(kube.Options{DetectLocal: kube.DetectLocal{ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}}))
	wait()
	p.SetAheadOfOthers(true)
	wait()
	stop()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	var ahead []bool
	for _, node := range dp.nodes {
		ahead = append(ahead, node.AheadOfOthers)
	}
	if want := []bool{true, false, false, true}; !slices.Equal(ahead, want) || !p.IsAheadOfOthers() {
		t.Errorf("AheadOfOthers of the Nodes: %v, want %v", ahead, want)
	}
	if want := []string{"kube-system/dns", "default/web"}; len(dp.services) != len(want) || dp.services[0].Service() != want[0] || dp.services[1].Service() != want[1] {
		t.Errorf("programmed Services %v, want %v", dp.services, want)
	}
}
