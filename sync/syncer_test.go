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

// The tests run in synctest bubbles: time stands still while anything can run,
// and a bubble ends only when all of its goroutines have, so each of them also
// checks that Run leaves none behind.

type updates = map[dataplane.Key]*dataplane.Service

// fixture is a Syncer that runs, on a fake kernel that can misbehave.
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

// Write makes the fixture the end of a log.
func (fx *fixture) Write(p []byte) (int, error) {
	fx.mu.Lock()
	defer fx.mu.Unlock()
	return fx.log.Write(p)
}

// startSyncer runs a Syncer in the bubble that the test is in.
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

// waitSynced waits until all that was handed over has been tried, and returns the
// commits since the last settle.
func (fx *fixture) waitSynced() []sync.Commit {
	fx.t.Helper()
	if err := fx.WaitSynced(fx.t.Context()); err != nil {
		fx.t.Fatal(err)
	}
	return fx.newCommits()
}

// newCommits returns the commits since it was called last, when nothing can run any
// more.
func (fx *fixture) newCommits() []sync.Commit {
	synctest.Wait()
	fx.mu.Lock()
	defer fx.mu.Unlock()
	commits := fx.commits
	fx.commits = nil
	return commits
}

// newLog returns the log since it was called last.
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
		fx.t.Errorf("the kernel does not hold what it should:\n%s", diff)
	}
}

// service returns Service number n with the endpoints 1 to endpoints.
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

// summarize describes commits by verb, reason and the number of changes and failed
// keys.
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
		left := service(9, 1) // by an earlier run
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
			t.Errorf("the commit has %d Services, the oldest handed over %v before, want 2 and 1h", c.Services, c.End.Sub(c.OldestUpdate))
		}
		if st := fx.Status(); !st.PendingSince.IsZero() || st.Services != 2 || !st.LastSuccess.Equal(time.Now()) {
			t.Errorf("status %+v after everything was programmed", st)
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
		began := time.Now()

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
		if time.Since(began) != 0 {
			t.Errorf("it took %v, want no waiting at all", time.Since(began))
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
			t.Errorf("calls and writes %+v, want none after %+v", got, before)
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
		fx.Update(upserts(service(2, 2))) // changed three times: the last counts
		fx.Update(deletions(service(2, 1)))
		fx.Update(upserts(service(2, 3)))
		fx.Update(upserts(service(3, 2))) // undone
		fx.Update(upserts(service(3, 1)))
		fx.Update(upserts(service(4, 1))) // created and gone again
		fx.Update(deletions(service(4, 1)))
		time.Sleep(time.Second)
		if st := fx.Status(); !st.CallSince.Equal(inFlight) || !st.PendingSince.Equal(inFlight) {
			t.Errorf("call since %v, pending since %v, want both %v", st.CallSince, st.PendingSince, inFlight)
		}
		release()
		commits := fx.waitSynced()
		fx.checkCommits(commits, "apply(change) 1; apply(change) 1")
		if c := commits[0]; c.End.Sub(c.Start) != 2*time.Second || c.End.Sub(c.OldestUpdate) != 2*time.Second {
			t.Errorf("the first commit took %v, and %v since its Update, want 2s", c.End.Sub(c.Start), c.End.Sub(c.OldestUpdate))
		}
		if c := commits[1]; c.Changes[0].New.Key != service(2, 3).Key || c.End.Sub(c.OldestUpdate) != time.Second {
			t.Errorf("the second commit: %v, after %v, want default/s2, 1s", c.Changes[0], c.End.Sub(c.OldestUpdate))
		}
		fx.checkKernel(service(1, 2), service(2, 3), service(3, 1))
		if st := fx.Status(); !st.CallSince.IsZero() || !st.PendingSince.IsZero() {
			t.Errorf("call since %v, pending since %v, want neither", st.CallSince, st.PendingSince)
		}
	})
}

