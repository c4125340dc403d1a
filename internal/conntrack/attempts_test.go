package conntrack

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/sync"
)

// unrepliedFlow parses a TCP flow without a reply, written "destination endpoint".
func unrepliedFlow(text string) flow {
	f := parseAddrPorts(text)
	return flow{protocol: dataplane.TCP, destination: f[0], endpoint: f[1]}
}

// TestConnAttempts checks which connection attempts are stale after changes.
func TestConnAttempts(t *testing.T) {
	t.Parallel()
	const (
		two   = "web 10.96.0.10:80 10.96.0.11:80 -> 10.0.0.1:8080 10.0.0.2:8080"
		one   = "web 10.96.0.10:80 10.96.0.11:80 -> 10.0.0.1:8080"
		other = "web 10.96.0.10:80 10.96.0.11:80 -> 10.0.0.1:8080 10.0.0.3:8080"
		node  = "node 0.0.0.0:30080 -> 10.0.0.1:8080"
	)
	for _, tt := range []struct {
		name    string
		changes []string // before, after
		stale   []string
		kept    []string
	}{
		{
			name: "endpoint removed", changes: []string{two, one},
			stale: []string{"10.96.0.10:80 10.0.0.2:8080", "10.96.0.11:80 10.0.0.2:8080"},
			kept:  []string{"10.96.0.10:80 10.0.0.1:8080", "10.96.0.12:80 10.0.0.2:8080", "10.96.0.10:80 10.96.0.10:80"},
		},
		{name: "endpoint added again", changes: []string{two, one, one, two}, kept: []string{"10.96.0.10:80 10.0.0.2:8080"}},
		{
			name: "endpoint added again, another removed", changes: []string{two, one, one, two, two, "web 10.96.0.10:80 10.96.0.11:80 -> 10.0.0.2:8080"},
			stale: []string{"10.96.0.10:80 10.0.0.1:8080"}, kept: []string{"10.96.0.10:80 10.0.0.2:8080"},
		},
		{
			name: "endpoints removed one after another", changes: []string{two, one, one, other, other, "web 10.96.0.10:80 10.96.0.11:80 -> 10.0.0.3:8080"},
			stale: []string{"10.96.0.10:80 10.0.0.1:8080", "10.96.0.11:80 10.0.0.2:8080"}, kept: []string{"10.96.0.10:80 10.0.0.3:8080"},
		},
		{name: "endpoint added", changes: []string{one, two}, kept: []string{"10.96.0.10:80 10.0.0.1:8080"}},
		{
			name: "Service added", changes: []string{"", one},
			stale: []string{"10.96.0.10:80 10.96.0.10:80"}, kept: []string{"10.96.0.10:80 10.0.0.9:8080"},
		},
		{name: "Service deleted", changes: []string{one, ""}, stale: []string{"10.96.0.10:80 10.0.0.1:8080"}},
		{
			name: "frontend removed", changes: []string{one, "web 10.96.0.10:80 -> 10.0.0.1:8080"},
			stale: []string{"10.96.0.11:80 10.0.0.1:8080"}, kept: []string{"10.96.0.10:80 10.0.0.1:8080"},
		},
		{
			name: "node port at the node's addresses", changes: []string{node, "node 0.0.0.0:30080 -> 10.0.0.2:8080"},
			stale: []string{"192.0.2.1:30080 10.0.0.1:8080", "198.51.100.7:30080 10.0.0.1:8080"}, kept: []string{"192.0.2.2:30080 10.0.0.1:8080"},
		},
	} {
		var a connAttempts
		for i := 0; i < len(tt.changes); i += 2 {
			a.record(dataplane.Change{
				Old: serviceWithProtocol(dataplane.TCP, tt.changes[i]), New: serviceWithProtocol(dataplane.TCP, tt.changes[i+1]),
			})
		}
		index := newServiceIndex()
		index.setNode(dataplane.Node{
			NodePortAddrs:    []netip.Addr{netip.MustParseAddr("192.0.2.1")},
			NodePortNetworks: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")},
		})
		stale := func(f flow) bool {
			nodePort, ok := index.nodePortFrontend(f.frontend())
			return a.isStale(f, nodePort, ok)
		}
		for _, text := range tt.stale {
			f := unrepliedFlow(text)
			if !stale(f) {
				t.Errorf("%s: %s is kept", tt.name, text)
			}
			f.replied = true
			if stale(f) {
				t.Errorf("%s: %s is stale although it has a reply", tt.name, text)
			}
		}
		for _, text := range tt.kept {
			if stale(unrepliedFlow(text)) {
				t.Errorf("%s: %s is stale", tt.name, text)
			}
		}
	}
}

