package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/internal/conntrack"
	"fairlead.io/fairlead/internal/health"
	"fairlead.io/fairlead/internal/history"
	"fairlead.io/fairlead/internal/metrics"
	"fairlead.io/fairlead/internal/nodeip"
	"fairlead.io/fairlead/internal/nodesettings"
	"fairlead.io/fairlead/internal/pipeline"
	"fairlead.io/fairlead/internal/relay"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/kube/kubetest"
	"fairlead.io/fairlead/sync"
)

// components holds the components of an agent that process objects and commits.
type components struct {
	*dispatcher
	*nodeState
	*progress

	log     *slog.Logger
	commits observers[sync.Commit]
}

// sliceOf returns a slice of objects whose type this package must not import.
func sliceOf[T any](objects ...T) []T { return objects }

// newComponents returns components that are not running.
func newComponents(log *slog.Logger) *components {
	options := kube.Options{NodeName: "node"}
	p := pipeline.New(fake.New(fake.Options{}), pipeline.Options{Tracker: options})
	status := p.Syncer.Status
	state := &nodeState{log: log, sourceHasNodes: true, name: options.NodeName}
	comp := &components{log: log, nodeState: state, progress: newProgress(status), dispatcher: &dispatcher{
		log: log, pipeline: p, conntrack: conntrack.New(conntrack.Options{}), relay: relay.New(relay.Options{}),
		healthChecks: health.NewPorts(health.PortsOptions{}), metrics: metrics.New(metrics.Options{Status: status}), history: history.New(),
		nodeSettings: nodesettings.New(nodesettings.Options{}), events: NoEvents{}, nodeState: state,
	}}
	comp.commits.add(comp.metrics.OnCommit)
	comp.commits.add(comp.conntrack.OnCommit)
	comp.commits.add(comp.relay.OnCommit)
	comp.commits.add(comp.onCommit)
	return comp
}

// TestMissingNode checks that a missing Node object is logged once, that its appearance is logged,
// and that the node is not eligible for load balancers in between.
func TestMissingNode(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	comp := newComponents(slog.New(slog.NewTextHandler(&log, nil)))
	node := kubetest.Node("node")
	steps := []struct {
		name     string
		delta    kube.Delta
		want     string // in the log
		eligible bool
	}{
		{"missing at first", kube.Delta{}, `level=WARN msg="Node object not found; if this persists, check --hostname-override" node=node`, false},
		{"still missing", kube.Delta{}, "", false},
		{"added", kube.Delta{Node: node}, `level=INFO msg="Node object found" node=node`, true},
		{"updated", kube.Delta{Node: node}, "", true},
		{"deleted", kube.Delta{NodeDeleted: true}, "level=WARN", false},
		{"added again", kube.Delta{Node: node}, "level=INFO", true},
	}
	for _, step := range steps {
		log.Reset()
		comp.deliver(step.delta)
		got := log.String()
		if !strings.Contains(got, step.want) || (step.want == "") != (got == "") || strings.Count(got, "\n") > 1 {
			t.Errorf("%s: log %q, want %q", step.name, got, step.want)
		}
		if comp.eligible() != step.eligible {
			t.Errorf("%s: eligible: %t, want %t", step.name, !step.eligible, step.eligible)
		}
	}
}

// TestUnknownNode checks that the node is eligible and nothing is logged while the source cannot
// determine whether the Node exists.
func TestUnknownNode(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	comp := newComponents(slog.New(slog.NewTextHandler(&log, nil)))
	comp.deliver(kube.Delta{NodeUnknown: true})
	if log.Len() > 0 || !comp.eligible() {
		t.Errorf("log %q, eligible: %t", &log, comp.eligible())
	}
	comp.deliver(kube.Delta{NodeDeleted: true})
	if !strings.Contains(log.String(), "Node object not found") || comp.eligible() {
		t.Errorf("log %q, eligible: %t", &log, comp.eligible())
	}
}

// TestNodeExists checks that nothing is logged if the Node exists from the start.
func TestNodeExists(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	comp := newComponents(slog.New(slog.NewTextHandler(&log, nil)))
	if comp.eligible() {
		t.Error("eligible before the first Delta")
	}
	comp.deliver(kube.Delta{Node: kubetest.Node("node")})
	if log.Len() > 0 || !comp.eligible() {
		t.Errorf("log %q, eligible: %t", &log, comp.eligible())
	}
}

