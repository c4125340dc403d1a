package conntrack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	stdsync "sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/dataplane/fake"
	"fairlead.io/fairlead/sync"
)

// fakeTable is a table in memory.
type fakeTable struct {
	mu      stdsync.Mutex
	flows   []flow
	lists   []query
	opens   int
	old     bool           // a kernel that ignores filters
	refuse  error          // of every call
	busy    netip.AddrPort // an endpoint whose entries can't be deleted
	listing func()         // called while a list is under way
}

func (t *fakeTable) open() (table, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.opens++
	return t, nil
}

func (*fakeTable) close() error { return nil }

func (t *fakeTable) list(_ context.Context, q query, visit func(flow) bool) (entries []entry, narrowed bool, err error) {
	t.mu.Lock()
	t.lists = append(t.lists, q)
	flows, refuse, listing := slices.Clone(t.flows), t.refuse, t.listing
	t.mu.Unlock()
	if refuse != nil {
		return nil, true, refuse
	}
	for _, f := range flows {
		if dataplane.FamilyOf(f.destination.Addr()) != q.family || !t.old && !q.covers(f) {
			continue
		}
		if visit(f) {
			entries = append(entries, entry{flow: f})
		}
	}
	if listing != nil {
		listing()
	}
	return entries, !t.old, nil
}

func (t *fakeTable) delete(_ context.Context, entries []entry) (n int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range entries {
		if e.endpoint == t.busy {
			err = unix.EBUSY
			continue
		}
		if i := slices.Index(t.flows, e.flow); i >= 0 {
			t.flows = slices.Delete(t.flows, i, i+1)
			n++
		}
	}
	return n, err
}

func (t *fakeTable) set(texts ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.flows = nil
	for _, text := range texts {
		f := addrPorts(text)
		t.flows = append(t.flows, flow{protocol: dataplane.UDP, destination: f[0], endpoint: f[1]})
	}
}

// onList has fn called once, at the end of the next list.
func (t *fakeTable) onList(fn func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.listing = stdsync.OnceFunc(fn)
}

// left returns the flows that are still there, and forgets the lists.
func (t *fakeTable) left() (texts []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lists = nil
	for _, f := range t.flows {
		texts = append(texts, fmt.Sprint(f.destination, " ", f.endpoint))
	}
	return texts
}

// running is a Cleaner with a table in memory, in a bubble of synctest.
type running struct {
	*Cleaner
	table *fakeTable
	log   *bytes.Buffer
	looks []Look
}

func start(t *testing.T) *running {
	t.Helper()
	r := &running{table: &fakeTable{}, log: &bytes.Buffer{}}
	logger := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	r.Cleaner = New(Options{Logger: logger, OnLook: func(l Look) { r.looks = append(r.looks, l) }})
	r.open = r.table.open
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func applied(pairs ...string) sync.Commit {
	return sync.Commit{Kind: sync.KindApply, Reason: sync.ReasonChange, Changes: changesOf(pairs...)}
}

func replaced(pairs ...string) sync.Commit {
	return sync.Commit{Kind: sync.KindReplace, Reason: sync.ReasonStart, Changes: changesOf(pairs...)}
}

func (r *running) want(t *testing.T, what string, flows ...string) {
	t.Helper()
	synctest.Wait()
	if diff := cmp.Diff(flows, r.table.left()); diff != "" {
		t.Errorf("%s: flows (-want +got)\n%s", what, diff)
	}
}

func TestCleaner(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		const (
			toA, toB, toC = "10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53", "10.96.0.10:53 10.0.0.3:53"
			foreign       = "8.8.8.8:53 8.8.8.8:53"
			nodeA, nodeC  = "192.0.2.1:30053 10.0.0.1:53", "192.0.2.1:30053 10.0.0.3:53"
		)
		const dns, node = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "node 0.0.0.0:30053 -> 10.0.0.1:53 10.0.0.2:53"
		r.table.set(toA, toC, foreign, nodeA, nodeC)
		r.want(t, "before anything", toA, toC, foreign, nodeA, nodeC)
		r.Committed(sync.Commit{Kind: sync.KindReplace, Err: errors.New("a call that failed")})
		r.want(t, "a call that failed", toA, toC, foreign, nodeA, nodeC)
		r.SetNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
		r.Committed(replaced("", dns, "", node))
		r.want(t, "the start", toA, foreign, nodeA)
		if len(r.looks) != 1 || r.looks[0].Family != dataplane.IPv4 || r.looks[0].Deleted != 2 || r.looks[0].Err != nil {
			t.Errorf("looks %+v, want one at IPv4 that deleted 2", r.looks)
		}

		r.table.set(toA, toB, toC)
		r.Committed(applied(dns, "dns 10.96.0.10:53 -> 10.0.0.1:53"))
		r.want(t, "an endpoint leaves, and the second look after the start is due later", toA, toC)
		time.Sleep(secondLook)
		r.want(t, "the second look after the start", toA)
		// In a queue to user space until now.
		r.table.set(toA, toB)
		time.Sleep(secondLook - time.Nanosecond)
		r.want(t, "a moment before the second look", toA, toB)
		time.Sleep(time.Nanosecond)
		r.want(t, "the second look after the endpoint left", toA)

		r.table.set(toA)
		lists := len(r.looks)
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(r.looks) != lists {
			t.Error("it looks although nothing happens")
		}
		r.Committed(applied("dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.4:53"))
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(r.looks) != lists {
			t.Error("it looks although nothing can be stale")
		}
		if r.log.Len() > 0 {
			t.Errorf("logged:\n%s", r.log)
		}
	})
}