// What is in flight is not undone by being absent from the kernel yet.
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
			t.Errorf("the first run wrote %d times, the second %d times, want some and none", before.Writes, n)
		}
	})
}

// failServices makes Services fail that are in it, by name.
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
			t.Errorf("status %+v, want default/s1 failing and nothing pending", st)
		}
		if log := fx.newLog(); strings.Count(log, "\n") != 1 || !strings.Contains(log, `msg="service failed" service="default/s1 IPv4"`) ||
			!strings.Contains(log, `error="no memory"`) {
			t.Errorf("log %q, want one line that names the Service and the error", log)
		}

		// The others go on, by Apply.
		fx.Update(upserts(service(3, 1)))
		fx.checkCommits(fx.waitSynced(), "apply(change) 1")
		fx.checkKernel(service(1, 1), service(2, 2), service(3, 1))

		// It is tried again after delays that double, up to a limit, and says
		// no more in the log.
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
				t.Errorf("delay %d is %v, want %v less at most a quarter", i, d, full)
			}
			full = min(2*full, sync.DefaultRetryMax)
		}
		if full != sync.DefaultRetryMax {
			t.Errorf("the delays end with %v, want the limit to be reached", delays)
		}
		if log := fx.newLog(); log != "" {
			t.Errorf("log %q while nothing new happens, want nothing", log)
		}

		fx.faulty.Set(fake.Faults{})
		time.Sleep(sync.DefaultRetryMax)
		commits = fx.newCommits()
		fx.checkCommits(commits, "replace(retry) 1")
		if c := commits[0].Changes[0]; !c.Old.Equal(service(1, 1)) || !c.New.Equal(service(1, 2)) {
			t.Errorf("the change that took at last is %v", c)
		}
		if c := commits[0]; c.End.Sub(c.OldestUpdate) < time.Minute {
			t.Errorf("the oldest change is %v old, want it since the first attempt", c.End.Sub(c.OldestUpdate))
		}
		fx.checkKernel(service(1, 2), service(2, 2), service(3, 1))
		if log := fx.newLog(); !strings.Contains(log, `msg="service no longer fails" service="default/s1 IPv4"`) {
			t.Errorf("log %q, want it to say that default/s1 no longer fails", log)
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
		began := time.Now()
		fx.Update(upserts(service(1, 2)))
		fx.checkCommits(fx.waitSynced(), "replace(retry) 1")
		if d := time.Since(began); d > sync.DefaultRetryMin {
			t.Errorf("tried after %v, want %v at most", d, sync.DefaultRetryMin)
		}
		fx.checkKernel(service(1, 2))
	})
}