// TestProgress checks that a failing dataplane counts as being behind since the first failure, even
// without pending changes.
func TestProgress(t *testing.T) {
	t.Parallel()
	comp := newComponents(slog.New(slog.DiscardHandler))
	at := func(minute int) time.Time { return time.Date(2026, 1, 1, 0, minute, 0, 0, time.UTC) }
	// Before the first call, pending changes do not count, because the initial list may take long.
	comp.pipeline.Syncer.Update(map[dataplane.Key]*dataplane.Service{{Name: "x"}: nil})
	if got := comp.healthProgress().WaitingSince; !got.IsZero() {
		t.Errorf("before the first call: WaitingSince %s, want zero", got)
	}
	comp = newComponents(comp.log)
	steps := []struct {
		commit sync.Commit
		want   time.Time
	}{
		{sync.Commit{Start: at(0), End: at(1), Err: errors.New("no")}, at(0)},
		{sync.Commit{Start: at(0), End: at(1), Err: errors.New("no")}, at(0)},
		{sync.Commit{Start: at(0), End: at(1)}, time.Time{}},
		{sync.Commit{Start: at(2), End: at(3), Err: errors.New("no")}, at(2)},
		{sync.Commit{Start: at(4), End: at(5), Err: errors.New("no")}, at(2)},
		{sync.Commit{Start: at(6), End: at(7)}, time.Time{}},
		{sync.Commit{Start: at(8), End: at(9), Err: errors.New("no")}, at(8)},
	}
	for i, step := range steps {
		comp.commits.notify(step.commit)
		if got := comp.healthProgress().WaitingSince; !got.Equal(step.want) {
			t.Errorf("step %d: WaitingSince %s, want %s", i, got, step.want)
		}
	}
	// After a successful call, pending changes count as well.
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- comp.pipeline.Syncer.Run(ctx) }()
	comp.pipeline.Syncer.FinishInitialList()
	if err := comp.pipeline.Syncer.WaitSynced(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	comp.pipeline.Syncer.Update(map[dataplane.Key]*dataplane.Service{{Name: "x"}: nil})
	comp.commits.notify(sync.Commit{})
	if got := comp.healthProgress().WaitingSince; got.Before(before) {
		t.Errorf("WaitingSince %s, want the time of the last change", got)
	}
}

// TestNetworkProgrammingLatency checks that the metric counts annotated changes of EndpointSlices
// that happened while the agent was running, and no others.
func TestNetworkProgrammingLatency(t *testing.T) {
	t.Parallel()
	comp := newComponents(slog.New(slog.DiscardHandler))
	start := time.Now()
	endpoint := func(address string, changed time.Time) kube.Delta {
		return kube.Delta{EndpointSlices: sliceOf(kubetest.EndpointSlice("shop", "web", netip.MustParseAddr(address), changed))}
	}
	first := endpoint("10.244.0.1", time.Now())
	first.Services = sliceOf(kubetest.Service("shop", "web", netip.MustParseAddr("10.96.0.10")))
	key := dataplane.Key{Namespace: "shop", Name: "web", Family: dataplane.IPv4}
	commit := func() {
		svc, err := dataplane.NewService(key, []dataplane.Frontend{{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort("10.96.0.10:80")}}, dataplane.ServiceSpec{})
		if err != nil {
			t.Fatal(err)
		}
		comp.commits.notify(sync.Commit{Start: time.Now(), End: time.Now(), Changes: []dataplane.Change{{New: svc}}})
	}
	steps := []struct {
		name  string
		delta kube.Delta
		want  int
	}{
		{"initial list", first, 0},
		{"change", endpoint("10.244.0.2", time.Now()), 1},
		{"no change of endpoints", endpoint("10.244.0.2", time.Now()), 1},
		{"change before the start", endpoint("10.244.0.3", start.Add(-time.Hour)), 1},
		{"another change", endpoint("10.244.0.4", time.Now()), 2},
	}
	for _, step := range steps {
		comp.deliver(step.delta)
		commit()
		response := httptest.NewRecorder()
		comp.metrics.Handler().ServeHTTP(response, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
		want := fmt.Sprintf("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} %d\n", step.want)
		if !strings.Contains(response.Body.String(), want) {
			t.Errorf("%s: no line %q", step.name, want)
		}
	}
}

// TestNodePortsWithoutAddress checks that node ports of a family without node addresses are logged
// once, and again after an address was added and removed.
func TestNodePortsWithoutAddress(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	comp := newComponents(slog.New(slog.NewTextHandler(&log, nil)))
	comp.sourceHasNodes = false
	web := kubetest.Service("shop", "web", netip.MustParseAddr("10.96.0.10"))
	web.Spec.Ports[0].NodePort = 30080
	webNodePort := web.DeepCopy()
	webNodePort.Spec.Type = "NodePort"
	comp.setAddresses(nodeip.Addresses{All: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
	steps := []struct {
		name  string
		delta kube.Delta
		want  bool
	}{
		{"no node port", kube.Delta{Services: sliceOf(web), Node: kubetest.Node("node", "203.0.113.1")}, false},
		{"node port and an address without interface", kube.Delta{Services: sliceOf(webNodePort)}, true},
		{"no change", kube.Delta{}, false},
		{"address of the other family", kube.Delta{Node: kubetest.Node("node", "2001:db8::1")}, false},
		{"address added", kube.Delta{Node: kubetest.Node("node", "192.0.2.1")}, false},
		{"address removed", kube.Delta{Node: kubetest.Node("node", "203.0.113.1")}, true},
		{"node port removed", kube.Delta{Services: sliceOf(web)}, false},
		{"address added without node ports", kube.Delta{Node: kubetest.Node("node", "192.0.2.1")}, false},
		{"address removed without node ports", kube.Delta{Node: kubetest.Node("node", "203.0.113.1")}, false},
	}
	for _, step := range steps {
		log.Reset()
		comp.deliver(step.delta)
		if got := log.String(); (strings.Count(got, "node ports are not served") == 1 && strings.Contains(got, "ip_family=IPv4")) != step.want || !step.want && got != "" {
			t.Errorf("%s: log %q, want a warning: %t", step.name, got, step.want)
		}
	}
}
