package sync_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	stdsync "sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/sync"
)

// The tests run in synctest bubbles. Time advances only when all goroutines are blocked, and a
// bubble ends only when all of its goroutines have ended. So each test also checks that Run leaks
// no goroutine.

type updates = map[dataplane.Key]*dataplane.Service

// fixture is a running Syncer with a fake kernel that can fail.
type fixture struct {
	*sync.Syncer
	t      *testing.T
	kernel *fake.Dataplane
	faulty *fake.Faulty
	stop   func() // ends Run and waits for it

	mu      stdsync.Mutex
	commits []sync.Commit
	log     bytes.Buffer
}

// Write appends to the log.
func (fx *fixture) Write(p []byte) (int, error) {
	fx.mu.Lock()
	defer fx.mu.Unlock()
	return fx.log.Write(p)
}

// startSyncer runs a Syncer in the current synctest bubble.
func startSyncer(t *testing.T, kernel *fake.Dataplane, opts sync.Options) *fixture {
	t.Helper()
	fx := &fixture{t: t, kernel: kernel, faulty: fake.NewFaulty(kernel, 1, fake.Faults{})}
	opts.OnCommit = func(c sync.Commit) {
		fx.mu.Lock()
		defer fx.mu.Unlock()
		fx.commits = append(fx.commits, c)
	}
	opts.Logger = slog.New(slog.NewTextHandler(fx, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
	fx.Syncer = sync.New(fx.faulty, opts)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- fx.Run(ctx) }()
	fx.stop = func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v after its context ended, want nil", err)
		}
	}
	return fx
}

// waitSynced waits until all input has been tried and returns the commits since the last call of
// newCommits.
func (fx *fixture) waitSynced() []sync.Commit {
	fx.t.Helper()
	if err := fx.WaitSynced(fx.t.Context()); err != nil {
		fx.t.Fatal(err)
	}
	return fx.newCommits()
}

// newCommits waits until all goroutines are blocked and returns the commits since the last call.
func (fx *fixture) newCommits() []sync.Commit {
	synctest.Wait()
	fx.mu.Lock()
	defer fx.mu.Unlock()
	commits := fx.commits
	fx.commits = nil
	return commits
}

// newLog returns the log output since the last call.
func (fx *fixture) newLog() string {
	synctest.Wait()
	fx.mu.Lock()
	defer fx.mu.Unlock()
	defer fx.log.Reset()
	return fx.log.String()
}

// checkKernel checks that the kernel holds exactly these Services.
func (fx *fixture) checkKernel(services ...*dataplane.Service) {
	fx.t.Helper()
	got, err := fx.kernel.Read(fx.t.Context())
	if err != nil {
		fx.t.Fatal(err)
	}
	if diff := dataplane.StateOf(slices.Values(services)).Diff(got); diff != "" {
		fx.t.Errorf("kernel state (want against got):\n%s", diff)
	}
}

// service returns the n-th Service, with the given number of endpoints.
func service(n, endpoints int) *dataplane.Service {
	key := dataplane.Key{Namespace: "default", Name: fmt.Sprintf("s%d", n), Family: dataplane.IPv4}
	frontend := dataplane.Frontend{
		Protocol: dataplane.TCP,
		Addr:     netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(96 + n>>16), byte(n >> 8), byte(n)}), 80),
	}
	es := make([]dataplane.Endpoint, endpoints)
	for i := range es {
		es[i].Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 8080)
	}
	s, err := dataplane.NewService(key, []dataplane.Frontend{frontend}, dataplane.ServiceSpec{Endpoints: es})
	if err != nil {
		panic(err)
	}
	return s
}

func upserts(services ...*dataplane.Service) updates {
	m := updates{}
	for _, s := range services {
		m[s.Key] = s
	}
	return m
}

func deletions(services ...*dataplane.Service) updates {
	m := updates{}
	for _, s := range services {
		m[s.Key] = nil
	}
	return m
}

// summarize returns the operation, the reason, and the number of changes and failed keys of each
// commit.
func summarize(commits []sync.Commit) string {
	var b strings.Builder
	for _, c := range commits {
		fmt.Fprintf(&b, "%s(%s) %d", c.Op, c.Reason, len(c.Changes))
		if len(c.Failed) > 0 {
			fmt.Fprintf(&b, " failed %d", len(c.Failed))
		}
		if c.Err != nil {
			b.WriteString(" failed")
		}
		b.WriteString("; ")
	}
	return strings.TrimSuffix(b.String(), "; ")
}

func (fx *fixture) checkCommits(commits []sync.Commit, want string) {
	fx.t.Helper()
	if got := summarize(commits); got != want {
		fx.t.Errorf("commits: %s\nwant:    %s", got, want)
	}
}

func TestNothingProgrammedBeforeInitialList(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kernel := fake.New(fake.Options{})
		left := service(9, 1) // from an earlier process
		if err := kernel.Replace(t.Context(), dataplane.Node{}, slices.Values([]*dataplane.Service{left}), nil); err != nil {
			t.Fatal(err)
		}
		fx := startSyncer(t, kernel, sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1)))
		fx.SetNode(dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}})
		time.Sleep(time.Hour)
		fx.Update(upserts(service(2, 1)))
		fx.checkCommits(fx.newCommits(), "")
		fx.checkKernel(left)
		if since := time.Since(fx.Status().PendingSince); since != time.Hour {
			t.Errorf("pending since %v, want 1h", since)
		}
		fx.FinishInitialList()
		commits := fx.waitSynced()
		fx.checkCommits(commits, "replace(start) 2")
		fx.checkKernel(service(1, 1), service(2, 1))
		if c := commits[0]; c.End.Sub(c.OldestUpdate) != time.Hour || c.Services != 2 {
			t.Errorf("the commit has %d Services and the oldest update %v before its end, want 2 and 1h", c.Services, c.End.Sub(c.OldestUpdate))
		}
		if st := fx.Status(); !st.PendingSince.IsZero() || st.Services != 2 || !st.LastSuccess.Equal(time.Now()) {
			t.Errorf("status after everything was programmed: %+v", st)
		}
	})
}

