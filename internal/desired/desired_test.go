package desired_test

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/backend"
	"fairlead.io/fairlead/internal/config"
	"fairlead.io/fairlead/internal/desired"
	"fairlead.io/fairlead/kube"
	"fairlead.io/fairlead/kube/kubetest"
)

// source delivers Deltas and then waits, or fails.
type source struct {
	deltas []kube.Delta
	err    error
}

// Run implements [desired.Source].
func (s source) Run(ctx context.Context, deliver func(kube.Delta)) error {
	for _, d := range s.deltas {
		deliver(d)
	}
	if s.err == nil {
		<-ctx.Done()
	}
	return s.err
}

func options(t *testing.T, s source, timeout time.Duration) desired.Options {
	t.Helper()
	b, err := backend.ByName(backend.NFT)
	if err != nil {
		t.Fatal(err)
	}
	c := config.Config{Tracker: kube.Options{NodeName: "node"}}
	return desired.Options{Config: c, Backend: b, Source: s, SourceName: "test", Timeout: timeout, Logger: slog.New(slog.DiscardHandler)}
}

// clusterDelta has two Services, of which one has an endpoint and one cannot be programmed, and the Node.
func clusterDelta() kube.Delta {
	d := kube.Delta{Node: kubetest.Node("node", "192.0.2.1")}
	broken := kubetest.Service("default", "broken", netip.MustParseAddr("10.96.0.12"))
	broken.Spec.Ports[0].Protocol = "TPC"
	d.Services = append(d.Services, kubetest.Service("default", "web", netip.MustParseAddr("10.96.0.11")), broken)
	d.EndpointSlices = append(d.EndpointSlices, kubetest.EndpointSlice("default", "web", netip.MustParseAddr("10.244.0.1"), time.Time{}))
	return d
}

func TestRead(t *testing.T) {
	t.Parallel()
	state, err := desired.Read(t.Context(), options(t, source{deltas: []kube.Delta{clusterDelta()}}, 0))
	if err != nil {
		t.Fatal(err)
	}
	var services []*dataplane.Service
	for s := range state.All() {
		services = append(services, s)
	}
	if len(services) != 1 || services[0].Key.Name != "web" || len(services[0].Endpoints) != 1 {
		t.Errorf("Services %v, want default/web with one endpoint", services)
	}
	if len(state.Problems) != 1 || state.Problems[0].Service.Name != "broken" {
		t.Errorf("problems %v, want one of default/broken", state.Problems)
	}
	if state.NodeHealth == nil || !state.NodeHealth.Exists || state.Tracker == nil || len(state.Objects.Services) != 2 {
		t.Errorf("state %+v lacks the Node, the tracker or the objects", state)
	}
}

func TestReadErrors(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	for _, test := range []struct {
		name    string
		source  source
		timeout time.Duration
		want    error
	}{
		{"the source delivers nothing", source{}, 20 * time.Millisecond, desired.ErrTimeout},
		{"the source fails", source{err: broken}, 0, broken},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if state, err := desired.Read(t.Context(), options(t, test.source, test.timeout)); !errors.Is(err, test.want) || state != nil {
				t.Errorf("state %v, error %v, want %v", state, err, test.want)
			}
		})
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if state, err := desired.Read(canceled, options(t, source{}, 0)); !errors.Is(err, context.Canceled) || state != nil {
		t.Errorf("state %v, error %v, want %v", state, err, context.Canceled)
	}
}

// TestFollow checks that later deliveries change the state, and that an error of the function ends it.
func TestFollow(t *testing.T) {
	t.Parallel()
	removal := kube.Delta{}
	removal.DeletedServices = appendName(removal.DeletedServices, "default", "web")
	var counts []int
	stop := errors.New("stop")
	err := desired.Follow(t.Context(), options(t, source{deltas: []kube.Delta{clusterDelta(), removal, {}}}, 0), func(s *desired.State) error {
		if counts = append(counts, len(s.Services)); len(counts) == 2 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || len(counts) != 2 || counts[0] != 1 || counts[1] != 0 {
		t.Errorf("numbers of Services %v, error %v; want 1, 0 and the error of the function", counts, err)
	}
}

// appendName appends a types.NamespacedName, which this package may not import.
func appendName[T ~struct{ Namespace, Name string }](names []T, namespace, name string) []T {
	return append(names, T{namespace, name})
}
