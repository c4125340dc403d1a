package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"fairlead.io/fairlead/dataplane"
	"fairlead.io/fairlead/internal/nettest"
	"fairlead.io/fairlead/internal/nlconn"
)

func newNamespace(tb testing.TB) *nettest.Namespace {
	tb.Helper()
	ns := nettest.NamespaceT(tb)
	return ns
}

func openTable(tb testing.TB, ns *nettest.Namespace) *netlinkTable {
	tb.Helper()
	t, err := openNetlinkTable(ns.Fd())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := t.close(); err != nil {
			tb.Error(err)
		}
	})
	return t.(*netlinkTable)
}

// testEntry is an entry to insert.
type testEntry struct {
	protocol                      byte // 0 means UDP
	client, destination, endpoint netip.AddrPort
	zone                          uint16
	replied                       bool
}

// newTestEntry returns an entry. An empty endpoint means that it is not translated.
func newTestEntry(client, destination, endpoint string) testEntry {
	m := testEntry{client: netip.MustParseAddrPort(client), destination: netip.MustParseAddrPort(destination)}
	m.endpoint = m.destination
	if endpoint != "" {
		m.endpoint = netip.MustParseAddrPort(endpoint)
	}
	return m
}

func (m testEntry) message(tb testing.TB) netlink.Message {
	tb.Helper()
	protocol := m.protocol
	if protocol == 0 {
		protocol = unix.IPPROTO_UDP
	}
	direction := func(from, to netip.AddrPort) func(*netlink.AttributeEncoder) error {
		source, destination := uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
		if to.Addr().Is6() {
			source, destination = ctaIPv6Src, ctaIPv6Dst
		}
		return func(e *netlink.AttributeEncoder) error {
			e.Nested(ctaTupleIP, func(e *netlink.AttributeEncoder) error {
				e.Bytes(source, from.Addr().AsSlice())
				e.Bytes(destination, to.Addr().AsSlice())
				return nil
			})
			e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
				e.Uint8(ctaProtoNum, protocol)
				e.Bytes(ctaProtoSrcPort, binary.BigEndian.AppendUint16(nil, from.Port()))
				e.Bytes(ctaProtoDstPort, binary.BigEndian.AppendUint16(nil, to.Port()))
				return nil
			})
			return nil
		}
	}
	const (
		msgNew       = unix.NFNL_SUBSYS_CTNETLINK << 8
		ctaProtoInfo = 4
		ctaTimeout   = 7
	)
	data, err := nlconn.Encode(nfHeader(dataplane.FamilyOf(m.client.Addr())), func(e *netlink.AttributeEncoder) {
		e.Nested(ctaTupleOrig, direction(m.client, m.destination))
		e.Nested(ctaTupleReply, direction(m.endpoint, m.client))
		e.Bytes(ctaTimeout, binary.BigEndian.AppendUint32(nil, 600))
		if protocol == unix.IPPROTO_TCP {
			// CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE: established
			e.Nested(ctaProtoInfo, func(e *netlink.AttributeEncoder) error {
				e.Nested(1, func(e *netlink.AttributeEncoder) error { e.Uint8(1, 3); return nil })
				return nil
			})
		}
		if m.replied {
			const confirmed = 1 << 3 // IPS_CONFIRMED
			e.Bytes(ctaStatus, binary.BigEndian.AppendUint32(nil, statusSeenReply|confirmed))
		}
		if m.zone != 0 {
			e.Bytes(ctaZone, binary.BigEndian.AppendUint16(nil, m.zone))
		}
	})
	if err != nil {
		tb.Fatal(err)
	}
	return netlink.Message{Header: netlink.Header{Type: msgNew, Flags: netlink.Create | netlink.Excl}, Data: data}
}

// insertEntries inserts entries into the kernel's table.
func insertEntries(tb testing.TB, k *netlinkTable, entries ...testEntry) {
	tb.Helper()
	var requests []netlink.Message
	for _, m := range entries {
		requests = append(requests, m.message(tb))
	}
	answers, err := k.conn.Batch(tb.Context(), requests)
	if err != nil {
		tb.Fatal(err)
	}
	for i, answer := range answers {
		if answer != nil {
			tb.Fatalf("insert %+v: %v", entries[i], answer)
		}
	}
}

// dumpFlows returns the flows that a query selects, sorted.
func dumpFlows(tb testing.TB, k *netlinkTable, q query) (flows []string, narrowed bool) {
	tb.Helper()
	_, narrowed, err := k.dump(tb.Context(), q, func(f flow) bool {
		flows = append(flows, fmt.Sprintf("%s %s", f.destination, f.endpoint))
		return false
	})
	if err != nil {
		tb.Fatal(err)
	}
	slices.Sort(flows)
	return flows, narrowed
}

