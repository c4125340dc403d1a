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
	mu             stdsync.Mutex
	flows          []flow
	dumps          []query
	opens          int
	ignoresFilters bool           // like kernels before 5.8
	err            error          // returned by dump
	busyEndpoint   netip.AddrPort // an endpoint whose entries cannot be deleted
	afterDump      func()         // called at the end of a dump
	events         *fakeEvents    // nil if the kernel makes no events
	dumpCount      int            // not reset by remaining
}

func (t *fakeTable) open() (table, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.opens++
	return t, nil
}

func (*fakeTable) close() error { return nil }

func (t *fakeTable) listen() (flowEvents, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.events == nil {
		return nil, ErrEventsOff
	}
	t.events.listeners++
	return t.events, nil
}

func (t *fakeTable) dump(_ context.Context, q query, visit func(flow) bool) (entries []entry, narrowed bool, err error) {
	t.mu.Lock()
	t.dumps = append(t.dumps, q)
	t.dumpCount++
	flows, refuse, listing := slices.Clone(t.flows), t.err, t.afterDump
	t.mu.Unlock()
	if refuse != nil {
		return nil, true, refuse
	}
	for _, f := range flows {
		if dataplane.FamilyOf(f.destination.Addr()) != q.family || !t.ignoresFilters && !q.matches(f) {
			continue
		}
		if visit(f) {
			entries = append(entries, entry{flow: f})
		}
	}
	if listing != nil {
		listing()
	}
	return entries, !t.ignoresFilters, nil
}

