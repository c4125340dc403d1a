package dataplane_test

import (
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
)

// The tests of this file check the laws of the package documentation, one test each, with
// random Services.

// countingDataplane is a Dataplane that counts its writes.
type countingDataplane interface {
	dataplane.Dataplane
	writeCount() int
}

type countingFake struct{ *fake.Dataplane }

func (k countingFake) writeCount() int { return k.Counts().Writes }

func (p *printer) writeCount() int { return p.lines }

// countingDataplanes returns constructors of the Dataplanes that the laws are tested with.
func countingDataplanes() map[string]func() countingDataplane {
	all := map[string]func() countingDataplane{"printer of the example": func() countingDataplane { return newPrinter(io.Discard, "lc", "sh") }}
	for name, opts := range fakeOptions() {
		all[name] = func() countingDataplane { return countingFake{fake.New(opts)} }
	}
	return all
}

func forEachHistory(t *testing.T, law func(t *testing.T, kernel countingDataplane, c *cluster, intn intN)) {
	t.Helper()
	for name, open := range countingDataplanes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(200) {
				t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
					law(t, open(), newCluster(), seededIntN(seed))
				})
			}
		})
	}
}

func mustRead(t *testing.T, dp dataplane.Dataplane) dataplane.State {
	t.Helper()
	state, err := dp.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return state
}

func mustReplace(t *testing.T, dp dataplane.Dataplane, services iter.Seq[*dataplane.Service]) {
	t.Helper()
	if err := dp.Replace(t.Context(), dataplane.Node{}, services, nil); err != nil {
		t.Fatal(err)
	}
}