func TestChangesAppliedImmediately(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{Strict: true}), sync.Options{})
		defer fx.stop()
		fx.FinishInitialList()
		fx.checkCommits(fx.waitSynced(), "replace(start) 0")
		started := time.Now()

		fx.Update(upserts(service(1, 1), service(2, 1)))
		commits := fx.waitSynced()
		fx.checkCommits(commits, "apply(change) 2")
		if len(commits[0].Changes) != 2 || commits[0].Changes[0].Old != nil {
			t.Errorf("creation: changes %v", commits[0].Changes)
		}
		s1 := service(1, 2)
		fx.Update(upserts(s1))
		commits = fx.waitSynced()
		fx.checkCommits(commits, "apply(change) 1")
		if c := commits[0].Changes[0]; !c.Old.Equal(service(1, 1)) || c.New != s1 {
			t.Errorf("change: %v", c)
		}
		fx.Update(deletions(s1))
		commits = fx.waitSynced()
		fx.checkCommits(commits, "apply(change) 1")
		if c := commits[0].Changes[0]; c.Old != s1 || c.New != nil {
			t.Errorf("deletion: %v", c)
		}
		fx.checkKernel(service(2, 1))
		if time.Since(started) != 0 {
			t.Errorf("the calls took %v, want no delay", time.Since(started))
		}
	})
}

func TestFrontendMovesInOneUpdate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{Strict: true}), sync.Options{})
		defer fx.stop()
		a, b := service(1, 1), service(2, 2)
		fx.Update(upserts(a, b))
		fx.FinishInitialList()
		fx.waitSynced()
		a2, b2 := *a, *b
		a2.Frontends, b2.Frontends = b.Frontends, a.Frontends
		fx.Update(upserts(&a2, &b2))
		fx.checkCommits(fx.waitSynced(), "apply(change) 2")
		fx.checkKernel(&a2, &b2)
	})
}

func TestEqualInputMakesNoCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		node := dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}
		fx.Update(upserts(service(1, 1)))
		fx.SetNode(node)
		fx.FinishInitialList()
		fx.waitSynced()
		before := fx.kernel.Counts()

		fx.Update(nil)
		fx.Update(upserts(service(1, 1)))
		fx.Update(deletions(service(2, 1)))
		fx.SetNode(dataplane.Node{PodCIDRs: slices.Clone(node.PodCIDRs)})
		fx.FinishInitialList()
		fx.checkCommits(fx.waitSynced(), "")
		if got := fx.kernel.Counts(); got != before {
			t.Errorf("calls and writes are %+v, want no change from %+v", got, before)
		}
		if got := fx.Status().PendingSince; !got.IsZero() {
			t.Errorf("pending since %v, want nothing pending", got)
		}
	})
}

func TestChangesCoalesceDuringCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{Strict: true}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1), service(2, 1), service(3, 1)))
		fx.FinishInitialList()
		fx.waitSynced()

		release := fx.faulty.Hold()
		fx.Update(upserts(service(1, 2)))
		synctest.Wait()
		inFlight := time.Now()
		time.Sleep(time.Second)
		fx.Update(upserts(service(2, 2))) // changed three times: the last value counts
		fx.Update(deletions(service(2, 1)))
		fx.Update(upserts(service(2, 3)))
		fx.Update(upserts(service(3, 2))) // changed and undone
		fx.Update(upserts(service(3, 1)))
		fx.Update(upserts(service(4, 1))) // created and deleted
		fx.Update(deletions(service(4, 1)))
		time.Sleep(time.Second)
		if st := fx.Status(); !st.CallSince.Equal(inFlight) || !st.PendingSince.Equal(inFlight) {
			t.Errorf("call since %v, pending since %v, want both %v", st.CallSince, st.PendingSince, inFlight)
		}
		release()
		commits := fx.waitSynced()
		fx.checkCommits(commits, "apply(change) 1; apply(change) 1")
		if c := commits[0]; c.End.Sub(c.Start) != 2*time.Second || c.End.Sub(c.OldestUpdate) != 2*time.Second {
			t.Errorf("the first commit took %v, and %v since its Update, want 2s for both", c.End.Sub(c.Start), c.End.Sub(c.OldestUpdate))
		}
		if c := commits[1]; c.Changes[0].New.Key != service(2, 3).Key || c.End.Sub(c.OldestUpdate) != time.Second {
			t.Errorf("the second commit is %v, %v after its Update, want default/s2 after 1s", c.Changes[0], c.End.Sub(c.OldestUpdate))
		}
		fx.checkKernel(service(1, 2), service(2, 3), service(3, 1))
		if st := fx.Status(); !st.CallSince.IsZero() || !st.PendingSince.IsZero() {
			t.Errorf("call since %v, pending since %v, want neither", st.CallSince, st.PendingSince)
		}
	})
}