func (t *fakeTable) delete(_ context.Context, entries []entry) (n int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range entries {
		if e.endpoint == t.busyEndpoint {
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

func (t *fakeTable) setFlows(texts ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.flows = nil
	for _, text := range texts {
		f := parseAddrPorts(text)
		t.flows = append(t.flows, flow{protocol: dataplane.UDP, destination: f[0], endpoint: f[1]})
	}
}

// onNextDump makes the next dump call fn once, before it returns.
func (t *fakeTable) onNextDump(fn func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.afterDump = stdsync.OnceFunc(fn)
}

// remaining returns the remaining flows and resets dumps.
func (t *fakeTable) remaining() (texts []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dumps = nil
	for _, f := range t.flows {
		texts = append(texts, fmt.Sprint(f.destination, " ", f.endpoint))
	}
	return texts
}

// testCleaner is a running Cleaner with a table in memory, in a synctest bubble.
type testCleaner struct {
	*Cleaner
	table *fakeTable
	log   *bytes.Buffer
	scans []ScanResult
}

func startCleaner(t *testing.T) *testCleaner {
	t.Helper()
	r := &testCleaner{table: &fakeTable{}, log: &bytes.Buffer{}}
	logger := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	r.Cleaner = New(Options{Logger: logger, OnScan: func(l ScanResult) { r.scans = append(r.scans, l) }})
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

func applyCommit(pairs ...string) sync.Commit {
	return sync.Commit{Op: sync.OpApply, Reason: sync.ReasonChange, Changes: parseChanges(pairs...)}
}

func replaceCommit(pairs ...string) sync.Commit {
	return sync.Commit{Op: sync.OpReplace, Reason: sync.ReasonStart, Changes: parseChanges(pairs...)}
}

func (r *testCleaner) expectFlows(t *testing.T, what string, flows ...string) {
	t.Helper()
	synctest.Wait()
	if diff := cmp.Diff(flows, r.table.remaining()); diff != "" {
		t.Errorf("%s: flows (-want +got)\n%s", what, diff)
	}
}

func TestCleaner(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		const (
			toA, toB, toC = "10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53", "10.96.0.10:53 10.0.0.3:53"
			unrelated     = "8.8.8.8:53 8.8.8.8:53"
			nodeA, nodeC  = "192.0.2.1:30053 10.0.0.1:53", "192.0.2.1:30053 10.0.0.3:53"
		)
		const dns, node = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "node 0.0.0.0:30053 -> 10.0.0.1:53 10.0.0.2:53"
		r.table.setFlows(toA, toC, unrelated, nodeA, nodeC)
		r.expectFlows(t, "before any commit", toA, toC, unrelated, nodeA, nodeC)
		r.OnCommit(sync.Commit{Op: sync.OpReplace, Err: errors.New("failed call")})
		r.expectFlows(t, "after a failed call", toA, toC, unrelated, nodeA, nodeC)
		r.SetNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
		r.OnCommit(replaceCommit("", dns, "", node))
		r.expectFlows(t, "after the start", toA, unrelated, nodeA)
		if len(r.scans) != 1 || r.scans[0].Family != dataplane.IPv4 || r.scans[0].Deleted != 2 || r.scans[0].Err != nil {
			t.Errorf("scans %+v, want one of IPv4 that deleted 2", r.scans)
		}

		r.table.setFlows(toA, toB, toC)
		r.OnCommit(applyCommit(dns, "dns 10.96.0.10:53 -> 10.0.0.1:53"))
		r.expectFlows(t, "endpoint removed, while the rescan after the start is due later", toA, toC)
		time.Sleep(rescanDelay)
		r.expectFlows(t, "rescan after the start", toA)
		// A datagram was in a queue to user space until now.
		r.table.setFlows(toA, toB)
		time.Sleep(rescanDelay - time.Nanosecond)
		r.expectFlows(t, "just before the rescan", toA, toB)
		time.Sleep(time.Nanosecond)
		r.expectFlows(t, "rescan after the endpoint was removed", toA)

		r.table.setFlows(toA)
		scans := len(r.scans)
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(r.scans) != scans {
			t.Error("scan without a change")
		}
		r.OnCommit(applyCommit("dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.4:53"))
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(r.scans) != scans {
			t.Error("scan although no entry can be stale")
		}
		if r.log.Len() > 0 {
			t.Errorf("logged:\n%s", r.log)
		}
	})
}

// TestChangesDuringScan checks that changes during a scan share the next scan, which uses the
// latest state.
func TestChangesDuringScan(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		var before, after []string
		for i := range 10 {
			before = append(before, "", fmt.Sprintf("s%d 10.96.0.%d:53 -> 10.0.0.1:53 10.0.0.2:53", i, i))
			after = append(after, before[2*i+1], fmt.Sprintf("s%d 10.96.0.%d:53 -> 10.0.0.1:53", i, i))
		}
		r.OnCommit(replaceCommit(before...))
		time.Sleep(time.Minute)
		synctest.Wait()
		r.table.remaining()

		release := make(chan struct{})
		r.table.onNextDump(func() { <-release })
		r.table.setFlows("10.96.0.0:53 10.0.0.2:53", "10.96.0.9:53 10.0.0.2:53", "10.96.0.1:53 10.0.0.2:53", "10.96.0.2:53 10.0.0.2:53")
		r.OnCommit(applyCommit(after[:2]...))
		synctest.Wait()
		for i := 1; i < 10; i++ {
			r.OnCommit(applyCommit(after[2*i : 2*i+2]...))
		}
		// The endpoint and the flow to it are back.
		r.OnCommit(applyCommit(after[2*9+1], before[2*9+1]))
		// A Service is deleted after its endpoint.
		r.OnCommit(applyCommit(after[2*2+1], ""))
		r.table.mu.Lock()
		if len(r.table.dumps) != 1 {
			t.Errorf("%d dumps during the first scan, want 1", len(r.table.dumps))
		}
		r.table.mu.Unlock()
		close(release)
		synctest.Wait()
		r.table.mu.Lock()
		if len(r.table.dumps) != 2 {
			t.Errorf("%d dumps %v, want 2", len(r.table.dumps), r.table.dumps)
		}
		r.table.mu.Unlock()
		r.expectFlows(t, "after both scans", "10.96.0.9:53 10.0.0.2:53")
	})
}

// TestScanRate checks that constant changes do not occupy a processor, and that a single
// change is not delayed.
func TestScanRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		const both, one = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "dns 10.96.0.10:53 -> 10.0.0.1:53"
		r.OnCommit(replaceCommit("", both))
		time.Sleep(time.Hour)
		r.table.remaining()
		begin := time.Now()
		for time.Since(begin) < 790*time.Millisecond {
			r.table.onNextDump(func() { time.Sleep(10 * time.Millisecond) })
			r.OnCommit(applyCommit(both, one))
			r.OnCommit(applyCommit(one, both))
			time.Sleep(time.Millisecond)
		}
		r.table.mu.Lock()
		if n := len(r.table.dumps); n != 16 {
			t.Errorf("%d scans of 10 ms in 790 ms, want 16", n)
		}
		r.table.mu.Unlock()

		time.Sleep(time.Hour)
		r.table.setFlows("10.96.0.10:53 10.0.0.2:53")
		r.OnCommit(applyCommit(both, one))
		r.expectFlows(t, "immediately")
	})
}

