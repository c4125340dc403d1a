package history_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/history"
	"fairlead.io/fairlead/sync"
)

func newService(t testing.TB, name string, endpoints ...byte) *dataplane.Service {
	t.Helper()
	var list []dataplane.Endpoint
	for _, e := range endpoints {
		list = append(list, dataplane.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 0, e}), 80)})
	}
	s, err := dataplane.NewService(dataplane.Key{Namespace: "default", Name: name, Family: dataplane.IPv4},
		[]dataplane.Frontend{{Protocol: dataplane.TCP, Addr: netip.MustParseAddrPort("10.96.0.1:80")}}, dataplane.ServiceSpec{Endpoints: list})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func commit(reason sync.Reason, changes ...dataplane.Change) sync.Commit {
	now := time.Now()
	return sync.Commit{
		Op: sync.OpApply, Reason: reason, Changes: changes, OldestUpdate: now, Start: now.Add(time.Millisecond), End: now.Add(3 * time.Millisecond),
	}
}

func TestChanges(t *testing.T) {
	t.Parallel()
	few, many := newService(t, "web", 1, 2, 3), newService(t, "web", 2, 3, 4, 5, 6, 7)
	for _, test := range []struct {
		name     string
		old, new *dataplane.Service
		want     string
	}{
		{"added", nil, few, "added 0 3 [] []"},
		{"removed", few, nil, "removed 3 0 [] []"},
		{"endpoints come and go", few, many, "updated 3 6 [10.244.0.4:80 10.244.0.5:80 10.244.0.6:80] [10.244.0.1:80]"},
		{"same endpoints", few, newService(t, "web", 1, 2, 3), "updated 3 3 [] []"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := history.New()
			r.RecordTrigger("default", "web", time.Now())
			before := r.Version()
			r.OnCommit(commit(sync.ReasonChange, dataplane.Change{Old: test.old, New: test.new}))
			c := r.Changes(0)[0]
			if got := fmt.Sprint(c.Action, " ", c.Before, " ", c.After, " ", c.AddedEndpoints, " ", c.RemovedEndpoints); got != test.want {
				t.Errorf("change %s, want %s", got, test.want)
			}
			if c.Latency != 3*time.Millisecond || c.SinceTrigger <= 0 || c.SinceTrigger > time.Second {
				t.Errorf("latency %s, since the trigger %s; want 3ms and more than 0", c.Latency, c.SinceTrigger)
			}
			if r.Version() == before {
				t.Error("the version is the same after a change")
			}
		})
	}
}

// TestBounded checks that the newest records remain, and that a start lists no Services.
func TestBounded(t *testing.T) {
	t.Parallel()
	r := history.New()
	start := commit(sync.ReasonStart)
	for i := range 10_000 {
		start.Changes = append(start.Changes, dataplane.Change{New: newService(t, fmt.Sprint("s", i))})
	}
	r.OnCommit(start)
	if changes := r.Changes(0); len(changes) != 0 {
		t.Errorf("the start is listed as %d changes", len(changes))
	}
	for i := range 1000 {
		r.OnCommit(commit(sync.ReasonChange, dataplane.Change{New: newService(t, fmt.Sprint("s", i))}))
		r.RecordEvent(history.Reload, false, fmt.Sprint(i))
	}
	changes, events := r.Changes(0), r.Events(0)
	if len(changes) != 512 || changes[0].Key.Name != "s999" || changes[511].Key.Name != "s488" {
		t.Errorf("%d changes, want the last 512, the latest first", len(changes))
	}
	if len(events) != 128 || events[0].Message != "999" {
		t.Errorf("%d events, want the last 128, the latest first", len(events))
	}
	if got := r.Changes(3); len(got) != 3 || got[2].Key.Name != "s997" {
		t.Errorf("the last 3 changes are %v", got)
	}
	r.OnCommit(sync.Commit{Reason: sync.ReasonChange, Changes: start.Changes})
	if listed := len(r.Changes(0)); listed != 512 || r.Events(1)[0].Kind != "change" {
		t.Errorf("%d changes and the event %v after a large commit", listed, r.Events(1))
	}
	if got := r.Totals().Changes; got != 11_000 {
		t.Errorf("%d changes in total, want 11000", got)
	}
}

// TestFailures checks that retries of the same failure are recorded once.
func TestFailures(t *testing.T) {
	t.Parallel()
	r := history.New()
	s := newService(t, "web", 1)
	failed := func(text string) {
		c := commit(sync.ReasonRetry)
		c.Failed = map[dataplane.Key]error{s.Key: errors.New(text)}
		r.OnCommit(c)
	}
	failed("no space")
	failed("no space")
	failed("no memory")
	r.OnCommit(commit(sync.ReasonRetry, dataplane.Change{New: s}))
	failed("no memory")
	var actions []history.Action
	for _, c := range r.Changes(0) {
		actions = append(actions, c.Action)
	}
	if want := []history.Action{history.Failed, history.Added, history.Failed, history.Failed}; !slices.Equal(actions, want) {
		t.Errorf("actions %v, want %v", actions, want)
	}
	for range 3 {
		c := commit(sync.ReasonDrift)
		c.Err = errors.New("netlink: busy")
		r.OnCommit(c)
	}
	if e := r.Events(1)[0]; e.Count != 3 || !e.Failed || e.Message != "the commit failed: netlink: busy" {
		t.Errorf("event %+v, want 3 failures", e)
	}
	r.OnCommit(commit(sync.ReasonDrift))
	if got := r.Totals(); got.DriftRepairs != 1 || got.LastDriftRepair.IsZero() || got.Failures != 6 {
		t.Errorf("totals %+v, want 1 drift repair and 6 failures", got)
	}
}

// BenchmarkOnCommit measures a commit with one changed endpoint. Its cost does not depend on the
// number of Services, which the Recorder does not know.
func BenchmarkOnCommit(b *testing.B) {
	r := history.New()
	c := commit(sync.ReasonChange, dataplane.Change{Old: newService(b, "web", 1, 2, 3), New: newService(b, "web", 1, 2, 3, 4)})
	for range 1000 {
		r.OnCommit(c) // fill the ring
	}
	b.ReportAllocs()
	for b.Loop() {
		r.OnCommit(c)
	}
}

// TestAllocations checks that recording a change of endpoints allocates at most the list of the
// changed endpoints.
func TestAllocations(t *testing.T) {
	r := history.New()
	c := commit(sync.ReasonChange, dataplane.Change{Old: newService(t, "web", 1, 2, 3), New: newService(t, "web", 1, 2, 3, 4)})
	for range 1000 {
		r.OnCommit(c)
	}
	if n := testing.AllocsPerRun(1000, func() { r.OnCommit(c) }); n > 1 {
		t.Errorf("%v allocations for each commit, want at most 1", n)
	}
}
