package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nlconn"
	"fairlead.io/fairlead/sync"
)

// dumpAll returns all entries of any protocol and zone, sorted.
func dumpAll(t *testing.T, k *netlinkTable) (texts []string) {
	t.Helper()
	for _, family := range []dataplane.Family{dataplane.IPv4, dataplane.IPv6} {
		request := netlink.Message{Header: netlink.Header{Type: msgGet}, Data: nfHeader(family)}
		if _, err := k.conn.Dump(t.Context(), request, func(data []byte) error {
			var original, reply tuple
			var zone uint16
			for typ, value := range nlconn.Attributes(data[4:]) {
				switch typ {
				case ctaTupleOrig:
					original = parseTuple(value)
				case ctaTupleReply:
					reply = parseTuple(value)
				case ctaZone:
					zone = uint16(value[0])<<8 | uint16(value[1])
				}
			}
			texts = append(texts, fmt.Sprintf("%d %d %s %s", original.protocol, zone, original.destination, reply.source))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(texts)
	return texts
}

func (m testEntry) text() string {
	protocol := m.protocol
	if protocol == 0 {
		protocol = unix.IPPROTO_UDP
	}
	return fmt.Sprintf("%d %d %s %s", protocol, m.zone, m.destination, m.endpoint)
}

// TestCleanerWithKernel checks which entries remain in the kernel after the start and after a
// change.
func TestCleanerWithKernel(t *testing.T) {
	t.Parallel()
	ns := newNamespace(t)
	k := openTable(t, ns)
	deleted := make(chan ScanResult, 100)
	c := New(Options{NetNS: ns.Fd(), OnScan: func(l ScanResult) { deleted <- l }})
	c.SetNode(dataplane.Node{NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}})

	withZone := func(protocol byte, zone uint16, m testEntry) testEntry {
		m.protocol, m.zone = protocol, zone
		return m
	}
	kept := []testEntry{
		newTestEntry("10.1.0.1:1", "10.96.0.10:53", "10.0.0.1:53"),
		newTestEntry("10.1.0.1:2", "192.0.2.1:30053", "10.0.0.1:53"),
		newTestEntry("[fd01::9]:3", "[fd00:96::10]:53", "[fd01::1]:53"),
		// Flows of other programs.
		newTestEntry("10.1.0.1:4", "8.8.8.8:53", ""),
		newTestEntry("10.1.0.1:5", "10.96.0.11:53", "10.0.0.9:53"),
		newTestEntry("10.1.0.1:6", "192.0.2.2:30053", "10.0.0.9:53"),
		newTestEntry("[fd01::9]:7", "[fd00:96::11]:53", "[fd01::9]:53"),
		// Other protocols, and another zone.
		withZone(unix.IPPROTO_TCP, 0, newTestEntry("10.1.0.1:8", "10.96.0.10:53", "10.0.0.9:53")),
		withZone(unix.IPPROTO_SCTP, 0, newTestEntry("10.1.0.1:9", "10.96.0.10:53", "10.0.0.9:53")),
		withZone(0, 7, newTestEntry("10.1.0.1:10", "10.96.0.10:53", "10.0.0.9:53")),
	}
	removed := []testEntry{
		newTestEntry("10.1.0.1:11", "10.96.0.10:53", "10.0.0.2:53"),
		newTestEntry("10.1.0.1:12", "192.0.2.1:30053", "10.0.0.2:53"),
		newTestEntry("[fd01::9]:13", "[fd00:96::10]:53", "[fd01::2]:53"),
	}
	stale := []testEntry{
		newTestEntry("10.1.0.1:14", "10.96.0.10:53", "10.0.0.9:53"),
		newTestEntry("10.1.0.1:15", "10.96.0.10:53", ""),
		newTestEntry("10.1.0.1:16", "192.0.2.1:30053", "10.0.0.9:53"),
		newTestEntry("[fd01::9]:17", "[fd00:96::10]:53", "[fd01::9]:53"),
		newTestEntry("[fd01::9]:18", "[2001:db8::1]:30053", ""),
	}
	want := func(when string, expected ...[]testEntry) {
		t.Helper()
		var texts []string
		for _, m := range slices.Concat(expected...) {
			texts = append(texts, m.text())
		}
		slices.Sort(texts)
		if diff := cmp.Diff(texts, dumpAll(t, k)); diff != "" {
			t.Errorf("%s: protocol, zone, destination, endpoint (-want +got)\n%s", when, diff)
		}
	}
	wait := func(n int) {
		t.Helper()
		for n > 0 {
			select {
			case result := <-deleted:
				if result.Err != nil {
					t.Fatal(result.Err)
				}
				n -= result.Deleted
			case <-time.After(10 * time.Second):
				t.Fatalf("%d deletions missing", n)
			}
		}
	}
	insertEntries(t, k, slices.Concat(kept, removed, stale)...)
	want("before", kept, removed, stale)

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	const (
		dns   = "dns 10.96.0.10:53 -> 10.0.0.1:53"
		node  = "node 0.0.0.0:30053 -> 10.0.0.1:53"
		dns6  = "dns [fd00:96::10]:53 -> [fd01::1]:53"
		node6 = "node [::]:30053 -> [fd01::1]:53"
		two   = " 10.0.0.2:53"
		two6  = " [fd01::2]:53"
	)
	c.OnCommit(replaceCommit("", dns+two, "", node+two, "", dns6+two6, "", node6+two6))
	wait(len(stale))
	want("after the start", kept, removed)
	c.OnCommit(applyCommit(dns+two, dns, node+two, node, dns6+two6, dns6, node6+two6, node6))
	wait(len(removed))
	want("after removing an endpoint", kept)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestCleanerWithSCTP checks that the Cleaner deletes the stale SCTP entries of several frontends. The
// kernel's filter ignores SCTP ports: a dump for one frontend contains entries of other ports.
func TestCleanerWithSCTP(t *testing.T) {
	t.Parallel()
	sctp := func(client, destination, endpoint string) testEntry {
		m := newTestEntry(client, destination, endpoint)
		m.protocol, m.replied = unix.IPPROTO_SCTP, true
		return m
	}
	for _, tt := range []struct {
		name           string
		frontends      []string
		stale, serving string // endpoints
		kept           []testEntry
	}{
		{
			name: "IPv4", frontends: []string{"10.96.0.10:36412", "10.96.0.11:36422"}, stale: "10.0.0.2:36412", serving: "10.0.0.1:36412",
			kept: []testEntry{sctp("10.1.0.1:1", "10.96.0.10:2905", "10.0.0.2:36412"), sctp("10.1.0.1:2", "10.96.0.11:2905", "10.0.0.2:36412")},
		},
		{
			name: "IPv6", frontends: []string{"[fd00:96::10]:36412", "[fd00:96::11]:36422"}, stale: "[fd01::2]:36412", serving: "[fd01::1]:36412",
			kept: []testEntry{sctp("[fd01::9]:1", "[fd00:96::10]:2905", "[fd01::2]:36412"), sctp("[fd01::9]:2", "[fd00:96::12]:36412", "[fd01::2]:36412")},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			k := openTable(t, ns)
			scans := make(chan ScanResult, 100)
			c := New(Options{NetNS: ns.Fd(), OnScan: func(l ScanResult) { scans <- l }})
			done := make(chan error)
			ctx, cancel := context.WithCancel(t.Context())
			go func() { done <- c.Run(ctx) }()
			defer func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}()
			commit := sync.Commit{Op: sync.OpApply}
			var want []string
			insertEntries(t, k, tt.kept...)
			for _, m := range tt.kept {
				want = append(want, m.text())
			}
			client := tt.kept[0].client
			for i, frontend := range tt.frontends {
				commit.Changes = append(commit.Changes, dataplane.Change{
					Old: serviceWithProtocol(dataplane.SCTP, fmt.Sprintf("s%d %s -> %s %s", i, frontend, tt.stale, tt.serving)),
					New: serviceWithProtocol(dataplane.SCTP, fmt.Sprintf("s%d %s -> %s", i, frontend, tt.serving)),
				})
				at := func(port int) string { return netip.AddrPortFrom(client.Addr(), uint16(port)).String() }
				serving := sctp(at(20+i), frontend, tt.serving)
				insertEntries(t, k, sctp(at(10+i), frontend, tt.stale), serving)
				want = append(want, serving.text())
			}
			slices.Sort(want)
			c.OnCommit(commit)
			select {
			case result := <-scans:
				if result.Err != nil || result.Deleted != len(tt.frontends) {
					t.Errorf("deleted %d, error %v; want %d", result.Deleted, result.Err, len(tt.frontends))
				}
			case <-time.After(10 * time.Second):
				t.Fatal("no scan")
			}
			if diff := cmp.Diff(want, dumpAll(t, k)); diff != "" {
				t.Errorf("protocol, zone, destination, endpoint (-want +got)\n%s", diff)
			}
		})
	}
}

// TestExplain checks that errors name the missing kernel feature or privilege.
func TestExplain(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		errno error
		want  error
	}{{unix.EINVAL, ErrUnavailable}, {unix.EPROTONOSUPPORT, ErrUnavailable}, {unix.EPERM, unix.EPERM}, {unix.ENOBUFS, unix.ENOBUFS}} {
		if err := explain(&netlink.OpError{Op: "receive", Err: tt.errno}); !errors.Is(err, tt.want) || !errors.Is(err, tt.errno) {
			t.Errorf("%v: error %v, want it to wrap %v", tt.errno, err, tt.want)
		}
	}
}