// TestUpdateInline checks which calls UpdateInline makes itself.
func TestUpdateInline(t *testing.T) {
	t.Parallel()
	const large = 300 // endpoints; more than UpdateInline programs
	for _, tt := range []struct {
		name string
		// before changes the state in which UpdateInline is called.
		before func(*fixture)
		change *dataplane.Service
		inline bool
	}{
		{"small change", func(*fixture) {}, service(1, 2), true},
		{"large Service", func(*fixture) {}, service(1, large), false},
		{"drift", func(fx *fixture) {
			fx.kernel.Edit(func(state dataplane.State) { clear(state) })
			synctest.Wait()
		}, service(1, 2), true},
		{"failed change", func(fx *fixture) {
			fx.faulty.Set(fake.Faults{Broken: func(s *dataplane.Service) error {
				if s.Key == service(2, 0).Key {
					return errors.New("broken")
				}
				return nil
			}})
			fx.UpdateInline(upserts(service(2, 2)))
			fx.faulty.Set(fake.Faults{})
			synctest.Wait()
		}, service(1, 2), true},
		{"just after a slow call", func(fx *fixture) { fx.holdCall(time.Second) }, service(1, 2), false},
		{"some time after a slow call", func(fx *fixture) {
			fx.holdCall(time.Second)
			time.Sleep(time.Second)
		}, service(1, 2), true},
		{"after Run", func(fx *fixture) { fx.stop() }, service(1, 2), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				fx := startSyncer(t, fake.New(fake.Options{PerObject: true}), sync.Options{})
				defer func() { fx.stop() }()
				fx.UpdateInline(upserts(service(1, 1), service(2, 1), service(3, 1)))
				synctest.Wait()
				if fx.kernel.Counts().Applies+fx.kernel.Counts().Replaces > 0 {
					t.Error("called the dataplane before the initial list was complete")
				}
				fx.FinishInitialList()
				fx.waitSynced()
				tt.before(fx)
				before := fx.kernel.Counts().Applies
				fx.UpdateInline(upserts(tt.change))
				if inline := fx.kernel.Counts().Applies > before; inline != tt.inline {
					t.Errorf("UpdateInline made the call: %t, want %t", inline, tt.inline)
				}
				if tt.name == "after Run" {
					fx.stop = func() {}
					return
				}
				fx.waitSynced()
				time.Sleep(2 * sync.DefaultRetryMax) // repairs and retries have ended
				two := service(2, 1)
				if tt.name == "failed change" {
					two = service(2, 2)
				}
				fx.checkKernel(tt.change, two, service(3, 1))
			})
		})
	}
}

// holdCall makes a call that takes the duration d.
func (fx *fixture) holdCall(d time.Duration) {
	fx.t.Helper()
	release := fx.faulty.Hold()
	time.AfterFunc(d, release)
	fx.UpdateInline(upserts(service(3, 2)))
	fx.UpdateInline(upserts(service(3, 1)))
	fx.waitSynced()
}

// TestUpdateInlineDuringCall checks that UpdateInline does not wait for a call that another goroutine
// makes.
func TestUpdateInlineDuringCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{Strict: true}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1), service(2, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		release := fx.faulty.Hold()
		fx.Update(upserts(service(1, 2)))
		synctest.Wait()
		begin := time.Now()
		fx.UpdateInline(upserts(service(2, 2)))
		fx.UpdateInline(upserts(service(2, 3)))
		if waited := time.Since(begin); waited > 0 {
			t.Errorf("UpdateInline waited for %s", waited)
		}
		release()
		fx.checkCommits(fx.waitSynced(), "apply(change) 1; apply(change) 1")
		fx.checkKernel(service(1, 2), service(2, 3))
	})
}

// Undoing a change that is in flight takes a second call.
func TestChangeUndoneDuringCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{Strict: true}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		release := fx.faulty.Hold()
		fx.Update(upserts(service(1, 2)))
		synctest.Wait()
		fx.Update(upserts(service(1, 1)))
		release()
		fx.checkCommits(fx.waitSynced(), "apply(change) 1; apply(change) 1")
		fx.checkKernel(service(1, 1))
	})
}

func TestWarmRestartWritesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kernel := fake.New(fake.Options{})
		var before fake.Counts
		for range 2 {
			fx := startSyncer(t, kernel, sync.Options{})
			before = kernel.Counts()
			fx.Update(upserts(service(1, 1), service(2, 2)))
			fx.FinishInitialList()
			fx.waitSynced()
			fx.stop()
		}
		if n := kernel.Counts().Writes - before.Writes; n != 0 || before.Writes == 0 {
			t.Errorf("the first run wrote %d times and the second %d times, want more than 0 and 0", before.Writes, n)
		}
	})
}

// failServices makes the Services with these names fail.
func failServices(names ...string) fake.Faults {
	return fake.Faults{Broken: func(s *dataplane.Service) error {
		if slices.Contains(names, s.Key.Name) {
			return errors.New("no memory")
		}
		return nil
	}}
}