func TestLaw1ReplaceIsExact(t *testing.T) {
	t.Parallel()
	forEachHistory(t, func(t *testing.T, kernel countingDataplane, c *cluster, intn intN) {
		for range 10 {
			c.change(intn)
			mustReplace(t, kernel, maps.Values(c.desired))
			want := dataplane.StateOf(maps.Values(c.desired))
			if diff := want.Diff(mustRead(t, kernel)); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}

// Laws 2 and 3: Apply removes every Old and adds every New, in whatever order the changes
// are listed.
func TestLaw2And3ApplyDiffsWholeCall(t *testing.T) {
	t.Parallel()
	forEachHistory(t, func(t *testing.T, kernel countingDataplane, c *cluster, intn intN) {
		syncer := newTestSyncer(unknownUntilReplace, kernel)
		syncer.sync(t.Context(), c.desired, true)
		for range 10 {
			c.change(intn)
			want := mustRead(t, kernel)
			changes := syncer.diff(c.desired)
			rand.Shuffle(len(changes), func(i, j int) { changes[i], changes[j] = changes[j], changes[i] })
			for _, ch := range changes {
				if ch.Old != nil {
					for _, f := range ch.Old.Frontends {
						delete(want, f)
					}
				}
			}
			for _, ch := range changes {
				if ch.New != nil {
					for _, f := range ch.New.Frontends {
						want[f] = dataplane.Binding{Service: ch.New.Key.Service(), ServiceSpec: ch.New.ServiceSpec}
					}
				}
			}
			err := kernel.Apply(t.Context(), changes)
			if err != nil {
				t.Fatal(err)
			}
			syncer.recordResult(err, changes, nil)
			if diff := want.Diff(mustRead(t, kernel)); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}

func TestLaw4EqualStatesWriteNothing(t *testing.T) {
	t.Parallel()
	forEachHistory(t, func(t *testing.T, kernel countingDataplane, c *cluster, intn intN) {
		for range 5 {
			c.change(intn)
		}
		mustReplace(t, kernel, maps.Values(c.desired))
		before := kernel.writeCount()
		var again []*dataplane.Service
		var none []dataplane.Change
		for k, s := range c.desired {
			same, err := dataplane.NewService(k, slices.Clone(s.Frontends), cloneSpec(s.ServiceSpec))
			if err != nil {
				t.Fatal(err)
			}
			again = append(again, same)
			none = append(none, dataplane.Change{Old: s, New: same})
		}
		mustReplace(t, kernel, slices.Values(again))
		if err := kernel.Apply(t.Context(), none); err != nil {
			t.Fatal(err)
		}
		if n := kernel.writeCount() - before; n != 0 {
			t.Errorf("replacing a state with an equal one made %d writes, want 0", n)
		}
	})
}

// Law 5, the testable half: the call succeeds for all keys that the error does not name.
func TestLaw5UnnamedKeysSucceed(t *testing.T) {
	t.Parallel()
	for name, opts := range fakeOptions() {
		if opts.Strict {
			continue // A strict kernel applies all keys of a call or none.
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			failures := 0
			for seed := range uint64(500) {
				intn := seededIntN(seed)
				faulty := fake.NewFaulty(fake.New(opts), seed, fake.Faults{Keys: 0.5})
				syncer := newTestSyncer(unknownUntilReplace, faulty)
				c := newCluster()
				for range 10 {
					c.change(intn)
					syncer.sync(t.Context(), c.desired, true)
					if len(syncer.unknown) == 0 {
						continue
					}
					failures++
					got := mustRead(t, faulty)
					for k, s := range syncer.applied {
						for _, f := range s.Frontends {
							want := dataplane.Binding{ServiceSpec: s.ServiceSpec}
							if !got[f].Equal(want) {
								t.Fatalf("seed %d: %s is not in the error, but has %v for %s, want %v; keys in the error: %v",
									seed, k, got[f], f, s.Endpoints, syncer.unknown)
							}
						}
					}
					// Repair the failed keys, so that the test observes each failure separately.
					faulty.Set(fake.Faults{})
					syncer.sync(t.Context(), c.desired, true)
					faulty.Set(fake.Faults{Keys: 0.5})
				}
			}
			if failures < 500 {
				t.Errorf("only %d calls had failed keys, want at least 500", failures)
			}
		})
	}
}

// TestApplyCostProportionalToChange checks that the number of writes depends on the change and
// not on the number of Services.
func TestApplyCostProportionalToChange(t *testing.T) {
	t.Parallel()
	for _, services := range []int{10, 1000} {
		for name, open := range countingDataplanes() {
			t.Run(fmt.Sprintf("%s/services=%d", name, services), func(t *testing.T) {
				t.Parallel()
				kernel := open()
				all := numberedServices(t, services)
				mustReplace(t, kernel, slices.Values(all))
				for _, tt := range []struct {
					what   string
					change dataplane.Change
					writes int
				}{
					{"one more endpoint", dataplane.Change{Old: all[0], New: withEndpoints(t, all[0], 4)}, 1},
					{"one endpoint fewer", dataplane.Change{Old: withEndpoints(t, all[0], 4), New: all[0]}, 1},
					{"no change", dataplane.Change{Old: all[1], New: all[1]}, 0},
				} {
					before := kernel.writeCount()
					if err := kernel.Apply(t.Context(), []dataplane.Change{tt.change}); err != nil {
						t.Fatalf("%s: %v", tt.what, err)
					}
					if n := kernel.writeCount() - before; n != tt.writes {
						t.Errorf("%s: %d writes, want %d", tt.what, n, tt.writes)
					}
				}
			})
		}
	}
}

func TestCancelledCallsChangeNothing(t *testing.T) {
	t.Parallel()
	kernel := fake.New(fake.Options{})
	all := numberedServices(t, 3)
	mustReplace(t, kernel, slices.Values(all))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := kernel.Replace(ctx, dataplane.Node{}, slices.Values(all[:1]), nil); err == nil {
		t.Error("Replace with a cancelled context succeeded")
	}
	if err := kernel.Apply(ctx, []dataplane.Change{{Old: all[0]}}); err == nil {
		t.Error("Apply with a cancelled context succeeded")
	}
	if diff := dataplane.StateOf(slices.Values(all)).Diff(mustRead(t, kernel)); diff != "" {
		t.Error(diff)
	}
}

// numberedServices returns n Services with one frontend and three endpoints each.
func numberedServices(t *testing.T, n int) []*dataplane.Service {
	t.Helper()
	all := make([]*dataplane.Service, n)
	for i := range all {
		k := dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s%d", i), Family: dataplane.IPv4}
		s, err := dataplane.NewService(k, []dataplane.Frontend{frontend(fmt.Sprintf("10.96.%d.%d:80", i/256, i%256))}, dataplane.ServiceSpec{})
		if err != nil {
			t.Fatal(err)
		}
		all[i] = withEndpoints(t, s, 3)
	}
	return all
}

// withEndpoints returns a copy of s with n endpoints.
func withEndpoints(t *testing.T, s *dataplane.Service, n int) *dataplane.Service {
	t.Helper()
	var es []dataplane.Endpoint
	for i := range n {
		es = append(es, endpoint(fmt.Sprintf("10.0.0.%d:8080", i+1)))
	}
	s, err := dataplane.NewService(s.Key, slices.Clone(s.Frontends), dataplane.ServiceSpec{Endpoints: es})
	if err != nil {
		t.Fatal(err)
	}
	return s
}
