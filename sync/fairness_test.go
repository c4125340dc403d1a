package sync_test

import (
	"context"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/sync"
)

// recorder is a Dataplane that sends the keys of each call to calls and blocks the call until
// next receives a value.
type recorder struct {
	calls chan []dataplane.Key
	next  chan struct{}
}

func (r *recorder) call(ctx context.Context, keys []dataplane.Key) error {
	select {
	case r.calls <- keys:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-r.next:
	case <-ctx.Done():
	}
	return ctx.Err()
}

func (r *recorder) Replace(ctx context.Context, _ dataplane.Node, services iter.Seq[*dataplane.Service], _ func(int)) error {
	var keys []dataplane.Key
	for s := range services {
		keys = append(keys, s.Key)
	}
	return r.call(ctx, keys)
}

func (r *recorder) Apply(ctx context.Context, changes []dataplane.Change) error {
	var keys []dataplane.Key
	for _, c := range changes {
		keys = append(keys, c.Key())
	}
	return r.call(ctx, keys)
}

func (*recorder) Read(context.Context) (dataplane.State, error) { return dataplane.State{}, nil }
func (*recorder) Drift() <-chan struct{}                        { return nil }
func (*recorder) Close() error                                  { return nil }

// TestHugeServiceDoesNotDelayOthers updates a Service with 300 ports, each with 200 frontends and
// 100 endpoints, and small Services while it is being programmed. The size of the calls is
// limited, each small Service is in the call after the one in flight, and WaitSynced returns when
// everything is programmed.
func TestHugeServiceDoesNotDelayOthers(t *testing.T) {
	t.Parallel()
	service := func(name string, port, frontends int) *dataplane.Service {
		key := dataplane.Key{Namespace: "default", Name: name, Port: fmt.Sprint(port), Family: dataplane.IPv4, Kind: dataplane.ExternalIP}
		var fs []dataplane.Frontend
		for n := range frontends {
			fs = append(fs, dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(n)}), uint16(1+port))})
		}
		var es []dataplane.Endpoint
		for n := range frontends / 2 {
			es = append(es, dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 80)})
		}
		s, err := dataplane.NewService(key, fs, dataplane.ServiceSpec{Endpoints: es})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	const ports = 300
	huge := map[dataplane.Key]*dataplane.Service{}
	for port := range ports {
		s := service("huge", port, 200)
		huge[s.Key] = s
	}
	dp := &recorder{calls: make(chan []dataplane.Key), next: make(chan struct{})}
	s := sync.New(dp, sync.Options{})
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	s.FinishInitialList()
	<-dp.calls
	s.Update(huge)
	dp.next <- struct{}{}

	seen := map[dataplane.Key]bool{}
	var synced chan error
	for round := 0; len(seen) < ports; round++ {
		keys := <-dp.calls
		if len(keys) > 20 {
			t.Fatalf("call %d has %d changes", round, len(keys))
		}
		if round == 0 { // not earlier, so that Run has processed all input
			synced = make(chan error, 1)
			go func() { synced <- s.WaitSynced(ctx) }()
		}
		for _, k := range keys {
			seen[k] = true
		}
		if round > 0 {
			small := service(fmt.Sprint("small-", round-1), 50_000, 1).Key
			if !slices.Contains(keys, small) {
				t.Fatalf("call %d does not contain the small Service that was updated during the previous call", round)
			}
			delete(seen, small)
		}
		if len(seen) < ports {
			select {
			case err := <-synced:
				t.Fatalf("WaitSynced returned after %d of %d changes: %v", len(seen), ports, err)
			default:
			}
		}
		next := service(fmt.Sprint("small-", round), 50_000, 1)
		s.Update(map[dataplane.Key]*dataplane.Service{next.Key: next})
		dp.next <- struct{}{}
	}
	<-dp.calls
	dp.next <- struct{}{}
	if err := <-synced; err != nil {
		t.Error(err)
	}
}

// TestReplacePutsHugeServicesLast has a Service with 100 ports whose name sorts before all
// others.
func TestReplacePutsHugeServicesLast(t *testing.T) {
	t.Parallel()
	dp := &recorder{calls: make(chan []dataplane.Key), next: make(chan struct{})}
	s := sync.New(dp, sync.Options{})
	all := map[dataplane.Key]*dataplane.Service{}
	add := func(name string, port int, endpoints int) {
		key := dataplane.Key{Namespace: "default", Name: name, Port: fmt.Sprintf("%03d", port), Family: dataplane.IPv4}
		var es []dataplane.Endpoint
		for n := range endpoints {
			es = append(es, dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 80)})
		}
		f := dataplane.Frontend{Protocol: dataplane.TCP, Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, name[0], 1}), uint16(1+port))}
		svc, err := dataplane.NewService(key, []dataplane.Frontend{f}, dataplane.ServiceSpec{Endpoints: es})
		if err != nil {
			t.Fatal(err)
		}
		all[key] = svc
	}
	for port := range 100 {
		add("a", port, 500)
	}
	add("b", 0, 10)
	add("c", 0, 10)
	s.Update(all)
	s.FinishInitialList()
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		_ = s.Run(ctx)
	}()
	keys := <-dp.calls
	index := func(name string) int {
		return slices.IndexFunc(keys, func(k dataplane.Key) bool { return k.Name == name })
	}
	if len(keys) != 102 || index("b") > 10 || index("c") > 11 {
		t.Errorf("of %d Services, b is at index %d and c at index %d, want at most 10 and 11", len(keys), index("b"), index("c"))
	}
	close(dp.next)
}