func TestFailingServiceIsIsolatedAndRetried(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{Strict: true}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1), service(2, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		fx.newLog()

		fx.faulty.Set(failServices("s1"))
		fx.Update(upserts(service(1, 2), service(2, 2)))
		commits := fx.waitSynced()
		fx.checkCommits(commits, "apply(change) 1 failed 1")
		fx.checkKernel(service(1, 1), service(2, 2))
		if st := fx.Status(); len(st.Failing) != 1 || st.Failing[service(1, 1).Key] == nil || !st.PendingSince.IsZero() || st.Err != nil {
			t.Errorf("status %+v, want default/s1 failing and no pending update", st)
		}
		if log := fx.newLog(); strings.Count(log, "\n") != 1 || !strings.Contains(log, `msg="failed to program service" service="default/s1 IPv4"`) ||
			!strings.Contains(log, `error="no memory"`) {
			t.Errorf("log %q, want one line with the Service and the error", log)
		}

		// Other Services still use Apply.
		fx.Update(upserts(service(3, 1)))
		fx.checkCommits(fx.waitSynced(), "apply(change) 1")
		fx.checkKernel(service(1, 1), service(2, 2), service(3, 1))

		// The failing Service is retried with a delay that doubles up to a limit. Repeated
		// failures are not logged.
		var delays []time.Duration
		last := commits[0].End
		for len(delays) < 14 {
			time.Sleep(10 * time.Millisecond)
			for _, c := range fx.newCommits() {
				fx.checkCommits([]sync.Commit{c}, "replace(retry) 0 failed 1")
				delays = append(delays, c.Start.Sub(last))
				last = c.End
			}
		}
		full := sync.DefaultRetryMin
		for i, d := range delays {
			if d > full || d < full*3/4 {
				t.Errorf("delay %d is %v, want %v minus at most a quarter", i, d, full)
			}
			full = min(2*full, sync.DefaultRetryMax)
		}
		if full != sync.DefaultRetryMax {
			t.Errorf("the delays are %v, want them to reach the limit", delays)
		}
		if log := fx.newLog(); log != "" {
			t.Errorf("log %q for repeated failures, want no output", log)
		}

		fx.faulty.Set(fake.Faults{})
		time.Sleep(sync.DefaultRetryMax)
		commits = fx.newCommits()
		fx.checkCommits(commits, "replace(retry) 1")
		if c := commits[0].Changes[0]; !c.Old.Equal(service(1, 1)) || !c.New.Equal(service(1, 2)) {
			t.Errorf("the change that finally succeeded is %v", c)
		}
		if c := commits[0]; c.End.Sub(c.OldestUpdate) < time.Minute {
			t.Errorf("the oldest update is %v old, want the time since the first attempt", c.End.Sub(c.OldestUpdate))
		}
		fx.checkKernel(service(1, 2), service(2, 2), service(3, 1))
		if log := fx.newLog(); !strings.Contains(log, `msg="service recovered" service="default/s1 IPv4"`) {
			t.Errorf("log %q, want the recovery of default/s1", log)
		}
		if st := fx.Status(); len(st.Failing) != 0 {
			t.Errorf("failing %v, want none", st.Failing)
		}
		time.Sleep(time.Hour)
		fx.checkCommits(fx.newCommits(), "")
	})
}

func TestChangedFailingServiceRetriedSoon(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.faulty.Set(failServices("s1"))
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		time.Sleep(10 * time.Minute)
		fx.newCommits()
		fx.faulty.Set(fake.Faults{})
		started := time.Now()
		fx.Update(upserts(service(1, 2)))
		fx.checkCommits(fx.waitSynced(), "replace(retry) 1")
		if d := time.Since(started); d > sync.DefaultRetryMin {
			t.Errorf("retried after %v, want at most %v", d, sync.DefaultRetryMin)
		}
		fx.checkKernel(service(1, 2))
	})
}

// Each retry is a Replace, so a failing Service that changes continuously must not cause
// continuous calls of Replace.
func TestChurningFailingServiceLimitsReplaceTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		faults := failServices("s1")
		faults.MaxDelay = 2 * time.Second
		fx.faulty.Set(faults)
		fx.FinishInitialList()
		var busy time.Duration
		for i := range 6000 {
			fx.Update(upserts(service(1, i%50)))
			time.Sleep(100 * time.Millisecond)
		}
		for _, c := range fx.newCommits() {
			if c.Op == sync.OpReplace {
				busy += c.End.Sub(c.Start)
			}
		}
		if busy < 30*time.Second || busy > 90*time.Second {
			t.Errorf("Replace took %v of 10m, want about a tenth at most", busy)
		}
	})
}

func TestChangedFailingServiceKeepsDataplaneBackoff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.faulty.Set(failServices("s1"))
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		fx.faulty.Set(fake.Faults{Down: errors.New("down")})
		time.Sleep(10 * time.Minute)
		fx.newCommits()
		for i := range 600 {
			fx.Update(upserts(service(1, i)))
			time.Sleep(100 * time.Millisecond)
		}
		if n := len(fx.newCommits()); n > 3 {
			t.Errorf("%d attempts in one minute, want one every 30s", n)
		}
	})
}

func TestFailingServiceIsDeleted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		fx.faulty.Set(failServices("s1"))
		fx.Update(upserts(service(1, 2)))
		fx.waitSynced()
		fx.Update(deletions(service(1, 2)))
		commits := fx.waitSynced()
		fx.checkCommits(commits, "replace(retry) 1")
		if c := commits[0].Changes[0]; !c.Old.Equal(service(1, 1)) || c.New != nil {
			t.Errorf("change %v, want the deletion of the last applied Service", c)
		}
		fx.checkKernel()
		if st := fx.Status(); len(st.Failing) != 0 || st.Services != 0 {
			t.Errorf("status %+v, want no Services and none failing", st)
		}
	})
}

func TestManyFailuresLogSummary(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.faulty.Set(fake.Faults{Broken: func(*dataplane.Service) error { return errors.New("no memory") }})
		all := updates{}
		for i := range 1000 {
			s := service(i, 1)
			all[s.Key] = s
		}
		fx.Update(all)
		fx.FinishInitialList()
		fx.waitSynced()
		log := fx.newLog()
		if n := strings.Count(log, "failed to program service"); n != 10 || !strings.Contains(log, `msg="failed to program more services" services=990`) {
			t.Errorf("%d Services are logged by name, want 10 and the number of the others:\n%s", n, log)
		}
	})
}

func TestUnsupportedServiceRetriedOnChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kernel := fake.New(fake.Options{Strict: true, Unsupported: func(s *dataplane.Service) error {
			if len(s.Endpoints) == 7 {
				return errors.New("seven endpoints")
			}
			return nil
		}})
		fx := startSyncer(t, kernel, sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 7), service(2, 1), service(3, 1)))
		fx.FinishInitialList()
		fx.checkCommits(fx.waitSynced(), "replace(start) 2 failed 1")
		fx.checkKernel(service(2, 1), service(3, 1))
		if log := fx.newLog(); !strings.Contains(log, `level=WARN msg="service not supported" service="default/s1 IPv4"`) {
			t.Errorf("log %q, want a warning", log)
		}
		time.Sleep(time.Hour)
		fx.Update(upserts(service(1, 7)))
		fx.checkCommits(fx.waitSynced(), "")
		if err := fx.Status().Failing[service(1, 7).Key]; !errors.Is(err, dataplane.ErrUnsupported) {
			t.Errorf("status has %v, want ErrUnsupported", err)
		}

		// Replace skips it.
		fx.SetNode(dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}})
		fx.checkCommits(fx.waitSynced(), "replace(node) 0")

		// A programmed Service is removed when it becomes unsupported.
		fx.Update(upserts(service(2, 7)))
		commits := fx.waitSynced()
		fx.checkCommits(commits, "apply(change) 1 failed 1")
		if c := commits[0].Changes[0]; !c.Old.Equal(service(2, 1)) || c.New != nil {
			t.Errorf("change %v, want the deletion of the programmed Service", c)
		}
		fx.checkKernel(service(3, 1))

		// A changed Service is applied without Old: the strict kernel would reject an Old that it
		// does not hold.
		fx.Update(upserts(service(1, 2), service(2, 2)))
		fx.checkCommits(fx.waitSynced(), "apply(change) 2")
		fx.checkKernel(service(1, 2), service(2, 2), service(3, 1))
		if st := fx.Status(); len(st.Failing) != 0 {
			t.Errorf("failing %v, want none", st.Failing)
		}

		// A deletion needs no call.
		fx.Update(upserts(service(1, 7)))
		fx.waitSynced()
		fx.Update(deletions(service(1, 7)))
		fx.checkCommits(fx.waitSynced(), "")
		if st := fx.Status(); len(st.Failing) != 0 || st.Services != 2 {
			t.Errorf("status %+v, want 2 Services and none failing", st)
		}

		// An unsupported Service is still skipped after a call that failed as a whole, unless it
		// changed.
		fx.Update(upserts(service(4, 7), service(5, 7)))
		fx.waitSynced()
		fx.faulty.Set(fake.Faults{Down: errors.New("down")})
		fx.Update(upserts(service(6, 1)))
		fx.waitSynced()
		fx.Update(upserts(service(4, 1)))
		fx.faulty.Set(fake.Faults{})
		fx.checkCommits(fx.waitSynced(), "replace(retry) 2")
		fx.checkKernel(service(2, 2), service(3, 1), service(4, 1), service(6, 1))
	})
}

func TestCallFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{RetryMin: time.Second, RetryMax: 4 * time.Second})
		defer fx.stop()
		fx.faulty.Set(fake.Faults{Down: errors.New("no netlink")})
		started := time.Now()
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.checkCommits(fx.waitSynced(), "replace(start) 0 failed")
		if log := fx.newLog(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "no netlink") {
			t.Errorf("log %q, want one line with the error", log)
		}
		if st := fx.Status(); st.Err == nil || !st.LastSuccess.IsZero() || !st.PendingSince.Equal(started) {
			t.Errorf("status %+v, want the error, no success, and an update pending since the beginning", st)
		}
		// Changes, drift and a new node do not shorten the delay.
		fx.Update(upserts(service(1, 2)))
		fx.SetNode(dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}})
		fx.kernel.Edit(func(dataplane.State) {})
		fx.checkCommits(fx.newCommits(), "")
		fx.checkCommits(fx.waitSynced(), "replace(start) 0 failed")
		if d := time.Since(started); d > time.Second || d < 750*time.Millisecond {
			t.Errorf("the second attempt came after %v, want 1s minus at most a quarter", d)
		}
		time.Sleep(time.Minute)
		if n := len(fx.newCommits()); n < 15 || n > 22 {
			t.Errorf("%d attempts in one minute, want one every 3 to 4s", n)
		}
		if log := fx.newLog(); log != "" {
			t.Errorf("log %q for repeated failures, want no output", log)
		}
		fx.faulty.Set(fake.Faults{})
		time.Sleep(4 * time.Second)
		commits := fx.newCommits()
		fx.checkCommits(commits, "replace(start) 1")
		if !commits[0].OldestUpdate.Equal(started) {
			t.Errorf("the oldest update is from %v, want %v", commits[0].OldestUpdate, started)
		}
		fx.checkKernel(service(1, 2))
		if log := fx.newLog(); !strings.Contains(log, "dataplane recovered") {
			t.Errorf("log %q, want the recovery of the dataplane", log)
		}

		// An Apply that fails as a whole may have changed the kernel.
		fx.faulty.Set(fake.Faults{Lose: 1})
		fx.Update(upserts(service(1, 3)))
		started = time.Now()
		fx.checkCommits(fx.waitSynced(), "apply(change) 0 failed")
		if st := fx.Status(); !st.PendingSince.Equal(started) {
			t.Errorf("pending since %v, want %v", st.PendingSince, started)
		}
		fx.faulty.Set(fake.Faults{})
		fx.Update(upserts(service(1, 2), service(2, 1)))
		commits = fx.waitSynced()
		fx.checkCommits(commits, "replace(retry) 1")
		if d := time.Since(started); d > time.Second || !commits[0].OldestUpdate.Equal(started) {
			t.Errorf("repaired after %v with the oldest update from %v, want at most 1s, as after a first failure, and %v",
				d, commits[0].OldestUpdate, started)
		}
		fx.checkKernel(service(1, 2), service(2, 1))
	})
}