// TestDump checks which entries a query selects.
func TestDump(t *testing.T) {
	t.Parallel()
	k := openTable(t, newNamespace(t))
	tcp, zoned := newTestEntry("10.1.0.1:5", "10.96.0.10:53", "10.0.0.1:53"), newTestEntry("10.1.0.1:6", "10.96.0.10:53", "10.0.0.1:53")
	tcp.protocol, zoned.zone = unix.IPPROTO_TCP, 7
	insertEntries(t, k,
		newTestEntry("10.1.0.1:1", "10.96.0.10:53", "10.0.0.1:5353"),
		newTestEntry("10.1.0.1:2", "10.96.0.10:54", "10.0.0.1:5353"),
		newTestEntry("10.1.0.1:3", "10.96.0.11:53", ""),
		newTestEntry("[fd00::1]:4", "[fd00:96::10]:53", "[fd01::1]:5353"),
		tcp, zoned,
	)
	for _, tt := range []struct {
		name string
		q    query
		want []string
	}{
		{"UDP over IPv4", query{family: dataplane.IPv4, protocol: dataplane.UDP}, []string{
			"10.96.0.10:53 10.0.0.1:5353", "10.96.0.10:54 10.0.0.1:5353", "10.96.0.11:53 10.96.0.11:53",
		}},
		{"UDP over IPv6", query{family: dataplane.IPv6, protocol: dataplane.UDP}, []string{"[fd00:96::10]:53 [fd01::1]:5353"}},
		{"port", query{family: dataplane.IPv4, protocol: dataplane.UDP, port: 53}, []string{
			"10.96.0.10:53 10.0.0.1:5353", "10.96.0.11:53 10.96.0.11:53",
		}},
		{"port and address", query{family: dataplane.IPv4, protocol: dataplane.UDP, addr: netip.MustParseAddr("10.96.0.10"), port: 53}, []string{
			"10.96.0.10:53 10.0.0.1:5353",
		}},
		{"IPv6 port", query{family: dataplane.IPv6, protocol: dataplane.UDP, port: 53}, []string{"[fd00:96::10]:53 [fd01::1]:5353"}},
		{"nothing", query{family: dataplane.IPv4, protocol: dataplane.UDP, port: 99}, nil},
	} {
		got, narrowed := dumpFlows(t, k, tt.q)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
		if !narrowed {
			t.Errorf("%s: the kernel does not filter the dump", tt.name)
		}
	}

	// Kernels before 5.8 ignore the filter and return TCP entries too.
	var got []string
	entries, narrowed, err := k.dumpFiltered(t.Context(), query{family: dataplane.IPv4, protocol: dataplane.UDP, port: 54}, nil, func(f flow) bool {
		got = append(got, f.destination.String())
		return f.destination.Port() == 53
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{"10.96.0.10:53", "10.96.0.10:53", "10.96.0.10:54", "10.96.0.11:53"}, got); diff != "" || narrowed || len(entries) != 3 {
		t.Errorf("without a filter: %d entries, narrowed %t, dumped (-want +got)\n%s", len(entries), narrowed, diff)
	}
}

// TestDelete checks that delete deletes exactly the given entries.
func TestDelete(t *testing.T) {
	t.Parallel()
	k := openTable(t, newNamespace(t))
	var all []testEntry
	for i := range 3*nlconn.BatchSize + 1 {
		all = append(all, newTestEntry(fmt.Sprintf("10.1.0.1:%d", 1000+i), "10.96.0.10:53", "10.0.0.1:5353"))
	}
	insertEntries(t, k, all...)
	insertEntries(t, k, newTestEntry("10.1.0.1:1", "10.96.0.11:53", ""))
	q := query{family: dataplane.IPv4, protocol: dataplane.UDP}
	ours := func(f flow) bool { return f.destination.Addr() == netip.MustParseAddr("10.96.0.10") }
	entries, _, err := k.dump(t.Context(), q, ours)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(all) {
		t.Fatalf("%d entries, want %d", len(entries), len(all))
	}

	if n, err := k.delete(t.Context(), entries[:2]); n != 2 || err != nil {
		t.Fatalf("deleted %d, %v", n, err)
	}
	// Two entries no longer exist, and the ID of a third one has changed.
	entries[2].id = []byte{1, 2, 3, 4}
	if n, err := k.delete(t.Context(), entries); n != len(all)-3 || err != nil {
		t.Errorf("deleted %d, %v; want %d", n, err, len(all)-3)
	}
	got, _ := dumpFlows(t, k, q)
	if diff := cmp.Diff([]string{"10.96.0.10:53 10.0.0.1:5353", "10.96.0.11:53 10.96.0.11:53"}, got); diff != "" {
		t.Errorf("remaining (-want +got)\n%s", diff)
	}
}

func TestContextCanceled(t *testing.T) {
	t.Parallel()
	k := openTable(t, newNamespace(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// Another goroutine sets the deadline, so the first dumps may succeed.
	var err error
	for range 1000 {
		if _, _, err = k.dump(ctx, query{family: dataplane.IPv4, protocol: dataplane.UDP}, func(flow) bool { return false }); err != nil {
			break
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("error %v, want os.ErrDeadlineExceeded", err)
	}
}

// FuzzParseEntry checks that the decoder does not panic or accept entries without addresses.
func FuzzParseEntry(f *testing.F) {
	replied := newTestEntry("[fd00::1]:4", "[fd00:96::10]:53", "[fd01::1]:5353")
	replied.replied = true
	for _, m := range []testEntry{newTestEntry("10.1.0.1:1", "10.96.0.10:53", "10.0.0.1:5353"), replied} {
		f.Add(m.message(f).Data[4:])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, ok := parseEntry(b, dataplane.IPv4); ok && (!e.destination.IsValid() || !e.endpoint.IsValid() || len(e.id) != 4) {
			t.Errorf("entry %+v", e)
		}
	})
}