// TestEndpointReturnsDuringScan checks that a scan uses the latest state, even if it changes
// during the dump.
func TestEndpointReturnsDuringScan(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		const both, one = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "dns 10.96.0.10:53 -> 10.0.0.1:53"
		r.OnCommit(replaceCommit("", both))
		time.Sleep(time.Minute)
		r.table.setFlows("10.96.0.10:53 10.0.0.2:53")
		r.table.onNextDump(func() { r.OnCommit(applyCommit(one, both)) })
		r.OnCommit(applyCommit(both, one))
		r.expectFlows(t, "endpoint added again", "10.96.0.10:53 10.0.0.2:53")
	})
}

// TestKernelIgnoresFilters checks that one dump per family suffices if the kernel ignores
// filters.
func TestKernelIgnoresFilters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		r.table.ignoresFilters = true
		r.table.setFlows("10.96.0.10:53 10.0.0.9:53", "10.96.0.11:54 10.0.0.9:53", "10.96.0.12:55 10.0.0.9:53", "[fd00:96::10]:53 [fd01::9]:53")
		r.OnCommit(replaceCommit(
			"", "a 10.96.0.10:53 -> 10.0.0.1:53", "", "b 10.96.0.11:54 -> 10.0.0.1:53", "", "c [fd00:96::10]:53 -> [fd01::1]:53",
		))
		synctest.Wait()
		r.table.mu.Lock()
		if n := len(r.table.dumps); n != 2 {
			t.Errorf("%d dumps, want one per family", n)
		}
		r.table.mu.Unlock()
		r.expectFlows(t, "all", "10.96.0.12:55 10.0.0.9:53")
	})
}

// TestScanFailures checks that an error is logged once, that no candidates are lost, and that
// they are scanned when the kernel allows it again.
func TestScanFailures(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		const dns, other = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "other 10.96.0.11:53 -> 10.0.0.1:53"
		r.table.err = explain(unix.EPERM)
		r.OnCommit(replaceCommit("", dns, "", other))
		r.table.setFlows("10.96.0.10:53 10.0.0.2:53", "10.96.0.11:53 10.0.0.1:53", "10.96.0.11:53 10.96.0.11:53")
		r.OnCommit(applyCommit(dns, ""))
		r.OnCommit(applyCommit(other, ""))
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := strings.Count(r.log.String(), "\n"); n != 1 || !strings.Contains(r.log.String(), "CAP_NET_ADMIN") ||
			!strings.Contains(r.log.String(), "level=WARN") {
			t.Errorf("logged:\n%swant one warning that names the capability", r.log)
		}
		if n := r.table.opens; n < 10 || n > 30 {
			t.Errorf("%d attempts in 10 minutes, want about one per minute", n)
		}
		for _, result := range r.scans {
			if result.Err == nil {
				t.Errorf("scan %+v: want an error", result)
			}
		}
		r.log.Reset()
		r.table.mu.Lock()
		r.table.err = nil
		r.table.mu.Unlock()
		time.Sleep(time.Minute + rescanDelay)
		r.expectFlows(t, "after the error", "10.96.0.11:53 10.96.0.11:53")
		if n := strings.Count(r.log.String(), "\n"); n != 1 || !strings.Contains(r.log.String(), "works again") {
			t.Errorf("logged:\n%swant one line", r.log)
		}
	})
}

// TestBusyEntries checks that an entry that cannot be deleted does not delay the deletion of
// others.
func TestBusyEntries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		const dns, other = "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53", "other 10.96.0.11:53 -> 10.0.0.1:53"
		r.OnCommit(replaceCommit("", dns, "", other))
		r.table.setFlows("10.96.0.10:53 10.0.0.1:53", "10.96.0.10:53 10.0.0.2:53", "10.96.0.11:53 10.0.0.1:53")
		r.table.busyEndpoint = netip.MustParseAddrPort("10.0.0.2:53")
		r.OnCommit(applyCommit(dns, "dns 10.96.0.10:53 ->"))
		r.expectFlows(t, "one entry is busy", "10.96.0.10:53 10.0.0.2:53", "10.96.0.11:53 10.0.0.1:53")
		r.OnCommit(applyCommit(other, ""))
		r.expectFlows(t, "another Service, while one entry is busy", "10.96.0.10:53 10.0.0.2:53")
		r.table.mu.Lock()
		r.table.busyEndpoint = netip.AddrPort{}
		r.table.mu.Unlock()
		time.Sleep(retryMax)
		r.expectFlows(t, "no entry is busy")
	})
}