// Each attempt to repair is a Replace, so a failing Service that changes all the
// time must not cause one all the time.
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
			t.Errorf("Replace took %v of 10m, want a tenth at most", busy)
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
			t.Errorf("%d attempts in a minute, want one every 30s", n)
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
			t.Errorf("change %v, want the Service that was last known to be there to go", c)
		}
		fx.checkKernel()
		if st := fx.Status(); len(st.Failing) != 0 || st.Services != 0 {
			t.Errorf("status %+v, want nothing", st)
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
		if n := strings.Count(log, "service failed"); n != 10 || !strings.Contains(log, `msg="more services failed" services=990`) {
			t.Errorf("%d Services are named, want 10 and the number of the others:\n%s", n, log)
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

		// A Replace does not offer it again.
		fx.SetNode(dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}})
		fx.checkCommits(fx.waitSynced(), "replace(node) 0")

		// One that was programmed is taken out when it becomes unsupported.
		fx.Update(upserts(service(2, 7)))
		commits := fx.waitSynced()
		fx.checkCommits(commits, "apply(change) 1 failed 1")
		if c := commits[0].Changes[0]; !c.Old.Equal(service(2, 1)) || c.New != nil {
			t.Errorf("change %v, want what was there to go", c)
		}
		fx.checkKernel(service(3, 1))

		// A change is tried, from nothing: the strict kernel would refuse an Old.
		fx.Update(upserts(service(1, 2), service(2, 2)))
		fx.checkCommits(fx.waitSynced(), "apply(change) 2")
		fx.checkKernel(service(1, 2), service(2, 2), service(3, 1))
		if st := fx.Status(); len(st.Failing) != 0 {
			t.Errorf("failing %v, want none", st.Failing)
		}

		// A deletion costs nothing.
		fx.Update(upserts(service(1, 7)))
		fx.waitSynced()
		fx.Update(deletions(service(1, 7)))
		fx.checkCommits(fx.waitSynced(), "")
		if st := fx.Status(); len(st.Failing) != 0 || st.Services != 2 {
			t.Errorf("status %+v, want 2 Services and none failing", st)
		}

		// It stays left out after everything was unknown, unless it changed.
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
		began := time.Now()
		fx.Update(upserts(service(1, 1)))
		fx.FinishInitialList()
		fx.checkCommits(fx.waitSynced(), "replace(start) 0 failed")
		if log := fx.newLog(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "no netlink") {
			t.Errorf("log %q, want one line", log)
		}
		if st := fx.Status(); st.Err == nil || !st.LastSuccess.IsZero() || !st.PendingSince.Equal(began) {
			t.Errorf("status %+v, want the error, no success, and pending since the start", st)
		}
		// Neither changes nor drift nor the node hurry it.
		fx.Update(upserts(service(1, 2)))
		fx.SetNode(dataplane.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}})
		fx.kernel.Edit(func(dataplane.State) {})
		fx.checkCommits(fx.newCommits(), "")
		fx.checkCommits(fx.waitSynced(), "replace(start) 0 failed")
		if d := time.Since(began); d > time.Second || d < 750*time.Millisecond {
			t.Errorf("the second attempt came after %v, want 1s less at most a quarter", d)
		}
		time.Sleep(time.Minute)
		if n := len(fx.newCommits()); n < 15 || n > 22 {
			t.Errorf("%d attempts in a minute, want one every 3 to 4 s", n)
		}
		if log := fx.newLog(); log != "" {
			t.Errorf("log %q while nothing new happens, want nothing", log)
		}
		fx.faulty.Set(fake.Faults{})
		time.Sleep(4 * time.Second)
		commits := fx.newCommits()
		fx.checkCommits(commits, "replace(start) 1")
		if !commits[0].OldestUpdate.Equal(began) {
			t.Errorf("the oldest change is from %v, want %v", commits[0].OldestUpdate, began)
		}
		fx.checkKernel(service(1, 2))
		if log := fx.newLog(); !strings.Contains(log, "dataplane works again") {
			t.Errorf("log %q, want it to say that the dataplane works again", log)
		}

		// An Apply that fails as a whole may have been taken.
		fx.faulty.Set(fake.Faults{Lose: 1})
		fx.Update(upserts(service(1, 3)))
		began = time.Now()
		fx.checkCommits(fx.waitSynced(), "apply(change) 0 failed")
		if st := fx.Status(); !st.PendingSince.Equal(began) {
			t.Errorf("pending since %v, want %v", st.PendingSince, began)
		}
		fx.faulty.Set(fake.Faults{})
		fx.Update(upserts(service(1, 2), service(2, 1)))
		commits = fx.waitSynced()
		fx.checkCommits(commits, "replace(retry) 1")
		if d := time.Since(began); d > time.Second || !commits[0].OldestUpdate.Equal(began) {
			t.Errorf("repaired after %v, the oldest change from %v: want 1s at most, as after a first failure, and %v",
				d, commits[0].OldestUpdate, began)
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

		for range 3 { // Rare drift is always repaired at once.
			time.Sleep(sync.DefaultRetryMax)
			edit()
			fx.checkCommits(fx.newCommits(), "replace(drift) 0")
			fx.checkKernel(service(1, 1))
		}

		// Somebody who edits a thousand times a second is answered once a second.
		repairs := 0
		for range 60_000 {
			time.Sleep(time.Millisecond)
			edit()
			repairs += len(fx.newCommits())
		}
		if repairs < 60 || repairs > 85 {
			t.Errorf("%d repairs in a minute of fighting, want one for each second or little less", repairs)
		}
		time.Sleep(sync.DefaultRetryMax)
		fx.newCommits()
		fx.checkKernel(service(1, 1))

		// And at once again when it has been quiet.
		time.Sleep(sync.DefaultRetryMax)
		edit()
		fx.checkCommits(fx.newCommits(), "replace(drift) 0")
		fx.checkKernel(service(1, 1))
	})
}