func TestDriftRepairBackoff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		edit := func() { fx.kernel.Edit(func(s dataplane.State) { clear(s) }) }

		for range 3 { // Rare drift is repaired immediately.
			time.Sleep(sync.DefaultRetryMax)
			edit()
			fx.checkCommits(fx.newCommits(), "replace(drift) 0")
			fx.checkKernel(service(1, 1))
		}

		// Drift that occurs a thousand times per second is repaired once per second.
		repairs := 0
		for range 60_000 {
			time.Sleep(time.Millisecond)
			edit()
			repairs += len(fx.newCommits())
		}
		if repairs < 60 || repairs > 85 {
			t.Errorf("%d repairs in one minute of continuous drift, want slightly more than one per second", repairs)
		}
		time.Sleep(sync.DefaultRetryMax)
		fx.newCommits()
		fx.checkKernel(service(1, 1))

		// After a quiet period, drift is repaired immediately again.
		time.Sleep(sync.DefaultRetryMax)
		edit()
		fx.checkCommits(fx.newCommits(), "replace(drift) 0")
		fx.checkKernel(service(1, 1))
	})
}

// lossy is a dataplane that reports losses and whose calls can fail with a conflict.
type lossy struct {
	*fake.Dataplane
	lost     chan struct{}
	conflict atomic.Bool
	broken   atomic.Bool
	calls    atomic.Int64
}

func (d *lossy) Lost() <-chan struct{} { return d.lost }

func (d *lossy) lose() {
	select {
	case d.lost <- struct{}{}:
	default:
	}
	d.Edit(func(s dataplane.State) { clear(s) })
}

func (d *lossy) Replace(ctx context.Context, node dataplane.Node, services iter.Seq[*dataplane.Service], progress func(int)) error {
	d.calls.Add(1)
	switch {
	case d.conflict.Load():
		return fmt.Errorf("replace: %w: no such table", dataplane.ErrConflict)
	case d.broken.Load():
		return errors.New("broken")
	}
	return d.Dataplane.Replace(ctx, node, services, progress)
}

func startLossy(t *testing.T) (*lossy, *sync.Syncer) {
	t.Helper()
	d := &lossy{Dataplane: fake.New(fake.Options{}), lost: make(chan struct{}, 1)}
	s := sync.New(d, sync.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	var ended stdsync.WaitGroup
	ended.Go(func() { _ = s.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		ended.Wait()
	})
	s.Update(upserts(service(1, 1)))
	s.FinishInitialList()
	synctest.Wait()
	return d, s
}

// A loss is repaired immediately after any history: repeated drift, or failures with a growing
// retry delay.
func TestLossRepairedImmediately(t *testing.T) {
	t.Parallel()
	const promptly = 25 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		d, _ := startLossy(t)
		for range 20 {
			time.Sleep(3 * time.Second)
			d.Edit(func(s dataplane.State) { clear(s) })
		}
		time.Sleep(100 * time.Millisecond)
		before := d.calls.Load()
		d.lose()
		time.Sleep(promptly)
		if got := d.calls.Load() - before; got == 0 {
			t.Error("a loss was not repaired immediately after repeated drift")
		}

		d.broken.Store(true)
		d.lose()
		time.Sleep(5 * time.Minute)
		before = d.calls.Load()
		time.Sleep(time.Minute)
		if got := d.calls.Load() - before; got > 4 {
			t.Errorf("%d attempts in one minute without a change, want at most 4", got)
		}
		d.broken.Store(false)
		before = d.calls.Load()
		d.lose()
		time.Sleep(promptly)
		if got := d.calls.Load() - before; got == 0 {
			t.Error("a loss was not repaired immediately after failures")
		}
	})
}

// If each Replace conflicts with another program for half a minute, the state is repaired as soon
// as the conflicts stop.
func TestConflictsDoNotBackOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, s := startLossy(t)
		d.conflict.Store(true)
		before := d.calls.Load()
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			d.lose()
		}
		if got := d.calls.Load() - before; got > 3000 {
			t.Errorf("%d calls in 30s, want a delay between them", got)
		}
		d.conflict.Store(false)
		time.Sleep(25 * time.Millisecond)
		if st := s.Status(); st.Err != nil {
			t.Errorf("still failing after the conflicts stopped: %v", st.Err)
		}
		got, err := d.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := dataplane.StateOf(slices.Values([]*dataplane.Service{service(1, 1)})).Diff(got); diff != "" {
			t.Errorf("kernel state after the conflicts stopped:\n%s", diff)
		}
	})
}