// TestConnAttemptsLimit checks that the number of recorded frontends is limited.
func TestConnAttemptsLimit(t *testing.T) {
	t.Parallel()
	var a connAttempts
	for i := range maxAttempts + 100 {
		old := serviceWithProtocol(dataplane.TCP, fmt.Sprintf("s%d 10.%d.%d.1:80 -> 10.0.0.1:80", i, i>>8, i&0xff))
		a.record(dataplane.Change{Old: old})
	}
	if len(a) != maxAttempts {
		t.Errorf("%d frontends recorded, want %d", len(a), maxAttempts)
	}
}

// TestAttemptScanSchedule checks that TCP entries are scanned a second after the first change,
// and then at most every attemptScanInterval for all changes together.
func TestAttemptScanSchedule(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startCleaner(t)
		change := func(before, after string) {
			r.OnCommit(sync.Commit{Op: sync.OpApply, Changes: []dataplane.Change{
				{Old: serviceWithProtocol(dataplane.TCP, before), New: serviceWithProtocol(dataplane.TCP, after)},
			}})
		}
		set := func(flows ...flow) {
			r.table.mu.Lock()
			defer r.table.mu.Unlock()
			r.table.flows = flows
		}
		const a, b, c = "web 10.96.0.10:80 -> 10.0.0.1:80", "web 10.96.0.10:80 -> 10.0.0.2:80", "web 10.96.0.10:80 -> 10.0.0.3:80"
		toA, toB, toC := "10.96.0.10:80 10.0.0.1:80", "10.96.0.10:80 10.0.0.2:80", "10.96.0.10:80 10.0.0.3:80"
		answered := unrepliedFlow(toA)
		answered.replied = true
		set(unrepliedFlow(toA), unrepliedFlow(toB), answered)
		change(a, b)
		r.expectFlows(t, "handshake in flight", toA, toB, toA)
		time.Sleep(attemptScanDelay)
		r.expectFlows(t, "after attemptScanDelay", toB, toA)
		change(b, c)
		set(unrepliedFlow(toB), unrepliedFlow(toC))
		time.Sleep(attemptScanInterval - time.Nanosecond)
		r.expectFlows(t, "before attemptScanInterval", toB, toC)
		change(c, a)
		change(a, b)
		time.Sleep(time.Nanosecond)
		r.expectFlows(t, "all changes since, except the endpoint added again", toB)
		r.table.mu.Lock()
		if len(r.table.dumps) != 0 {
			t.Errorf("unexpected dumps %v", r.table.dumps)
		}
		r.table.mu.Unlock()
		scans := len(r.scans)
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(r.scans) != scans {
			t.Error("scan without a change")
		}
	})
}

// TestUnrepliedFilter checks that the kernel can select entries without a reply.
func TestUnrepliedFilter(t *testing.T) {
	t.Parallel()
	k := openTable(t, newNamespace(t))
	attempt, answered := newTestEntry("10.1.0.1:1", "10.96.0.10:80", "10.0.0.1:80"), newTestEntry("10.1.0.1:2", "10.96.0.10:80", "10.0.0.2:80")
	attempt.protocol, answered.protocol = byte(dataplane.TCP), byte(dataplane.TCP)
	answered.replied = true
	insertEntries(t, k, attempt, answered, newTestEntry("10.1.0.1:3", "10.96.0.10:80", "10.0.0.3:80"))
	got, narrowed := dumpFlows(t, k, query{family: dataplane.IPv4, protocol: dataplane.TCP, unreplied: true})
	if diff := cmp.Diff([]string{"10.96.0.10:80 10.0.0.1:80"}, got); diff != "" || !narrowed {
		t.Errorf("narrowed %t, dumped (-want +got)\n%s", narrowed, diff)
	}
}
