package conntrack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/internal/nettest"
)

// TestFlowEvents checks that new UDP and SCTP entries of the default zone are received, and no others.
func TestFlowEvents(t *testing.T) {
	t.Parallel()
	ns := newNamespace(t)
	k := openTable(t, ns)
	events, err := k.listen()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = events.close() }()
	receive := func() (got []string) {
		t.Helper()
		if err := events.receive(func(f flow) { got = append(got, fmt.Sprintf("%d %s %s", f.protocol, f.destination, f.endpoint)) }); err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := receive(); len(got) > 0 {
		t.Errorf("received %q before any entry", got)
	}
	tcp, sctp, zoned := newTestEntry("10.1.0.1:1", "10.96.0.10:80", "10.0.0.1:80"), newTestEntry("10.1.0.1:2", "10.96.0.10:36412", "10.0.0.1:36412"),
		newTestEntry("10.1.0.1:3", "10.96.0.10:53", "10.0.0.1:53")
	tcp.protocol, sctp.protocol, zoned.zone = unix.IPPROTO_TCP, unix.IPPROTO_SCTP, 7
	insertEntries(t, k, tcp, newTestEntry("10.1.0.1:4", "10.96.0.10:53", "10.0.0.1:5353"), zoned, newTestEntry("10.1.0.1:5", "8.8.8.8:53", ""),
		newTestEntry("[fd00::1]:4", "[fd00:96::10]:53", "[fd01::1]:5353"), sctp)
	want := []string{"17 10.96.0.10:53 10.0.0.1:5353", "17 8.8.8.8:53 8.8.8.8:53", "17 [fd00:96::10]:53 [fd01::1]:5353", "132 10.96.0.10:36412 10.0.0.1:36412"}
	if diff := cmp.Diff(want, receive()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got := receive(); len(got) > 0 {
		t.Errorf("received %q twice", got)
	}
}

// TestFlowEventsLost checks that receive reports a full buffer.
func TestFlowEventsLost(t *testing.T) {
	t.Parallel()
	ns := newNamespace(t)
	k := openTable(t, ns)
	events, err := openFlowEvents(ns.Fd(), 8<<10)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = events.close() }()
	for i := range 1000 {
		insertEntries(t, k, newTestEntry(fmt.Sprintf("10.1.%d.%d:53", i/200, i%200), "10.96.0.10:53", ""))
	}
	if err := events.receive(func(flow) {}); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("error %v, want %v", err, unix.ENOBUFS)
	}
}

// TestFlowEventsOff checks that a follower does not rely on a kernel that makes no events.
func TestFlowEventsOff(t *testing.T) {
	t.Parallel()
	node := nettest.NewT(t, nettest.Options{}).Node
	set := func(value string) {
		t.Helper()
		if err := node.Do(func() error {
			return os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_events", []byte(value), 0o600)
		}); err != nil {
			t.Fatal(err)
		}
	}
	set("0")
	if _, err := openFlowEvents(node.Fd(), flowEventsBuffer); !errors.Is(err, ErrEventsOff) {
		t.Errorf("listen: error %v, want %v", err, ErrEventsOff)
	}
	set("2")
	events, err := openFlowEvents(node.Fd(), flowEventsBuffer)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = events.close() }()
	if err := events.receive(func(flow) {}); err != nil {
		t.Error(err)
	}
	set("0")
	if err := events.receive(func(flow) {}); !errors.Is(err, ErrEventsOff) {
		t.Errorf("turned off later: error %v, want %v", err, ErrEventsOff)
	}
}

// TestFollowWithKernel checks with the kernel's events that frequent changes scan only for entries that
// exist, and delete those.
func TestFollowWithKernel(t *testing.T) {
	t.Parallel()
	ns := newNamespace(t)
	k := openTable(t, ns)
	scans := make(chan ScanResult, 1000)
	c := New(Options{NetNS: ns.Fd(), OnScan: func(l ScanResult) { scans <- l }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	const dns, dns2 = "dns 10.96.0.10:53 -> 10.0.0.1:53", "dns 10.96.0.10:53 -> 10.0.0.1:53 10.0.0.2:53"
	const idle, idle2 = "idle 10.96.9.9:9 -> 10.0.9.1:9", "idle 10.96.9.9:9 -> 10.0.9.1:9 10.0.9.2:9"
	old := newTestEntry("10.1.0.1:1", "10.96.0.10:53", "10.0.0.2:53")
	kept := newTestEntry("10.1.0.1:2", "10.96.0.10:53", "10.0.0.1:53")
	insertEntries(t, k, old, kept)
	c.OnCommit(replaceCommit("", dns2, "", idle2))
	for range 25 {
		c.OnCommit(applyCommit(idle2, idle, idle, idle2))
		time.Sleep(100 * time.Millisecond)
	}
	time.Sleep(2 * rescanDelay)
	drain := func() (n int) {
		for {
			select {
			case s := <-scans:
				if s.Err != nil {
					t.Fatal(s.Err)
				}
				n++
			default:
				return n
			}
		}
	}
	for begin := time.Now(); ; {
		drain()
		c.OnCommit(applyCommit(idle2, idle, idle, idle2))
		time.Sleep(300 * time.Millisecond)
		if drain() == 0 {
			break
		}
		if time.Since(begin) > time.Minute {
			t.Fatal("each change of a Service without flows causes a scan")
		}
	}
	begin := time.Now()
	for range 20 {
		c.OnCommit(applyCommit(idle2, idle, idle, idle2))
		time.Sleep(50 * time.Millisecond)
	}
	time.Sleep(2 * rescanDelay)
	if n := drain(); n > 1+int(time.Since(begin)/verifyDelay) {
		t.Errorf("%d scans for 20 changes of a Service without flows in %s, want one every %s", n, time.Since(begin), verifyDelay)
	}
	// The follower knows this flow from its dump, and the next one from an event.
	for _, m := range []testEntry{old, newTestEntry("10.1.0.1:3", "10.96.0.10:53", "10.0.0.2:53")} {
		if m.client != old.client {
			c.OnCommit(applyCommit(dns, dns2))
			insertEntries(t, k, m)
		}
		c.OnCommit(applyCommit(dns2, dns))
		deadline := time.Now().Add(verifyDelay / 2)
		for !slices.Equal(dumpAll(t, k), []string{kept.text()}) {
			if time.Now().After(deadline) {
				t.Fatalf("entries %v, want the one to the remaining endpoint", dumpAll(t, k))
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}