// TestServingChangeIsCommitted checks that a change of Service.Serving is committed without a
// write of the dataplane.
func TestServingChangeIsCommitted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dp := fake.New(fake.Options{Strict: true})
		var commits []sync.Commit
		s := sync.New(dp, sync.Options{OnCommit: func(c sync.Commit) { commits = append(commits, c) }})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		update := func(svc *dataplane.Service) {
			s.Update(map[dataplane.Key]*dataplane.Service{svc.Key: svc})
			synctest.Wait()
		}
		s.FinishInitialList()
		update(service("dns 10.96.0.10:53 -> 10.0.0.1:53 (10.0.0.2:53)"))
		writes := dp.Counts().Writes
		update(service("dns 10.96.0.10:53 -> 10.0.0.1:53"))
		update(service("dns 10.96.0.10:53 -> 10.0.0.1:53"))
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		last := commits[len(commits)-1]
		if len(last.Changes) != 1 || len(last.Changes[0].Old.Serving) != 1 || len(last.Changes[0].New.Serving) != 0 || last.Op != sync.OpApply {
			t.Errorf("last commit %+v", last)
		}
		if n := dp.Counts(); n.Writes != writes || n.Applies > 2 {
			t.Errorf("%+v, want %d writes and no Apply without changes", n, writes)
		}
	})
}

// TestUntranslatedAttempts checks that a Replace deletes the untranslated TCP connection
// attempts to Services, and nothing else of TCP, immediately and after rescanDelay.
func TestUntranslatedAttempts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		r.SetNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
		const (
			lost     = "10.96.0.10:80 10.96.0.10:80"
			lostNode = "192.0.2.1:30080 192.0.2.1:30080"
			lostIPv6 = "[fd00:96::10]:80 [fd00:96::10]:80"
			deleted  = "10.96.0.11:80 10.96.0.11:80"
		)
		kept := []string{"10.96.0.10:80 10.0.0.9:80", "192.0.2.2:30080 192.0.2.2:30080", "10.96.0.10:81 10.96.0.10:81"}
		replied := unrepliedFlow(lost)
		replied.replied = true
		set := func(texts ...string) {
			r.table.mu.Lock()
			defer r.table.mu.Unlock()
			r.table.flows = []flow{replied}
			for _, text := range texts {
				r.table.flows = append(r.table.flows, unrepliedFlow(text))
			}
		}
		want := slices.Concat([]string{lost}, kept) // the first one has a reply
		change := func(before, after string) dataplane.Change {
			return dataplane.Change{Old: serviceWithProtocol(dataplane.TCP, before), New: serviceWithProtocol(dataplane.TCP, after)}
		}
		set(slices.Concat(kept, []string{lost, lostNode, lostIPv6, deleted})...)
		r.OnCommit(sync.Commit{Op: sync.OpReplace, Reason: sync.ReasonStart, Changes: []dataplane.Change{
			change("", "web 10.96.0.10:80 -> 10.0.0.1:80"), change("", "node 0.0.0.0:30080 -> 10.0.0.1:80"),
			change("", "web6 [fd00:96::10]:80 -> [fd01::1]:80"), change("", "gone 10.96.0.11:80 -> 10.0.0.1:80"),
		}})
		r.expectFlows(t, "after the start", want...)
		set(append(slices.Clone(kept), lost)...) // a SYN that was under way
		time.Sleep(rescanDelay)
		r.expectFlows(t, "after rescanDelay", want...)
		r.OnCommit(sync.Commit{Op: sync.OpApply, Reason: sync.ReasonChange, Changes: []dataplane.Change{
			change("gone 10.96.0.11:80 -> 10.0.0.1:80", ""), change("web 10.96.0.10:80 -> 10.0.0.1:80", "web 10.96.0.10:80 -> 10.0.0.2:80"),
		}})
		time.Sleep(time.Minute)
		set(append(slices.Clone(kept), lost, deleted)...)
		time.Sleep(time.Minute)
		r.expectFlows(t, "without a Replace", slices.Concat(want, []string{lost, deleted})...)
		r.OnCommit(sync.Commit{Op: sync.OpReplace, Reason: sync.ReasonDrift})
		r.expectFlows(t, "after repairing drift", slices.Concat(want, []string{deleted})...)
	})
}