// lossy is a dataplane that tells losses, and whose calls can fail by a conflict.
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

// A loss is repaired at once whatever came before: many other edits, or a failure
// that is tried again less and less often.
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
			t.Error("after many edits a loss was not repaired at once")
		}

		d.broken.Store(true)
		d.lose()
		time.Sleep(5 * time.Minute)
		before = d.calls.Load()
		time.Sleep(time.Minute)
		if got := d.calls.Load() - before; got > 4 {
			t.Errorf("%d attempts in a minute although nothing changed", got)
		}
		d.broken.Store(false)
		before = d.calls.Load()
		d.lose()
		time.Sleep(promptly)
		if got := d.calls.Load() - before; got == 0 {
			t.Error("after failures a loss was not repaired at once")
		}
	})
}

// A disturbance of half a minute, in which each Replace conflicts with somebody else,
// is over as soon as it ends.
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
			t.Errorf("%d calls in 30 s, want pauses between them", got)
		}
		d.conflict.Store(false)
		time.Sleep(25 * time.Millisecond)
		if st := s.Status(); st.Err != nil {
			t.Errorf("still failing after the end: %v", st.Err)
		}
		got, err := d.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := dataplane.StateOf(slices.Values([]*dataplane.Service{service(1, 1)})).Diff(got); diff != "" {
			t.Errorf("after the end:\n%s", diff)
		}
	})
}

// Drift that is announced before a Replace begins is repaired by it.
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
				t.Fatalf("commits %s, want an Apply and one Replace", summarize(commits))
			}
		}
	})
}

// closedDrift is a dataplane that has no more drift to announce.
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
		time.Sleep(time.Minute) // It would never end if Run never rested.
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
			t.Errorf("log %q, want nothing about an orderly end", log)
		}
		fx.checkKernel(service(1, 1))
		fx.Update(upserts(service(1, 3))) // is of no use, and harmless
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
			t.Errorf("WaitSynced returned %v before the list is complete, want DeadlineExceeded", err)
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
			t.Errorf("log %q, want an error that names default/s2", log)
		}
	})
}

// Random updates of Services that fight over frontends, on kernels with all
// kinds of faults. When the faults have stopped, the kernel holds what is
// wanted, and nothing is left to do.
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

	const n = 6
	owner := [n]int{0, 1, 2, 3, 4, 5} // of each frontend; n for nobody
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
		fx.Update(changes)
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
		t.Errorf("status %+v, want %v failing for being unsupported and all else well", st, slices.Collect(maps.Keys(failing)))
	}
	before := fx.kernel.Counts()
	time.Sleep(time.Hour)
	if after := fx.kernel.Counts(); after.Replaces != before.Replaces || after.Applies != before.Applies {
		t.Errorf("calls go on after all is well: %+v, then %+v", before, after)
	}
}

// One changed Service costs the dataplane one call with one change, however many
// Services there are. (What it costs the syncer itself, the benchmarks show.)
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
				t.Errorf("%d Services: %+v, then %+v, want one Apply that writes once", n, before, after)
			}
		})
	}
}