// TestManyChangesShareALook says that what is told while a look is under way is
// looked at together, and against the last of it.
func TestManyChangesShareALook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		var before, after []string
		for i := range 10 {
			before = append(before, "", fmt.Sprintf("s%d 10.96.0.%d:53 -> 10.0.0.1:53 10.0.0.2:53", i, i))
			after = append(after, before[2*i+1], fmt.Sprintf("s%d 10.96.0.%d:53 -> 10.0.0.1:53", i, i))
		}
		r.Committed(replaced(before...))
		time.Sleep(time.Minute)
		synctest.Wait()
		r.table.left()

		release := make(chan struct{})
		r.table.onList(func() { <-release })
		r.table.set("10.96.0.0:53 10.0.0.2:53", "10.96.0.9:53 10.0.0.2:53", "10.96.0.1:53 10.0.0.2:53", "10.96.0.2:53 10.0.0.2:53")
		r.Committed(applied(after[:2]...))
		synctest.Wait()
		for i := 1; i < 10; i++ {
			r.Committed(applied(after[2*i : 2*i+2]...))
		}
		// It is back, as is the flow to it.
		r.Committed(applied(after[2*9+1], before[2*9+1]))
		// One Service goes altogether, after its endpoint.
		r.Committed(applied(after[2*2+1], ""))
		r.table.mu.Lock()
		if len(r.table.lists) != 1 {
			t.Errorf("%d dumps before the first is over, want 1", len(r.table.lists))
		}
		r.table.mu.Unlock()
		close(release)
		synctest.Wait()
		r.table.mu.Lock()
		if len(r.table.lists) != 2 {
			t.Errorf("%d dumps %v, want 2", len(r.table.lists), r.table.lists)
		}
		r.table.mu.Unlock()
		r.want(t, "after both", "10.96.0.9:53 10.0.0.2:53")
	})
}

// TestLooksLeaveTime says that Services that keep changing do not occupy a
// processor, and that one that changes alone does not wait.
func TestLooksLeaveTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		const both, one = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "dns 10.96.0.10:53 -> 10.0.0.1:53"
		r.Committed(replaced("", both))
		time.Sleep(time.Hour)
		r.table.left()
		begin := time.Now()
		for time.Since(begin) < 790*time.Millisecond {
			r.table.onList(func() { time.Sleep(10 * time.Millisecond) })
			r.Committed(applied(both, one))
			r.Committed(applied(one, both))
			time.Sleep(time.Millisecond)
		}
		r.table.mu.Lock()
		if n := len(r.table.lists); n != 16 {
			t.Errorf("%d looks of 10 ms in 790 ms, want 16", n)
		}
		r.table.mu.Unlock()

		time.Sleep(time.Hour)
		r.table.set("10.96.0.10:53 10.0.0.2:53")
		r.Committed(applied(both, one))
		r.want(t, "at once")
	})
}

// TestAnEndpointThatIsBack says that a flow is judged by what was told last, even
// while the kernel lists.
func TestAnEndpointThatIsBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		const both, one = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "dns 10.96.0.10:53 -> 10.0.0.1:53"
		r.Committed(replaced("", both))
		time.Sleep(time.Minute)
		r.table.set("10.96.0.10:53 10.0.0.2:53")
		r.table.onList(func() { r.Committed(applied(one, both)) })
		r.Committed(applied(both, one))
		r.want(t, "back again", "10.96.0.10:53 10.0.0.2:53")
	})
}