// Replace repairs drift that was reported before it began.
func TestReplaceCoversPendingDrift(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1)))
		fx.kernel.Edit(func(dataplane.State) {})
		fx.FinishInitialList()
		fx.waitSynced()
		for i := range 20 {
			time.Sleep(sync.DefaultRetryMax)
			release := fx.faulty.Hold()
			fx.Update(upserts(service(1, i+2)))
			synctest.Wait()
			fx.kernel.Edit(func(s dataplane.State) { clear(s) })
			fx.SetNode(dataplane.Node{PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10}), i+1)}})
			release()
			synctest.Wait()
			fx.checkKernel(service(1, i+2))
			if commits := fx.newCommits(); len(commits) != 2 {
				t.Fatalf("commits %s, want one Apply and one Replace", summarize(commits))
			}
		}
	})
}

// closedDrift is a dataplane that closes its Drift channel.
type closedDrift struct{ *fake.Dataplane }

func (closedDrift) Drift() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

func TestClosedDriftChannel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kernel := fake.New(fake.Options{})
		s := sync.New(closedDrift{kernel}, sync.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = s.Run(ctx) }()
		s.Update(upserts(service(1, 1)))
		s.FinishInitialList()
		if err := s.WaitSynced(ctx); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // does not return if Run is never blocked
		if n := kernel.Counts().Replaces; n != 1 {
			t.Errorf("%d Replaces, want 1", n)
		}
	})
}

func TestNodeChangeReplaces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		fx.SetNode(dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}})
		fx.Update(upserts(service(2, 1)))
		fx.checkCommits(fx.waitSynced(), "replace(node) 1")
		fx.checkKernel(service(1, 1), service(2, 1))
	})
}

func TestResync(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{ResyncPeriod: time.Minute})
		defer fx.stop()
		fx.FinishInitialList()
		fx.waitSynced()
		time.Sleep(3*time.Minute + time.Second)
		fx.checkCommits(fx.newCommits(), "replace(resync) 0; replace(resync) 0; replace(resync) 0")
	})
}

func TestCancelDuringCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.waitSynced()
		release := fx.faulty.Hold()
		defer release()
		fx.Update(upserts(service(1, 2)))
		synctest.Wait()
		fx.newLog()
		waited := make(chan error, 1)
		go func() { waited <- fx.WaitSynced(t.Context()) }()
		synctest.Wait()
		fx.stop()
		if err := <-waited; !errors.Is(err, sync.ErrStopped) {
			t.Errorf("WaitSynced returned %v, want ErrStopped", err)
		}
		fx.checkCommits(fx.newCommits(), "")
		if log := fx.newLog(); log != "" {
			t.Errorf("log %q after a cancelled call, want no output", log)
		}
		fx.checkKernel(service(1, 1))
		fx.Update(upserts(service(1, 3))) // has no effect
		if err := fx.Run(t.Context()); err == nil {
			t.Error("a second Run returned no error")
		}
	})
}

func TestWaitSyncedContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := fx.WaitSynced(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("WaitSynced returned %v before the initial list was complete, want DeadlineExceeded", err)
		}
	})
}

func TestMismatchedKeyIgnored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fx := startSyncer(t, fake.New(fake.Options{}), sync.Options{})
		defer fx.stop()
		fx.FinishInitialList()
		fx.Update(updates{service(1, 1).Key: service(2, 1), service(3, 1).Key: service(3, 1)})
		fx.waitSynced()
		fx.checkKernel(service(3, 1))
		if log := fx.newLog(); !strings.Contains(log, "level=ERROR") || !strings.Contains(log, "default/s2") {
			t.Errorf("log %q, want an error with default/s2", log)
		}
	})
}

// TestRandomHistories updates Services that compete for frontends, on kernels with all kinds of
// faults. When the faults have stopped, the kernel holds the desired state and the syncer makes
// no more calls.
func TestRandomHistories(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		kernel fake.Options
		faults fake.Faults
	}{
		"atomic": {
			fake.Options{},
			fake.Faults{Reject: 0.1, Lose: 0.1, Partial: 0.1, Keys: 0.3, Drift: 0.05, MaxDelay: 50 * time.Millisecond},
		},
		"strict": {
			fake.Options{Strict: true},
			fake.Faults{Reject: 0.1, Lose: 0.1, Drift: 0.1, MaxDelay: 50 * time.Millisecond},
		},
		"strict, no faults": {
			fake.Options{Strict: true},
			fake.Faults{MaxDelay: 50 * time.Millisecond},
		},
		"per object": {
			fake.Options{PerObject: true},
			fake.Faults{Reject: 0.05, Lose: 0.05, Partial: 0.1, Keys: 0.3, Drift: 0.05, MaxDelay: 50 * time.Millisecond},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(300) {
				synctest.Test(t, func(t *testing.T) {
					randomHistory(t, seed, tt.kernel, tt.faults)
				})
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

func randomHistory(t *testing.T, seed uint64, opts fake.Options, faults fake.Faults) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 3))
	unsupported := func(s *dataplane.Service) bool { return len(s.Endpoints) == 5 }
	opts.Unsupported = func(s *dataplane.Service) error {
		if unsupported(s) {
			return errors.New("five endpoints")
		}
		return nil
	}
	fx := startSyncer(t, fake.New(opts), sync.Options{})
	defer fx.stop()
	fx.faulty.Set(faults)
	inline := seed%2 == 1

	const n = 6
	owner := [n]int{0, 1, 2, 3, 4, 5} // of each frontend; n for no owner
	endpoints := [n]int{}
	desired := updates{}
	for round := range 40 {
		for range 1 + rnd.IntN(3) {
			if rnd.IntN(2) == 0 {
				owner[rnd.IntN(n)] = rnd.IntN(n + 1)
			} else {
				endpoints[rnd.IntN(n)] = rnd.IntN(6)
			}
		}
		changes := updates{}
		for i := range n {
			s := service(i, endpoints[i])
			s.Frontends = nil
			for f, o := range owner {
				if o == i {
					s.Frontends = append(s.Frontends, service(f, 0).Frontends...)
				}
			}
			if len(s.Frontends) == 0 {
				s = nil
			}
			k := service(i, 0).Key
			if !s.Equal(desired[k]) || rnd.IntN(4) == 0 {
				changes[k] = s
				desired[k] = s
			}
		}
		if inline {
			fx.UpdateInline(changes)
		} else {
			fx.Update(changes)
		}
		if round == 3 {
			fx.FinishInitialList()
		}
		if rnd.IntN(10) == 0 {
			fx.SetNode(dataplane.Node{PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10}), rnd.IntN(3)+8)}})
		}
		time.Sleep(time.Duration(rnd.Int64N(int64(200 * time.Millisecond))))
	}
	if err := fx.WaitSynced(t.Context()); err != nil {
		t.Fatal(err)
	}
	if faults.Keys == 0 && faults.Lose == 0 {
		for _, c := range fx.newCommits() {
			for k, err := range c.Failed {
				if !errors.Is(err, dataplane.ErrUnsupported) {
					t.Errorf("without faults, %s failed: %v", k, err)
				}
			}
		}
	}
	fx.faulty.Set(fake.Faults{})
	time.Sleep(2 * sync.DefaultRetryMax)
	fx.newCommits()

	var want []*dataplane.Service
	failing := map[dataplane.Key]bool{}
	for k, s := range desired {
		switch {
		case s == nil:
		case unsupported(s):
			failing[k] = true
		default:
			want = append(want, s)
		}
	}
	fx.checkKernel(want...)
	st := fx.Status()
	if len(st.Failing) != len(failing) || st.Err != nil || !st.PendingSince.IsZero() {
		t.Errorf("status %+v, want %v failing as unsupported and no other error", st, slices.Collect(maps.Keys(failing)))
	}
	before := fx.kernel.Counts()
	time.Sleep(time.Hour)
	if after := fx.kernel.Counts(); after.Replaces != before.Replaces || after.Applies != before.Applies {
		t.Errorf("calls continue although the state is as desired: %+v, then %+v", before, after)
	}
}