// TestOldKernels says that one dump serves for all where filters are ignored.
func TestOldKernels(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		r.table.old = true
		r.table.set("10.96.0.10:53 10.0.0.9:53", "10.96.0.11:54 10.0.0.9:53", "10.96.0.12:55 10.0.0.9:53", "[fd00:96::10]:53 [fd01::9]:53")
		r.Committed(replaced(
			"", "a 10.96.0.10:53 -> 10.0.0.1:53", "", "b 10.96.0.11:54 -> 10.0.0.1:53", "", "c [fd00:96::10]:53 -> [fd01::1]:53",
		))
		synctest.Wait()
		r.table.mu.Lock()
		if n := len(r.table.lists); n != 2 {
			t.Errorf("%d dumps, want one a family", n)
		}
		r.table.mu.Unlock()
		r.want(t, "all", "10.96.0.12:55 10.0.0.9:53")
	})
}

// TestFailures says that a kernel that refuses is reported once, nothing is
// forgotten meanwhile, and all is made good when it no longer refuses.
func TestFailures(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		const dns, other = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "other 10.96.0.11:53 -> 10.0.0.1:53"
		r.table.refuse = explain(unix.EPERM)
		r.Committed(replaced("", dns, "", other))
		r.table.set("10.96.0.10:53 10.0.0.2:53", "10.96.0.11:53 10.0.0.1:53", "10.96.0.11:53 10.96.0.11:53")
		r.Committed(applied(dns, ""))
		r.Committed(applied(other, ""))
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := strings.Count(r.log.String(), "\n"); n != 1 || !strings.Contains(r.log.String(), "CAP_NET_ADMIN") ||
			!strings.Contains(r.log.String(), "level=WARN") {
			t.Errorf("logged:\n%swant one warning that names the capability", r.log)
		}
		if n := r.table.opens; n < 10 || n > 30 {
			t.Errorf("%d attempts in 10 minutes, want one a minute in the end", n)
		}
		for _, look := range r.looks {
			if look.Err == nil {
				t.Errorf("look %+v: want an error", look)
			}
		}
		r.log.Reset()
		r.table.mu.Lock()
		r.table.refuse = nil
		r.table.mu.Unlock()
		time.Sleep(time.Minute + secondLook)
		r.want(t, "allowed again", "10.96.0.11:53 10.96.0.11:53")
		if n := strings.Count(r.log.String(), "\n"); n != 1 || !strings.Contains(r.log.String(), "removed again") {
			t.Errorf("logged:\n%swant one line", r.log)
		}
	})
}

// TestBusyEntries says that an entry that can't be deleted yet holds nothing up.
func TestBusyEntries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		const dns, other = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "other 10.96.0.11:53 -> 10.0.0.1:53"
		r.Committed(replaced("", dns, "", other))
		r.table.set("10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53", "10.96.0.11:53 10.0.0.1:53")
		r.table.busy = netip.MustParseAddrPort("10.0.0.2:53")
		r.Committed(applied(dns, "dns 10.96.0.10:53 ->"))
		r.want(t, "one is busy", "10.96.0.10:53 10.0.0.2:53", "10.96.0.11:53 10.0.0.1:53")
		r.Committed(applied(other, ""))
		r.want(t, "the other Service is not held up", "10.96.0.10:53 10.0.0.2:53")
		r.table.mu.Lock()
		r.table.busy = netip.AddrPort{}
		r.table.mu.Unlock()
		time.Sleep(retryMax)
		r.want(t, "busy no longer")
	})
}

// TestServingReachesListeners says that a change of what only serves on is
// committed, without a write, and told.
func TestServingReachesListeners(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dp := fake.New(fake.Options{Strict: true})
		var commits []sync.Commit
		s := sync.New(dp, sync.Options{OnCommit: func(c sync.Commit) { commits = append(commits, c) }})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		give := func(svc *dataplane.Service) {
			s.Update(map[dataplane.Key]*dataplane.Service{svc.Key: svc})
			synctest.Wait()
		}
		s.ListComplete()
		give(service("dns 10.96.0.10:53 -> 10.0.0.1:53 (10.0.0.2:53)"))
		writes := dp.Counts().Writes
		give(service("dns 10.96.0.10:53 -> 10.0.0.1:53"))
		give(service("dns 10.96.0.10:53 -> 10.0.0.1:53"))
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		last := commits[len(commits)-1]
		if len(last.Changes) != 1 || len(last.Changes[0].Old.Serving) != 1 || len(last.Changes[0].New.Serving) != 0 || last.Kind != sync.KindApply {
			t.Errorf("the last commit is %+v", last)
		}
		if n := dp.Counts(); n.Writes != writes || n.Applies > 2 {
			t.Errorf("%+v, want no more than %d writes, and none for what has not changed", n, writes)
		}
	})
}