// One changed Service costs one dataplane call with one change, regardless of the number of
// Services. The benchmarks show the cost in the syncer.
func TestCostProportionalToChange(t *testing.T) {
	t.Parallel()
	for _, n := range []int{100, 10_000} {
		synctest.Test(t, func(t *testing.T) {
			fx := startSyncer(t, fake.New(fake.Options{Strict: true}), sync.Options{})
			defer fx.stop()
			all := updates{}
			for i := range n {
				s := service(i, 3)
				all[s.Key] = s
			}
			fx.Update(all)
			fx.FinishInitialList()
			fx.waitSynced()
			before := fx.kernel.Counts()
			fx.Update(upserts(service(n/2, 4)))
			fx.checkCommits(fx.waitSynced(), "apply(change) 1")
			after := fx.kernel.Counts()
			if got := after.Writes - before.Writes; got != 1 || after.Applies != before.Applies+1 || after.Replaces != before.Replaces {
				t.Errorf("%d Services: %+v, then %+v, want one Apply with one write", n, before, after)
			}
		})
	}
}

// prefetcher counts the calls of Prefetch and keeps the last desired state.
type prefetcher struct {
	dataplane.Dataplane
	calls    atomic.Int32
	node     dataplane.Node
	services []dataplane.Key
}

func (p *prefetcher) Prefetch(_ context.Context, desired dataplane.Desired) error {
	p.calls.Add(1)
	p.node, p.services = desired.Node, nil
	for s := range desired.Services {
		p.services = append(p.services, s.Key)
	}
	return nil
}

// TestPrepare checks that Prepare prefetches with the newest complete input, that it programs
// nothing, and that Run programs the input at once.
func TestPrepare(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		kernel := fake.New(fake.Options{})
		p := &prefetcher{Dataplane: kernel}
		s := sync.New(p, sync.Options{})
		done := make(chan struct{})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.Prepare(t.Context(), done)
		}()
		one, two := service(1, 1), service(2, 2)
		node := dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
		s.SetNode(node)
		s.Update(updates{one.Key: one})
		time.Sleep(time.Minute)
		if n := p.calls.Load(); n != 0 {
			t.Errorf("%d prefetches before the initial list is complete, want 0", n)
		}
		s.FinishInitialList()
		time.Sleep(time.Second)
		s.Update(updates{two.Key: two})
		time.Sleep(time.Second)
		synctest.Wait()
		if want := []dataplane.Key{one.Key, two.Key}; !slices.Equal(p.services, want) || !p.node.Equal(node) {
			t.Errorf("the last prefetch got the Services %v and the node %v, want %v and %v", p.services, p.node, want, node)
		}
		if n := p.calls.Load(); n < 5 || n > 10 {
			t.Errorf("%d prefetches in two seconds, want 5 to 10", n)
		}
		if counts := kernel.Counts(); counts != (fake.Counts{}) {
			t.Errorf("Prepare has written to the kernel: %+v", counts)
		}
		close(done)
		<-ended
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error, 1)
		go func() { stopped <- s.Run(ctx) }()
		if err := s.WaitSynced(t.Context()); err != nil {
			t.Error(err)
		}
		state, err := kernel.Read(t.Context())
		if err != nil {
			t.Error(err)
		}
		if want := dataplane.StateOf(slices.Values([]*dataplane.Service{one, two})); !state.Equal(want) {
			t.Error(want.Diff(state))
		}
		cancel()
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	})
}
